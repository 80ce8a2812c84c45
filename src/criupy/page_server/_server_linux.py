"""The page server on trio: accepting, admitting and reporting. The pages themselves are served in C."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from criupy._tls.files import TlsFiles
from criupy._tls.tls_linux import TlsSession
from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Account, Ending, Server
from criupy.errors import PageServerError, TlsError
from criupy.page_server._access import Network, is_allowed, is_loopback
from criupy.page_server._admission_linux import Admission, take
from criupy.page_server._images import ServedTask, load_tasks
from criupy.page_server._telling import tell

__all__ = ["Account", "Config", "Ending", "PageServer", "open_page_server"]

log = logging.getLogger("criupy.page_server")

_BACKLOG = 128
# Until a connection ends, or the limit is raised.
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE = 0.1
# Dead peers show within 40 seconds also while they ask for nothing.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


@dataclass(frozen=True, slots=True)
class Config:
    """How to serve.

    ``address`` and ``port`` are where to listen (0 lets the kernel choose), or
    ``listener`` is an inherited socket that listens already. ``allow`` are the
    networks that peers may come from, all when it is empty. ``once`` serves one
    connection, as CRIU does. Timeouts are in seconds: ``stall_timeout`` for a
    peer that stops in the middle of something, ``idle_timeout`` for one that
    asks for nothing (None: for ever). With ``tls`` peers need a certificate,
    which (unless it says otherwise) must be for the address that is listened
    on: so CRIU has it, whose hosts use one certificate for either end.
    """

    images_dir: Path
    address: str = "127.0.0.1"
    port: int = 0
    listener: socket.socket | None = None
    allow: tuple[Network, ...] = ()
    once: bool = False
    max_connections: int = 64
    stall_timeout: float = 30.0
    idle_timeout: float | None = None
    tls: TlsFiles | None = None


class PageServer:
    """A page server that listens; made by ``open_page_server``.

    ``address`` and ``port`` are where.
    """

    def __init__(self, config: Config, native: Server, listener: trio.socket.SocketType) -> None:
        self._config = config
        self._unchecked = 0  # connections whose handshake is not done
        self._native = native
        self._listener = listener
        self._peers: dict[int, str] = {}
        self._accepting = trio.CancelScope()
        self._changed = trio.Event()
        self.address: str
        self.port: int
        self.address, self.port = listener.getsockname()[:2]
        #: The account of the only connection of a server with ``once``, when it has ended.
        self.last: Account | None = None
        self._admission: Admission | None = None
        if config.tls is not None:
            called = self.address if config.listener is not None else config.address
            self._admission = Admission(config.tls, called)

    def connections(self) -> list[Account]:
        """Return the accounts of the connections that go on."""
        return self._native.connections(self._config.max_connections)

    def stop(self) -> None:
        """Accept no more; ``wait`` returns when those that are connected have ended."""
        self._accepting.cancel()

    async def wait(self) -> None:
        """Wait until nothing more is accepted and every connection has ended."""
        while self._peers or self._unchecked or not self._accepting.cancel_called:
            await self._changed.wait()

    async def _accept(self, nursery: trio.Nursery) -> None:
        with self._accepting, self._listener:
            while True:
                try:
                    connection, peer = await self._listener.accept()
                except OSError as error:
                    if error.errno not in _OUT_OF_DESCRIPTORS:
                        raise
                    log.warning("a connection cannot be accepted: %s", error.strerror)
                    await trio.sleep(_PAUSE)
                    continue
                if self._admit(connection, peer, nursery) and self._config.once:
                    self.stop()
        self._notify()

    def _admit(
        self, connection: trio.socket.SocketType, peer: tuple[str, int], nursery: trio.Nursery
    ) -> bool:
        """Serve a connection, or refuse it; tell which. With TLS that shows later."""
        host, port = peer[:2]
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with connection:
            if not is_allowed(host, self._config.allow):
                log.warning("%s: refused, it is in no network that is allowed", name)
                return False
            connected = len(self._peers) + self._unchecked
            if connected >= self._config.max_connections:
                log.warning("%s: refused, %d are connected already", name, connected)
                return False
            try:
                prepare(connection)
                if self._admission is not None:
                    nursery.start_soon(self._check, self._admission, take(connection), name)
                    self._unchecked += 1
                    return False
                self._serve(connection, name)
            except OSError as error:
                log.warning("%s: refused, %s", name, error)
                return False
        return True

    def _serve(
        self, connection: trio.socket.SocketType, name: str, session: TlsSession | None = None
    ) -> None:
        """Hand a connection over to a thread."""
        kind = "plain TCP" if session is None else session.describe()
        transport = 0 if session is None else session.transport
        serial = self._native.serve(connection.fileno(), transport=transport)
        if session is not None:
            session.given()
        connection.detach()
        self._peers[serial] = name
        log.info("connection %d: from %s, %s", serial, name, kind)

    async def _check(self, admission: Admission, connection: trio.socket.SocketType, name: str) -> None:
        """Serve a peer whose certificate is good; with ``once`` nobody after it."""
        try:
            with connection, await admission.handshake(connection, self._config.stall_timeout) as session:
                if self._config.once and self._accepting.cancel_called:
                    log.warning("%s: refused, another is served", name)
                    return
                self._serve(connection, name, session)
        except (TlsError, OSError) as error:
            log.warning("%s: refused, %s", name, error)
        else:
            if self._config.once:
                self.stop()
        finally:
            self._unchecked -= 1
            self._notify()

    async def _reap(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._native.event_fd)
            for account in self._native.ended():
                tell(account, self._peers.pop(account.serial), self._config.stall_timeout)
                self.last = account
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def prepare(connection: trio.socket.SocketType) -> None:
    """Set what a connection to a destination needs."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _serve_images(native: Server, images_dir: Path) -> None:
    pages = 0
    for task in load_tasks(images_dir):
        pages += _serve_task(native, task)
    log.info("%s: %d lazy pages", images_dir, pages)


