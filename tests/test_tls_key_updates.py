"""Keys of TLS 1.3 that wear out: the bytes on both sides stay right from one key to the next."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._tls.files import TlsFiles
from criupy._tls.tls_linux import TlsContext, TlsSession
from criupy._uffd._native import ffi
from criupy._uffd.server_linux import Ending
from criupy.page_server import Config as ServerConfig
from criupy.page_server import open_page_server
from criupy.testing.certificates import Certificates
from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec
from page_server_clients import loopback
from serving import MIB, all_good, serve
from test_tls_serving import ADDRESS, handshake, python_end, wrap

pytestmark = pytest.mark.usefixtures("nothing_is_left")

RECORD = 16384
KEY_UPDATE = 24  # RFC 8446, B.3


def wear_out(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let keys of ours be good for so many bytes."""
    init = TlsContext.__init__

    def worn_out_soon(self: TlsContext, files: TlsFiles, *, server: bool) -> None:
        init(self, files, server=server)
        self._lib.criupy_tls_context_set_bytes_per_key(self._context, size)

    monkeypatch.setattr(TlsContext, "__init__", worn_out_soon)


@pytest.fixture(params=[1, 5 * RECORD])
def bytes_per_key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    wear_out(monkeypatch, request.param)
    return int(request.param)


class End:
    """What pager and page server do with a transport: send something, and receive so many bytes."""

    def __init__(self, session: TlsSession, sock: socket.socket, sent: bytes, size: int) -> None:
        self.sock = sock
        self.received = bytearray()
        self._transport: Any = ffi.cast("struct criupy_transport *", session.transport)
        self._sent = sent
        self._taken = 0
        self._size = size
        self._random = random.Random(size)
        self._into = ffi.new("char[]", 6 * RECORD)

    def step(self) -> int:
        """Do what can be done now; return the poll events to wait for, 0 when all is done."""
        transport = self._transport
        while self._taken < len(self._sent):
            piece = self._sent[self._taken : self._taken + self._random.randint(1, 2 * RECORD)]
            taken = self._result(transport.send(transport, piece, len(piece)))
            if taken is None:
                break
            self._taken += taken
        flushed = self._result(transport.flush(transport)) is not None
        while len(self.received) < self._size:
            room = self._random.randint(1, 6 * RECORD)
            got = self._result(transport.receive(transport, self._into, room))
            if got is None:
                break
            self.received += bytes(ffi.buffer(self._into, got))
        missing = len(self.received) < self._size
        unsent = not flushed or self._taken < len(self._sent)
        return (select.POLLIN if missing else 0) | (select.POLLOUT if unsent else 0)

    def _result(self, result: int) -> int | None:
        assert result >= 0 or result == -errno.EAGAIN, errno.errorcode[-result]
        return result if result >= 0 else None


def run(*ends: End) -> None:
    """Let ends of ours talk until they have sent and received all."""
    while waiting := {end.sock.fileno(): events for end in ends if (events := end.step())}:
        poll = select.poll()
        for fd, events in waiting.items():
            poll.register(fd, events)
        assert poll.poll(10_000), "nothing comes any more"


@contextlib.contextmanager
def secured(certificates: Certificates, sock: socket.socket, *, server: bool) -> Iterator[TlsSession]:
    """A session of ours on one end of a connection."""
    sock.setblocking(False)
    files = certificates.files("server" if server else "client")
    with TlsContext(files, server=server).session(sock.fileno(), ADDRESS) as session:
        yield session


@pytest.fixture
def socks() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = loopback()
    with pair[0], pair[1]:
        yield pair


