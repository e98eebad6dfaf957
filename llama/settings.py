"""The `LLAMA_*` environment variables, read here and nowhere else.

Knows names, types and defaults; knows nothing of what a value means to a model or a device.
"""

from __future__ import annotations

import logging
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveInt, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from llama.errors import BadSettings

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
"""The repository, where `predict.py` is."""

DEFAULT_CONCURRENCY = 32
"""Requests that the server takes at once. `predict.py` and `cog build` have the same number."""

EngineName = Literal["torch", "vllm"]

_PREFIX = "LLAMA_"
_OTHERS = ("LLAMA_GATEWAY_",)
"""Prefixes of variables that are not for this server, and of which it does not warn."""


class Settings(BaseSettings):
    """One field a variable; the README's table has the same names."""

    model_config = SettingsConfigDict(env_prefix="LLAMA_", env_ignore_empty=True, frozen=True)

    weights: Path | None = None
    """Folder in Hugging Face format; None means the embedded model."""
    engine: EngineName = "torch"
    """Our own, for one device, or vLLM for several GPUs and machines."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "fp8", "int8", "nf4"] = "auto"
    device: str = "auto"
    """A torch device such as `cuda:0` or `cpu`; `auto` takes the first GPU, else the CPU."""
    max_context: Annotated[int, Field(ge=64)] | None = None
    """Tokens of prompt and answer together; None means all that the model and the cache allow."""
    cache_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory for keys and values, such as `8GB`; None means what a GPU has free, or half a CPU's memory."""
    threads: PositiveInt | None = None
    """CPU threads of the torch engine; None lets it use fewer than all while other programs need a core."""
    prefix_reuse: bool = True
    """Let a prompt begin with the keys and values of an earlier one; 0 where timing must tell nothing."""
    cuda_graphs: bool = True
    """Replay decode steps on a GPU from CUDA graphs; 0 where one cannot be captured, which is slower."""
    tensor_parallel: PositiveInt | None = None
    """GPUs that share every layer; None means all of this machine that divide the heads evenly."""
    pipeline_parallel: PositiveInt | None = None
    """Stages of layers, each on GPUs of its own; None means what `tensor_parallel` leaves over."""
    distributed: Literal["auto", "mp", "ray"] = "auto"
    """How vLLM's workers are started: processes of this machine, or Ray over several."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of each GPU's memory that vLLM takes for weights, cache and all else."""
    cache_dir: Path = Path("~/.cache/llama-cog")
    """Where the embedded model is kept once it has been converted."""
    pull: bool = False
    """At setup, download the files of the manifest that are missing in `weights`."""
    weights_manifest: Path = ROOT / "weights.txt"
    """What `weights pull`, `verify` and `lock` go by."""
    weights_base_url: str | None = None
    """Where a copy of the manifest's files lies, each under its destination."""
    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    """The hub's own variable: sent to the hosts that the manifest names, over HTTPS, and to no other."""
    max_concurrency: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=DEFAULT_CONCURRENCY, validation_alias="COG_MAX_CONCURRENCY"
    )
    """Requests in one batch. Cog's own variable: its server lets no more in than this."""

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the environment. Raises BadSettings naming the first variable that cannot be used; a variable
        that looks like one of ours and is not gets a warning."""
        cls._warn_of_unknown()
        try:
            settings = cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            variable = name if name.isupper() else f"LLAMA_{name.upper()}"
            raise BadSettings(
                f"{variable} is {first['input']!r}: {first['msg']}; set it to a valid value or unset it"
            ) from error
        if settings.pull and settings.weights is None:
            raise BadSettings(
                "LLAMA_PULL is 1 and LLAMA_WEIGHTS is not set; set it to the folder that is to be filled"
            )
        return settings

    @classmethod
    def _warn_of_unknown(cls) -> None:
        known = [name.upper() for name in cls.model_fields]
        for variable in os.environ:
            name = variable.removeprefix(_PREFIX)
            if name == variable or name in known or variable.startswith(_OTHERS):
                continue
            near = get_close_matches(name, known, n=1)
            logger.warning(
                "%s is no setting%s", variable, f"; did you mean {_PREFIX}{near[0]}?" if near else ""
            )


def expanded(path: Path, variable: str) -> Path:
    """A path with its `~` replaced. Raises BadSettings for a user who has no home."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise BadSettings(
            f"{variable} is {path}, and this user has no home directory; set it to a full path"
        ) from error
