"""What a container's limit leaves of the memory, against small copies of the kernel's files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from llama.model.memory import available_memory

GB = 10**9


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def left(groups: Path, membership: str) -> int:
    path = groups.parent / "membership"
    path.write_text(membership)
    return available_memory(groups, path)


def test_a_limit_of_a_container_counts_what_is_used_less_what_can_be_given_back(groups: Path) -> None:
    stat = "anon 1\ninactive_file 200000000\nactive_file 5"
    write(groups, memory__max="1000000000", memory__current="700000000", memory__stat=stat)
    assert left(groups, "0::/\n") == 500_000_000


def test_the_narrowest_of_the_limits_above_counts(groups: Path) -> None:
    write(groups / "a", memory__max="900000000", memory__current="800000000", memory__stat="")
    write(groups / "a" / "b", memory__max="max", memory__current="100", memory__stat="")
    assert left(groups, "0::/a/b\n") == 100_000_000


def test_a_path_of_the_host_is_looked_for_from_the_root(groups: Path) -> None:
    write(groups, memory__max="300000000", memory__current="100000000", memory__stat="")
    assert left(groups, "0::/kubepods/pod1/container2\n") == 200_000_000


def test_version_1_has_names_of_its_own(groups: Path) -> None:
    files = {"memory__limit_in_bytes": "500000000", "memory__usage_in_bytes": "450000000"}
    write(groups / "memory" / "docker", **files, memory__stat="total_inactive_file 1000000")
    assert left(groups, "5:cpu,memory:/docker\n1:name=systemd:/x\n") == 51_000_000


def test_more_than_the_limit_is_nothing_left(groups: Path) -> None:
    write(groups, memory__max="100", memory__current="200", memory__stat="")
    assert left(groups, "0::/\n") == 0


@pytest.mark.parametrize("membership", ["", "0::/\n", "nonsense", "3:memory:/gone\n"])
def test_without_a_limit_it_is_the_machines(groups: Path, membership: str) -> None:
    groups.mkdir()
    machine = psutil.virtual_memory().available
    assert 0.5 * machine < left(groups, membership) < 2 * machine
