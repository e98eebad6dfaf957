"""Cog's server: its schema, its cancel signal, and how to start it without Docker."""
