"""What /proc tells of another process: its parent, its tracer, its program."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["is_ending", "is_named", "parent_of", "status_of", "tracer_of"]


def parent_of(pid: int) -> int | None:
    """Return the parent of a process; None once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def status_of(pid: int) -> dict[str, str]:
    """Return what /proc/PID/status tells of a process; nothing once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


def tracer_of(pid: int) -> int:
    """Return the process that traces another one; 0 for none, or none that can be seen."""
    return int(status_of(pid).get("TracerPid", "0"))


def is_ending(pid: int) -> bool:
    """Tell whether a process has closed all that it had open, as it does at its end, or is gone."""
    try:
        return next(Path(f"/proc/{pid}/fd").iterdir(), None) is None
    except OSError:
        return True


def is_named(pid: int, name: str) -> bool:
    """Tell whether a process is of a program whose name begins so, as ``criu-4.2`` does with ``criu``."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith(name)
    return False
