"""On trio: waiting, processes, and one request from start to end."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

import trio

from criupy._descriptor import Descriptor
from criupy.errors import CriupyError, CriuTimeout, LocalProtocolError
from criupy.rpc._calls_linux import Call
from criupy.rpc._connection_linux import Connection, Ended
from criupy.rpc._exchange_linux import Exchange, Take, ends_worker
from criupy.rpc._notify import AsyncHooks, Notification, external_of, invoke
from criupy.rpc._operation_linux import LAST_MOMENT
from criupy.rpc._session import Answer, Notified
from criupy.rpc._worker_linux import Orphan, Worker

__all__ = ["AsyncOperation", "AsyncProcess", "end_worker", "wait_ended"]

T = TypeVar("T")

_POLL_INTERVAL = 0.01


class AsyncProcess:
    """A process that became our child: the program of ``exec_cmd``, or a lazy-pages daemon."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._worker.pid

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""
        status = self._worker.poll()
        if status is not None:
            self._worker.close()
        return status

    async def wait(self) -> int:
        """Wait for its end and return its exit status, negative for a signal."""
        status = await wait_ended(self._worker)
        self.poll()  # lets go of it
        return status

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self._worker.terminate()

    def kill(self) -> None:
        """Kill it with all that it started, unless it has ended."""
        self._worker.kill()


async def wait_ended(worker: Worker) -> int:
    """Wait until a worker has ended, and reap it; return its exit status, negative for a signal."""
    await trio.lowlevel.checkpoint_if_cancelled()
    while (status := worker.poll()) is None:
        # A duplicate: only one task may wait for a descriptor, and any may wait for a process.
        with Descriptor(os.dup(worker.pidfd)) as pidfd:
            await trio.lowlevel.wait_readable(pidfd.fileno())
    return status


async def insist(undo: Callable[[], Awaitable[T]]) -> T:
    """Undo something, cancelled or not; if it is interrupted, once more, so that it is not left half done.

    Against Ctrl-C a shield does not help: trio raises it in the main task, at any checkpoint.
    """
    with trio.CancelScope(shield=True):
        try:
            return await undo()
        except CriupyError:
            raise
        except BaseException:
            await undo()
            raise
    raise AssertionError  # a shield without a deadline swallows nothing


async def end_worker(worker: Worker | Orphan | None, patience: float) -> None:
    """Wait until a worker whose socket is closed has ended, killing it after a time, and let go of it.

    Cancellation does not shorten it: what is started has to be ended. Ctrl-C does, unless ``patience``
    is without limit (``math.inf``): then it goes on.
    """
    with trio.CancelScope(shield=True):
        if isinstance(worker, Worker):
            try:
                with trio.move_on_after(patience):
                    await wait_ended(worker)
                worker.kill()
                await wait_ended(worker)
            except BaseException:
                if patience != math.inf:
                    worker.abandon()
                raise
            worker.close()
        elif isinstance(worker, Orphan):
            with trio.move_on_after(patience):
                while not worker.has_ended:  # noqa: ASYNC110 - no child of ours, and no descriptor may be held
                    await trio.sleep(_POLL_INTERVAL)
            worker.kill()


