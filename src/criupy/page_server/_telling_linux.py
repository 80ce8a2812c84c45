"""What a connection's end is called in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Final

from criupy._uffd.server_linux import Account, Ending
from criupy.page_server._statistics import counted
from criupy.page_server._writer import Finished
from criupy.wire.page_server import Command, ImageType, decode_image_id

__all__ = ["tell", "tell_upload"]

log = logging.getLogger("criupy.page_server")

# An end that is not here is as it should be.
_PROBLEMS: Final = {
    Ending.RESET: "reset by the peer",
    Ending.CUT: "it was cut here",
    Ending.IDLE: "nothing was asked for too long (--idle-timeout)",
    Ending.STALLED: "the peer stood still in the middle of something for too long (--stall-timeout)",
    Ending.DATA: "the images cannot be read any more: {error}",
    Ending.CHANGED: "the images have changed since they were read; start the server anew",
    Ending.DISK: "what the source sends cannot be kept: {error}",
    Ending.GONE: "the source has ended before it gave the pages that were asked for",
    Ending.ERROR: "{error}",
    Ending.SPEAKS_TLS: "the peer speaks TLS, which this server was not told to use (--tls)",
    Ending.TRANSPORT: "{fault}",
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

# Of one that did nothing at all.
_QUIET: Final = frozenset({Ending.EOF, Ending.RESET, Ending.CUT})
_RUNS: Final = frozenset({Command.GET, Command.ADD, Command.ADD_F, Command.HOLE})
_OPENS: Final = frozenset({Command.OPEN, Command.OPEN2, Command.PARENT})
_TYPES: Final = {ImageType.TASK: "process", ImageType.SHMEM: "shared memory"}


def _frame(account: Account) -> str:
    command = Command(account.command)
    if command not in _RUNS | _OPENS:
        return f"command {account.command:#x}"
    if command is Command.GET:
        whose = f"process {account.id}"
    elif decoded := decode_image_id(account.id):
        whose = f"{_TYPES[decoded[0]]} {decoded[1]}"
    else:
        whose = f"id {account.id:#x}"
    if command in _OPENS:
        return f"{command.name} of {whose}"
    return f"{command.name} of {counted(account.nr_pages, 'page')} at {account.address:#x} of {whose}"


def _problem(problems: Mapping[Ending, str], account: Account, why: str | None = None) -> str | None:
    """Say what was wrong, and where; None for an end that is as it should be."""
    if account.ending is Ending.EOF and account.fault and not account.requests:
        return account.fault  # it did not like our certificate, say
    if account.ending is None or account.ending not in problems:
        return None
    error = os.strerror(account.errno)
    said = problems[account.ending].format(
        error=error, frame=_frame(account), why=why or error, fault=account.fault
    )
    return f"{said}, byte {account.offset}" if account.ending >= Ending.COMMAND else said


def _did_nothing(account: Account) -> bool:
    """Tell whether there is nothing to say of a peer, such as one that looked whether somebody listens."""
    return not account.requests and not account.fault and account.ending in _QUIET


def _seconds(account: Account) -> float:
    return (account.ended or account.started) - account.started


def tell(account: Account, peer: str) -> None:
    """Log the end of a connection, in one line."""
    pages, requests = counted(account.pages, "page"), counted(account.requests, "request")
    did = f"{pages} for {requests} in {_seconds(account):.3f} s"
    problem = _problem(_PROBLEMS, account)
    if problem is None or _did_nothing(account):
        log.info("connection %d: %s has ended, %s", account.serial, peer, did)
    else:
        log.warning("connection %d: %s: %s; closed after %s", account.serial, peer, problem, did)


def tell_upload(
    account: Account, peer: str, finished: Finished | None, why: str | None, *, has_cost_the_old: bool
) -> None:
    """Log the end of an upload, in one line; ``why`` is what was refused."""
    seconds = _seconds(account)
    problem = _problem(_UPLOAD_PROBLEMS, account, why)
    if problem is None or _did_nothing(account):
        what = "nothing was uploaded"
        if finished is not None:
            what = f"{counted(finished.pages, 'page')} in {counted(finished.images, 'image')}"
            if finished.bytes_given_back:
                what += f", {finished.bytes_given_back >> 10} KiB given back by their parents"
        log.info("connection %d: %s has ended, %s in %.3f s", account.serial, peer, what, seconds)
        return
    left = "its images are whole and stay"
    if finished is None:
        left = "nothing of it is left" + (", nor of what was there before" if has_cost_the_old else "")
    log.warning(
        "connection %d: %s: %s; closed after %s in %.3f s, %s",
        account.serial,
        peer,
        problem,
        counted(account.pages, "page"),
        seconds,
        left,
    )
