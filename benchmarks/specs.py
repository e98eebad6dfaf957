"""The engines that are compared, and how each is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process import Spec
from benchmarks.targets import OURS, SERVED, SERVED_ON_VLLM, VLLM_SERVER
from benchmarks.workload import CONTEXT, OUT

_PEERS = "benchmarks.peers"
_REUSE_PREFIXES = {
    f"{_PEERS}.{name}" for name in ("ours", "served", "vllm_cpu", "vllm_server", "llama_cpp_batch")
}


@dataclass(frozen=True, slots=True)
class Pythons:
    """The Python interpreters of peers that need their own environment, or None to leave a peer out."""

    vllm: str | None
    llama_cpp: str | None


def reuses_prefixes(spec: Spec) -> bool:
    """Whether the engine reuses the keys and values of earlier prompts."""
    return spec.module in _REUSE_PREFIXES


def specs(model: Path, pythons: Pythons) -> list[Spec]:
    """Return all engines for the benchmark model."""
    return [
        *_specs(model, "bfloat16", pythons),
        *_specs(model, "float32", pythons),
        *_specs_of_llama_cpp(model, pythons, "bf16", "q4_0"),
    ]


def specs_for_dialogue(model: Path, pythons: Pythons) -> list[Spec]:
    """Return the engines that can take the token ids of any model, in bfloat16."""
    modules = {f"{_PEERS}.{name}" for name in ("ours", "transformers_generate", "vllm_cpu", "vllm_server")}
    found = [spec for spec in _specs(model, "bfloat16", pythons) if spec.module in modules]
    return [*found, *_specs_of_llama_cpp(model, pythons, "bf16")]


def _specs(model: Path, dtype: str, pythons: Pythons) -> Iterator[Spec]:
    variables = {"LLAMA_DTYPE": dtype, "LLAMA_DEVICE": "cpu"}

    def spec(name: str, module: str, **options: str) -> Spec:
        return Spec(f"{name}, {dtype}", f"{_PEERS}.{module}", str(model), variables, **options)

    yield spec(OURS.removesuffix(", bfloat16"), "ours")
    if dtype == "bfloat16":
        yield spec(SERVED.removesuffix(", bfloat16"), "served")
        if pythons.vllm:
            yield from _servers_on_vllm(model, dtype, pythons.vllm)
    yield spec("transformers generate", "transformers_generate")
    yield spec("transformers continuous batching", "transformers_continuous")
    if pythons.vllm:
        yield spec("vLLM engine (CPU, eager)", "vllm_cpu", python=pythons.vllm)


def _servers_on_vllm(model: Path, dtype: str, python: str) -> Iterator[Spec]:
    """Yield our server on vLLM and vLLM's server, with the same context and the same memory for the cache."""
    alike = {"LLAMA_DTYPE": dtype, "LLAMA_MAX_CONTEXT": str(CONTEXT)}
    on_vllm = {**alike, "LLAMA_ENGINE": "vllm", "LLAMA_CACHE_MEMORY": "2GiB"}
    yield Spec(SERVED_ON_VLLM, f"{_PEERS}.served", str(model), on_vllm, python)
    yield Spec(VLLM_SERVER, f"{_PEERS}.vllm_server", str(model), alike, python)


def _specs_of_llama_cpp(model: Path, pythons: Pythons, *kinds: str) -> Iterator[Spec]:
    """Yield llama.cpp with weights of each kind. Its files must be written to the paths of `gguf_of`."""
    if pythons.llama_cpp:
        for kind in kinds:
            path = str(gguf_of(model, kind))
            yield Spec(f"llama.cpp, {kind}", f"{_PEERS}.llama_cpp_batch", path, python=pythons.llama_cpp)


def gguf_of(model: Path, kind: str) -> Path:
    """Return the path of the model's GGUF file, in the folder of unfinished results."""
    return OUT / f"{model.name}.{kind}.gguf"
