"""What a relay needs to know beyond how to serve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RelayConfig"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """How to stand between a live source and its destination.

    ``upstream`` is where the source waits, (host, port). ``cache`` is how many
    bytes of its pages are kept in memory. With ``spool`` they all go there instead,
    into a directory that becomes a full image; with ``close_when_spooled`` the source
    ends when it is one, though no destination has reported that the restore finished.
    After ``hold_timeout`` seconds without the destination the source goes on (None:
    it stays frozen). ``work_dir`` is where operators find the relay; by default the
    images directory.

    Raises ValueError for what makes no sense.
    """

    upstream: tuple[str, int]
    cache: int = 256 * _MIB
    spool: Path | None = None
    close_when_spooled: bool = False
    hold_timeout: float | None = None
    connect_timeout: float = 10.0
    link_timeout: float = 30.0
    work_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what would show later, and elsewhere."""
        if not 1 <= self.upstream[1] <= 65535:
            raise ValueError(f"upstream: expected a port from 1 to 65535, not {self.upstream[1]}")
        if self.cache < _MIB:
            raise ValueError(f"cache: expected {_MIB} bytes or more, not {self.cache}")
        if self.close_when_spooled and self.spool is None:
            raise ValueError("close_when_spooled: there is no spool")
        for name in ("hold_timeout", "connect_timeout", "link_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name}: expected more than 0 seconds, not {seconds}")
