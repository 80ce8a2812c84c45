"""Blocking: waiting with poll(2), processes, and one request from start to end."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from criupy.errors import CriupyError, LocalProtocolError
from criupy.rpc._calls_linux import Call
from criupy.rpc._connection_linux import Connection, Ended
from criupy.rpc._exchange_linux import Exchange, Take, ends_worker
from criupy.rpc._notify import Hooks, Notification, external_of, invoke
from criupy.rpc._session import Answer, Notified
from criupy.rpc._worker_linux import Orphan, Worker

__all__ = ["Operation", "Process", "end_worker"]

T = TypeVar("T")

#: In seconds, for a CRIU whose connection is closed: killed with its code in a task it kills that, too.
LAST_MOMENT = 1.0

_LONGEST_POLL = (1 << 31) - 1  # milliseconds, which poll(2) takes as an int


def wait_for(deadline: float, *fds: int, events: int = select.POLLIN) -> bool:
    """Wait for events on any of these descriptors; False once the deadline (monotonic) has passed.

    Even with an event at hand: a peer that never stops sending must not stop the clock.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    while (left := deadline - time.monotonic()) > 0:
        # Rounded up: a poll that returns early would spin.
        if poll.poll(None if left == math.inf else math.ceil(min(left * 1000, _LONGEST_POLL))):
            return True
    return False


def insist(undo: Callable[[], T]) -> T:
    """Undo something; if Ctrl-C or the like interrupts it, once more, so that it is not left half done."""
    try:
        return undo()
    except CriupyError:
        raise
    except BaseException:
        undo()
        raise


class Process:
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

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit status, negative for a signal.

        Raise TimeoutError after ``timeout`` seconds.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if not wait_for(deadline, self._worker.pidfd):
                raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
        return status

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self._worker.terminate()

    def kill(self) -> None:
        """Kill it with all that it started, unless it has ended."""
        self._worker.kill()


def end_worker(worker: Worker | Orphan | None, deadline: float) -> None:
    """Wait until a worker whose socket is closed has ended, killing it at the deadline, and let go of it.

    What interrupts this kills it, too, unless there is no deadline (``math.inf``): then it goes on.
    """
    if isinstance(worker, Worker):
        until = deadline
        try:
            while worker.poll() is None:
                if not wait_for(until, worker.pidfd):
                    worker.kill()
                    until = math.inf
        except BaseException:
            if deadline != math.inf:
                worker.abandon()
            raise
        worker.close()
    elif isinstance(worker, Orphan):
        while not worker.has_ended and time.monotonic() < deadline:
            time.sleep(0.01)
        worker.kill()


