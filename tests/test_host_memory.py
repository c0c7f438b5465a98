"""How much memory of the host is free: of the machine, and of the control groups of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_bp.host_memory import free_bytes

V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")


def group(root: Path, names: tuple[str, ...], path: str, limit: object, used: int, cached: int = 0) -> None:
    folder, limit_file, used_file, prefix = names
    place = root / folder / path
    place.mkdir(parents=True, exist_ok=True)
    (place / limit_file).write_text(f"{limit}\n")
    (place / used_file).write_text(f"{used}\n")
    (place / "memory.stat").write_text(
        f"anon 5\n{prefix}inactive_file {cached}\n{prefix}active_file 1\nworkingset_refault_file 7\n"
    )


def machine(root: Path, available: int, groups: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  99 kB\nMemFree: 3 kB\nMemAvailable:   {available} kB\n")
    (root / "proc/self/cgroup").write_text(groups)


def test_a_machine_without_limits(tmp_path: Path) -> None:
    machine(tmp_path, 64, "0::/user.slice\n")
    assert free_bytes(tmp_path) == 64 * 1024
    group(tmp_path, V2, "user.slice", "max", 1000)
    assert free_bytes(tmp_path) == 64 * 1024


@pytest.mark.parametrize(("names", "line"), [(V1, "4:cpu,cpuacct:/x\n3:memory:/a/b\n"), (V2, "0::/a/b\n")])
def test_control_groups(tmp_path: Path, names: tuple[str, ...], line: str) -> None:
    """The tightest of those that a process is in; cached files are no obstacle."""
    machine(tmp_path, 64, line)
    group(tmp_path, names, "", 60_000, 1000)
    assert free_bytes(tmp_path) == 60_000 - 1000 + 1
    group(tmp_path, names, "a", 9000, 5000, cached=2000)
    assert free_bytes(tmp_path) == 9000 - 5000 + 2001
    group(tmp_path, names, "a/b", 8000, 7000, cached=500)
    assert free_bytes(tmp_path) == 1501
    group(tmp_path, names, "a/b", 8000, 9000)
    assert free_bytes(tmp_path) == 0
    group(tmp_path, names, "a/other", 10, 9)
    assert free_bytes(tmp_path) == 0


def test_another_system(tmp_path: Path) -> None:
    """Without /proc the system is asked, in pages."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total / 1000 < free_bytes(tmp_path) <= total
