"""What a connection's end is called in the log."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from criupy._uffd.server_linux import Account
    from criupy.page_server._writer import Finished

__all__ = ["tell", "tell_upload"]

log = logging.getLogger("criupy.page_server")

#: By the name of an Ending; those that are as they should be are missing.
_PROBLEMS = {
    "RESET": "reset by the peer",
    "IDLE": "nothing was asked for too long (--idle-timeout)",
    "STALLED": "the peer stood still for {stall_timeout:g} s in the middle of something",
    "DATA": "the images cannot be read any more: {error}",
    "ERROR": "{error}",
    "COMMAND": "{frame}: nothing that is done here",
    "COUNT": "{frame}: no pages",
    "ADDRESS": "{frame}: not the address of a page",
    "ID": "{frame}: there is no such process in the images",
    "PAGE": "{frame}: that is no lazy page of it",
    "TRUNCATED": "the stream ended inside a frame",
    "TRAILING": "something came after CLOSE",
}
_UPLOAD_PROBLEMS = _PROBLEMS | {
    "EOF": "the peer closed without CLOSE",
    "CUT": "it was cut here",
    "IDLE": "nothing came for too long (--idle-timeout)",
    "DISK": "the images cannot be written: {error}",
    "REFUSED": "{why}",
    "COUNT": "{frame}: not a possible number of pages",
    "ID": "{frame}: not the type of a pagemap",
    "TRUNCATED": "the stream ended inside a frame or its pages",
    "FLAGS": "{frame}: its flags mean nothing",
    "ORDER": "{frame}: it begins before the end of the entry before",
    "UNOPENED": "{frame}: that is not what was opened",
}

_COMMANDS = {1: "ADD", 2: "HOLE", 3: "OPEN", 4: "OPEN2", 5: "PARENT", 6: "ADD_F", 7: "GET"}
_ADDS = frozenset({1, 2, 6})
_GET = 7
_TYPES = {1: "process", 2: "shared memory"}


def _frame(account: Account) -> str:
    name = _COMMANDS.get(account.command)
    if name is None:
        return f"command {account.command:#x}"
    kind = "process" if account.command == _GET else _TYPES.get(account.id & 0xFF)
    number = account.id if account.command == _GET else account.id >> 8
    whose = f"{kind} {number}" if kind else f"id {account.id:#x}"
    if account.command != _GET and account.command not in _ADDS:
        return f"{name} of {whose}"
    plural = "" if account.nr_pages == 1 else "s"
    return f"{name} of {account.nr_pages} page{plural} at {account.address:#x} of {whose}"


def _problem(
    problems: dict[str, str], account: Account, stall_timeout: float, why: str | None = None
) -> str | None:
    """Say what was wrong, and where; None for an end that is as it should be."""
    from criupy._uffd.server_linux import Ending

    if account.ending is None or account.ending.name not in problems:
        return None
    error = os.strerror(account.errno)
    said = problems[account.ending.name].format(
        stall_timeout=stall_timeout, error=error, frame=_frame(account), why=why or error
    )
    return f"{said}, byte {account.offset}" if account.ending >= Ending.COMMAND else said


def tell(account: Account, peer: str, stall_timeout: float) -> None:
    """Log the end of a connection, in one line."""
    seconds = (account.ended or account.started) - account.started
    did = f"{account.pages} pages for {account.requests} requests in {seconds:.3f} s"
    problem = _problem(_PROBLEMS, account, stall_timeout)
    if problem is None:
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
    else:
        log.warning("connection %d: %s: %s; closed after %s", account.serial, peer, problem, did)


def tell_upload(
    account: Account, peer: str, stall_timeout: float, finished: Finished | None, why: str | None
) -> None:
    """Log the end of an upload, in one line; ``why`` is what was refused."""
    seconds = (account.ended or account.started) - account.started
    problem = _problem(_UPLOAD_PROBLEMS, account, stall_timeout, why)
    if problem is None or (finished is None and not account.requests):
        what = "nothing was uploaded"
        if finished is not None:
            what = f"{finished.pages} pages in {finished.images} images"
            if finished.bytes_given_back:
                what += f", {finished.bytes_given_back >> 10} KiB given back by their parents"
        log.info("connection %d: %s has ended, %s in %.3f s", account.serial, peer, what, seconds)
        return
    left = "nothing of it is left" if finished is None else "its images are whole and stay"
    log.warning(
        "connection %d: %s: %s; closed after %d pages in %.3f s, %s",
        account.serial,
        peer,
        problem,
        account.pages,
        seconds,
        left,
    )
