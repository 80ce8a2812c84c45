"""The blocking client."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, Unpack

from criupy.errors import CriuError, CriuTimeout, LocalProtocolError, OptionError
from criupy.rpc import _calls_linux as calls
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
from criupy.rpc._held_linux import PageServerChild, PreDumpLoop
from criupy.rpc._lazy_client_linux import LazyDump, LazyRestore
from criupy.rpc._lazy_linux import LazyDumpPlan, plan_restore
from criupy.rpc._notify import Hooks, check_hooks
from criupy.rpc._operation_linux import Operation, Process, end_worker
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
from criupy.rpc._worker_linux import HeldInterrupt

__all__ = ["Criu"]

T = TypeVar("T")


class Criu:
    """Drive CRIU, blocking.

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

    Use it as a context manager or ``close`` it; from one thread at a time.
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
        self._children: dict[int, PageServerChild] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers that wait for requests, and page servers that are their children."""
        self._closed = True
        with contextlib.ExitStack() as stack:  # all, whatever one of them raises
            stack.callback(self._close_kept)
            for child in self._children.values():
                stack.callback(child.close)

    # ---- questions -------------------------------------------------------------------

    def version(self, *, request_timeout: float | None = None) -> Version:
        """Ask for CRIU's version."""
        self._version = self._query(calls.version(), request_timeout)
        return self._version

    def feature_check(self, *names: FeatureName, request_timeout: float | None = None) -> Features:
        """Ask what CRIU can do on this kernel: the named features, or all."""
        return self._query(calls.feature_check(names), request_timeout)

    def check(
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
            self._run(calls.check(directory, options), request_timeout)

    def cpuinfo_dump(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[CpuinfoOptions],
    ) -> None:
        """Write the features of this CPU to an image."""
        self._run(calls.cpuinfo("cpuinfo_dump", images_dir, options), request_timeout)

    def cpuinfo_check(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[CpuinfoOptions],
    ) -> None:
        """Compare the features of this CPU with an image; CriuError if it has not all of them."""
        self._run(calls.cpuinfo("cpuinfo_check", images_dir, options), request_timeout)

    # ---- dump --------------------------------------------------------------------------------

    def dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        hooks: Hooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[DumpOptions],
    ) -> None:
        """Dump the tree whose root is ``pid``; it is killed then unless an option says otherwise."""
        check_hooks(hooks, Hooks)
        with self.open_dump(
            pid, images_dir=images_dir, request_timeout=request_timeout, **options
        ) as operation:
            operation._serve(hooks)

    def open_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[DumpOptions],
    ) -> Operation[None]:
        """Dump, with the notifications as an iterator instead of hooks."""
        return self._operation(calls.dump(pid, images_dir, options), request_timeout)

    def self_dump(
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
        self._close_kept()
        call = calls.self_dump(images_dir, options)
        return self._run(call, request_timeout, connect=partial(self._connect, call, detached=True))

    def pre_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PreDumpOptions],
    ) -> None:
        """Write the memory that changed since ``parent_img``, and let the tasks go on (CRIU 3.17)."""
        self._need_dirty_tracking(request_timeout)
        self._run(calls.pre_dump(pid, images_dir, options, single=True), request_timeout)

    def pre_dump_loop(self, pid: int, *, request_timeout: float | None = None) -> PreDumpLoop:
        """Make any number of pre-dumps and then a dump, in a block."""
        return PreDumpLoop(self, pid, request_timeout)

    # ---- restore -------------------------------------------------------------------------------

    def restore(
        self,
        *,
        images_dir: Directory,
        hooks: Hooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Restored[Process]:
        """Restore a tree, detached.

        Its first process becomes a child of init (or of the nearest
        subreaper); of this process with ``rst_sibling``, which then has to
        reap it; or of the program that the worker becomes with ``exec_cmd``.
        """
        check_hooks(hooks, Hooks)
        with self.open_restore(
            images_dir=images_dir, request_timeout=request_timeout, **options
        ) as operation:
            operation._serve(hooks)
        return Restored(operation.result, None if operation._worker is None else Process(operation._worker))

    def open_restore(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Operation[int]:
        """Restore, with the notifications as an iterator; ``result`` is the pid."""
        return self._operation(calls.restore(images_dir, options), request_timeout)

    # ---- page server -----------------------------------------------------------------------------

    def page_server(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PageServerOptions],
    ) -> PageServer:
        """Start CRIU's page server in the background, for one connection; port 0 lets the kernel choose.

        It is nobody's child, and CRIU does not tell its pid.
        """
        return self._run(calls.page_server(images_dir, options), request_timeout)

    def page_server_child(
        self,
        *,
        images_dir: Directory,
        request_timeout: float | None = None,
        **options: Unpack[PageServerOptions],
    ) -> PageServerChild:
        """Start CRIU's page server as a child of the worker, so that its end can be waited for."""
        held: list[Connection] = []
        call = calls.page_server_child(images_dir, options)
        try:
            pid, port = self._run(call, request_timeout, release=held.append)
            child = self._children[pid] = PageServerChild(self, held[0], pid, port)
        except BaseException:
            for connection in held:
                # A page server may have been started, and nobody would end it.
                if connection.worker is not None:
                    connection.worker.kill()
                self._end(connection)
            raise
        return child

    def wait_pid(self, pid: int, *, request_timeout: float | None = None) -> int:
        """Wait for a page_server_child; return its exit status, negative for a signal."""
        child = self._children.get(pid)
        if child is not None:
            return child.wait(request_timeout=request_timeout)
        if self._transport.fd is None:
            raise OptionError("pid", f"expected the pid of a page_server_child() of this client, got {pid}")
        return self._run(calls.wait_pid(pid), request_timeout)

    # ---- lazy migration -----------------------------------------------------------------------------

    def lazy_dump(
        self,
        pid: int,
        *,
        images_dir: Directory,
        address: str | None = "127.0.0.1",
        port: int = 0,
        hooks: Hooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[LazyDumpOptions],
    ) -> LazyDump:
        """Freeze a tree and serve its memory to a destination, in a block.

        The block begins when the images are complete and the page server
        listens on ``address`` (None is all interfaces); ``port`` 0 lets the
        kernel choose, with a worker of our own. ``request_timeout`` counts until
        then. Leaving the block waits until the destination has all pages.
        Without ``tls`` CRIU asks nobody who they are, and takes any connection
        that is closed for a destination that has all: see that only yours
        reaches the port.
        """
        check_hooks(hooks, Hooks)
        plan = LazyDumpPlan(
            pid, images_dir, options, address=address, port=port, is_own=self._transport.is_own
        )
        return LazyDump(self, plan, hooks, request_timeout)

    def lazy_restore(
        self,
        *,
        images_dir: Directory,
        page_server: tuple[str, int] | None = None,
        daemon: Sequence[str] | None = OUR_DAEMON,
        hooks: Hooks | None = None,
        request_timeout: float | None = None,
        **options: Unpack[LazyRestoreOptions],
    ) -> LazyRestore:
        """Restore a tree whose memory follows, in a block.

        Starts a lazy-pages ``daemon``, given as the words of its command and by
        default criupy's own (with options: ``("criupy-lazy-pages", "--reconnect",
        "60")``), that takes pages from ``page_server`` (host and port), or from
        the images themselves; None expects one that listens in the work directory
        already. With ``tls`` the daemon talks TLS to
        ``page_server``. The block begins when the tasks run; leaving it waits
        for the last page.
        """
        check_hooks(hooks, Hooks)
        call, plan = plan_restore(
            images_dir,
            options,
            daemon=daemon,
            page_server=page_server,
            capture=self._transport.capture_output,
        )
        return LazyRestore(self, call, hooks, plan, request_timeout)

    # ---- inside --------------------------------------------------------------------------------------

    def _operation(
        self,
        call: Call[T],
        request_timeout: float | None,
        *,
        connect: Callable[[Take, float], None] | None = None,
        release: Callable[[Connection], None] | None = None,
    ) -> Operation[T]:
        try:
            seconds = check_seconds("request_timeout", request_timeout)
        except OptionError:
            call.close()
            raise
        return Operation(
            call,
            connect or partial(self._connect, call),
            release or self._keep,
            request_timeout=self._transport.request_timeout if seconds is None else seconds,
            grace=self._transport.grace,
        )

    def _run(
        self,
        call: Call[T],
        request_timeout: float | None,
        *,
        connect: Callable[[Take, float], None] | None = None,
        release: Callable[[Connection], None] | None = None,
    ) -> T:
        with self._operation(call, request_timeout, connect=connect, release=release) as operation:
            pass
        return operation.result

    def _query(self, call: Call[T], request_timeout: float | None) -> T:
        """Ask what can be asked many times, on a connection that is kept."""
        return self._run(call, request_timeout, connect=partial(self._reuse, call))

    def _reuse(self, call: Call[T], take: Take, deadline: float) -> None:
        if not self._take_kept(take):
            self._connect(call, take, deadline)

    def _check(self, call: Call[T], deadline: float) -> None:
        """Refuse what this client or this CRIU cannot do, before anything is sent."""
        if self._closed:
            raise LocalProtocolError(f"{call.name}: the client is closed")
        call.check_transport(self._transport)
        if call.check_images is not None:
            call.check_images()
        if call.needs_version:
            left = max(0.0, deadline - time.monotonic())
            call.check_version(self._version or self.version(request_timeout=left))

    def _connect(self, call: Call[T], take: Take, deadline: float, *, detached: bool = False) -> None:
        """Make a connection for a request, having checked that this CRIU knows all its options."""
        self._check(call, deadline)
        transport = self._transport
        if detached and transport.fd is None:
            self._close_kept()  # which a version may have been asked on
        if transport.fd is not None:
            if not self._take_kept(take):
                raise LocalProtocolError(
                    f"{call.name}: the connection of fd={transport.fd} is in use, or CRIU has ended it"
                )
            return
        if transport.socket is not None:
            while (connection := connect(transport.socket, request=call.name)) is None:
                if time.monotonic() >= deadline:
                    raise CriuTimeout(call.name, f"{transport.socket}: nobody was accepted in time")
                time.sleep(BUSY_PAUSE)
            take(connection)
            return
        binary = transport.binary or "criu"
        with HeldInterrupt():
            if detached:
                take(
                    start_detached_worker(
                        binary, transport.arguments, request=call.name, inherit=call.inherit
                    )
                )
            else:
                take(
                    start_worker(
                        binary,
                        transport.arguments,
                        request=call.name,
                        inherit=call.inherit,
                        capture=transport.capture_output,
                        own_group=call.own_group,
                    )
                )

    def _take_kept(self, take: Take) -> bool:
        """Hand on the connection that was kept, if there is one and CRIU is still there."""
        connection = self._kept
        if connection is None:
            return False
        try:
            alive = connection.is_alive()
        except BaseException:
            self._close_kept()
            raise
        if not alive:
            self._close_kept()
            return False
        take(connection)
        self._kept = None
        return True

    def _keep(self, connection: Connection) -> None:
        if self._kept is connection:
            return  # interrupted when it was kept already
        if self._kept is None and not self._closed:
            self._kept = connection
        else:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        try:
            connection.close_socket()
        finally:
            end_worker(connection.worker, self._until_grace())

    def _close_kept(self) -> None:
        if self._kept is not None:
            try:
                self._end(self._kept)
            finally:
                self._kept = None

    def _until_grace(self) -> float:
        return time.monotonic() + self._transport.grace

    def _need_dirty_tracking(self, request_timeout: float | None) -> None:
        # Without it CRIU runs into an assertion of its own, inside the task.
        if self.feature_check("mem_track", request_timeout=request_timeout).mem_track is False:
            raise CriuError("pre_dump", "CRIU cannot track changes of memory", hint=NO_DIRTY_TRACKING)

    def _wait_for(self, child: PageServerChild, request_timeout: float | None) -> int:
        if self._children.get(child.pid) is not child:
            raise LocalProtocolError(f"wait_pid: page server {child.pid} was waited for or closed before")

        def connect(take: Take, _: float) -> None:
            take(child._connection)
            del self._children[child.pid]

        try:
            return self._run(calls.wait_pid(child.pid), request_timeout, connect=connect)
        except BaseException:
            if child._connection.fileno() < 0:
                self._children.pop(child.pid, None)
            if child.pid not in self._children:  # else it can be waited for again
                child._connection.kill_child(child.pid)
            raise

    def _drop(self, child: PageServerChild) -> None:
        if self._children.get(child.pid) is child:
            try:
                child._connection.kill_child(child.pid)
            finally:
                self._end(child._connection)
                del self._children[child.pid]
