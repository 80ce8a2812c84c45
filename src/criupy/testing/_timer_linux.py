"""A timer as exact as the kernel's: trio itself, and epoll from Python, wait whole milliseconds."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Final

import trio

__all__ = ["Timer"]

#: timerfd_create(2); os.timerfd_create comes with Python 3.13
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK


class _Setting(ctypes.Structure):
    """struct itimerspec: the interval is zero, for a timer that rings once."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("ns", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)


class Timer:
    """A timer for one task at a time."""

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    async def sleep_until(self, due: float) -> None:
        """Sleep until that moment of trio's clock."""
        left = due - trio.current_time()
        if left <= 0:
            await trio.lowlevel.checkpoint()
            return
        setting = _Setting(0, 0, int(left), max(1, int(left % 1 * 1e9)))
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        await trio.lowlevel.wait_readable(self._fd)
        os.read(self._fd, 8)

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self._fd)
