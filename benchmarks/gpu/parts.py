"""The parts of `make bench-gpu`: their names, what they measure, and about how long each takes.

Knows nothing about torch, so that the process that starts the parts never uses the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_PART = 540.0
"""The default time limit of a part. A run of one part ends within 10 minutes."""


@dataclass(frozen=True, slots=True)
class Part:
    """Measurements that run together, in one process."""

    name: str
    minutes: float
    """An estimate for an H100 (not measured)."""
    measures: str


PARTS = (
    Part(
        "checks", 2, "correctness of attention, linear layers, CUDA graphs and the engine, with small models"
    ),
    Part("memory-errors", 1, "errors that a lack of GPU memory causes at each stage of the start"),
    Part("fp8", 3, "speed and memory of a random 70B in FP8"),
    Part("nf4", 3, "the same in NF4"),
    Part("int8", 4, "the same in int8"),
    Part("bf16", 3, "the same in bfloat16, which only a GPU with more than 140 GB holds"),
    Part("quality", 5, "perplexity of each precision, with a small model"),
    Part("serving", 6, "the start of Cog's server with a packed 70B; writes 40 GB to the disk"),
)


def chosen(names: list[str]) -> list[Part]:
    """Return the parts with these names, in the order of PARTS, or all if there are no names.

    Raises ValueError if a name is unknown.
    """
    known = {part.name for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"unknown part: {', '.join(unknown)}; choose from {', '.join(part.name for part in PARTS)}"
        )
    return [part for part in PARTS if not names or part.name in names]


def described() -> str:
    """Return one line per part, for `--help`."""
    return "\n".join(f"  {part.name:14} {part.minutes:2g} min  {part.measures}" for part in PARTS)
