"""Wait for what nobody announces: a file that grows, a word in shared memory."""

from __future__ import annotations

from collections.abc import Callable

import trio

__all__ = ["until"]


async def until(condition: Callable[[], bool], *, pause: float = 0.001) -> None:
    """Wait until the condition holds, looking every `pause` seconds; it may raise to give up."""
    while not condition():
        await trio.sleep(pause)
