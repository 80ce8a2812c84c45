"""The page server on trio: accepting, admitting and reporting. The pages themselves are served in C."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from criupy._tls.tls_linux import TlsSession
from criupy._uffd.server_linux import Account, Ending, Question, Server
from criupy.errors import PageServerError, TlsError
from criupy.page_server._access import at, household, is_allowed, is_loopback
from criupy.page_server._admission_linux import Admission, take
from criupy.page_server._config import Config
from criupy.page_server._socket_linux import listen, prepare
from criupy.page_server._statistics import Statistics
from criupy.page_server._telling_linux import tell

__all__ = ["Decider", "PageServer", "running"]

log = logging.getLogger("criupy.page_server")

# Until a connection ends, or the limit is raised.
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# The listener's own failures; all others are those of one connection.
_NO_LISTENER = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
_PAUSE = 0.1


class Decider(Protocol):
    """What decides for a server that receives images, or relays those of a live source."""

    async def answer(self, question: Question) -> None:
        """Answer what a connection asked."""

    async def end(self, account: Account, peer: str) -> bool:
        """Conclude with an ended connection, tell of it, and whether all is well with it."""


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    host: str


class PageServer:
    """A page server that listens; made by ``open_page_server`` or ``open_page_receiver``.

    ``address`` and ``port`` are where ("" and 0 with an inherited connection).
    """

    def __init__(self, config: Config, native: Server, decider: Decider | None = None) -> None:
        self._config = config
        self._native = native
        self._decider = decider
        self._peers: dict[int, _Peer] = {}
        self._handshakes: dict[trio.CancelScope, _Peer] = {}
        self._only: int | None = None  # with ``once``: whom it was all for
        self._accepting = trio.CancelScope()
        self._accepts = True
        self._changed = trio.Event()
        self.address: str = ""
        self.port: int = 0
        self.statistics: Statistics = Statistics()
        #: The account of the connection that ended last; with ``once`` only of the one that counts.
        self.last: Account | None = None
        #: Whether all had come of it that was to be received.
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
        while self._peers or self._handshakes or self._accepts:
            await self._changed.wait()

    def cut(self) -> None:
        """End every connection now."""
        self._cut(keep=None)

    def _cut(self, keep: int | None) -> None:
        for serial in self._peers:
            if serial != keep:
                self._native.cut(serial)
        for scope in self._handshakes:
            scope.cancel()

    # ---- those who come ------------------------------------------------------

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        with self._accepting, listener:
            while True:
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
        self, connection: trio.socket.SocketType, address: tuple[str, int], nursery: trio.Nursery
    ) -> bool:
        """Serve a connection, or refuse it; tell which. With TLS that shows later."""
        peer = _Peer(at(*address[:2]), address[0])
        with connection:
            if self._accepting.cancel_called:
                return True  # its accept could not be cancelled any more
            refusal = self._refusal(peer)
            if refusal is None:
                try:
                    self._take(connection, peer, nursery)
                except OSError as error:
                    refusal = str(error)
        if refusal is not None:
            log.warning("%s: refused, %s", peer.name, refusal)
        return refusal is None

    def _refusal(self, peer: _Peer) -> str | None:
        if not is_allowed(peer.host, self._config.allow):
            return "it is in no network that is allowed"
        connected = [*self._peers.values(), *self._handshakes.values()]
        if len(connected) >= self._config.max_connections:
            return f"{len(connected)} are connected already"
        house = household(peer.host)
        from_there = sum(household(other.host) == house for other in connected if other.host)
        if from_there >= self._config.share:
            return f"{from_there} from its address are connected already, which is what one may have"
        return None

    def _adopt(self, connection: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        """Serve the only connection that there will be."""
        self._accepts = False
        with connection:
            try:
                self._take(connection, _Peer(f"the inherited socket {connection.fileno()}", ""), nursery)
            except OSError as error:
                raise PageServerError(f"the inherited socket cannot be served: {error}") from error

    def _take(self, connection: trio.socket.SocketType, peer: _Peer, nursery: trio.Nursery) -> None:
        prepare(connection, self._config.stall_timeout)
        if self._admission is None:
            self._serve(connection, peer)
        else:
            scope = trio.CancelScope()
            nursery.start_soon(self._check, self._admission, take(connection), peer, scope)
            self._handshakes[scope] = peer

    def _serve(
        self, connection: trio.socket.SocketType, peer: _Peer, session: TlsSession | None = None
    ) -> None:
        """Hand a connection over to a thread."""
        kind = "plain TCP" if session is None else session.describe()
        transport = 0 if session is None else session.transport
        serial = self._native.serve(connection.fileno(), transport=transport)
        if session is not None:
            session.given()
        connection.detach()
        self._peers[serial] = peer
        log.info("connection %d: from %s, %s", serial, peer.name, kind)

    async def _check(
        self, admission: Admission, connection: trio.socket.SocketType, peer: _Peer, scope: trio.CancelScope
    ) -> None:
        """Serve a peer whose certificate is good, unless it is cut before."""
        refusal = "it was cut here"
        try:
            with (
                connection,
                scope,
                await admission.handshake(connection, self._config.stall_timeout) as session,
            ):
                if not scope.cancel_called:  # as the handshake was done
                    self._serve(connection, peer, session)
                    return
        except (TlsError, OSError) as error:
            refusal = str(error)
        finally:
            del self._handshakes[scope]
            self._notify()
        log.warning("%s: refused, %s", peer.name, refusal)
        self.statistics.refused += 1

    # ---- what becomes of them ------------------------------------------------

    async def _reap(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._native.event_fd)
                ended = list(self._native.ended())
                if self._config.once and self._only is None:
                    self._look_for_the_only([*ended, *self.connections()])
                for account in ended:
                    nursery.start_soon(self._end, account)
                if self._decider is not None:
                    for question in self._native.questions():
                        self._ask(self._decider, question, nursery)

    def _look_for_the_only(self, accounts: list[Account]) -> None:
        # One that was given a page needs the others; one that closed its session needed none. Who merely
        # connects (to see if there is somebody, or to speak HTTP) keeps nobody from being served.
        if self._decider is not None:
            return
        counting = [
            (account.first_page or account.ended or account.started, account.serial)
            for account in accounts
            if account.first_page or account.ending is Ending.CLOSED
        ]
        if counting:
            self._choose(min(counting)[1])

    def _choose(self, serial: int) -> None:
        self._only = serial
        self.stop()
        self._cut(keep=serial)

    def _ask(self, decider: Decider, question: Question, nursery: trio.Nursery) -> None:
        if self._config.once and self._only is None:
            self._choose(question.serial)
        if self._only in {None, question.serial}:
            nursery.start_soon(decider.answer, question)
        else:
            self._native.cut(question.serial)

    async def _end(self, account: Account) -> None:
        peer = self._peers[account.serial]
        is_whole = False
        try:
            if self._decider is None:
                tell(account, peer.name)
            else:
                with trio.CancelScope(shield=True):  # its account is given once
                    is_whole = await self._decider.end(account, peer.name)
        finally:
            del self._peers[account.serial]
        self.statistics.add(account, peer.name)
        is_given = self._config.connection is not None  # there is no other
        if is_given or not self._config.once or self._only == account.serial:
            self.last, self.is_whole = account, is_whole
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


async def _listener(config: Config) -> trio.socket.SocketType:
    listener = config.listener
    if listener is None:
        listener = await trio.to_thread.run_sync(listen, config.address, config.port)
    return trio.socket.from_stdlib_socket(listener)


@contextlib.asynccontextmanager
async def running(
    server: PageServer,
    config: Config,
    warning: str,
    *,
    beside: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """Accept connections while the block runs; ``warning`` is what everyone can do who reaches it."""
    listener = None
    if config.connection is None:
        listener = await _listener(config)
        server.address, server.port = listener.getsockname()[:2]
        if config.tls is None and not config.allow and not is_loopback(server.address):
            log.warning("%s: %s; --allow says who may", at(server.address, server.port), warning)
    error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            if config.connection is not None:
                server._adopt(trio.socket.from_stdlib_socket(config.connection), nursery)
            if listener is not None:
                nursery.start_soon(server._accept, listener, nursery)
            nursery.start_soon(server._reap)
            if beside is not None:
                nursery.start_soon(beside)
            try:
                yield
            except BaseException as raised:  # noqa: BLE001 - raised below, as it is and in no group
                error = raised
            nursery.cancel_scope.cancel()
    finally:  # the nursery raises where the block was cancelled from outside
        with trio.CancelScope(shield=True):
            await server._end_all()
        if error is not None and not isinstance(error, trio.Cancelled):
            raise error
    try:
        if error is not None:
            raise error
    finally:
        del error
