"""Waiting for what a pager does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from criupy._uffd.pager_linux import Pager, Phase

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["Changes", "obeyed", "reached"]


class Changes:
    """Tells those who wait that something has changed.

    Take ``next`` before looking, and wait for it after: what happens between is not missed.
    """

    def __init__(self) -> None:
        self._event = trio.Event()

    @property
    def next(self) -> trio.Event:
        """What the next ``notify`` sets."""
        return self._event

    def notify(self) -> None:
        """Wake who waits."""
        self._event.set()
        self._event = trio.Event()


async def obeyed(pager: Pager, changes: Changes) -> Stats:
    """Wait until the pager has done all that it was told; return its counters then."""
    while True:
        changed = changes.next
        stats = pager.snapshot()
        if pager.obeyed(stats):
            return stats
        await changed.wait()


async def reached(pager: Pager, changes: Changes, phase: Phase) -> None:
    """Wait until the pager is in this phase, or in a later one."""
    while True:
        changed = changes.next
        if pager.snapshot().phase >= phase:
            return
        await changed.wait()