@pytest.mark.usefixtures("bytes_per_key")
def test_between_our_ends(certificates: Certificates, socks: tuple[socket.socket, socket.socket]) -> None:
    """Both update, each in the middle of what the other sends."""
    one, other = random.Random(1).randbytes(4 * MIB), random.Random(2).randbytes(3 * MIB)
    with (
        secured(certificates, socks[0], server=False) as client,
        secured(certificates, socks[1], server=True) as server,
    ):
        thread = threading.Thread(target=handshake, args=(client, socks[0].fileno()))
        thread.start()
        handshake(server, socks[1].fileno())
        thread.join()
        ends = End(client, socks[0], one, len(other)), End(server, socks[1], other, len(one))
        run(*ends)
    assert ends[0].received == other
    assert ends[1].received == one


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("server", [True, False])
def test_with_pythons_ssl(
    certificates: Certificates,
    socks: tuple[socket.socket, socket.socket],
    server: bool,
    version: ssl.TLSVersion,
    bytes_per_key: int,
) -> None:
    """It sends back what it gets; TLS 1.2 has no such thing as new keys."""
    data = random.Random(3).randbytes(4 * MIB)
    updates: list[str] = []

    def see(_: object, direction: str, _version: object, _content: object, kind: int, _data: bytes) -> None:
        if kind == KEY_UPDATE:
            updates.append(direction)

    def echo(sock: ssl.SSLSocket) -> None:
        left = len(data)
        while left:
            piece = sock.recv(2 * RECORD)
            assert piece
            sock.sendall(piece)
            left -= len(piece)

    context = python_end(certificates, server=not server)
    context.maximum_version = version
    context._msg_callback = see  # type: ignore[attr-defined]
    ours, theirs = socks
    with (
        secured(certificates, ours, server=server) as session,
        wrap(context, theirs, session, ours.fileno(), server=not server) as sock,
    ):
        thread = threading.Thread(target=echo, args=(sock,))
        thread.start()
        end = End(session, ours, data, len(data))
        run(end)
        thread.join()
    assert end.received == data
    if version == ssl.TLSVersion.TLSv1_3:
        assert len(data) // (bytes_per_key + RECORD) <= len(updates) <= len(data) // bytes_per_key
        assert set(updates) == {"read"}
    else:
        assert not updates


def test_a_peer_that_asks_for_new_keys(certificates: Certificates) -> None:
    """openssl(1) does, on a line that begins with K; our new key comes before our next bytes."""
    files = certificates.files("server")
    words = ["-cert", files.cert, "-key", files.key, "-CAfile", files.cacert, "-Verify", "1", "-msg"]
    with subprocess.Popen(
        ["openssl", "s_server", "-accept", f"{ADDRESS}:0", "-naccept", "1", *map(str, words)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        told = b""

        def tells(pattern: bytes) -> str:
            """Wait until it has said this, and return all since the last time."""
            nonlocal told
            assert peer.stdout is not None
            while not (found := re.search(pattern, told)):
                more = peer.stdout.read(1 << 16)
                assert more, told
                told += more
            before, told = told[: found.end()], told[found.end() :]
            return before.decode(errors="replace")

        port = int(tells(rb"ACCEPT \S+:\d+\n").rpartition(":")[2])
        with (
            socket.create_connection((ADDRESS, port)) as sock,
            secured(certificates, sock, server=False) as session,
        ):
            handshake(session, sock.fileno())
            for nr in range(5):
                peer.stdin.write(b"K\n")
                tells(b">>> .*KeyUpdate\n")
                asked = f"and {nr}?\n".encode()
                peer.stdin.write(asked)
                run(end := End(session, sock, b"", len(asked)))
                assert end.received == asked
                run(End(session, sock, f"yes {nr}\n".encode(), 0))
                assert re.search("<<< .*KeyUpdate", tells(f"yes {nr}\n".encode()))


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program", "bytes_per_key")
async def test_a_restore(room: Path, certificates: Certificates) -> None:
    """Our page server and our daemon, both with keys that wear out."""
    spec = WorkloadSpec(size=8 * MIB, areas=2, tree=2)
    full = write_images(room / "full", spec, style="full")
    lazy = write_images(room / "lazy", spec)
    config = ServerConfig(full.directory, once=True, tls=certificates.files("server"))
    async with open_page_server(config) as server:
        where = (server.address, server.port)
        ours = certificates.files("client")
        async with (
            serve(room, spec, images=lazy, style="full", page_server=where, tls=ours) as s,
            s.restore(early=4) as standin,
        ):
            await standin.finish()
            await s.daemon.wait()
            await all_good(standin)
        await server.wait()
        assert server.last is not None
        assert server.last.ending is Ending.CLOSED
