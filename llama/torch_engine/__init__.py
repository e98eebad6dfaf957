"""The default engine: continuous batching on one device, with a model loaded by transformers."""
