"""Llama 2 Chat as a Replicate model: the code behind `predict.py`.

Importing this package is quick: torch and transformers are loaded when a model is.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository, where `predict.py` is."""
