"""How a page server is to serve, whatever it serves."""

from __future__ import annotations

import ipaddress
import math
import socket
from dataclasses import dataclass
from pathlib import Path

from criupy._tls.files import TlsFiles
from criupy.page_server._access import Network

__all__ = ["Config"]

# Who dumps or restores has much to do between its connect and its first page.
_STALLS_BEFORE_THE_FIRST = 20
# So many an address may always have at a time, however few there may be in all.
_LEAST_SHARE = 4


@dataclass(frozen=True, slots=True)
class Config:
    """How to serve.

    ``address`` and ``port`` are where to listen (0 lets the kernel choose), or
    ``listener`` is an inherited socket that listens already. ``connection`` is
    an inherited socket that is connected: it is served, and nothing else.
    ``allow`` are the networks that peers may come from, all when it is empty.
    ``once`` ends with the first that was given a page, or began a dump; who
    connects and does neither does not count. Of ``max_connections`` one address
    (of IPv6: one /64) has at most half, but always four. Timeouts are in seconds:
    ``stall_timeout`` for a peer that stops in the middle of something,
    ``idle_timeout`` for one that asks for nothing (None: for ever, once it has
    begun; before that, 20 times ``stall_timeout``). With ``tls``
    peers need a certificate, which (unless it says otherwise) must be for
    ``address``: so CRIU has it, whose hosts use one certificate for either end.

    Raises ValueError for what makes no sense.
    """

    images_dir: Path
    address: str = "127.0.0.1"
    port: int = 0
    listener: socket.socket | None = None
    connection: socket.socket | None = None
    allow: tuple[Network, ...] = ()
    once: bool = False
    max_connections: int = 64
    stall_timeout: float = 30.0
    idle_timeout: float | None = None
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        """Refuse what would show later, and elsewhere."""
        if self.listener is not None and self.connection is not None:
            raise ValueError("expected a listener or a connection, or neither")
        if self.listener is not None and self.listener.family not in {socket.AF_INET, socket.AF_INET6}:
            raise ValueError("listener: expected a socket of AF_INET or AF_INET6")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, not {self.port}")
        if self.max_connections < 1:
            raise ValueError(f"max_connections: expected 1 or more, not {self.max_connections}")
        for name, seconds in (("stall_timeout", self.stall_timeout), ("idle_timeout", self.idle_timeout)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name}: expected more than 0 seconds, not {seconds}")
        for network in self.allow:
            if not isinstance(network, ipaddress.IPv4Network | ipaddress.IPv6Network):
                raise TypeError(
                    f"allow: expected networks such as ipaddress.ip_network('10.0.0.0/8'), not {network!r}"
                )

    @property
    def first_timeout(self) -> float:
        """How long a peer may say nothing at all, in seconds."""
        return self.idle_timeout or _STALLS_BEFORE_THE_FIRST * self.stall_timeout

    @property
    def share(self) -> int:
        """How many connections one address may have at a time."""
        return max(_LEAST_SHARE, self.max_connections // 2)
