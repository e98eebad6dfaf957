"""How much memory this process may still take: the machine's, or less if a container limits it.

Source of the files: the kernel's documentation of control groups, versions 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that can be had without swapping and without being ended for them."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(groups, membership)])


def _left_in_groups(groups: Path, membership: Path) -> Iterator[int]:
    """What is left of each limit that this process is under."""
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(groups, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
                yield from _left(groups / "memory", path, limit, usage, "total_inactive_file")


def _left(root: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """For a group and those above it. In a container the path may be the host's, of which only the root is
    there."""
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # no such file where there is no limit, or the word `max`
            free = int((group / limit).read_text()) - int((group / usage).read_text())
            yield max(free + _cached(group / "memory.stat", cached), 0)
        if group == root:
            return


def _cached(path: Path, name: str) -> int:
    """Bytes of files that the kernel gives back when memory is asked for."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
