"""Checks the settings before a model is loaded, and loads it in this process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from llama.settings import Settings

if TYPE_CHECKING:
    from llama.generation import Llama


def settings_to_load() -> Settings:
    """Read the settings and, unless setup will download the weights, check that their folder exists.

    The embedded model is converted here at its first use, so that the user sees why the start takes longer.
    """
    from llama.weights.folder import weights_folder

    settings = Settings.from_environment()
    if not settings.pull:
        weights_folder(settings)
    return settings


def load_with_notice() -> Llama:
    """Check the settings, print that the model is being loaded, and load it."""
    from llama.load import load_llama

    settings = settings_to_load()
    print("loading the model ...", file=sys.stderr)
    return load_llama(settings)
