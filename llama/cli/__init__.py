"""The command line: `python -m llama`."""
