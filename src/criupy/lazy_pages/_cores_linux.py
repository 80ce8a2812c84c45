"""How many cores this process may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process has all of: by its affinity, and by the quotas of cgroups (v2).

    Threads that together use up a quota are all stopped until the next period, whichever
    of them somebody waits for. ``root`` is where ``/proc`` and ``/sys`` are.
    """
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the limit of each cgroup that this process is in, in cores."""
    for group in _groups(root):
        # Not there in the root group; "max" means no limit.
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            yield quota / period


def _groups(root: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                group = root / "sys/fs/cgroup" / line.removeprefix("0::/")
                yield group
                yield from group.parents
