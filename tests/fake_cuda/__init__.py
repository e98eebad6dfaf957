"""Runs the engine's GPU code on fake CUDA tensors, which have shapes, dtypes and devices but no memory.

Nothing is computed, so no GPU is needed. This shows tensors on the wrong device, shapes and dtypes that do not
agree, waits for the host, kernel launches, and memory. It cannot show wrong numbers, durations, or limits of
the kernels that torch's shape functions do not check.
"""
