"""Describe the machine and the commit on which a benchmark runs."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
_NAMES = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX512",
    "avx2": "AVX2",
}


def usable_cores() -> int:
    """The number of cores that this process may run on. Linux can restrict them; macOS cannot."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def vector_instructions(machine: Mapping[str, Any]) -> str:
    """Name the widest vector instructions of a machine that `describe` has described."""
    flags = machine["instructions"]
    return next((name for flag, name in _NAMES.items() if flag in flags), "none")


def describe() -> dict[str, object]:
    """Return the processor, the number of usable cores, the memory in GB, and the vector instructions."""
    import psutil  # here, because a peer that needs only `usable_cores` may not have it

    info = Path("/proc/cpuinfo")
    lines = {
        name.strip(): value.strip()
        for line in (info.read_text() if info.is_file() else "").split("\n\n")[0].splitlines()
        for name, separator, value in [line.partition(":")]
        if separator
    }
    flags = lines.get("flags", "").split()
    return {
        "processor": lines.get("model name", platform.processor()),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the commit, with "-dirty" if files other than results have been changed since, or "unknown"."""
    from llama import ROOT  # here, because a peer that needs only `usable_cores` may not have pydantic

    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], check=False
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
