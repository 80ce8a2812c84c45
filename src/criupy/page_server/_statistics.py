"""What a page server did, counted connection by connection."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from criupy._uffd.server_linux import Account

__all__ = ["Statistics", "counted", "summary"]

_PAGE_SIZE: Final = 4096
_KEPT: Final = 1000
_OURS: Final = frozenset({"cut", "data", "changed", "error"})


@dataclass(slots=True)
class Statistics:
    """Sums over all connections that have ended.

    ``refused`` are connections that were not served at all. ``endings`` counts
    those that were by the name of their Ending, in lower case, and ``ours`` those
    that had asked for something and were ended here, with nothing wrong about
    them. ``connections`` says more of the last thousand.
    """

    ended: int = 0
    refused: int = 0
    requests: int = 0
    pages: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    connections: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, account: Account, peer: str) -> None:
        """Count a connection that has ended."""
        ending = "" if account.ending is None else account.ending.name.lower()
        self.ended += 1
        self.requests += account.requests
        self.pages += account.pages
        self.endings[ending] += 1
        if account.requests and ending in _OURS:
            self.ours[ending] += 1
        first, ended = account.first_page, account.ended or account.started
        self.connections.append(
            {
                "serial": account.serial,
                "peer": peer,
                "ending": ending,
                "frame_size": account.frame_size,
                "requests": account.requests,
                "pages": account.pages,
                "seconds": ended - account.started,
                "seconds_to_first_page": None if first is None else first - account.started,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is called bytes is what the pages hold."""
        return {
            "ended": self.ended,
            "refused": self.refused,
            "requests": self.requests,
            "pages": self.pages,
            "bytes": self.pages * _PAGE_SIZE,
            "endings": dict(self.endings),
            "connections": list(self.connections),
        }


def counted(count: int, what: str) -> str:
    """Return such as "1 page" or "3 pages"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def summary(statistics: Statistics, *, received: bool) -> str:
    """Return the lines of --display-stats."""
    endings = ", ".join(f"{count:,} {name}" for name, count in sorted(statistics.endings.items()))
    ended = f"{statistics.ended:,} ({endings})" if endings else "0"
    mebibytes = statistics.pages * _PAGE_SIZE / 2**20
    memory = f"{counted(statistics.pages, 'page')} ({mebibytes:,.1f} MiB)"
    return f"Connections:   {ended}, {statistics.refused:,} refused\n" + (
        f"Received:      {memory}"
        if received
        else f"Lazy memory:   {memory} for {counted(statistics.requests, 'request')}"
    )
