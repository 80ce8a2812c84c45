"""Which signals a daemon takes for a wish to stop, and which must not end it."""

from __future__ import annotations

import signal
from collections.abc import Callable

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


def hold_signals() -> None:
    """Let no signal end the process, and keep a wish to stop until ``stop_on_signal`` takes it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


async def stop_on_signal(stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """Call ``stop`` at each signal that asks for it."""
    with trio.open_signal_receiver(*_STOP_SIGNALS) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        task_status.started()
        try:
            async for _ in received:
                stop()
        finally:
            # It ends already; a further wish must not make of its status that of a signal.
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
