"""How much more memory this process can use: what the machine has available, or less in a container.

A container's limits are read from the files of Linux control groups, which the kernel's documentation of
cgroup v1 and v2 describes. Other systems, such as macOS, do not have these files, so no such limit applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that this process can allocate without swapping and without exceeding a container's limit."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(groups, membership)])


def _left_in_groups(groups: Path, membership: Path) -> Iterator[int]:
    """Yield the bytes that remain under each limit that applies to this process."""
    with suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(groups, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
                yield from _left(groups / "memory", path, limit, usage, "total_inactive_file")


def _left(root: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """Yield the bytes that remain in a group and in each of its parents. In a container, the path may be the
    one on the host, of which only the root exists."""
    folder = root / path.strip("/")
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # without a limit, the file is missing or contains `max`
            free = int((group / limit).read_text()) - int((group / usage).read_text())
            yield max(free + _cached(group / "memory.stat", cached), 0)
        if group == root:
            return


def _cached(path: Path, name: str) -> int:
    """Bytes of cached files, which the kernel frees when memory runs short."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