class AsyncOperation(Generic[T]):
    """A request under way: iterate over it for its notifications, each answered when the next is asked for.

    Leaving the block accepts the notifications that are left and waits for the
    answer; ``result`` has it. An exception in the block is sent to CRIU as a
    refusal, and raised on when CRIU has undone what it did. Cancellation is
    such an exception.
    """

    def __init__(
        self,
        call: Call[T],
        connect: Callable[[Take], Awaitable[None]],
        release: Callable[[Connection], Awaitable[None]],
        *,
        request_timeout: float | None,
        grace: float,
    ) -> None:
        self._call = call
        self._connect = connect
        self._release = release
        self._timeout = math.inf if request_timeout is None else request_timeout
        self._grace = grace
        self._deadline: float | None = None
        self._exchange: Exchange[T] | None = None
        self._kept: Worker | None = None
        self._left = False

    @property
    def _running(self) -> Exchange[T]:
        if self._exchange is None:
            raise LocalProtocolError(f"{self._call.name}: enter the block first")
        return self._exchange

    @property
    def _until(self) -> float:
        return math.inf if self._deadline is None else self._deadline

    @property
    def result(self) -> T:
        """What CRIU answered; there after the block."""
        return self._running.result()

    @property
    def _succeeded(self) -> bool:
        """Whether CRIU has answered that it is done."""
        return self._running.succeeded

    @property
    def _peer_pid(self) -> int | None:
        """The pid of the CRIU that works on it, as far as it is known."""
        return self._running.connection.peer_pid

    @property
    def _worker(self) -> Worker | None:
        """What the worker became (exec_cmd), after the block."""
        return self._kept

    # Here Ctrl-C comes at checkpoints only, so that what is started has an owner by then.
    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._call.closed:
            raise LocalProtocolError(f"{self._call.name}: the block can be entered once")
        if self._deadline is None:
            self._deadline = trio.current_time() + self._timeout
        try:
            await self._reach()
            await self._send(self._running.request_packet())
        except BaseException as error:
            await self._undo(error)
            raise
        return self

    async def _reach(self) -> None:
        if self._until == math.inf:
            await self._connect(self._take)
            return
        with trio.move_on_at(self._until):
            await self._connect(self._take)
            return
        raise CriuTimeout(self._call.name, f"CRIU was not reached in {self._timeout:g} s")

    def _take(self, connection: Connection) -> None:
        self._exchange = Exchange(self._call, connection)

    def __aiter__(self) -> Self:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> Notification:
        exchange = self._running
        event = None
        if not (exchange.over or self._left):
            await self._answer()
            event = await self._receive()
        notification = None if event is None else exchange.take(event)
        if notification is None:
            raise StopAsyncIteration
        return notification

    def _set_deadline(self, deadline: float) -> None:
        """Say until when (trio's clock) the answer has to come."""
        self._deadline = deadline

    async def _answer(self) -> None:
        """Answer the notification at hand without waiting for what comes next."""
        self._running.check_time(self._timeout, is_over=trio.current_time() > self._until)
        packet = self._running.answer_packet()
        if packet is not None:
            await self._send(packet)

    async def _ask(self, hooks: AsyncHooks | None, notification: Notification) -> None:
        """Let the hooks decide on a notification, within the time of the request."""
        if hooks is None:
            return
        with trio.move_on_at(self._until) as scope:
            notification.external = external_of(await invoke(hooks, notification), notification)
        if scope.cancelled_caught:
            raise self._running.timed_out(self._timeout)

    async def _serve(self, hooks: AsyncHooks | None) -> None:
        """Answer all notifications, asking the hooks."""
        async for notification in self:
            await self._ask(hooks, notification)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                async for _ in self:
                    pass
                await self._finish()
            else:
                await self._undo(error)
        except BaseException as failed:
            if not await self._undo(failed):
                raise

    async def _send(self, packet: bytes) -> None:
        connection = self._running.connection
        while not connection.send_now(packet, self._call.name):
            with trio.move_on_at(self._until) as scope:
                await trio.lowlevel.wait_writable(connection.fileno())
            if scope.cancelled_caught:
                raise self._running.timed_out(self._timeout)

    async def _receive(self) -> Notified | Answer | Ended | None:
        """Receive what comes next; None if CRIU was done before it could undo what took too long."""
        event = await self._receive_until(self._until)
        if event is None:
            error = self._running.timed_out(self._timeout)
            if not await self._undo(error):
                raise error
        return event

    async def _receive_until(
        self, deadline: float, *, undoing: bool = False
    ) -> Notified | Answer | Ended | None:
        if deadline == math.inf:  # a cancel scope costs as much as the rest of a short request
            return await self._next_event(undoing=undoing)
        with trio.move_on_at(deadline):
            return await self._next_event(undoing=undoing)
        return None

    async def _next_event(self, *, undoing: bool) -> Notified | Answer | Ended:
        exchange = self._running
        connection = exchange.connection
        receive = exchange.receive_undone if undoing else connection.receive_now
        while True:
            await trio.lowlevel.wait_readable(connection.event_fd())
            event = receive()
            if ends_worker(event) and isinstance(connection.worker, Worker):
                # So that the error can say how it ended, and what it printed.
                with trio.move_on_after(1):
                    await wait_ended(connection.worker)
            if event is not None:
                return event
            if isinstance(connection.worker, Worker) and connection.worker.poll() is not None:
                return receive() or Ended()

    async def _undo(self, error: BaseException) -> bool:
        """End a request that failed on our side; True if CRIU had done it nevertheless, in time.

        What interrupts this, a Ctrl-C say, leaves CRIU a moment to end by itself; another one kills it.
        """
        with trio.CancelScope(shield=True):
            try:
                return await self._undo_all(error)
            except BaseException:
                await self._end(min(self._grace, LAST_MOMENT))
                raise
        raise AssertionError  # a shield without a deadline swallows nothing

    async def _undo_all(self, error: BaseException) -> bool:
        exchange = self._exchange
        if exchange is None:
            self._call.close()
            return False
        if exchange.connection.fileno() < 0:  # ended already, and then interrupted
            self._left = True
        if exchange.over or self._left:
            await self._finish()
            return False
        patience = self._grace if exchange.begin_undo() else 0.0
        undone = await self._see_undone(trio.current_time() + patience)
        if exchange.settle(error):
            await self._finish()
            return True
        await self._end(patience if undone else 0.0)
        return False

    async def _see_undone(self, deadline: float) -> bool:
        exchange = self._running
        while not exchange.over:
            event = await self._receive_until(deadline, undoing=True)
            if event is None:
                return False
            exchange.take_undone(event)
        return True

    async def _strike(self, stop: Callable[[], None]) -> None:
        """Kill CRIU in a phase in which that harms nobody; ``stop`` does it where it is no child of ours."""
        worker = self._running.connection.worker
        if worker is not None:
            worker.kill()
        else:
            await trio.to_thread.run_sync(stop)

    async def _kill(self, stop: Callable[[], None]) -> bool:
        """Strike, and let go of what is left; False if CRIU's end was not seen."""
        exchange = self._running
        if exchange.connection.fileno() < 0:  # ended already, and then interrupted
            return exchange.over
        with trio.CancelScope(shield=True):
            await self._strike(stop)
            seen = await self._see_undone(trio.current_time() + self._grace)
            await self._end(self._grace)
        return seen

    async def _finish(self) -> None:
        """Let go of the connection after the answer."""
        exchange = self._running
        connection = exchange.connection
        if self._left:
            return
        if connection.usable:
            await self._release(connection)
            self._left = True
            self._call.close()
            return
        if self._call.exec_cmd and exchange.succeeded and isinstance(connection.worker, Worker):
            self._kept, connection.worker = connection.worker, None
        await self._end(self._grace)

    async def _end(self, patience: float) -> None:
        if self._exchange is not None:
            connection = self._exchange.connection
            try:
                connection.close_socket()
            finally:
                await end_worker(connection.worker, patience)
        self._left = True
        self._call.close()
