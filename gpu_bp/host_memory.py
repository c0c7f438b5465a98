"""How much memory of the host a process may still take."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Of a control group: its folder below /sys/fs/cgroup, its limit, what is used, and the cached files that make room.
VERSIONS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", ""),
}


def free_bytes(root: Path = Path("/")) -> int:
    """What the machine has available, or its control groups, as in a container, leave of it.

    Where nothing is known, more than there can be. `root` is where /proc and /sys are.
    """
    return max(0, min(_of_the_machine(root), *_of_groups(root), sys.maxsize))


def _of_the_machine(root: Path) -> int:
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    names = getattr(os, "sysconf_names", {})  # macOS says how much there is in all
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else sys.maxsize


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in, and has a limit, leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, limit, used, prefix = VERSIONS[1 if controllers else 2]
        # in a container the groups above may be missing, and the path that of the host: the nearest there is counts
        for group in (Path(path), *Path(path).parents):
            place = root / folder / group.relative_to("/")
            try:
                most, taken = (place / limit).read_text().strip(), int((place / used).read_text())
                cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", (place / "memory.stat").read_text(), re.M)
            except OSError:
                continue
            if most != "max":
                yield int(most) - taken + sum(map(int, cached))
