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

    if account.ending is Ending.EOF and account.fault and not account.requests:
        return account.fault
    if account.ending in {Ending.CLOSED, Ending.EOF, Ending.CUT, None}:
        return None
    return {
        Ending.RESET: "reset by the peer",
        Ending.IDLE: "nothing was asked for too long (--idle-timeout)",
        Ending.STALLED: f"the peer stood still for {stall_timeout:g} s in the middle of something",
        Ending.DATA: f"the images cannot be read any more: {os.strerror(account.errno)}",
        Ending.ERROR: os.strerror(account.errno),
        Ending.COMMAND: f"{_frame(account)}: nothing that is done here",
        Ending.COUNT: f"{_frame(account)}: no pages",
        Ending.ADDRESS: f"{_frame(account)}: not the address of a page",
        Ending.ID: f"{_frame(account)}: there is no such process in the images",
        Ending.PAGE: f"{_frame(account)}: that is no lazy page of it",
        Ending.TRUNCATED: "the stream ended inside a frame",
        Ending.TRAILING: "something came after CLOSE",
        Ending.SPEAKS_TLS: "the peer speaks TLS, which this server was not told to use (--tls)",
        Ending.TRANSPORT: account.fault,
    }[account.ending]


def tell(account: Account, peer: str, stall_timeout: float) -> None:
    """Log the end of a connection, in one line."""
    from criupy._uffd.server_linux import Ending

    seconds = (account.ended or account.started) - account.started
    did = f"{account.pages} pages for {account.requests} requests in {seconds:.3f} s"
    problem = _problem(account, stall_timeout)
    if problem is None:
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
    else:
        broken = account.ending is not None and Ending.COMMAND <= account.ending <= Ending.TRAILING
        where = f", byte {account.offset}" if broken else ""
        log.warning("connection %d: %s: %s%s; closed after %s", account.serial, peer, problem, where, did)
