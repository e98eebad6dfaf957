"""The database: predictions, keys and counts."""
