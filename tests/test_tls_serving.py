"""TLS under page server and pager: every byte, and what the end of a connection tells the peer."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
import trio.testing

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._tls.tls_linux import TlsContext, TlsSession
from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link, Outcome, Phase
from criupy._uffd.server_linux import Account, Ending, Server
from criupy.errors import PageServerError, TlsError
from criupy.lazy_pages import Config as DaemonConfig
from criupy.lazy_pages import open_lazy_pages
from criupy.page_server import Config as ServerConfig
from criupy.page_server import open_page_server
from criupy.page_server._images import load_tasks
from criupy.testing.certificates import Certificates
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec
from native_peer import Restore, Source
from page_server_clients import CLOSE, GET, OPEN2, PAGE, Destination, frame, loopback
from serving import MIB, all_good, serve

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ADDRESS = "127.0.0.1"
A = 0x10_0000_0000


def handshake(session: TlsSession, fd: int) -> None:
    while events := session.step():
        poll = select.poll()
        poll.register(fd, events)
        assert poll.poll(5000)


def python_end(certificates: Certificates, *, server: bool, name: str | None = None) -> ssl.SSLContext:
    """The same in Python's ssl, which tells a close_notify from the mere end of the stream."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates.cacert)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    name = name or ("server" if server else "client")
    context.load_cert_chain(certificates.cert(name), certificates.key(name))
    return context


def wrap(
    context: ssl.SSLContext, sock: socket.socket, session: TlsSession, fd: int, *, server: bool
) -> ssl.SSLSocket:
    """Shake hands between Python's ssl and a session of ours."""
    wrapped: list[ssl.SSLSocket] = []

    def work() -> None:
        wrapped.append(context.wrap_socket(sock, server_side=server, suppress_ragged_eofs=False))

    thread = threading.Thread(target=work)
    thread.start()
    handshake(session, fd)
    thread.join()
    return wrapped[0]


def ending(sock: socket.socket) -> str:
    """Wait for the end of the stream and say how it came."""
    try:
        while sock.recv(1 << 16):
            pass
    except (ssl.SSLEOFError, ConnectionResetError):
        # Python's ssl does not tell which of the two; TCP does: TCP_CLOSE (linux/tcp.h) comes of a reset.
        return "RST" if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\7" else "FIN"
    return "close_notify"


# ---- the page server ----------------------------------------------------------------------------------


class Served:
    def __init__(self, images: WrittenImages, certificates: Certificates, *, stall: float = 30.0) -> None:
        self.images = images
        self.certificates = certificates
        self.context = TlsContext(certificates.files("server"), server=True)
        self.server = Server(stall_timeout=stall, idle_timeout=None)
        for task in load_tasks(images.directory):
            entries = task.entries
            fd = os.open(task.pages, os.O_RDONLY | os.O_CLOEXEC)
            self.server.add_image(Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices), fd)

    def connect(self, frame_size: int = 32) -> Destination:
        ours, theirs = loopback()
        theirs.setblocking(False)
        session = self.context.session(theirs.fileno(), ADDRESS)
        sock = wrap(python_end(self.certificates, server=False), ours, session, theirs.fileno(), server=False)
        self.server.serve(theirs.detach(), transport=session.transport)
        session.given()
        return Destination(sock, frame_size)

    def end(self) -> Account:
        while True:
            assert select.select([self.server.event_fd], [], [], 30)[0], "no connection ends"
            for account in self.server.ended():
                return account


@pytest.fixture
def served(tmp_path: Path, certificates: Certificates) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def make(*, stall: float = 30.0) -> Served:
            spec = WorkloadSpec(size=3000 * PAGE, areas=2, tree=2)
            made = Served(write_images(tmp_path / "images", spec, style="full"), certificates, stall=stall)
            stack.callback(made.server.close)
            return made

        yield make


@pytest.mark.parametrize("frame_size", [24, 32])
@pytest.mark.parametrize("nr", [1, 5, 256, 1500])
def test_every_page(served: Callable[..., Served], frame_size: int, nr: int) -> None:
    s = served()
    spec = s.images.spec
    with s.connect(frame_size) as destination:
        for task in s.images.tasks:
            for run in task.runs:
                for first in range(0, run.nr_pages, nr):
                    count = min(nr, run.nr_pages - first)
                    data = destination.get(task.pid, run.start + first * PAGE, count)
                    assert data == b"".join(spec.page(task.task, run.first + first + n) for n in range(count))
        destination.send(CLOSE)
        assert destination.receive(4) == bytes(4)
        destination.sock.unwrap()  # type: ignore[attr-defined]
    account = s.end()
    assert (account.ending, account.pages, account.fault) == (Ending.CLOSED, 6000, "")


