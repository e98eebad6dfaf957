"""Restricts the engines to older vector instructions than this CPU has.

Most libraries have an environment variable for this. torch.cpu and vLLM have none, so
`limited_torch/sitecustomize.py` changes what torch.cpu reports. Knows variables; knows nothing about speed.
"""

from __future__ import annotations

from pathlib import Path

NAMES = {"avx512": "AVX512", "avx2": "AVX2"}

_VARIABLES = {
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY": "avx512",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "NUMBA_CPU_NAME": "cascadelake",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
    },
}


def variables(isa: str) -> dict[str, str]:
    """Return the environment that restricts our engine, transformers and vLLM."""
    return {
        **_VARIABLES[isa],
        # Without this, numba would add the features of this CPU to those that the name implies.
        "NUMBA_CPU_FEATURES": "",
        "PYTHONPATH": str(Path(__file__).parent / "limited_torch"),
    }


def excluded() -> dict[str, str]:
    """Return the engines that cannot be restricted, and the reason."""
    reason = "its vector instructions are chosen when it is compiled, so they cannot be limited"
    return {f"llama.cpp, {kind}": reason for kind in ("bf16", "q4_0")}
