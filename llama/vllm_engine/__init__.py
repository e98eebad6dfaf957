"""The `Engine` protocol on vLLM, for several GPUs or machines."""
