"""A scripted peer with a client of either kind, and what the tests of the clients say of both."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

import rpc_clients
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import (
    Peer,
    Reply,
    Script,
    scripted_criu,
    scripted_service,
    scripted_worker,
)
from rpc_clients import Client

WAYS = ("swrk", "service", "fd")
HANG = 60
"""Seconds after which a test counts as hung."""

PID = 4321
"""Of the process to be dumped; nobody here looks whether it exists."""


def response(kind: schema.RequestType.ValueType, *, success: bool = True, **fields: Any) -> schema.Response:
    return schema.Response(type=kind, success=success, **fields)


def note(script: str = "pre-dump") -> schema.Response:
    return response(schema.NOTIFY, notify=schema.Notify(script=script))


DONE = Reply(response(schema.DUMP))
FAILED = Reply(
    response(schema.DUMP, success=False, cr_errno=3, cr_errmsg=b"Error (criu/cr-dump.c:1): no way")
)
RESTORED = Reply(response(schema.RESTORE, restore=schema.RestoreAnswer(pid=17)))


@contextlib.contextmanager
def reached(
    way: str, directory: Path, scripts: Sequence[Script], version: Sequence[int] | None
) -> Iterator[tuple[Peer, dict[str, Any]]]:
    """A peer, and how a client is to reach it."""
    if way == "swrk":
        with scripted_criu(directory, scripts, version=version) as peer:
            yield peer, {"binary": peer.path}
    elif way == "service":
        with scripted_service(directory, scripts, version=version) as peer:
            yield peer, {"socket": peer.path}
    else:
        (script,) = scripts
        with scripted_worker(directory, script, version=version) as (peer, sock):
            yield peer, {"fd": sock.fileno()}


def descriptors() -> list[str]:
    """What is open here."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found.append(f"{link.name} {link.readlink()}")
    return sorted(found)


@contextlib.asynccontextmanager
async def client_of(
    kind: str,
    way: str,
    directory: Path,
    *scripts: Script,
    version: Sequence[int] | None = (4, 2, 1),
    **how: Any,
) -> AsyncIterator[tuple[Client, Peer]]:
    """A client and its peer; once it is closed nothing is left here, nor a worker that it started."""
    with trio.fail_after(HANG), reached(way, directory, scripts, version) as (peer, where):
        before = descriptors()
        async with rpc_clients.open_client(kind, **where, **how) as client:
            yield client, peer
        assert descriptors() == before
        if way == "swrk":
            for connection in peer.connections:
                assert not is_child(connection.pid), "neither running nor a zombie"


def raises(error: type[BaseException], message: str = "") -> pytest.RaisesExc[BaseException]:
    """It is of this very class, and its text says this; pytest's own match sees the notes as well."""

    def check(raised: BaseException) -> bool:
        assert type(raised) is error
        assert re.search(message, str(raised)), str(raised)
        return True

    return pytest.raises(error, check=check)


def is_child(pid: int) -> bool:
    """Whether there is such a child of ours, be it a zombie; an orphan is init's to reap."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(text.rpartition(")")[2].split()[1]) == os.getpid()


def notes(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return "\n".join(getattr(caught.value, "__notes__", ()))


async def enter(client: Client, method: str, *arguments: Any, **options: Any) -> None:
    async with client.block(method, *arguments, **options):
        pass


async def enter_client(kind: str, **how: Any) -> None:
    async with rpc_clients.open_client(kind, **how):
        pass


async def inside(client: Client, block: Any) -> None:
    if client.is_async:
        async with block:
            pass
    else:
        with block:
            pass


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of other processes no event tells
        await trio.sleep(0.005)
