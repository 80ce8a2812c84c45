"""The page server on trio: accepting, admitting and reporting. The pages themselves are served in C."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from criupy._tls.files import TlsFiles
from criupy._tls.tls_linux import TlsSession
from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Account, Ending, Question, Server
from criupy.errors import PageServerError, TlsError
from criupy.page_server._access import Network, is_allowed, is_loopback
from criupy.page_server._admission_linux import Admission, take
from criupy.page_server._images import ServedTask, load_tasks, open_pages
from criupy.page_server._statistics import Statistics
from criupy.page_server._telling_linux import tell

__all__ = ["Account", "Config", "Ending", "PageServer", "listen", "open_page_server"]

log = logging.getLogger("criupy.page_server")

_BACKLOG = 128
# Until a connection ends, or the limit is raised.
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# The listener's own failures; all others are those of one connection.
_NO_LISTENER = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
_PAUSE = 0.1
# Dead peers show within 40 seconds also while they ask for nothing.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


@dataclass(frozen=True, slots=True)
class Config:
    """How to serve.

    ``address`` and ``port`` are where to listen (0 lets the kernel choose), or
    ``listener`` is an inherited socket that listens already. ``connection`` is
    an inherited socket that is connected: it is served, and nothing else.
    ``allow`` are the networks that peers may come from, all when it is empty.
    ``once`` serves one connection, as CRIU does. Timeouts are in seconds:
    ``stall_timeout`` for a peer that stops in the middle of something,
    ``idle_timeout`` for one that asks for nothing (None: for ever). With ``tls``
    peers need a certificate, which (unless it says otherwise) must be for
    ``address``: so CRIU has it, whose hosts use one certificate for either end.
    """

    images_dir: Path
    address: str = "127.0.0.1"
    port: int = 0
    listener: socket.socket | None = None
    connection: socket.socket | None = None
    allow: tuple[Network, ...] = ()
    once: bool = False
    max_connections: int = 64
    stall_timeout: float = 30.0
    idle_timeout: float | None = None
    tls: TlsFiles | None = None


class Uploads(Protocol):
    """What a server that receives does with the images that come."""

    async def answer(self, question: Question) -> None:
        """Answer what a connection asked."""

    async def end(self, account: Account, peer: str) -> bool:
        """Discard what an ended connection left unfinished, tell of it, and whether all had come."""


def at(host: str, port: int) -> str:
    """Write an address and a port as people do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class PageServer:
    """A page server that listens; made by ``open_page_server`` or ``open_page_receiver``.

    ``address`` and ``port`` are where ("" and 0 with an inherited connection).
    """

    def __init__(self, config: Config, native: Server, uploads: Uploads | None = None) -> None:
        self._config = config
        self._unchecked = 0  # connections whose handshake is not done
        self._native = native
        self._uploads = uploads
        self._peers: dict[int, str] = {}
        self._unchecked = 0  # connections whose handshake is not done
        self._served = False
        self._accepting = trio.CancelScope()
        self._accepts = True
        self._changed = trio.Event()
        self.address: str = ""
        self.port: int = 0
        self.statistics: Statistics = Statistics()
        #: The account of the only connection of a server with ``once``, when it has ended.
        self.last: Account | None = None
        #: Whether all had come of the last upload.
        self.is_whole: bool = False
        self._admission = None if config.tls is None else Admission(config.tls, config.address)

    def connections(self) -> list[Account]:
        """Return the accounts of the connections that go on."""
        return self._native.connections(self._config.max_connections)

    def stop(self) -> None:
        """Accept no more; ``wait`` returns when those that are connected have ended."""
        self._accepting.cancel()

    async def wait(self) -> None:
        """Wait until nothing more is accepted and every connection has ended."""
        while self._peers or self._unchecked or self._accepts:
            await self._changed.wait()

    def cut(self) -> None:
        """End every connection now."""
        for serial in self._peers:
            self._native.cut(serial)

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        with self._accepting, listener:
            while not (self._served and self._config.once):
                try:
                    connection, peer = await listener.accept()
                except OSError as error:
                    if error.errno in _NO_LISTENER:
                        raise
                    log.warning("a connection cannot be accepted: %s", error.strerror)
                    if error.errno in _OUT_OF_DESCRIPTORS:
                        await trio.sleep(_PAUSE)
                    continue
                self.statistics.refused += not self._admit(connection, peer, nursery)
        self._accepts = False
        self._notify()

    def _admit(
        self, connection: trio.socket.SocketType, peer: tuple[str, int], nursery: trio.Nursery
    ) -> bool:
        """Serve a connection, or refuse it; tell which. With TLS that shows later."""
        host, port = peer[:2]
        name = at(host, port)
        with connection:
            if not is_allowed(host, self._config.allow):
                log.warning("%s: refused, it is in no network that is allowed", name)
                return False
            connected = len(self._peers) + self._unchecked
            if connected >= self._config.max_connections:
                log.warning("%s: refused, %d are connected already", name, connected)
                return False
            try:
                self._take(connection, name, nursery)
            except OSError as error:
                log.warning("%s: refused, %s", name, error)
                return False
        return True

    def _adopt(self, connection: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        """Serve the only connection that there will be."""
        self._accepts = False
        with connection:
            try:
                self._take(connection, f"the inherited socket {connection.fileno()}", nursery)
            except OSError as error:
                raise PageServerError(f"the inherited socket cannot be served: {error}") from error

    def _take(self, connection: trio.socket.SocketType, name: str, nursery: trio.Nursery) -> None:
        prepare(connection)
        if self._admission is None:
            self._serve(connection, name)
        else:
            nursery.start_soon(self._check, self._admission, take(connection), name)
            self._unchecked += 1

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
        self._served = True
        self._peers[serial] = name
        log.info("connection %d: from %s, %s", serial, name, kind)

    async def _check(self, admission: Admission, connection: trio.socket.SocketType, name: str) -> None:
        """Serve a peer whose certificate is good; with ``once`` nobody after it."""
        try:
            with connection, await admission.handshake(connection, self._config.stall_timeout) as session:
                if not (self._config.once and self._served):
                    self._serve(connection, name, session)
                    return
            log.warning("%s: refused, another is served", name)
            self.statistics.refused += 1
        except (TlsError, OSError) as error:
            log.warning("%s: refused, %s", name, error)
            self.statistics.refused += 1
        finally:
            if self._served and self._config.once:
                self.stop()
            self._unchecked -= 1
            self._notify()

    async def _reap(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._native.event_fd)
                for account in self._native.ended():
                    nursery.start_soon(self._end, account)
                if self._uploads is not None:
                    for question in self._native.questions():
                        nursery.start_soon(self._uploads.answer, question)

    async def _end(self, account: Account) -> None:
        peer = self._peers[account.serial]
        if self._uploads is None:
            tell(account, peer)
        else:
            with trio.CancelScope(shield=True):  # its account is given once
                self.is_whole = await self._uploads.end(account, peer)
        del self._peers[account.serial]
        self.statistics.add(account, peer)
        self.last = account
        self._notify()

    async def _end_all(self) -> None:
        """Cut what is connected and tell of it; each thread ends as soon as it sees that."""
        self.cut()
        while self._peers:
            await trio.lowlevel.wait_readable(self._native.event_fd)
            for account in self._native.ended():
                await self._end(account)
        self._accepts = False
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def prepare(connection: trio.socket.SocketType) -> None:
    """Set what a connection to a destination needs."""
    if connection.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _serve_images(native: Server, config: Config, tasks: Iterable[ServedTask] | None) -> None:
    pages = 0
    for task in load_tasks(config.images_dir) if tasks is None else tasks:
        pages += _serve_task(native, task)
    log.info("%s: %d lazy pages", config.images_dir, pages)


def _serve_task(native: Server, task: ServedTask) -> int:
    entries = task.entries
    image = Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices)
    fd = open_pages(task.pages)
    try:
        native.add_image(image, fd)
    except BaseException:
        os.close(fd)
        raise
    log.debug("task %d: %d lazy pages in %d extents", task.pid, sum(entries.nr_pages), len(entries.starts))
    return sum(entries.nr_pages)


