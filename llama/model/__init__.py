"""From a folder to a model in memory: configuration, precision, tensors and layers."""
