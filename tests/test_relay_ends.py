"""Ends of a relay's session that cross: what was decided once holds, and nobody is told otherwise."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._tls.tls_linux import TlsFiles, is_available
from criupy.errors import ImageError, PageServerError, TlsError
from criupy.images import MARKER, read_marker
from criupy.lazy_pages._extension import Extension, RefusedError
from criupy.lazy_pages._saying_linux import say
from criupy.page_server import Config as ServerConfig
from criupy.page_server import Fate, PageServer, Relay, RelayConfig, open_relay
from criupy.page_server._control_linux import ABORT, SOCKET_NAME, ask
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.link_linux import Link, Loss, open_link
from criupy.testing.page_server import Behaviour, End
from criupy.testing.page_server import PageServer as Source
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.wire.extension import Hello, Lane, Refusal, encode_plain
from criupy.wire.page_server import Command, Frame
from page_server_clients import OPEN2, Destination, task
from page_server_command import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

MIB = 1 << 20
SPEC = WorkloadSpec(size=4 * MIB, areas=2)
# So a spool takes long enough for anything to happen meanwhile.
SLOW = Behaviour(delay=0.2, max_pages=16)


class Ours(Destination):
    """A destination as a daemon of ours is one, in blocking calls."""

    def __init__(self, address: tuple[str, int], images: WrittenImages, counter: int = 1) -> None:
        super().__init__(socket.create_connection(address))
        marker = read_marker(images.directory)
        assert marker is not None
        self.sock.sendall(Hello(bytes(16), Lane.BULK, counter).encode(marker.key))

    def say(self, what: Command) -> int:
        """Say ABORT or CLOSE, and return the answer."""
        self.sock.sendall(encode_plain(what))
        (status,) = struct.unpack("<i", self.receive(4))
        return int(status)

    def refusal(self) -> Refusal:
        frame = Frame.decode(self.receive(32), 32)
        assert frame.command is Command.REFUSED
        return Refusal(frame.nr_pages)


@dataclass(slots=True, eq=False)
class Relayed:
    images: WrittenImages
    source: Source
    server: PageServer
    relay: Relay
    upstream: Link
    room: Path

    async def connect(self, counter: int = 1) -> Ours:
        where = (self.server.address, self.server.port)
        return await trio.to_thread.run_sync(Ours, where, self.images, counter)

    async def get(self, client: Destination) -> None:
        """Ask for a page, from which on the source is held twice."""
        first = self.images.tasks[0]
        await trio.to_thread.run_sync(client.get, first.pid, first.runs[0].start)

    async def abort(self) -> str:
        return await trio.to_thread.run_sync(ask, self.room / SOCKET_NAME, ABORT, 30.0)


@contextlib.asynccontextmanager
async def a_source(
    room: Path, behaviour: Behaviour | None = None
) -> AsyncIterator[tuple[WrittenImages, Source]]:
    images = write_images(room / "images", SPEC, style="lazy")
    source = Source(images, behaviour or Behaviour())
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        yield images, source
        with trio.fail_after(10):
            await source.ended.wait()
    assert source.violations == []


@contextlib.asynccontextmanager
async def relayed(room: Path, behaviour: Behaviour | None = None, **relay: Any) -> AsyncIterator[Relayed]:
    async with (
        a_source(room, behaviour) as (images, source),
        open_link((source.address, source.port)) as link,
    ):
        config = RelayConfig((link.address, link.port), work_dir=room, **relay)
        async with open_relay(ServerConfig(images.directory), config) as (server, kept):
            yield Relayed(images, source, server, kept, link, room)
            server.stop()


# ---- CLOSE with a spool that is not complete -------------------------------------------------------------


async def test_a_close_that_waits_for_the_spool_holds_when_the_relay_stops(room: Path) -> None:
    """The destination was told that all is well, and runs."""
    async with relayed(room, SLOW, spool=room / "spool", hold_timeout=0.5) as r:
        with await r.connect() as client:
            await r.get(client)
            assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == 0
            assert not r.relay.is_spooled
    assert r.relay.fate is Fate.CLOSED
    assert r.source.end is End.CLOSED
    assert not (room / "spool").exists()


async def test_and_when_it_is_killed(room: Path) -> None:
    async with a_source(room, SLOW) as (images, source):
        words = (
            "--upstream",
            f"127.0.0.1:{source.port}",
            "--spool",
            str(room / "spool"),
            "--hold-timeout",
            "1",
        )
        running = command(images.directory, room / "work", *words, lazy_pages=False)
        relay = await trio.to_thread.run_sync(running.__enter__)
        try:
            with await trio.to_thread.run_sync(Ours, (relay.address, relay.port), images) as client:
                first = images.tasks[0]
                await trio.to_thread.run_sync(client.get, first.pid, first.runs[0].start)
                assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == 0
            relay.stop(signal.SIGKILL)
            with trio.fail_after(10):
                await source.ended.wait()
        finally:
            await trio.to_thread.run_sync(running.__exit__, None, None, None)
    assert source.end is not None
    assert not source.end.source_goes_on


async def test_nobody_decides_otherwise_while_the_source_is_ended(room: Path) -> None:
    """Else the destination would be refused its pages, and its tasks killed, though the source has ended."""
    slow = Behaviour(silent_at_close=True)
    async with relayed(room, slow, spool=room / "spool", link_timeout=1.0) as r:
        with await r.connect() as client:
            await r.get(client)
            client.sock.sendall(encode_plain(Command.FINISHED))
            await until(lambda: r.source.closed_by is not None)
            with pytest.raises(PageServerError, match="cannot go on: the spool has everything"):
                await r.abort()
        assert r.relay.fate is Fate.HELD
        with await r.connect(2) as client:
            await r.get(client)
        assert await r.relay.wait() is Fate.CLOSED


# ---- what was decided otherwise --------------------------------------------------------------------------


async def test_a_close_after_an_abort_is_not_well(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with relayed(room) as r:
        with await r.connect() as client:
            await r.get(client)
            await r.abort()
            assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == -errno.EALREADY
    assert "and the source goes on" in caplog.text


async def test_tasks_may_not_run_after_an_abort(room: Path) -> None:
    async with relayed(room) as r:
        with await r.connect() as client:
            await r.get(client)
            await r.abort()
            client.sock.sendall(encode_plain(Command.FINISHED))
            assert await trio.to_thread.run_sync(client.refusal) is Refusal.ENDED


async def test_a_close_whose_answer_was_lost_is_answered_again(room: Path) -> None:
    async with relayed(room) as r:
        with await r.connect() as client:
            await r.get(client)
            assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == 0
        with await r.connect(2) as client:
            assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == 0
        with await r.connect(3) as client:
            assert await trio.to_thread.run_sync(client.say, Command.ABORT) == -errno.EALREADY


async def test_nobody_is_told_that_an_ended_source_goes_on(room: Path) -> None:
    async with relayed(room, spool=room / "spool", close_when_spooled=True) as r:
        assert await r.relay.wait() is Fate.CLOSED
        with await r.connect() as client:
            assert await trio.to_thread.run_sync(client.say, Command.ABORT) == -errno.EALREADY


async def test_a_refusal_is_no_status(room: Path) -> None:
    """An ABORT that is said again, as its answer was lost: the relay listens to nobody any more."""
    async with relayed(room) as r:
        extension = Extension(read_marker(r.images.directory))
        for expected in (0, None):
            with socket.create_connection((r.server.address, r.server.port)) as sock:
                sock.setblocking(False)
                said = partial(say, sock, None, extension.hello(Lane.BULK), Command.ABORT)
                if expected is not None:
                    assert await said() == expected
                else:
                    with pytest.raises(RefusedError, match="by somebody's decision"):
                        await said()


async def test_a_marker_that_cannot_be_written_costs_no_dump(room: Path) -> None:
    """Nor is one left where no source is, for a destination to take somebody else for a relay."""
    async with a_source(room) as (images, source):
        (images.directory / MARKER).mkdir()
        config = RelayConfig((source.address, source.port), work_dir=room)
        with pytest.raises(ImageError, match="cannot be written"):
            async with open_relay(ServerConfig(images.directory), config):
                pass
        assert not source.accepted.is_set()
        (images.directory / MARKER).rmdir()
        with pytest.raises(PageServerError, match="refused"):
            async with open_relay(
                ServerConfig(images.directory), RelayConfig(("127.0.0.1", 1), work_dir=room)
            ):
                pass
        assert not (images.directory / MARKER).exists()
        async with open_relay(ServerConfig(images.directory), config):
            pass


@pytest.mark.parametrize("what", ["holder", "listener", "tls"])
async def test_nor_does_anything_else_that_fails(
    what: str, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "tls" and not is_available():
        pytest.skip("built without TLS")
    async with a_source(room) as (images, source):
        upstream = RelayConfig((source.address, source.port), work_dir=room)
        config = ServerConfig(images.directory)
        with contextlib.ExitStack() as stack:
            if what == "holder":
                stack.enter_context(monkeypatch.context()).setattr(sys, "executable", "/nowhere/python")
            elif what == "listener":
                taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                config = ServerConfig(images.directory, port=taken.getsockname()[1])
            else:
                config = ServerConfig(images.directory, tls=TlsFiles(cacert=room / "nothing"))
            with pytest.raises((PageServerError, TlsError)):
                async with open_relay(config, upstream):
                    pass
        assert not source.accepted.is_set()
        assert not (images.directory / MARKER).exists()
        assert not (room / SOCKET_NAME).exists()
        async with open_relay(ServerConfig(images.directory), upstream):
            assert (images.directory / MARKER).exists()


async def stop_relay(pidfile: Path) -> None:
    pidfd = os.pidfd_open(int(pidfile.read_text()))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def test_a_parent_returns_when_the_marker_is_there(room: Path) -> None:
    async with a_source(room) as (images, source):
        work = room / "work"
        program = [sys.executable, "-m", "criupy.page_server", "-D", str(images.directory), "-W", str(work)]
        program += ["--daemon", "--pidfile", "pid", "-o", "log"]
        ended = await trio.run_process(
            [*program, "--upstream", "127.0.0.1:1"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_stderr=True,
        )
        assert ended.returncode == 1
        assert "Connection refused" in (work / "log").read_text()
        assert not (work / "pid").exists()
        upstream = f"127.0.0.1:{source.port}"
        await trio.run_process([*program, "--upstream", upstream], stdin=subprocess.DEVNULL)
        assert read_marker(images.directory) is not None
        await stop_relay(work / "pid")
    assert source.end is End.RESET


_KILL_PARENT = """#!/bin/sh
parent() { cut -d ' ' -f 4 /proc/$PPID/stat; }
echo $PPID > "$CRTOOLS_IMAGE_DIR/../child"
waiting=$(parent)
kill -9 $waiting
while [ "$(parent)" = $waiting ]; do sleep 0.01; done
"""


async def test_a_relay_does_not_need_the_parent_that_waits(room: Path) -> None:
    async with a_source(room) as (images, source):
        script = room / "script"
        script.write_text(_KILL_PARENT)
        script.chmod(0o700)
        reader, writer = os.pipe()
        program = [sys.executable, "-m", "criupy.page_server", "-D", str(images.directory), "-W", str(room)]
        program += ["--daemon", "-o", "log", "--action-script", str(script), "--status-fd", str(writer)]
        with open(reader, "rb") as status:  # noqa: PTH123 - a descriptor
            try:
                ended = await trio.run_process(
                    [*program, "--upstream", f"127.0.0.1:{source.port}"],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[writer],
                )
            finally:
                os.close(writer)
            assert ended.returncode == -signal.SIGKILL
            assert await trio.to_thread.run_sync(status.read) == b"\0", (room / "log").read_text()
        await stop_relay(room / "child")
    assert source.end is End.RESET


# ---- a source that goes away by itself -------------------------------------------------------------------


async def test_a_source_that_is_lost_when_all_is_here_is_lost_all_the_same(room: Path) -> None:
    """Its process goes on, whatever was fetched of it before: no restore may finish."""
    async with relayed(room) as r:
        with await r.connect() as client:
            await r.get(client)
            await until(lambda: r.relay.snapshot().complete)
            r.upstream.cut(Loss.RST)
            assert await r.relay.wait() is Fate.LOST
            assert await trio.to_thread.run_sync(client.is_over)
        with await r.connect(2) as client:
            assert await trio.to_thread.run_sync(client.refusal) is Refusal.GONE


async def test_a_spool_whose_source_was_not_seen_to_end_is_not_served(room: Path) -> None:
    async with relayed(room, spool=room / "spool") as r:
        await until(lambda: r.relay.is_spooled)
    assert r.relay.fate is Fate.RESUMED
    words = [*(sys.executable, "-m", "criupy.page_server", "--upstream", "127.0.0.1:1", "--port", "0")]
    words += ["--spool", str(room / "spool"), "-D", str(r.images.directory)]
    ended = await trio.run_process(words, check=False, capture_stderr=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1
    assert b"its source was not seen to end" in ended.stderr


# ---- who is no destination -------------------------------------------------------------------------------


async def test_a_dump_that_went_astray_takes_nothing(room: Path) -> None:
    async with relayed(room) as r:
        with Destination(socket.create_connection((r.server.address, r.server.port))) as dumper:
            dumper.send(OPEN2, 0, 0, task(77))
            assert await trio.to_thread.run_sync(dumper.is_over)
        assert not r.relay.session.is_taken
        with await r.connect() as client:
            await r.get(client)


async def test_an_operator_who_is_late_is_told(room: Path) -> None:
    async with relayed(room) as r:
        with await r.connect() as client:
            await r.get(client)
            assert await trio.to_thread.run_sync(client.say, Command.CLOSE) == 0
        with pytest.raises(PageServerError, match="it has ended"):
            await r.relay.abort("too late")
