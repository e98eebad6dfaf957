"""Available memory under a container's limit, read from small copies of the kernel's files."""

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


def available(groups: Path, membership: str) -> int:
    path = groups.parent / "membership"
    path.write_text(membership)
    return available_memory(groups, path)


def test_cached_files_do_not_count_as_used_memory(groups: Path) -> None:
    stat = "anon 1\ninactive_file 200000000\nactive_file 5"
    write(groups, memory__max="1000000000", memory__current="700000000", memory__stat=stat)
    assert available(groups, "0::/\n") == 500_000_000


def test_the_group_or_parent_with_the_least_free_memory_decides(groups: Path) -> None:
    write(groups / "a", memory__max="900000000", memory__current="800000000", memory__stat="")
    write(groups / "a" / "b", memory__max="max", memory__current="100", memory__stat="")
    assert available(groups, "0::/a/b\n") == 100_000_000


def test_a_group_path_that_exists_only_on_the_host_falls_back_to_the_root(groups: Path) -> None:
    write(groups, memory__max="300000000", memory__current="100000000", memory__stat="")
    assert available(groups, "0::/kubepods/pod1/container2\n") == 200_000_000


def test_limits_of_cgroup_version_1_are_read(groups: Path) -> None:
    files = {"memory__limit_in_bytes": "500000000", "memory__usage_in_bytes": "450000000"}
    write(groups / "memory" / "docker", **files, memory__stat="total_inactive_file 1000000")
    assert available(groups, "5:cpu,memory:/docker\n1:name=systemd:/x\n") == 51_000_000


def test_usage_above_the_limit_leaves_no_memory(groups: Path) -> None:
    write(groups, memory__max="100", memory__current="200", memory__stat="")
    assert available(groups, "0::/\n") == 0


@pytest.mark.parametrize("membership", ["", "0::/\n", "nonsense", "3:memory:/gone\n"])
def test_without_a_limit_the_machine_decides(groups: Path, membership: str) -> None:
    groups.mkdir()
    machine = psutil.virtual_memory().available
    assert 0.5 * machine < available(groups, membership) < 2 * machine


def test_on_a_system_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert 0.5 * machine < available_memory(tmp_path / "cgroup", tmp_path / "membership") < 2 * machine
