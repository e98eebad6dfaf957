"""What a caller's inputs mean: a checked request with a dialogue or a prompt of its own format."""
