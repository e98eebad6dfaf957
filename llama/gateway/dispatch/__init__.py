"""The queue, the servers behind it, and how predictions are given to them."""
