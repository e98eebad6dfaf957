"""Reads the `LLAMA_*` environment variables. No other module reads them.

Knows names, types and defaults; knows nothing about what a value means for a model or a device.
"""

from __future__ import annotations

import logging
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import ByteSize, Field, PositiveInt, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from llama.errors import BadSettings

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
"""The root of the repository, which contains `predict.py`."""

DEFAULT_CONCURRENCY = 32
"""The maximum number of concurrent requests. `predict.py` and `cog build` use the same number."""

EngineName = Literal["torch", "vllm"]

_EXPECTED = {
    "byte_size": "should be a size such as 8GB or 512MiB",
    "byte_size_unit": "should be a size such as 8GB or 512MiB",
    "bool_parsing": "should be 0 or 1",
    "int_parsing": "should be an integer",
    "float_parsing": "should be a number",
    "decimal_parsing": "should be a number",
    "string_pattern_mismatch": "does not have the form that docs/reference.md describes",
    "ip_v4_network": "should list networks such as 10.0.0.0/8",
}


class EnvironmentSettings(BaseSettings):
    """Settings that are read from environment variables with one prefix."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, hide_input_in_errors=True)

    others: ClassVar[tuple[str, ...]] = ()
    """Prefixes of variables that belong to other programs, so no warning is logged about them."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment, and log a warning for every unknown variable that starts with the prefix.

        Raises BadSettings, which names the first invalid variable.
        """
        cls._warn_about_unknown()
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            variable = name if name.isupper() else f"{cls._prefix()}{name.upper()}"
            expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Input ")
            shown = "set" if cls._is_secret(name) else repr(first["input"])
            raise BadSettings(f"{variable} is {shown}, but it {expected}; correct it or unset it") from error

    @classmethod
    def _is_secret(cls, name: str) -> bool:
        field = next(f for own, f in cls.model_fields.items() if name in (own, f.validation_alias))
        return SecretStr in (field.annotation, *get_args(field.annotation))

    @classmethod
    def _prefix(cls) -> str:
        return cls.model_config["env_prefix"]

    @classmethod
    def _warn_about_unknown(cls) -> None:
        known = [name.upper() for name in cls.model_fields]
        for variable in os.environ:
            name = variable.removeprefix(cls._prefix())
            if name == variable or name in known or variable.startswith(cls.others):
                continue
            near = get_close_matches(name, known, n=1)
            logger.warning(
                "%s is not a known setting and is ignored%s",
                variable,
                f"; did you mean {cls._prefix()}{near[0]}?" if near else "",
            )


class Settings(EnvironmentSettings):
    """One field per variable. `docs/reference.md` describes them."""

    model_config = SettingsConfigDict(env_prefix="LLAMA_")
    others = ("LLAMA_GATEWAY_",)

    weights: Path | None = None
    """A folder in Hugging Face format; None means the embedded model."""
    engine: EngineName = "torch"
    """`torch` is this project's own engine, for one device; `vllm` is for several GPUs or machines."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "fp8", "int8", "nf4"] = "auto"
    device: str = "auto"
    """A torch device: `cpu` or a GPU such as `cuda:0`. `auto` means the first GPU, or the CPU without one."""
    max_context: Annotated[int, Field(ge=64)] | None = None
    """The maximum number of tokens of prompt and answer together; None means as many as the model and the
    cache allow."""
    cache_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory for keys and values, such as `8GB`; None means all free memory on a GPU, and half of the
    available memory on a CPU."""
    threads: PositiveInt | None = None
    """The number of CPU threads of the torch engine; None means all cores, but fewer while other programs use
    some of them."""
    prefix_reuse: bool = True
    """Reuse the keys and values of an earlier prompt that begins with the same tokens. Set it to 0 if
    response times must not reveal what earlier prompts contained."""
    cuda_graphs: bool = True
    """Replay decode steps from CUDA graphs on a GPU. Set it to 0 if a graph cannot be captured; decoding is
    slower then."""
    tensor_parallel: PositiveInt | None = None
    """The number of GPUs that share every layer; None means as many of this machine's GPUs as divide the
    heads evenly."""
    pipeline_parallel: PositiveInt | None = None
    """The number of stages that the layers are divided into, each on its own GPUs; None means as many as the
    GPUs allow with `tensor_parallel`."""
    distributed: Literal["auto", "mp", "ray"] = "auto"
    """How vLLM starts its workers: `mp` as processes on this machine, `ray` on several machines."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The fraction of each GPU's memory that vLLM uses for weights, cache and everything else."""
    cache_dir: Path = Path("~/.cache/llama-cog")
    """The folder that stores the converted embedded model and the compiled kernels."""
    pull: bool = False
    """At setup, download the manifest's files that are missing from `weights`."""
    weights_manifest: Path = ROOT / "weights.txt"
    """The manifest that `weights pull`, `verify` and `lock` use."""
    weights_base_url: str | None = None
    """The URL of a mirror of the manifest's files, where each file's path is its destination."""
    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    """The Hugging Face hub's own variable. It is sent to the hub only, over HTTPS."""
    max_concurrency: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=DEFAULT_CONCURRENCY, validation_alias="COG_MAX_CONCURRENCY"
    )
    """The maximum number of requests in one batch. It is Cog's own variable: Cog's server accepts no more
    requests than this at a time."""

    @classmethod
    def from_environment(cls) -> Self:
        settings = super().from_environment()
        if settings.pull and settings.weights is None:
            raise BadSettings(
                "LLAMA_PULL is 1, but LLAMA_WEIGHTS is not set; set it to the folder to download weights to"
            )
        return settings


def expanded(path: Path, variable: str) -> Path:
    """Replace a leading `~` of a path. Raises BadSettings if that user's home directory is unknown."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise BadSettings(
            f"{variable} is {path}, but that home directory is unknown; set {variable} to an absolute path"
        ) from error
