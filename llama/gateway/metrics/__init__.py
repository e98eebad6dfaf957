"""What `/metrics` tells Prometheus about a gateway.

`recorder.py` counts and times what happens, `state.py` reads what is the case now, and `usage.py` shows what
the database has counted.
"""
