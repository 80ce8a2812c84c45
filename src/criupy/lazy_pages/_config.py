"""What one restore needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from criupy._tls.files import TlsFiles

__all__ = ["Config"]


@dataclass(frozen=True, slots=True)
class Config:
    """What one restore needs to know.

    ``page_server`` is the source's (host, port), ``ps_socket`` an inherited
    connected socket instead; with neither, pages come from the images.
    Timeouts are in seconds. ``frame_size`` None takes what the images tell.
    ``reconnect`` is how long a page server that was lost is tried to be reached
    again; only criupy's can be, one that serves full images or a relay. ``extended``
    says whether the page server is criupy's; None: it is if the images
    have the marker of a relay. With such a one ``lanes`` connections are used, of which
    the second is for what threads wait for. While one waits, or has just got a page, the
    pager looks for more for ``busy_poll`` seconds before it sleeps (None: 100 us where
    there is more than one core). With ``tls`` the source's
    certificate must be for ``source_name``, which is the host of
    ``page_server`` unless given.
    """

    images_dir: Path
    page_server: tuple[str, int] | None = None
    ps_socket: int | None = None
    frame_size: Literal[24, 32] | None = None
    connect_timeout: float = 10.0
    link_timeout: float = 30.0
    stop_timeout: float = 30.0
    on_failure: Literal["poison", "kill"] = "poison"
    reconnect: float | None = None
    extended: bool | None = None
    lanes: Literal[1, 2] = 2
    busy_poll: float | None = None
    tls: TlsFiles | None = None
    source_name: str | None = None

    @property
    def remote(self) -> bool:
        """Whether the pages come over a connection."""
        return self.page_server is not None or self.ps_socket is not None
