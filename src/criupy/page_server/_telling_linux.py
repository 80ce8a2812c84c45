"""What a connection's end is called in the log."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from criupy._uffd.server_linux import Account, Ending
from criupy.wire.page_server import Command, decode_image_id

if TYPE_CHECKING:
    from criupy.page_server._writer import Finished

__all__ = ["tell", "tell_upload"]

log = logging.getLogger("criupy.page_server")

# An end that is not here is as it should be.
_PROBLEMS: Final = {
    Ending.RESET: "reset by the peer",
    Ending.IDLE: "nothing was asked for too long (--idle-timeout)",
    Ending.STALLED: "the peer stood still in the middle of something for too long (--stall-timeout)",
    Ending.DATA: "the images cannot be read any more: {error}",
    Ending.ERROR: "{error}",
    Ending.COMMAND: "{frame}: nothing that is done here",
    Ending.COUNT: "{frame}: no pages, or more than there are addresses",
    Ending.ADDRESS: "{frame}: not the address of a page",
    Ending.ID: "{frame}: there is no such process in the images",
    Ending.PAGE: "{frame}: that is no lazy page of it",
    Ending.TRUNCATED: "the stream ended inside a frame",
    Ending.TRAILING: "something came after CLOSE",
}


_UPLOAD_PROBLEMS: Final = _PROBLEMS | {
    Ending.EOF: "the peer closed without CLOSE",
    Ending.CUT: "it was cut here",
    Ending.IDLE: "nothing came for too long (--idle-timeout)",
    Ending.DISK: "the images cannot be written: {error}",
    Ending.REFUSED: "{why}",
    Ending.COUNT: "{frame}: not a possible number of pages",
    Ending.ID: "{frame}: not the type of a pagemap",
    Ending.TRUNCATED: "the stream ended inside a frame or its pages",
    Ending.FLAGS: "{frame}: its flags mean nothing",
    Ending.ORDER: "{frame}: it begins before the end of the entry before",
    Ending.UNOPENED: "{frame}: that is not what was opened",
}

_ADDS: Final = frozenset({Command.ADD, Command.HOLE, Command.ADD_F})
_OPENS: Final = frozenset({Command.OPEN, Command.OPEN2, Command.PARENT})


def _frame(account: Account) -> str:
    plural = "" if account.nr_pages == 1 else "s"
    pages = f"{account.nr_pages} page{plural} at {account.address:#x}"
    if account.command == Command.GET:
        return f"GET of {pages} of process {account.id}"
    if account.command not in _ADDS | _OPENS:
        return f"command {account.command:#x}"
    decoded = decode_image_id(account.id)
    whose = f"id {account.id:#x}" if decoded is None else f"{decoded[0].name.lower()} {decoded[1]}"
    name = Command(account.command).name
    return f"{name} of {pages} of {whose}" if account.command in _ADDS else f"{name} of {whose}"


def _problem(problems: dict[Ending, str], account: Account, why: str | None = None) -> str | None:
    """Say what was wrong, and where; None for an end that is as it should be."""
    ending = account.ending
    if ending is None or ending not in problems:
        return None
    error = os.strerror(account.errno)
    said = problems[ending].format(error=error, frame=_frame(account), why=why or error)
    return f"{said}, byte {account.offset}" if ending >= Ending.COMMAND else said


def _seconds(account: Account) -> float:
    return (account.ended or account.started) - account.started


def tell(account: Account, peer: str) -> None:
    """Log the end of a connection, in one line."""
    did = f"{account.pages} pages for {account.requests} requests in {_seconds(account):.3f} s"
    problem = _problem(_PROBLEMS, account)
    if problem is None:
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
    else:
        log.warning("connection %d: %s: %s; closed after %s", account.serial, peer, problem, did)


def tell_upload(account: Account, peer: str, finished: Finished | None, why: str | None) -> None:
    """Log the end of an upload, in one line; ``why`` is what was refused."""
    problem = _problem(_UPLOAD_PROBLEMS, account, why)
    did = f"{account.pages} pages in {_seconds(account):.3f} s"
    if problem is None or (finished is None and not account.requests):
        images = "nothing was uploaded" if finished is None else f"{finished.images} images"
        given_back = finished.bytes_given_back if finished is not None else 0
        parents = f", {given_back >> 10} KiB given back by their parents" if given_back else ""
        log.info("connection %d: %s has ended, %s, %s%s", account.serial, peer, images, did, parents)
        return
    left = "nothing of it is left" if finished is None else "its images are whole and stay"
    log.warning("connection %d: %s: %s; closed after %s, %s", account.serial, peer, problem, did, left)
