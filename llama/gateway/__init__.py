"""Replicate's and OpenAI's HTTP APIs in front of one or several of this project's servers."""
