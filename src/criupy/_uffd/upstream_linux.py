"""The source of a relay, as Python drives it.

The thread behind :class:`Upstream` fetches without the interpreter, and the
threads of a page server take from it. Everything here happens once per task or
per second.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from criupy._uffd.image_linux import Image, check, ffi, lib
from criupy._uffd.pager_linux import Link, ReplyFault

if TYPE_CHECKING:
    from criupy._uffd._native import UpstreamStats

__all__ = ["Upstream", "UpstreamState"]


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """What an upstream has done so far.

    ``errno`` says why a link is LOST: EPIPE is an end of the stream, ETIMEDOUT
    silence, EPROTO an answer with this ``reply_fault``, whose frame has
    ``command`` and the other fields and began ``offset`` bytes into the stream.
    ``close_status`` is what the source answered to CLOSE, None before.
    ``disk_errno``, unless it is 0, says why nothing more can be kept.
    ``complete``: every page is kept, so the source is not needed any more.
    ``pages_fetched`` counts a page each time that it came, ``pages_given`` once
    (again when it was evicted and fetched for somebody a second time).
    """

    link: Link
    errno: int
    close_status: int | None
    disk_errno: int
    complete: bool
    reply_fault: ReplyFault
    command: int
    nr_pages: int
    address: int
    id: int
    offset: int
    bytes_received: int
    requests: int
    urgent_requests: int
    pages_outstanding: int
    pages_total: int
    pages_fetched: int
    pages_kept: int
    pages_evicted: int
    pages_given: int


def _state(stats: UpstreamStats) -> UpstreamState:
    return UpstreamState(
        link=Link(stats.state),
        errno=stats.error,
        close_status=stats.close_status if stats.state == Link.CLOSED else None,
        disk_errno=stats.disk_error,
        complete=bool(stats.complete),
        reply_fault=ReplyFault(stats.reply_fault),
        command=stats.bad_reply.cmd,
        nr_pages=stats.bad_reply.nr_pages,
        address=stats.bad_reply.vaddr,
        id=stats.bad_reply.dst_id,
        offset=stats.bad_reply_offset,
        bytes_received=stats.bytes_received,
        requests=stats.nr_requests,
        urgent_requests=stats.nr_urgent,
        pages_outstanding=stats.nr_outstanding,
        pages_total=stats.pages_total,
        pages_fetched=stats.pages_fetched,
        pages_kept=stats.pages_kept,
        pages_evicted=stats.pages_evicted,
        pages_given=stats.pages_given,
    )


class Upstream:
    """Fetches every page of a stock source over the one connection that it accepts.

    What a client of the page server waits for goes first. ``link_timeout``
    (seconds): how long the source may be silent while something is outstanding.
    At most ``cache_pages`` are kept, those go first that a client has; None
    keeps all.
    """

    def __init__(self, *, link_timeout: float, cache_pages: int | None = None) -> None:
        if cache_pages is not None and cache_pages < 1:
            raise ValueError(f"cache_pages: expected 1 or more, got {cache_pages}")
        config = ffi.new(
            "struct criupy_upstream_config *",
            {"link_timeout_ns": int(link_timeout * 1e9), "cache_pages": cache_pages or 0},
        )
        out = ffi.new("struct criupy_upstream **")
        check("make an upstream", lib.criupy_upstream_create(out, config))
        self._upstream: Any = out[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.destroy()

    def destroy(self) -> None:
        """Stop fetching; a connection that is still open is reset, and the source goes on.

        A server can go on giving out what was fetched, unless the source does so.
        """
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            lib.criupy_upstream_destroy(upstream)

    def add_image(self, image: Image, fd: int) -> None:
        """Keep an image's pages in the file ``fd``, at its ``data_pages``; both are the upstream's now.

        Only before ``start``.
        """
        check("fetch an image", lib.criupy_upstream_add_image(self._to_share(), image._to_give(), fd))
        image._given()

    def start(self, fd: int, frame_size: int) -> None:
        """Fetch over this connection, which is the upstream's now, with frames of ``frame_size`` bytes."""
        check("fetch from a source", lib.criupy_upstream_start(self._to_share(), fd, frame_size))

    @property
    def event_fd(self) -> int:
        """Readable when the link, an error or completeness has changed; ``snapshot`` resets it."""
        return int(lib.criupy_upstream_event_fd(self._to_share()))

    def snapshot(self) -> UpstreamState:
        """Return what was done so far."""
        with contextlib.suppress(BlockingIOError):  # nothing new since the last call
            os.eventfd_read(self.event_fd)
        stats = ffi.new("struct criupy_upstream_stats *")
        lib.criupy_upstream_snapshot(self._to_share(), stats)
        return _state(stats)

    def close(self) -> None:
        """Ask for nothing more, receive what is outstanding, and end with CLOSE."""
        check("close an upstream", lib.criupy_upstream_close(self._to_share()))

    def reset(self) -> None:
        """End the connection by a reset, whoever else holds it: the source goes on, and no page is given."""
        check("reset an upstream", lib.criupy_upstream_reset(self._to_share()))

    def leave(self) -> None:
        """Let go of the connection without a word to the source, which somebody else holds."""
        check("leave an upstream", lib.criupy_upstream_leave(self._to_share()))

    def _to_share(self) -> Any:
        if self._upstream is None:
            raise ValueError("the upstream was destroyed")
        return self._upstream
