"""Killing restored tasks together with everything they forked since."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["descendants", "kill_trees", "stop"]


# States of /proc/PID/stat: stopped, traced, zombie, dead.
_STILL = frozenset("TtZXx")
# A thread that waits in the kernel for something else, a page say, stops only then.
_PATIENCE = 0.2  # seconds, for all


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    # A process or thread that ends while we look has no children worth a signal.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and these, as long as their parents are there."""
    found: set[int] = set()
    pending = [pid]
    while pending:
        new = _children(pending.pop()) - found
        found |= new
        pending += new
    return found


def _is_still(pid: int) -> bool:
    """Tell whether no thread of a process can fork any more: stopped, or at its end."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] not in _STILL:
                    return False
    return True


def _wait_until_still(pid: int, deadline: float) -> None:
    # A stop takes effect when the thread next looks for signals: a fork under way is finished before.
    while not _is_still(pid) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def stop(pid: int, pidfd: int) -> None:
    """Stop a process; from then on it forks no more, unless a thread hangs in the kernel."""
    _signal(pidfd, signal.SIGSTOP)
    _wait_until_still(pid, time.monotonic() + _PATIENCE)


def kill_trees(roots: Iterable[tuple[int | None, int]]) -> None:
    """Kill each (host pid, pidfd) and its descendants.

    All are stopped before the first is killed: what is stopped forks no more,
    and its children keep it as their parent, by which they are found. A child
    whose parent had exited before is not found, nor one that is forked by a
    thread that hung in the kernel when it should stop.
    """
    pidfds: dict[int, int] = {}
    unnamed: list[int] = []
    opened: list[int] = []
    pending: list[int] = []
    try:
        for pid, pidfd in roots:
            _signal(pidfd, signal.SIGSTOP)
            if pid is None:
                unnamed.append(pidfd)
            else:
                pidfds[pid] = pidfd
                pending.append(pid)
        deadline = time.monotonic() + _PATIENCE
        while pending:
            pid = pending.pop()
            _wait_until_still(pid, deadline)
            for child in _children(pid) - pidfds.keys():
                with contextlib.suppress(ProcessLookupError):
                    opened.append(os.pidfd_open(child))
                    pidfds[child] = opened[-1]
                    _signal(opened[-1], signal.SIGSTOP)
                    pending.append(child)
        for pidfd in [*pidfds.values(), *unnamed]:
            _signal(pidfd, signal.SIGKILL)
    finally:
        for fd in opened:
            os.close(fd)
