"""What the daemon says of its pager: one line for each thing that happened."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from criupy._uffd.image_linux import ffi
from criupy._uffd.pager_linux import Link, Notice, NoticeKind, ReplyFault
from criupy.lazy_pages._extension import refusal_text

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

__all__ = ["log_completion", "log_notice", "trouble_of", "was_refused"]

log = logging.getLogger("criupy.lazy_pages")


def log_notice(notice: Notice) -> None:
    """Log a notice of the pager."""
    match notice.kind:
        case NoticeKind.TASK_DONE:
            log.info("%d: all pages are in place", notice.a)
        case NoticeKind.TASK_GONE:
            log.info("%d: the process is gone, %d pages were not needed any more", notice.a, notice.b)
        case NoticeKind.NO_MEMORY:
            log.warning(
                "%d: no memory for the page at %#x (a cgroup limit?), trying again", notice.a, notice.b
            )
        case NoticeKind.NO_DESCRIPTOR:
            log.warning(
                "%d: a fork waits for a file descriptor (%s), trying again; raise RLIMIT_NOFILE",
                notice.a,
                os.strerror(notice.errno),
            )
        case NoticeKind.NOT_LOCKED:
            log.warning(
                "could not lock %d KiB of buffers in memory (%s); raise RLIMIT_MEMLOCK",
                notice.a >> 10,
                os.strerror(notice.errno),
            )
        case NoticeKind.FEW_COPIERS:
            log.warning(
                "only %d threads that copy could be started (%s), it goes more slowly; see RLIMIT_NPROC",
                notice.a,
                os.strerror(notice.errno),
            )


def trouble_of(stats: Stats, link_timeout: float) -> str | None:
    """Say why a transfer cannot go on, None while it can; ``link_timeout`` is in seconds."""
    if stats.error:
        return f"the pager failed: {os.strerror(stats.error)}"
    if stats.refused:
        return refusal_text(stats.refused)
    if stats.link != Link.LOST:
        return None
    if told := ffi.string(stats.link_fault).decode(errors="replace"):
        return f"the connection to the page server was lost: {told}"
    match stats.link_error:
        case errno.EPROTO:
            if stats.reply_fault == ReplyFault.TLS:
                return "the page server wants TLS: see --tls"
            bad = stats.bad_reply
            return (
                f"the page server broke the protocol ({ReplyFault(stats.reply_fault).name.lower()}) "
                f"at byte {stats.bad_reply_offset}: cmd {bad.cmd:#x}, {bad.nr_pages} pages, "
                f"address {bad.vaddr:#x}, id {bad.dst_id:#x}; does --frame fit its CRIU version?"
            )
        case errno.ETIMEDOUT:
            return (
                f"the page server was silent for {link_timeout:g} s with pages outstanding; "
                "see --link-timeout"
            )
        case errno.EPIPE:
            return "the page server closed the connection"
    return f"the connection to the page server was lost: {os.strerror(stats.link_error)}"


def was_refused(stats: Stats) -> bool:
    """Tell whether the source ended the connection for want of TLS, or for a certificate of ours.

    Under TLS 1.3 that shows only after our side of the handshake.
    """
    if stats.link != Link.LOST:
        return False
    no_tls = stats.link_error == errno.EPROTO and stats.reply_fault == ReplyFault.TLS
    return no_tls or (not stats.bytes_received and bool(ffi.string(stats.link_fault)))


def log_completion(stats: Stats) -> None:
    """Log the end of a transfer that is complete, and what was odd about it."""
    if stats.link == Link.CLOSED and stats.close_status:
        log.warning("every page arrived, but the page server ended with status %d", stats.close_status)
    elif stats.link == Link.LOST:
        log.warning(
            "every page arrived, but the page server did not confirm the end (%s)",
            os.strerror(stats.link_error),
        )
    log.info("transferred %d pages, served %d faults", stats.pages_received, stats.nr_faults)
