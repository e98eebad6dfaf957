"""The `Engine` protocol on vLLM, for more than one GPU or machine."""
