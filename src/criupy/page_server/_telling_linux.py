"""What a connection's end is called in the log."""

from __future__ import annotations

import logging
import os
from typing import Final

from criupy._uffd.server_linux import Account, Ending
from criupy.wire.page_server import Command

__all__ = ["tell"]

log = logging.getLogger("criupy.page_server")

# An end that is not here is as it should be.
_PROBLEMS: Final = {
    Ending.RESET: "reset by the peer",
    Ending.IDLE: "nothing was asked for too long (--idle-timeout)",
    Ending.STALLED: "the peer stood still in the middle of something for too long (--stall-timeout)",
    Ending.DATA: "the images cannot be read any more: {error}",
    Ending.ERROR: "{error}",
    Ending.COMMAND: "{frame}: nothing that is done here",
    Ending.COUNT: "{frame}: no pages",
    Ending.ADDRESS: "{frame}: not the address of a page",
    Ending.ID: "{frame}: there is no such process in the images",
    Ending.PAGE: "{frame}: that is no lazy page of it",
    Ending.TRUNCATED: "the stream ended inside a frame",
    Ending.TRAILING: "something came after CLOSE",
}


def _frame(account: Account) -> str:
    if account.command == Command.GET:
        plural = "" if account.nr_pages == 1 else "s"
        return f"GET of {account.nr_pages} page{plural} at {account.address:#x} of process {account.id}"
    return f"command {account.command:#x}"


def tell(account: Account, peer: str) -> None:
    """Log the end of a connection, in one line."""
    seconds = (account.ended or account.started) - account.started
    did = f"{account.pages} pages for {account.requests} requests in {seconds:.3f} s"
    ending = account.ending
    if ending is None or ending not in _PROBLEMS:
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
        return
    problem = _PROBLEMS[ending].format(error=os.strerror(account.errno), frame=_frame(account))
    where = f", byte {account.offset}" if ending >= Ending.COMMAND else ""
    log.warning("connection %d: %s: %s%s; closed after %s", account.serial, peer, problem, where, did)
