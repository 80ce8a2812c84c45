"""The trio client: the same names and options as the blocking one."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, Unpack

import trio

from criupy.errors import CriuError, LocalProtocolError, OptionError
from criupy.rpc import _calls_linux as calls
from criupy.rpc._async_held_linux import AsyncPageServerChild, AsyncPreDumpLoop
from criupy.rpc._async_lazy_client_linux import AsyncLazyDump, AsyncLazyRestore
from criupy.rpc._async_operation_linux import AsyncOperation, AsyncProcess, end_worker
from criupy.rpc._calls_linux import Call, log_directory
from criupy.rpc._connection_linux import (
    BUSY_PAUSE,
    Connection,
    adopt,
    connect,
    start_detached_worker,
    start_worker,
)
from criupy.rpc._daemon_linux import OUR_DAEMON
from criupy.rpc._exchange_linux import Take
from criupy.rpc._lazy_linux import LazyDumpPlan, plan_restore
from criupy.rpc._notify import AsyncHooks, check_hooks
from criupy.rpc._option_types import Directory
from criupy.rpc._options import (
    CheckOptions,
    CpuinfoOptions,
    DumpOptions,
    LazyDumpOptions,
    LazyRestoreOptions,
    PageServerOptions,
    PreDumpOptions,
    RestoreOptions,
)
from criupy.rpc._report import NO_DIRTY_TRACKING
from criupy.rpc._results import FeatureName, Features, PageServer, Restored, Version
from criupy.rpc._transport import check_seconds, make_transport

__all__ = ["AsyncCriu"]

T = TypeVar("T")


class AsyncCriu:
    """Drive CRIU on trio.

    ``binary`` is CRIU's program, by default ``criu`` on PATH, run as ``criu
    swrk`` for each request; ``socket`` is instead the path of a ``criu
    service``'s socket, ``fd`` the descriptor of an AF_UNIX SOCK_SEQPACKET socket
    that is connected to either (it is duplicated, not closed; CRIU ends such a
    connection with the first request that is not a query).

    ``default_config`` lets workers read CRIU's default configuration files.
    ``capture_output`` keeps what they print for the errors; False lets them
    print where this process does. ``request_timeout`` is how many seconds a
    request may take, notifications included, before CriuTimeout; None is no
    limit, and each call may say otherwise (``math.inf`` for no limit). It is
    not CRIU's own option ``timeout``. ``grace`` is how many seconds CRIU then
    has to undo what it did, before it is killed.

    Use it as an async context manager or ``close`` it. Any number of tasks may
    use it at once. A request that is cancelled is undone first: CRIU has
    ``grace`` seconds for that.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str] | None = None,
        *,
        socket: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        default_config: bool = False,
        capture_output: bool = True,
        request_timeout: float | None = None,
        grace: float = 10.0,
    ) -> None:
        self._transport = make_transport(
            binary,
            socket,
            fd,
            default_config=default_config,
            capture_output=capture_output,
            request_timeout=request_timeout,
            grace=grace,
        )
        self._kept = None if fd is None else adopt(fd)
        self._version: Version | None = None
        self._children: dict[int, AsyncPageServerChild] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @trio.lowlevel.enable_ki_protection
    async def close(self) -> None:
        """End the workers that wait for requests, and page servers that are their children."""
        self._closed = True
        async with contextlib.AsyncExitStack() as stack:  # all, whatever one of them raises
            stack.push_async_callback(self._close_kept)
            for child in self._children.values():
                stack.push_async_callback(child.close)

    # ---- questions -------------------------------------------------------------------

    async def version(self, *, request_timeout: float | None = None) -> Version:
        """Ask for CRIU's version."""
        self._version = await self._query(calls.version(), request_timeout)
        return self._version

    async def feature_check(self, *names: FeatureName, request_timeout: float | None = None) -> Features:
        """Ask what CRIU can do on this kernel: the named features, or all."""
        return await self._query(calls.feature_check(names), request_timeout)

    async def check(
        self,
        *,
        images_dir: Directory | None = None,
        request_timeout: float | None = None,
        **options: Unpack[CheckOptions],
    ) -> None:
        """Let CRIU check that this kernel has what it needs; CriuError says what it lacks.

        Its log goes to ``images_dir``, by default to a temporary directory.
        """
        with log_directory(images_dir) as directory:
            await self._run(calls.check(directory, options), request_timeout)

    async def cpuinfo_dump(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[CpuinfoOptions],
    ) -> None:
        """Write the features of this CPU to an image."""
        await self._run(calls.cpuinfo("cpuinfo_dump", images_dir, options), request_timeout)

    async def cpuinfo_check(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[CpuinfoOptions],
    ) -> None:
        """Compare the features of this CPU with an image; CriuError if it has not all of them."""
        await self._run(calls.cpuinfo("cpuinfo_check", images_dir, options), request_timeout)

    # ---- dump --------------------------------------------------------------------------------

    async def dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        hooks: AsyncHooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[DumpOptions],
    ) -> None:
        """Dump the tree whose root is ``pid``; it is killed then unless an option says otherwise."""
        check_hooks(hooks, AsyncHooks)
        async with self.open_dump(
            pid, images_dir=images_dir, request_timeout=request_timeout, **options
        ) as operation:
            await operation._serve(hooks)

    def open_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[DumpOptions],
    ) -> AsyncOperation[None]:
        """Dump, with the notifications as an iterator instead of hooks."""
        return self._operation(calls.dump(pid, images_dir, options), request_timeout)

    async def self_dump(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[DumpOptions],
    ) -> bool:
        """Dump the calling process; like fork(2) it returns twice.

        True in the restored copy, False in the process that goes on
        (``leave_running``). Its children are dumped with it.
        """
        # A worker of ours is a child: it would be dumped, and cannot dump itself.
        await self._close_kept()
        call = calls.self_dump(images_dir, options)
        return await self._run(
            call, request_timeout, connect=lambda take: self._connect(call, take, detached=True)
        )

    async def pre_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PreDumpOptions],
    ) -> None:
        """Write the memory that changed since ``parent_img``, and let the tasks go on (CRIU 3.17)."""
        await self._need_dirty_tracking(request_timeout)
        await self._run(calls.pre_dump(pid, images_dir, options, single=True), request_timeout)

    def pre_dump_loop(self, pid: int, *, request_timeout: float | None = None) -> AsyncPreDumpLoop:
        """Make any number of pre-dumps and then a dump, in a block."""
        return AsyncPreDumpLoop(self, pid, request_timeout)

    # ---- restore -------------------------------------------------------------------------------

    async def restore(
        self,
        *,
        images_dir: Directory,
        hooks: AsyncHooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Restored[AsyncProcess]:
        """Restore a tree, detached.

        Its first process becomes a child of init (or of the nearest
        subreaper); of this process with ``rst_sibling``, which then has to
        reap it; or of the program that the worker becomes with ``exec_cmd``.
        """
        check_hooks(hooks, AsyncHooks)
        async with self.open_restore(
            images_dir=images_dir, request_timeout=request_timeout, **options
        ) as operation:
            await operation._serve(hooks)
        return Restored(
            operation.result, None if operation._worker is None else AsyncProcess(operation._worker)
        )

    def open_restore(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[RestoreOptions],
    ) -> AsyncOperation[int]:
        """Restore, with the notifications as an iterator; ``result`` is the pid."""
        return self._operation(calls.restore(images_dir, options), request_timeout)

    # ---- page server -----------------------------------------------------------------------------

    async def page_server(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PageServerOptions],
    ) -> PageServer:
        """Start CRIU's page server in the background, for one connection; port 0 lets the kernel choose.

        It is nobody's child, and CRIU does not tell its pid.
        """
        return await self._run(calls.page_server(images_dir, options), request_timeout)

    async def page_server_child(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PageServerOptions],
    ) -> AsyncPageServerChild:
        """Start CRIU's page server as a child of the worker, so that its end can be waited for."""
        held: list[Connection] = []
        call = calls.page_server_child(images_dir, options)

        async def hold(connection: Connection) -> None:
            held.append(connection)

        try:
            pid, port = await self._run(call, request_timeout, release=hold)
            child = self._children[pid] = AsyncPageServerChild(self, held[0], pid, port)
        except BaseException:
            for connection in held:
                # A page server may have been started, and nobody would end it.
                if connection.worker is not None:
                    connection.worker.kill()
                await self._end(connection)
            raise
        return child

    async def wait_pid(self, pid: int, *, request_timeout: float | None = None) -> int:
        """Wait for a page_server_child; return its exit status, negative for a signal."""
        child = self._children.get(pid)
        if child is not None:
            return await child.wait(request_timeout=request_timeout)
        if self._transport.fd is None:
            raise OptionError("pid", f"expected the pid of a page_server_child() of this client, got {pid}")
        return await self._run(calls.wait_pid(pid), request_timeout)

    # ---- lazy migration -----------------------------------------------------------------------------

    def lazy_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        address: str | None = "127.0.0.1",
        port: int = 0,
        hooks: AsyncHooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[LazyDumpOptions],
    ) -> AsyncLazyDump:
        """Freeze a tree and serve its memory to a destination, in a block.

        The block begins when the images are complete and the page server
        listens on ``address`` (None is all interfaces); ``port`` 0 lets the
        kernel choose, with a worker of our own. ``request_timeout`` counts until
        then. Leaving the block waits until the destination has all pages.
        Without ``tls`` CRIU asks nobody who they are, and takes any connection
        that is closed for a destination that has all: see that only yours
        reaches the port.
        """
        check_hooks(hooks, AsyncHooks)
        plan = LazyDumpPlan(
            pid, images_dir, options, address=address, port=port, is_own=self._transport.is_own
        )
        return AsyncLazyDump(self, plan, hooks, request_timeout)

    def lazy_restore(
        self,
        *,
        images_dir: Directory,
        page_server: tuple[str, int] | None = None,
        daemon: Sequence[str] | None = OUR_DAEMON,
        hooks: AsyncHooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[LazyRestoreOptions],
    ) -> AsyncLazyRestore:
        """Restore a tree whose memory follows, in a block.

        Starts a lazy-pages ``daemon``, given as the words of its command and by
        default criupy's own (with options: ``("criupy-lazy-pages", "--reconnect",
        "60")``), that takes pages from ``page_server`` (host and port), or from
        the images themselves; None expects one that listens in the work directory
        already. With ``tls`` the daemon talks TLS to
        ``page_server``. The block begins when the tasks run; leaving it waits
        for the last page.
        """
        check_hooks(hooks, AsyncHooks)
        call, plan = plan_restore(
            images_dir,
            options,
            daemon=daemon,
            page_server=page_server,
            capture=self._transport.capture_output,
        )
        return AsyncLazyRestore(self, call, hooks, plan, request_timeout)

    # ---- inside --------------------------------------------------------------------------------------

    def _operation(
        self,
        call: Call[T],
        request_timeout: float | None,
        *,
        connect: Callable[[Take], Awaitable[None]] | None = None,
        release: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> AsyncOperation[T]:
        try:
            seconds = check_seconds("request_timeout", request_timeout)
        except OptionError:
            call.close()
            raise
        return AsyncOperation(
            call,
            connect or (lambda take: self._connect(call, take)),
            release or self._keep,
            request_timeout=self._transport.request_timeout if seconds is None else seconds,
            grace=self._transport.grace,
        )

    async def _run(
        self,
        call: Call[T],
        request_timeout: float | None,
        *,
        connect: Callable[[Take], Awaitable[None]] | None = None,
        release: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> T:
        async with self._operation(call, request_timeout, connect=connect, release=release) as operation:
            pass
        return operation.result

    async def _query(self, call: Call[T], request_timeout: float | None) -> T:
        """Ask what can be asked many times, on a connection that is kept."""
        return await self._run(call, request_timeout, connect=lambda take: self._reuse(call, take))

    async def _reuse(self, call: Call[T], take: Take) -> None:
        if not await self._take_kept(take):
            await self._connect(call, take)

    async def _check(self, call: Call[T]) -> None:
        """Refuse what this client or this CRIU cannot do, before anything is sent."""
        if self._closed:
            raise LocalProtocolError(f"{call.name}: the client is closed")
        call.check_transport(self._transport)
        if call.check_images is not None:
            await trio.to_thread.run_sync(call.check_images)
        if call.needs_version:
            # The request's own time limits this, too.
            version = self._version or await self.version(request_timeout=math.inf)
            call.check_version(version)

    async def _connect(self, call: Call[T], take: Take, *, detached: bool = False) -> None:
        """Make a connection for a request, having checked that this CRIU knows all its options."""
        await self._check(call)
        transport = self._transport
        if detached and transport.fd is None:
            await self._close_kept()  # which a version may have been asked on
        if transport.fd is not None:
            if not await self._take_kept(take):
                raise LocalProtocolError(
                    f"{call.name}: the connection of fd={transport.fd} is in use, or CRIU has ended it"
                )
            return
        if transport.socket is not None:
            while (  # noqa: ASYNC110 - of a full queue no event tells
                connection := connect(transport.socket, request=call.name)
            ) is None:
                await trio.sleep(BUSY_PAUSE)
            take(connection)
            return
        binary = transport.binary or "criu"
        if detached:
            take(start_detached_worker(binary, transport.arguments, request=call.name, inherit=call.inherit))
            return
        # Starting a program may wait for a disk. Cancelled or not, what was started is ours.
        take(
            await trio.to_thread.run_sync(
                partial(
                    start_worker,
                    binary,
                    transport.arguments,
                    request=call.name,
                    inherit=call.inherit,
                    capture=transport.capture_output,
                    own_group=call.own_group,
                )
            )
        )

    async def _take_kept(self, take: Take) -> bool:
        """Hand on the connection that was kept, if there is one and CRIU is still there."""
        connection = self._kept
        if connection is None:
            return False
        try:
            alive = connection.is_alive()
        except BaseException:
            await self._close_kept()
            raise
        if not alive:
            await self._close_kept()
            return False
        take(connection)
        self._kept = None
        return True

    async def _keep(self, connection: Connection) -> None:
        if self._kept is connection:
            return  # interrupted when it was kept already
        if self._kept is None and not self._closed:
            self._kept = connection
        else:
            await self._end(connection)

    async def _end(self, connection: Connection) -> None:
        try:
            connection.close_socket()
        finally:
            await end_worker(connection.worker, self._transport.grace)

    async def _close_kept(self) -> None:
        connection, self._kept = self._kept, None
        if connection is not None:
            await self._end(connection)

    async def _need_dirty_tracking(self, request_timeout: float | None) -> None:
        # Without it CRIU runs into an assertion of its own, inside the task.
        features = await self.feature_check("mem_track", request_timeout=request_timeout)
        if features.mem_track is False:
            raise CriuError("pre_dump", "CRIU cannot track changes of memory", hint=NO_DIRTY_TRACKING)

    async def _wait_for(self, child: AsyncPageServerChild, request_timeout: float | None) -> int:
        if self._children.get(child.pid) is not child:
            raise LocalProtocolError(f"wait_pid: page server {child.pid} was waited for or closed before")

        async def connect(take: Take) -> None:
            take(child._connection)
            del self._children[child.pid]

        try:
            return await self._run(calls.wait_pid(child.pid), request_timeout, connect=connect)
        except BaseException:
            if child._connection.fileno() < 0:
                self._children.pop(child.pid, None)
            if child.pid not in self._children:  # else it can be waited for again
                child._connection.kill_child(child.pid)
            raise

    async def _drop(self, child: AsyncPageServerChild) -> None:
        if self._children.get(child.pid) is child:
            del self._children[child.pid]
            child._connection.kill_child(child.pid)
            await self._end(child._connection)
