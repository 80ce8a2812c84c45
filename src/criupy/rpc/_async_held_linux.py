"""What holds a connection between two requests, on trio: a page server child, a loop of pre-dumps."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import trio

from criupy.errors import LocalProtocolError
from criupy.rpc import _calls_linux as calls
from criupy.rpc._calls_linux import Call
from criupy.rpc._connection_linux import Connection
from criupy.rpc._exchange_linux import Take
from criupy.rpc._notify import AsyncHooks, check_hooks
from criupy.rpc._option_types import Directory
from criupy.rpc._options import DumpOptions, PreDumpOptions

if TYPE_CHECKING:
    from criupy.rpc._async_client_linux import AsyncCriu

__all__ = ["AsyncPageServerChild", "AsyncPreDumpLoop"]


class AsyncPageServerChild:
    """A page server that is a child of its worker; ``wait`` for it, or ``close`` to end it.

    ``pid`` is its process, ``port`` where it listens.
    """

    def __init__(self, client: AsyncCriu, connection: Connection, pid: int, port: int) -> None:
        self._client = client
        self._connection = connection
        self.pid = pid
        self.port = port

    async def __aenter__(self) -> Self:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def wait(self, *, request_timeout: float | None = None) -> int:
        """Wait until it has served its one connection; return its exit status, negative for a signal."""
        return await self._client._wait_for(self, request_timeout)

    @trio.lowlevel.enable_ki_protection
    async def close(self) -> None:
        """End it with its worker."""
        await self._client._drop(self)


class AsyncPreDumpLoop:
    """Pre-dumps on one connection, so that CRIU notices a reused pid, and the dump that ends them."""

    def __init__(self, client: AsyncCriu, pid: int, request_timeout: float | None) -> None:
        self._client = client
        self._pid = pid
        self._timeout = request_timeout
        self._connection: Connection | None = None
        self._entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = False
        if self._connection is not None:
            await self._client._end(self._connection)
            self._connection = None

    async def pre_dump(self, *, images_dir: Directory, **options: Unpack[PreDumpOptions]) -> None:
        """Write the memory that changed since the one before, and let the tasks go on."""
        self._check_entered()
        if self._connection is None:
            # Asked once, and the version with it: with fd= there is no other connection later.
            await self._client._need_dirty_tracking(self._timeout)
            await self._client.version(request_timeout=self._timeout)
        call = calls.pre_dump(self._pid, images_dir, options, single=False)
        await self._client._run(
            call, self._timeout, connect=lambda take: self._connect(call, take), release=self._keep
        )

    async def dump(
        self, *, images_dir: Directory, hooks: AsyncHooks | None = None, **options: Unpack[DumpOptions]
    ) -> None:
        """Dump the tree; the loop is over then."""
        self._check_entered()
        check_hooks(hooks, AsyncHooks)
        call = calls.dump(self._pid, images_dir, options)
        async with self._client._operation(
            call, self._timeout, connect=lambda take: self._connect(call, take)
        ) as operation:
            await operation._serve(hooks)

    async def _connect(self, call: Call[None], take: Take) -> None:
        if self._connection is None:
            await self._client._connect(call, take)
            return
        await self._client._check(call)
        call.refuse_inherited("expected with the first request of a loop, at which its worker starts")
        take(self._connection)
        self._connection = None

    async def _keep(self, connection: Connection) -> None:
        self._connection = connection

    def _check_entered(self) -> None:
        if not self._entered:
            raise LocalProtocolError("pre_dump_loop: enter the block first")
