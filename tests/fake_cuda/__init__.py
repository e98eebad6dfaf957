"""Runs the engine's GPU code on fake CUDA tensors, which have shapes, dtypes and devices but no memory.

Nothing is computed, so no GPU is needed. This finds tensors on the wrong device, shapes and dtypes that do not
agree, and calls that make the host wait for the GPU. It counts kernel launches and memory. It cannot find wrong
numbers, measure durations, or check limits of the kernels that torch's shape functions do not check.
"""
