"""The default engine: continuous batching on one device, with the layers of a transformers model."""
