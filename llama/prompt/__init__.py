"""Turns a caller's inputs into a validated request with a dialogue or a custom-formatted prompt."""
