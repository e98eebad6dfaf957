"""The folder of weights: downloaded, verified and found."""
