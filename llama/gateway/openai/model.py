"""Finds the model that a client of OpenAI's API names."""

from __future__ import annotations

from dataclasses import dataclass

from llama.gateway.model_card import ModelVersion, is_version
from llama.gateway.problems import Problem
from llama.gateway.settings import GatewaySettings


@dataclass(frozen=True)
class NamedModel:
    """The version and the deployment that a client named; "hidden" and None if it did not."""

    version: str = "hidden"
    deployment: str | None = None


def find_model(name: str, settings: GatewaySettings, own: ModelVersion | None) -> NamedModel:
    """Return what a client means by a model's name.

    These are `owner/name`, `name`, both with `:version`, aliases, and the names of deployments. `own` is the
    version that the servers run, if it is known. Raises Problem 404.
    """
    if name in settings.deployments:
        return NamedModel(deployment=name)
    if name in settings.aliases:
        return NamedModel()
    bare, colon, version = name.partition(":")
    if bare in (settings.model, settings.model.partition("/")[2]):
        if not colon:
            return NamedModel()
        if is_version(version, settings.versions, own):
            return NamedModel(version)
    shown = f"'{name}'" if len(name) <= 100 else "with this name"
    raise Problem(
        404,
        "Not found",
        f"The model {shown} does not exist or you do not have access to it. Use '{settings.model}'.",
        code="model_not_found",
        param="model",
    )
