"""The folder of weights: download it, verify it, and find it."""