def listen(address: str, port: int) -> socket.socket:
    """Listen on an address; raise PageServerError, in one line, where that is not possible."""
    where = at(address, port)
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a name"
        raise PageServerError(f"{where}: no such address ({reason}); see --address") from error
    family, kind, protocol, _, bound = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bound)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PageServerError(f"{where}: {error.strerror}; see --address and --port") from error
    return listener


async def _listener(config: Config) -> trio.socket.SocketType:
    listener = config.listener
    if listener is None:
        listener = await trio.to_thread.run_sync(listen, config.address, config.port)
    return trio.socket.from_stdlib_socket(listener)


@contextlib.asynccontextmanager
async def running(server: PageServer, config: Config, warning: str) -> AsyncIterator[None]:
    """Accept connections while the block runs; ``warning`` is what everyone can do who reaches it."""
    listener = None
    if config.connection is None:
        listener = await _listener(config)
        server.address, server.port = listener.getsockname()[:2]
        if config.tls is None and not config.allow and not is_loopback(server.address):
            log.warning("%s: %s; --allow says who may", at(server.address, server.port), warning)
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        if config.connection is not None:
            server._adopt(trio.socket.from_stdlib_socket(config.connection), nursery)
        if listener is not None:
            nursery.start_soon(server._accept, listener, nursery)
        nursery.start_soon(server._reap)
        try:
            yield
        except BaseException as raised:  # noqa: BLE001 - raised below, as it is and in no group
            error = raised
        nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await server._end_all()
    try:
        if error is not None:
            raise error
    finally:
        del error


@contextlib.asynccontextmanager
async def open_page_server(
    config: Config, *, tasks: Iterable[ServedTask] | None = None
) -> AsyncIterator[PageServer]:
    """Serve the lazy pages of images while the block runs, to any number of destinations.

    What is connected at the end of the block is cut. Raises ImageError for
    images that cannot be served, PageServerError when it cannot listen, TlsError
    for files that TLS cannot be done with. ``tasks`` are what the images hold,
    where they have been read already.
    """
    with Server(stall_timeout=config.stall_timeout, idle_timeout=config.idle_timeout) as native:
        await trio.to_thread.run_sync(partial(_serve_images, native, config, tasks))
        server = PageServer(config, native)
        warning = "whoever reaches it is given the memory of these processes, in clear text"
        async with running(server, config, warning):
            yield server