def test_answers_are_cut_into_records_as_stock_clients_need_it(served: Callable[..., Served]) -> None:
    """A receive of Python's ssl gives one record at most."""
    s = served()
    task = s.images.tasks[0]
    start = task.runs[0].start
    with s.connect() as destination:
        # in one record, so that all answers may be on their way before the first is read
        destination.sock.sendall(
            b"".join(frame(32, GET, nr, start + nr * PAGE, task.pid) for nr in (1, 6, 1))
        )
        sizes: list[int] = []
        while sum(sizes) < 3 * 32 + 8 * PAGE:
            sizes.append(len(destination.sock.recv(1 << 16)))
    assert sizes == [32, 4096, 32, 16384, 8192, 32, 4096]


@pytest.mark.parametrize("polite", [True, False])
def test_the_peer_ends_without_close(served: Callable[..., Served], polite: bool) -> None:
    s = served()
    task = s.images.tasks[0]
    with s.connect() as destination:
        destination.get(task.pid, task.runs[0].start, 1)
        if polite:
            destination.sock.unwrap()  # type: ignore[attr-defined]
    assert s.end().ending is (Ending.EOF if polite else Ending.RESET)


def test_a_peer_that_does_not_read(served: Callable[..., Served]) -> None:
    s = served(stall=0.3)
    task = s.images.tasks[0]
    with s.connect() as destination:
        for _ in range(50):
            destination.send(GET, 1024, task.runs[0].start, task.pid)
        assert s.end().ending is Ending.STALLED
        assert ending(destination.sock) != "close_notify"


def test_a_peer_that_sends_slowly(served: Callable[..., Served]) -> None:
    """Each byte is a record, and all of them are too late."""
    s = served(stall=0.3)
    with s.connect() as destination:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(20):
                destination.sock.sendall(b"\7")
                time.sleep(0.05)
        assert s.end().ending is Ending.STALLED
        assert time.monotonic() - started < 5


def test_a_cut_is_no_success(served: Callable[..., Served]) -> None:
    s = served()
    with s.connect() as destination:
        s.server.cut(0)
        assert s.end().ending is Ending.CUT
        assert ending(destination.sock) != "close_notify"


def test_garbage_in_the_session(served: Callable[..., Served]) -> None:
    s = served()
    with s.connect() as destination:
        raw = socket.socket(fileno=os.dup(destination.sock.fileno()))
        with raw:
            raw.sendall(b"\x17\3\3\0\x30" + bytes(48))
        account = s.end()
    assert account.ending is Ending.TRANSPORT
    assert account.fault.startswith("TLS failed: ")


def test_a_client_of_tls_where_there_is_none(
    served: Callable[..., Served], certificates: Certificates
) -> None:
    s = served()
    ours, theirs = loopback()
    s.server.serve(theirs.detach())
    ours.setblocking(False)
    context = TlsContext(certificates.files("client"), server=False)
    with (
        ours,
        context.session(ours.fileno(), ADDRESS) as session,
        pytest.raises(TlsError, match=r"it (closed|reset) the connection"),
    ):
        handshake(session, ours.fileno())
    assert s.end().ending is Ending.SPEAKS_TLS


# ---- the pager ----------------------------------------------------------------------------------------


class SecuredSource(Source):
    """A scripted source behind Python's ssl."""

    def __init__(self, certificates: Certificates, frame_size: int = 32) -> None:
        super().__init__(frame_size)
        self.client.setblocking(False)
        context = TlsContext(certificates.files("client"), server=False)
        self.session = context.session(self.client.fileno(), ADDRESS)
        secure = python_end(certificates, server=True)
        self.sock = wrap(secure, self.sock, self.session, self.client.fileno(), server=True)

    def link(self, restore: Restore) -> None:
        transport = self.session.transport
        restore.pager.set_link(
            self.client.detach(), frame_size=self.frame_size, shared=False, transport=transport
        )
        self.session.given()


@pytest.fixture
def source(certificates: Certificates) -> Iterator[SecuredSource]:
    with SecuredSource(certificates) as made:
        yield made


def test_an_abort_says_nothing_in_tls(source: SecuredSource) -> None:
    with Restore() as restore:
        source.link(restore)
        restore.obeyed()
        restore.pager.abort()
        assert ending(source.sock) == "RST"
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link) == (Outcome.VETOED, Link.RESET)


