"""Killing restored tasks together with everything they forked since."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

__all__ = ["kill_trees"]


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    # A process or thread that ends while we look has no children worth a signal.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def _signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def kill_trees(roots: Iterable[tuple[int | None, int]]) -> None:
    """Kill each (host pid, pidfd) and its descendants.

    All are stopped before the first is killed: what is stopped forks no more,
    and its children keep it as their parent, by which they are found. A child
    whose parent had exited before is not found.
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
        while pending:
            for child in _children(pending.pop()) - pidfds.keys():
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
