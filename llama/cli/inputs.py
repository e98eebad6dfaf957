"""The model's published inputs and the settings, as a command takes them.

Knows where `predict.py` is, whose signature is the published schema.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from llama.errors import InvalidInput
from llama.settings import ROOT, Settings


def published_run() -> Callable[..., object]:
    """`Predictor.run`, whose signature is the published schema."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from predict import Predictor

    run: Callable[..., object] = Predictor.run
    return run


def read_inputs(pairs: list[str]) -> dict[str, Any]:
    """The published defaults with NAME=VALUE pairs over them."""
    from llama.serving.schema import input_defaults, input_properties

    run = published_run()
    inputs, properties = input_defaults(run), input_properties(run)
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name not in properties:
            raise InvalidInput(f"-i {pair}: write NAME=VALUE with a name among {', '.join(properties)}")
        try:
            inputs[name] = value if properties[name]["type"] == "string" else json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"-i {name} takes JSON of type {properties[name]['type']}; correct it"
            ) from error
    return inputs


def check_inputs(inputs: dict[str, Any]) -> None:
    """Refuse what no model could answer, before one is loaded."""
    from llama.prompt.limits import PromptLimits
    from llama.prompt.request import Request

    Request.from_inputs(inputs, PromptLimits(context=sys.maxsize, longest_piece=1))


def settings_to_load() -> Settings:
    """The settings, checked. Unless the weights will be downloaded, their folder is there: the embedded model
    is converted here at its first use, where a person can watch it."""
    from llama.weights.folder import weights_folder

    settings = Settings.from_environment()
    if not settings.pull:
        weights_folder(settings)
    return settings
