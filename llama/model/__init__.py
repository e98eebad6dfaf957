"""Loads a checkpoint folder as a model: configuration, precision, tensors and layers."""