def test_a_pager_that_ends_early_says_nothing_in_tls(source: SecuredSource) -> None:
    with Restore() as restore:
        source.link(restore)
        restore.obeyed()
    assert ending(source.sock) == "RST"


def test_after_close_the_source_hears_the_end_and_is_waited_for(source: SecuredSource) -> None:
    with Restore() as restore:
        source.link(restore)
        restore.finish()
        assert source.frame() == (CLOSE, 0, 0, 0)
        source.sock.sendall(struct.pack("<i", 0))
        assert ending(source.sock) == "close_notify"
        # Nothing but that has come: to close now would reset what the source still sends.
        stats = restore.until(lambda stats: stats.close_status == 0)
        assert stats.phase == Phase.CLOSING
        source.sock.unwrap()  # type: ignore[attr-defined]
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.close_status) == (Outcome.COMPLETE, Link.CLOSED, 0)


def test_a_source_that_never_says_goodbye(source: SecuredSource) -> None:
    with Restore(link_timeout=0.2) as restore:
        source.link(restore)
        restore.finish()
        source.frame()
        source.sock.sendall(struct.pack("<i", 0))
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.close_status) == (Outcome.COMPLETE, Link.CLOSED, 0)


@pytest.mark.parametrize("polite", [True, False])
def test_a_source_that_ends(source: SecuredSource, polite: bool) -> None:
    with Restore() as restore:
        source.link(restore)
        restore.obeyed()
        if polite:
            source.sock.settimeout(0.1)  # the pager gives no answer
            with contextlib.suppress(OSError):
                source.sock.unwrap()  # type: ignore[attr-defined]
        source.sock.close()
        stats = restore.until(lambda stats: stats.link == Link.LOST)
        restore.pager.abort()
        restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert stats.link_error == 32  # EPIPE


def test_garbage_from_the_source(source: SecuredSource) -> None:
    with Restore() as restore:
        source.link(restore)
        restore.obeyed()
        with socket.socket(fileno=os.dup(source.sock.fileno())) as raw:
            raw.sendall(b"\x17\3\3\0\x30" + bytes(48))
        restore.until(lambda stats: stats.link == Link.LOST)
        restore.pager.abort()
        restore.until(lambda stats: stats.phase == Phase.ENDED)


# ---- our page server and our daemon -------------------------------------------------------------------

TREE = WorkloadSpec(size=4 * MIB, areas=4, adjacent=True, tree=3, threads=2)
ONE = WorkloadSpec(size=48 * MIB)


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program")
@pytest.mark.parametrize("frame_size", [24, 32])
@pytest.mark.parametrize("spec", [ONE, TREE], ids=["one", "tree"])
async def test_a_restore(
    room: Path, certificates: Certificates, spec: WorkloadSpec, frame_size: Literal[24, 32]
) -> None:
    full = write_images(room / "full", spec, style="full")
    lazy = write_images(room / "lazy", spec)
    config = ServerConfig(full.directory, once=True, tls=certificates.files("server", revocations=True))
    async with open_page_server(config) as server:
        where = (server.address, server.port)
        ours = certificates.files("client", revocations=True)
        async with (
            serve(
                room, spec, images=lazy, style="full", page_server=where, tls=ours, frame_size=frame_size
            ) as s,
            s.restore(early=4) as standin,
        ):
            await standin.finish()
            assert standin.early_result_is_good
            await all_good(standin)
            done = await s.daemon.wait()
            await all_good(standin)
        await server.wait()
        assert server.last is not None
        assert server.last.ending is Ending.CLOSED
    assert done.pages_missing == 0


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program")
@pytest.mark.parametrize(
    ("theirs", "ours", "said", "server_said"),
    [
        ("stranger", "client", "is not signed by a CA that is trusted here", "it says that our certificate"),
        ("elsewhere", "client", "is for DNS:elsewhere.example", "does not accept our certificate"),
        ("server", "stranger", "it says that our certificate is not signed", "is not signed by a CA"),
        ("server", "revoked", "it says that our certificate has been revoked", "has been revoked"),
        ("server", None, "the page server wants TLS: see --tls", "what it sent is no TLS"),
        (None, "client", "was it told to use TLS (--tls)?", "the peer speaks TLS"),
    ],
)
async def test_a_restore_that_is_refused(
    room: Path,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    theirs: str | None,
    ours: str | None,
    said: str,
    server_said: str,
) -> None:
    spec = WorkloadSpec(size=2 * MIB)
    full = write_images(room / "full", spec, style="full")
    lazy = write_images(room / "lazy", spec)
    server_files = None if theirs is None else certificates.files(theirs, revocations=True)
    client_files = None if ours is None else certificates.files(ours)
    async with open_page_server(ServerConfig(full.directory, tls=server_files)) as server:
        where = (server.address, server.port)
        async with (
            serve(room, spec, images=lazy, style="full", page_server=where, tls=client_files) as s,
            s.restore(early=1) as standin,  # who only waits for requests shows nothing before one
        ):
            story = await s.failure()
            assert "vetoed" in story
            await standin.abandon()
        server.stop()
        await server.wait()
    assert said in story
    assert server_said in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program")
