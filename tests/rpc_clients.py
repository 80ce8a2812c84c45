"""Both clients behind one face, so that a test is written once and holds for either."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import trio

from criupy import AsyncCriu, AsyncHooks, Criu, Hooks, Notification, Script
from criupy.rpc import Descriptor
from criupy.runc import AsyncRunc, Runc

Act = Callable[[], object]


class Recorder:
    """What hooks saw: the scripts in order; ``acts`` are done at theirs, and may refuse by raising."""

    def __init__(self, acts: dict[str, Act] | None = None, external: Sequence[str] = ()) -> None:
        self.scripts: list[str] = []
        self.pids: dict[str, int] = {}
        self.master: Descriptor | None = None
        self.external = external
        self._acts = acts or {}

    def see(self, script: str, pid: int | None = None, descriptor: Descriptor | None = None) -> None:
        self.scripts.append(script)
        if pid is not None:
            self.pids[script] = pid
        if descriptor is not None:
            self.master = Descriptor(descriptor.detach())
        if script in self._acts:
            self._acts[script]()

    def hooks(self) -> Hooks:
        return _recording_hooks(self)

    def async_hooks(self) -> AsyncHooks:
        return _recording_async_hooks(self)


def _recording_hooks(recorder: Recorder) -> Hooks:
    hooks = Hooks()
    for script in Script:

        def hook(*arguments: Any, script: str = script.value) -> Any:
            _see(recorder, script, arguments)
            return recorder.external if script == Script.QUERY_EXT_FILES else None

        setattr(hooks, script.value.replace("-", "_"), hook)
    return hooks


def _recording_async_hooks(recorder: Recorder) -> AsyncHooks:
    hooks = AsyncHooks()
    for script in Script:

        async def hook(*arguments: Any, script: str = script.value) -> Any:
            await trio.lowlevel.checkpoint()
            _see(recorder, script, arguments)
            return recorder.external if script == Script.QUERY_EXT_FILES else None

        setattr(hooks, script.value.replace("-", "_"), hook)
    return hooks


def _see(recorder: Recorder, script: str, arguments: tuple[Any, ...]) -> None:
    pid = next((argument for argument in arguments if isinstance(argument, int)), None)
    descriptor = next((argument for argument in arguments if isinstance(argument, Descriptor)), None)
    recorder.see(script, pid, descriptor)


class Client:
    """One of the clients; a call to it is the same call to the client."""

    def __init__(self, client: Criu | AsyncCriu | Runc | AsyncRunc) -> None:
        self.client: Any = client
        self.is_async = isinstance(client, (AsyncCriu, AsyncRunc))

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method, in a thread if it blocks."""
        function = getattr(self.client, method)
        if isinstance(options.get("hooks"), Recorder):
            recorder = options["hooks"]
            options["hooks"] = recorder.async_hooks() if self.is_async else recorder.hooks()
        return await self.run(partial(function, *arguments, **options))

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call a function that blocks or is to be awaited, as the client's methods do."""
        if not self.is_async:
            return await trio.to_thread.run_sync(function)
        result = function()
        return await result if isinstance(result, Awaitable) else result

    @contextlib.asynccontextmanager
    async def block(self, method: str, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        """Enter the block that a method returns."""
        if isinstance(options.get("hooks"), Recorder):
            recorder = options["hooks"]
            options["hooks"] = recorder.async_hooks() if self.is_async else recorder.hooks()
        entered = getattr(self.client, method)(*arguments, **options)
        if self.is_async:
            async with entered as value:
                yield value
            return
        value = await trio.to_thread.run_sync(entered.__enter__)
        try:
            yield value
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(entered.__exit__, type(error), error, error.__traceback__)
            raise
        await trio.to_thread.run_sync(entered.__exit__, None, None, None)

    async def notifications(self, operation: Any) -> AsyncGenerator[Notification, None]:
        """Iterate over an operation of either client."""
        if self.is_async:
            async for notification in operation:
                yield notification
            return
        while True:
            notification = await trio.to_thread.run_sync(next, operation, None)
            if notification is None:
                return
            yield notification


@contextlib.asynccontextmanager
async def open_client(kind: str, **how: Any) -> AsyncIterator[Client]:
    """Make a client of a kind, "blocking" or "trio"."""
    if kind == "trio":
        async with AsyncCriu(**how) as asynchronous:
            yield Client(asynchronous)
        return
    blocking = Criu(**how)
    try:
        yield Client(blocking)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(blocking.close)
