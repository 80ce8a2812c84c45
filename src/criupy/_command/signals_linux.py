"""Which signals a daemon takes for a wish to stop, and which must not end it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trio

__all__ = ["hold_signals", "stop_on_signal"]

# A terminal that closes must not end what running tasks depend on: SIGHUP stops like SIGTERM.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# By default these would end the daemon at once, and leave running tasks without their memory.
_IGNORED_SIGNALS = (
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def hold_signals() -> None:
    """Let no signal end the process, and keep a wish to stop until ``stop_on_signal`` takes it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    for number in _STOP_SIGNALS:
        # What holds again between the end of ``stop_on_signal`` and its last words.
        signal.signal(number, _do_nothing)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def stop_on_signal(stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """Call ``stop`` at each signal that asks for it, and take no notice of more when this is cancelled."""
    import trio  # signals are held before it is loaded

    try:
        with trio.open_signal_receiver(*_STOP_SIGNALS) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            task_status.started()
            async for _ in received:
                stop()
    finally:
        # Python gives a handler of its own up before the process ends, but not this.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
