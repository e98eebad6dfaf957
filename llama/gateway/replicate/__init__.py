"""Replicate's API: how requests are read, and how predictions and events are written."""
