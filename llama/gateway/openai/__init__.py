"""OpenAI's API: how requests become inputs, and how predictions become responses."""
