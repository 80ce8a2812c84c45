"""Both clients where there is no CRIU to talk to: no program, no service, no connection."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import rpc_clients
from criupy import (
    AsyncCriu,
    Criu,
    CriuTimeout,
    CriuUnavailable,
    OptionError,
)
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import (
    Exit,
    Expect,
    Notify,
)
from rpc_peers import (
    DONE,
    HANG,
    PID,
    client_of,
    descriptors,
    enter,
    enter_client,
    raises,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# ---- no CRIU at all ------------------------------------------------------------------------------


def _no_file(directory: Path) -> Path:
    return directory / "criu"


def _directory(directory: Path) -> Path:
    (directory / "criu").mkdir()
    return directory / "criu"


def _not_executable(directory: Path) -> Path:
    (directory / "criu").write_text("#!/bin/sh\n")
    return directory / "criu"


def _no_format(directory: Path) -> Path:
    path = directory / "criu"
    path.write_bytes(b"\x7fELF and no more")
    path.chmod(0o755)
    return path


def _no_interpreter(directory: Path) -> Path:
    path = directory / "criu"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_no_file, "there is no such program - name CRIU's program with binary="),
        (_directory, "this is a directory - name CRIU's program with binary="),
        (_not_executable, "it is not executable - name CRIU's program with binary="),
        (_no_format, "Exec format error"),
        (_no_interpreter, "No such file or directory"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
async def test_no_program(kind: str, tmp_path: Path, make: Callable[[Path], Path], why: str) -> None:
    path = make(tmp_path)
    before = descriptors()
    async with rpc_clients.open_client(kind, binary=path) as client:
        for _ in range(2):
            with raises(CriuUnavailable, f"^version: {re.escape(f'{path}: {why}')}"):
                await client.call("version")
        with raises(CriuUnavailable, f"^dump: {re.escape(f'{path}: {why}')}"):
            await client.call("dump", PID, images_dir=tmp_path)
        with raises(CriuUnavailable, f"^version: {re.escape(f'{path}: {why}')}"):
            await enter(client, "lazy_dump", PID, images_dir=tmp_path)
    assert descriptors() == before


async def test_no_program_on_path(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for how, name in (({}, "criu"), ({"binary": "no-criu"}, "no-criu")):
        async with rpc_clients.open_client(kind, **how) as client:
            with raises(
                CriuUnavailable,
                f"^check: there is no program {name} on PATH - install CRIU, or name it with binary=$",
            ):
                await client.call("check")


@pytest.mark.parametrize("leave", ["nothing", "a file", "a stream", "nobody listening", "too long", "empty"])
async def test_no_service(kind: str, tmp_path: Path, leave: str) -> None:
    path = tmp_path / "service"
    why = "Connection refused"
    if leave == "nothing":
        why = "No such file or directory.* - start criu service --address PATH, or name its socket"
    elif leave == "a file":
        path.touch()
    elif leave == "too long":
        path = tmp_path / ("x" * 200)
        why = "path too long"
    elif leave == "empty":
        with raises(OptionError, "socket: expected a path, got ''"):
            await enter_client(kind, socket="")
        return
    else:
        streams = leave == "a stream"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if streams else socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(path))
            if streams:
                sock.listen()
                why = "Protocol wrong type for socket"
                await _refused(kind, path, why)
                return
        why += ".* - nobody listens there any more: start criu service --address PATH"
    await _refused(kind, path, why)


async def _refused(kind: str, path: Path, why: str) -> None:
    before = descriptors()
    async with rpc_clients.open_client(kind, socket=path) as client:
        with raises(CriuUnavailable, f"^version: {path}: .*{why}"):
            await client.call("version")
    assert descriptors() == before


async def test_a_service_that_accepts_nobody(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "service"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(path))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        waiting.setblocking(False)
        waiting.connect(str(path))
        async with rpc_clients.open_client(kind, socket=path, request_timeout=0.2, grace=0.1) as client:
            with trio.fail_after(HANG), raises(CriuTimeout, "^version: "):
                await client.call("version")
            with trio.fail_after(HANG), raises(CriuTimeout, "^dump: "):
                await client.call("dump", PID, images_dir=tmp_path)


# ---- a descriptor that is no connection ----------------------------------------------------------


def _closed() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    return reading


async def test_no_connection(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        null = os.open("/dev/null", os.O_RDWR)
        stack.callback(os.close, null)
        stream, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (stream, other, datagram, unconnected):
            stack.enter_context(sock)
        before = descriptors()
        for number, why in (
            (null, "expected a socket connected to CRIU, {} is none"),
            (_closed(), "expected a socket connected to CRIU, {} is none"),
            (1 << 20, "expected a socket connected to CRIU, {} is none"),
            (1 << 40, "expected a socket connected to CRIU, {} is none"),
            (stream.fileno(), "expected an AF_UNIX socket of type SOCK_SEQPACKET, {} is none"),
            (datagram.fileno(), "expected an AF_UNIX socket of type SOCK_SEQPACKET, {} is none"),
            (unconnected.fileno(), "expected a socket connected to CRIU, {} is not connected"),
            (-1, "expected the number of a descriptor, got {}"),
            (True, "expected the number of a descriptor, got {}"),
            ("3", "expected the number of a descriptor, got '3'"),
        ):
            with raises(OptionError, f"^fd: {re.escape(why.format(number))}"):
                await enter_client(kind, fd=number)
        assert descriptors() == before


async def test_one_way_is_enough(kind: str) -> None:
    for ways in ({"binary": "criu", "socket": "/run/criu"}, {"socket": "/run/criu", "fd": 0}):
        with raises(OptionError, f"expected one of binary, socket and fd, got {' and '.join(ways)}$"):
            await enter_client(kind, **ways)
    for value in ("", 5, b"criu", True):
        with raises(OptionError, f"^binary: expected a path, got {value!r}$"):
            await enter_client(kind, binary=value)


SECONDS = [math.nan, -1, -0.5, -math.inf, True, False, "3", b"3", [3], 1j]


@pytest.mark.parametrize("value", SECONDS, ids=repr)
async def test_times_that_are_none(kind: str, tmp_path: Path, value: Any) -> None:
    before = descriptors()
    for option in ("request_timeout", "grace"):
        with raises(OptionError, f"^{option}: expected seconds, .*; got {re.escape(repr(value))}$"):
            await enter_client(kind, **{option: value})
    async with rpc_clients.open_client(kind) as client:
        for call in (
            lambda: client.call("version", request_timeout=value),
            lambda: client.call("dump", PID, images_dir=tmp_path, request_timeout=value),
            lambda: client.call("restore", images_dir=tmp_path, request_timeout=value),
            lambda: client.call("page_server_child", images_dir=tmp_path, request_timeout=value),
            lambda: enter(client, "open_dump", PID, images_dir=tmp_path, request_timeout=value),
            lambda: enter(client, "lazy_dump", PID, images_dir=tmp_path, request_timeout=value),
            lambda: enter(client, "lazy_restore", images_dir=tmp_path, request_timeout=value),
        ):
            with raises(OptionError, "^request_timeout: expected seconds"):
                await call()
    assert descriptors() == before


async def test_grace_has_to_be_said(kind: str) -> None:
    with raises(OptionError, "^grace: expected seconds, got None$"):
        await enter_client(kind, grace=None)


@pytest.mark.parametrize("seconds", [1e7, 1e300, sys.float_info.max, math.inf, 1 << 40])
async def test_any_long_time(kind: str, tmp_path: Path, seconds: float) -> None:
    script = [Expect(schema.DUMP), Notify("pre-dump"), DONE, Exit()]
    async with client_of(kind, "swrk", tmp_path, script, request_timeout=seconds, grace=seconds) as (
        client,
        _,
    ):
        await client.call("dump", PID, images_dir=tmp_path)


# ---- without descriptors -------------------------------------------------------------------------


@pytest.mark.parametrize("client", [Criu, AsyncCriu])
def test_no_descriptor_left(client: type[Criu | AsyncCriu]) -> None:
    """Both are made without any, and need none until they are asked."""
    before = descriptors()
    for _ in range(3):
        client()
    assert descriptors() == before
