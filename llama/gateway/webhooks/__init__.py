"""Webhooks: when they are sent, how they are signed, and which addresses they may reach."""
