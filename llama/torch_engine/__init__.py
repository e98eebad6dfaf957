"""The default engine: continuous batching on one device over a model that transformers loads."""
