"""Serves Llama 2 Chat as a Replicate model: the code behind `predict.py`.

Importing this package is fast: a public name is imported when it is first used, and torch and transformers
are imported when a model is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.errors import LlamaError
    from llama.generation import Llama, Prediction
    from llama.load import load_llama
    from llama.settings import ROOT, Settings

__all__ = ["ROOT", "Llama", "LlamaError", "Prediction", "Settings", "__version__", "load_llama"]

__version__ = "0.2.0"

_MODULES = {
    "ROOT": "llama.settings",
    "Llama": "llama.generation",
    "LlamaError": "llama.errors",
    "Prediction": "llama.generation",
    "Settings": "llama.settings",
    "load_llama": "llama.load",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