async def test_a_source_whose_certificate_has_expired(room: Path, certificates: Certificates) -> None:
    """It is Python's ssl, because our page server would not begin."""
    spec = WorkloadSpec(size=2 * MIB)
    write_images(room / "full", spec, style="full")
    lazy = write_images(room / "lazy", spec)
    context = python_end(certificates, server=True, name="expired")
    alerts: list[str] = []

    async def refuse(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            await stream.do_handshake()
            await stream.receive_some()
        except trio.BrokenResourceError as error:
            alerts.append(str(error.__cause__))

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host=ADDRESS)
        nursery.start_soon(trio.serve_listeners, refuse, [trio.SSLListener(listener, context)])
        where = (ADDRESS, listener.socket.getsockname()[1])
        ours = certificates.files("client")
        async with (
            serve(room, spec, images=lazy, style="full", page_server=where, tls=ours) as s,
            s.restore(early=1) as standin,
        ):
            story = await s.failure()
            await standin.abandon()
        nursery.cancel_scope.cancel()
    assert "vetoed" in story
    assert "has expired on 2" in story
    assert "certificate expired" in "".join(alerts)


@pytest.mark.parametrize("name", ["expired", "early"])
async def test_who_begins_with_a_certificate_out_of_its_time(
    tmp_path: Path, certificates: Certificates, name: str
) -> None:
    """Neither page server nor daemon, which looks before the restore begins."""
    images = write_images(tmp_path / "images", WorkloadSpec(size=PAGE), style="full")
    files = certificates.files(name)
    said = "has expired on 2|is not valid before 2"
    with pytest.raises(TlsError, match=said):
        async with open_page_server(ServerConfig(images.directory, tls=files)):
            pass
    daemon = DaemonConfig(images.directory, page_server=(ADDRESS, 1), tls=files)
    with pytest.raises(TlsError, match=said):
        async with open_lazy_pages(daemon):
            pass
    assert not (images.directory / "lazy-pages.socket").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program")
async def test_a_restore_over_an_inherited_socket(room: Path, certificates: Certificates) -> None:
    full = write_images(room / "full", ONE, style="full")
    lazy = write_images(room / "lazy", ONE)
    config = ServerConfig(full.directory, once=True, tls=certificates.files("server"))
    async with open_page_server(config) as server:
        with socket.create_connection((server.address, server.port)) as kept:
            ours = certificates.files("client")
            inherited: dict[str, Any] = {"ps_socket": os.dup(kept.fileno()), "source_name": ADDRESS}
            async with (
                serve(room, ONE, images=lazy, style="full", tls=ours, **inherited) as s,
                s.restore() as standin,
            ):
                await standin.finish()
                await s.daemon.wait()
                await all_good(standin)
            # It ends although somebody still holds the socket.
            await server.wait()
        assert server.last is not None
        assert server.last.ending is Ending.CLOSED


