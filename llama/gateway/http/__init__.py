"""What happens to a request before and beside its route: paths, keys, limits, addresses and disconnects."""
