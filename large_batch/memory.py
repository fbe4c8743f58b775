"""The memory of this machine, or of the container that the process is in."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def free_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or the container's where that is less."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _containers())])


def total_bytes() -> int:
    """Return the memory that this process could have if there were no others."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _containers())])


def used_bytes() -> int:
    """Return the memory that this process has."""
    return psutil.Process().memory_info().rss


def _containers(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Yield the memory of each container that this process is in, and what all processes in it have of that."""
    with suppress(OSError):
        inner = root / own.read_text().strip().rpartition("::")[2].lstrip("/")
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # a group may have no limit: "max"
                limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit, used - int(held["inactive_file"])  # copies of files, which are given back