@pytest.mark.slow
@pytest.mark.usefixtures("workload_program")
@pytest.mark.parametrize("finished", [False, True])
async def test_a_stop_in_the_middle_of_the_handshake(
    room: Path, certificates: Certificates, finished: bool
) -> None:
    """Before restore-finished the source goes on; after it this connection is still needed."""
    spec = WorkloadSpec(size=2 * MIB)
    full = write_images(room / "full", spec, style="full")
    lazy = write_images(room / "lazy", spec)
    config = ServerConfig(full.directory, once=True, tls=certificates.files("server"))
    async with trio.open_nursery() as nursery, open_page_server(config) as server:
        gate = trio.Event()
        listeners = await trio.open_tcp_listeners(0, host=ADDRESS)
        where = (ADDRESS, listeners[0].socket.getsockname()[1])
        accepted: list[trio.SocketStream] = []
        connected = trio.Event()

        async def relay(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in source:
                    await sink.send_all(data)
                await sink.send_eof()

        async def between() -> None:
            async with listeners[0] as listener:
                client = await listener.accept()
            async with client:
                accepted.append(client)
                connected.set()
                await gate.wait()
                async with (
                    await trio.open_tcp_stream(server.address, server.port) as onward,
                    trio.open_nursery() as both,
                ):
                    both.start_soon(relay, client, onward)
                    both.start_soon(relay, onward, client)

        nursery.start_soon(between)
        ours = certificates.files("client")
        async with (
            serve(room, spec, images=lazy, style="full", page_server=where, tls=ours) as s,
            s.restore() as standin,
        ):
            await connected.wait()
            if finished:
                await standin.finish()
            s.daemon.stop()
            if finished:
                gate.set()
                await s.daemon.wait()
                await all_good(standin)
            else:
                assert "source goes on" in await s.failure()
                with pytest.raises(trio.BrokenResourceError):  # a reset
                    while await accepted[0].receive_some():
                        pass
                await standin.abandon()
        nursery.cancel_scope.cancel()


# ---- the page server's own rules ----------------------------------------------------------------------


async def test_no_certificate_is_for_every_address(tmp_path: Path, certificates: Certificates) -> None:
    images = write_images(tmp_path / "images", WorkloadSpec(size=PAGE), style="full")
    config = ServerConfig(images.directory, address="0.0.0.0", tls=certificates.files("server"))
    with pytest.raises(PageServerError, match="see --address and --tls-no-cn-verify"):
        async with open_page_server(config):
            pass


async def test_who_does_not_shake_hands_is_refused(
    tmp_path: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", WorkloadSpec(size=PAGE), style="full")
    config = ServerConfig(
        images.directory, once=True, stall_timeout=0.2, max_connections=1, tls=certificates.files("server")
    )
    async with open_page_server(config) as server:
        first = await trio.open_tcp_stream(server.address, server.port)
        async with first:
            await trio.testing.wait_all_tasks_blocked(0.05)
            async with await trio.open_tcp_stream(server.address, server.port) as second:
                assert await second.receive_some() == b""
            assert await first.receive_some() == b""
        assert "refused, 1 are connected already" in caplog.text
        assert "refused, no TLS handshake within 0.2 s" in caplog.text
        server.stop()
        await server.wait()
        assert server.last is None


async def test_a_cut_ends_a_handshake_too(
    room: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    full = write_images(room / "full", ONE, style="full")
    config = ServerConfig(full.directory, tls=certificates.files("server"))
    async with open_page_server(config) as server:
        with socket.create_connection((server.address, server.port)) as silent:
            while not server._handshakes:  # noqa: ASYNC110
                await trio.sleep(0.01)
            server.stop()
            with trio.move_on_after(0.1) as waiting:
                await server.wait()
            assert waiting.cancelled_caught
            server.cut()
            with trio.fail_after(5):
                await server.wait()
            assert silent.recv(1) == b""
    assert "refused, it was cut here" in caplog.text


async def test_a_silent_handshake_does_not_hold_up_once(room: Path, certificates: Certificates) -> None:
    full = write_images(room / "full", ONE, style="full")
    config = ServerConfig(full.directory, once=True, tls=certificates.files("server"))
    async with open_page_server(config) as server:
        where = (server.address, server.port)
        with socket.create_connection(where), socket.create_connection(where) as sock:

            def fetch() -> int:
                context = python_end(certificates, server=False)
                with Destination(context.wrap_socket(sock)) as destination:
                    assert len(destination.get(100, A)) == PAGE
                    return destination.close()

            assert await trio.to_thread.run_sync(fetch) == 0
            with trio.fail_after(5):
                await server.wait()
        assert server.last is not None
        assert server.last.ending is Ending.CLOSED


@pytest.mark.parametrize(("command", "answer"), [(GET, b"\x15\x03\x03\x00\x02\x02\x46"), (OPEN2, b"")])
async def test_a_plain_peer_is_told_what_it_understands(
    room: Path, certificates: Certificates, command: int, answer: bytes
) -> None:
    """A dump would take the alert for the answer to its first frame."""
    full = write_images(room / "full", ONE, style="full")
    async with open_page_server(ServerConfig(full.directory, tls=certificates.files("server"))) as server:
        with socket.create_connection((server.address, server.port)) as sock:
            sock.sendall(frame(32, command, 1, A, 100))

            def listen() -> bytes:
                with contextlib.suppress(ConnectionResetError):
                    return sock.recv(100)
                return b""

            assert await trio.to_thread.run_sync(listen) == answer