class Operation(Generic[T]):
    """A request under way: iterate over it for its notifications, each answered when the next is asked for.

    Leaving the block accepts the notifications that are left and waits for the
    answer; ``result`` has it. An exception in the block is sent to CRIU as a
    refusal, and raised on when CRIU has undone what it did.
    """

    def __init__(
        self,
        call: Call[T],
        connect: Callable[[Take, float], None],
        release: Callable[[Connection], None],
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

    def __enter__(self) -> Self:
        if self._call.closed:
            raise LocalProtocolError(f"{self._call.name}: the block can be entered once")
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout
        try:
            self._connect(self._take, self._deadline)
            self._send(self._running.request_packet())
            return self  # noqa: TRY300 - an interruption here, too, has to undo it
        except BaseException as error:
            self._undo(error)
            raise

    def _take(self, connection: Connection) -> None:
        self._exchange = Exchange(self._call, connection)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Notification:
        exchange = self._running
        event = None
        if not (exchange.over or self._left):
            self._answer()
            event = self._receive()
        notification = None if event is None else exchange.take(event)
        if notification is None:
            raise StopIteration
        return notification

    def _set_deadline(self, deadline: float) -> None:
        """Say until when (monotonic) the answer has to come."""
        self._deadline = deadline

    def _answer(self) -> None:
        """Answer the notification at hand without waiting for what comes next."""
        self._running.check_time(self._timeout, is_over=time.monotonic() > self._until)
        packet = self._running.answer_packet()
        if packet is not None:
            self._send(packet)

    def _ask(self, hooks: Hooks | None, notification: Notification) -> None:
        """Let the hooks decide on a notification."""
        if hooks is not None:
            notification.external = external_of(invoke(hooks, notification), notification)

    def _serve(self, hooks: Hooks | None) -> None:
        """Answer all notifications, asking the hooks."""
        for notification in self:
            self._ask(hooks, notification)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for _ in self:
                    pass
                self._finish()
            else:
                self._undo(error)
        except BaseException as failed:
            if not self._undo(failed):
                raise

    def _send(self, packet: bytes) -> None:
        connection = self._running.connection
        while not connection.send_now(packet, self._call.name):
            if not wait_for(self._until, connection.fileno(), events=select.POLLOUT):
                raise self._running.timed_out(self._timeout)

    def _receive(self) -> Notified | Answer | Ended | None:
        """Receive what comes next; None if CRIU was done before it could undo what took too long."""
        event = self._receive_until(self._until)
        if event is None:
            error = self._running.timed_out(self._timeout)
            if not self._undo(error):
                raise error
        return event

    def _receive_until(self, deadline: float, *, undoing: bool = False) -> Notified | Answer | Ended | None:
        exchange = self._running
        connection = exchange.connection
        receive = exchange.receive_undone if undoing else connection.receive_now
        while True:
            if not wait_for(deadline, connection.event_fd()):
                return None
            event = receive()
            if ends_worker(event) and isinstance(connection.worker, Worker):
                # So that the error can say how it ended, and what it printed.
                wait_for(min(deadline, time.monotonic() + 1), connection.worker.pidfd)
            if event is not None:
                return event
            if isinstance(connection.worker, Worker) and connection.worker.poll() is not None:
                return receive() or Ended()

    def _undo(self, error: BaseException) -> bool:
        """End a request that failed on our side; True if CRIU had done it nevertheless, in time.

        What interrupts this, a second Ctrl-C say, leaves CRIU a moment to end by itself; a third kills it.
        """
        try:
            return self._undo_all(error)
        except BaseException:
            self._end(time.monotonic() + min(self._grace, LAST_MOMENT))
            raise

    def _undo_all(self, error: BaseException) -> bool:
        exchange = self._exchange
        if exchange is None:
            self._call.close()
            return False
        if exchange.connection.fileno() < 0:  # ended already, and then interrupted
            self._left = True
        if exchange.over or self._left:
            self._finish()
            return False
        deadline = time.monotonic()
        if exchange.begin_undo():
            deadline += self._grace
        undone = self._see_undone(deadline)
        if exchange.settle(error):
            self._finish()
            return True
        self._end(deadline if undone else time.monotonic())
        return False

    def _see_undone(self, deadline: float) -> bool:
        exchange = self._running
        while not exchange.over:
            event = self._receive_until(deadline, undoing=True)
            if event is None:
                return False
            exchange.take_undone(event)
        return True

    def _kill(self, stop: Callable[[], None]) -> bool:
        """Kill CRIU in a phase in which that harms nobody; ``stop`` does it where it is no child of ours.

        False if its end was not seen.
        """
        exchange = self._running
        if exchange.connection.fileno() < 0:  # ended already, and then interrupted
            return exchange.over
        worker = exchange.connection.worker
        if worker is not None:
            worker.kill()
        else:
            stop()
        deadline = time.monotonic() + self._grace
        seen = self._see_undone(deadline)
        self._end(deadline)
        return seen

    def _finish(self) -> None:
        """Let go of the connection after the answer."""
        exchange = self._running
        connection = exchange.connection
        if self._left:
            return
        if connection.usable:
            self._release(connection)
            self._left = True
            self._call.close()
            return
        if self._call.exec_cmd and exchange.succeeded and isinstance(connection.worker, Worker):
            self._kept, connection.worker = connection.worker, None
        self._end(time.monotonic() + self._grace)

    def _end(self, deadline: float) -> None:
        if self._exchange is not None:
            connection = self._exchange.connection
            try:
                connection.close_socket()
            finally:
                end_worker(connection.worker, deadline)
        self._left = True
        self._call.close()
