"""The metrics that `/metrics` shows to Prometheus.

`recorder.py` counts and times events, `state.py` reads the current state, and `usage.py` shows the counts of
the database.
"""
