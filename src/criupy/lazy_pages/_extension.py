"""What a daemon says to a page server of criupy, and to nobody else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from criupy.errors import LazyPagesError
from criupy.images import RelayMarker, read_marker
from criupy.lazy_pages._config import Config
from criupy.wire.extension import KEY_LENGTH, SESSION_LENGTH, Hello, Lane, Refusal

if TYPE_CHECKING:
    from criupy.lazy_pages._images_linux import DumpedTask

__all__ = ["Extension", "RefusedError", "extension_for", "refusal_text"]

#: A destination has ended its tasks, for sure, when so much of a relay's --hold-timeout has gone.
_SAFE: Final = 0.8


class RefusedError(LazyPagesError):
    """The page server does not let this session in any more; ``reason`` is a Refusal, or a newer number."""

    def __init__(self, reason: int) -> None:
        super().__init__(refusal_text(reason))
        self.reason = reason


class Extension:
    """This daemon's session with a page server of criupy.

    ``marker`` is that of the relay; None: the page server gives out images, and
    has no process that waits for how this ends.
    """

    def __init__(self, marker: RelayMarker | None) -> None:
        self.marker = marker
        self._session = os.urandom(SESSION_LENGTH)
        self._counters = Counter[Lane]()

    @property
    def is_relayed(self) -> bool:
        """Whether a live source waits behind the page server, and learns the end from what is said."""
        return self.marker is not None

    @property
    def must_kill(self) -> bool:
        """Whether tasks that lack pages may not go on: the source will, some day."""
        return self.marker is not None and self.marker.hold_timeout is not None

    def hello(self, lane: Lane) -> bytes:
        """Return what a connection begins with; each time another."""
        self._counters[lane] += 1
        key = bytes(KEY_LENGTH) if self.marker is None else self.marker.key
        return Hello(self._session, lane, self._counters[lane]).encode(key)


def extension_for(config: Config, dumped: Mapping[int, DumpedTask]) -> Extension | None:
    """Tell what the page server is; raise LazyPagesError for what cannot be done with it.

    None: it is a stock one, or may be, and is never sent what it does not know.
    """
    if config.page_server is None:
        return None
    marker = None if config.extended is False else read_marker(config.images_dir)
    if config.reconnect is not None and marker is None:
        _check_reconnect(dumped)
    if marker is None:
        return Extension(None) if config.extended else None
    if marker.hold_timeout is not None:
        # A link that comes back, and is silent from its first moment, takes as long again to be seen.
        gone = config.link_timeout
        if config.reconnect is not None:
            gone += config.reconnect + config.link_timeout
        if gone > _SAFE * marker.hold_timeout:
            raise LazyPagesError(
                f"the relay lets the source go on {marker.hold_timeout:g} s after it was left "
                f"(--hold-timeout), and this daemon would hold its tasks for {gone:g} s (--link-timeout, or "
                f"twice that with --reconnect, and that): make it {_SAFE * marker.hold_timeout:g} s at most, "
                "or two may run"
            )
    return Extension(marker)


def _check_reconnect(dumped: Mapping[int, DumpedTask]) -> None:
    for task in dumped.values():
        if not task.is_whole:
            raise LazyPagesError(
                "--reconnect: these images are of a lazy dump, whose source serves one connection and takes "
                "its loss for the end. It needs a relay beside the source (criupy-page-server --upstream), "
                "whose marker criupy-relay.json is to be copied with the images; or full images"
            )


def refusal_text(reason: int) -> str:
    """Say why a page server of criupy does not serve this restore."""
    try:
        return _REFUSALS[Refusal(reason)]
    except ValueError:
        return (
            f"the page server refused this restore, for a reason ({reason}) that this version does not know"
        )


_REFUSALS: Final = {
    Refusal.KEY: "the relay does not know the marker beside these images: is it the one of this dump?",
    Refusal.TAKEN: "the relay serves another restore of this process, and there can be only one",
    Refusal.REPLAYED: "the relay has heard this before: is somebody between?",
    Refusal.GONE: "the relay has lost the source",
    Refusal.VERSION: "the page server is of a version of criupy that speaks otherwise",
    Refusal.ENDED: "the relay's source has ended, or goes on, by somebody's decision",
}
