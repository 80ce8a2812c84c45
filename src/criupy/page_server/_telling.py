"""What a connection's end is called in the log."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from criupy._uffd.server_linux import Account

__all__ = ["tell"]

log = logging.getLogger("criupy.page_server")


def _frame(account: Account) -> str:
    if account.command == 7:
        plural = "" if account.nr_pages == 1 else "s"
        return f"GET of {account.nr_pages} page{plural} at {account.address:#x} of process {account.id}"
    return f"command {account.command:#x}"


def _problem(account: Account, stall_timeout: float) -> str | None:
    """Say what was wrong; None for an end that is as it should be."""
    from criupy._uffd.server_linux import Ending

    match account.ending:
        case Ending.CLOSED | Ending.EOF | Ending.CUT | None:
            return None
        case Ending.RESET:
            return "reset by the peer"
        case Ending.IDLE:
            return "nothing was asked for too long (--idle-timeout)"
        case Ending.STALLED:
            return f"the peer stood still for {stall_timeout:g} s in the middle of something"
        case Ending.DATA:
            return f"the images cannot be read any more: {os.strerror(account.errno)}"
        case Ending.ERROR:
            return os.strerror(account.errno)
        case Ending.COMMAND:
            return f"{_frame(account)}: nothing that is done here"
        case Ending.COUNT:
            return f"{_frame(account)}: no pages"
        case Ending.ADDRESS:
            return f"{_frame(account)}: not the address of a page"
        case Ending.ID:
            return f"{_frame(account)}: there is no such process in the images"
        case Ending.PAGE:
            return f"{_frame(account)}: that is no lazy page of it"
        case Ending.TRUNCATED:
            return "the stream ended inside a frame"
        case Ending.TRAILING:
            return "something came after CLOSE"


def tell(account: Account, peer: str, stall_timeout: float) -> None:
    """Log the end of a connection, in one line."""
    seconds = (account.ended or account.started) - account.started
    did = f"{account.pages} pages for {account.requests} requests in {seconds:.3f} s"
    problem = _problem(account, stall_timeout)
    if problem is None:
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
    else:
        where = f", byte {account.offset}" if account.ending is not None and account.ending >= Ending.COMMAND else ""
        log.warning("connection %d: %s: %s%s; closed after %s", account.serial, peer, problem, where, did)