def _serve_task(native: Server, task: ServedTask) -> int:
    entries = task.entries
    image = Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices)
    fd = os.open(task.pages, os.O_RDONLY | os.O_CLOEXEC)
    try:
        native.add_image(image, fd)
    except BaseException:
        os.close(fd)
        raise
    log.debug("task %d: %d lazy pages in %d extents", task.pid, sum(entries.nr_pages), len(entries.starts))
    return sum(entries.nr_pages)


async def _listen(config: Config) -> trio.socket.SocketType:
    where = f"{config.address}:{config.port}"
    if config.listener is not None:
        return trio.socket.from_stdlib_socket(config.listener)
    try:
        found = await trio.socket.getaddrinfo(
            config.address, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise PageServerError(f"{where}: no such address ({error.strerror}); see --address") from error
    family, kind, protocol, _, address = found[0]
    listener = trio.socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PageServerError(f"{where}: {error.strerror}; see --address and --port") from error
    return listener


@contextlib.asynccontextmanager
async def open_page_server(config: Config) -> AsyncIterator[PageServer]:
    """Serve the lazy pages of images while the block runs, to any number of destinations.

    What is connected at the end of the block is cut. Raises ImageError for
    images that cannot be served, PageServerError when it cannot listen, TlsError
    for files that TLS cannot be done with.
    """
    with Server(stall_timeout=config.stall_timeout, idle_timeout=config.idle_timeout) as native:
        await trio.to_thread.run_sync(partial(_serve_images, native, config.images_dir))
        listener = await _listen(config)
        try:
            server = PageServer(config, native, listener)
        except BaseException:
            listener.close()
            raise
        if not is_loopback(server.address) and not config.allow and config.tls is None:
            log.warning(
                "the memory of these processes is given in clear text to everyone who reaches %s:%d; "
                "--allow says who may have it",
                server.address,
                server.port,
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server._accept, nursery)
            nursery.start_soon(server._reap)
            yield server
            nursery.cancel_scope.cancel()
