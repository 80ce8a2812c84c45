"""The course of one request on a connection: what is sent next, and what comes of what is received.

The clients send and wait; everything else that they have in common is here.
An exchange ends in one of three ways: CRIU answers, CRIU closes, or we have
waited long enough. In the second half of the file is how it is undone: CRIU is
told that nobody listens any more (a refusal of the notification that waits, and
the end of our stream, which fails every later one), and undoes what it did. It
must have time for that: killed while it puts its code into a task, it takes
the task with it (tried: a SIGTRAP, once in fifty kills of a small dump).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from criupy._descriptor import Descriptor
from criupy._proc_linux import status_of
from criupy.errors import CriuDied, CriuError, CriuTimeout, LocalProtocolError, RemoteProtocolError
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._calls_linux import Call
from criupy.rpc._connection_linux import Connection, Ended
from criupy.rpc._notify import Notification, Script, parse_script
from criupy.rpc._report import MAX_LINES, NEVER_ATTACHED, failure, hint_for
from criupy.rpc._session import KEEP_OPEN, Answer, Notified, State
from criupy.rpc._worker_linux import Worker

__all__ = ["Exchange", "Take", "ends_worker"]

T = TypeVar("T")

#: Becomes the owner of a connection at the moment at which there is one.
Take: TypeAlias = Callable[[Connection], None]

log = logging.getLogger("criupy.rpc")


def ends_worker(event: Notified | Answer | Ended | None) -> bool:
    """Tell whether CRIU ends with this, in failure, unless the connection is kept."""
    if isinstance(event, Answer):
        return not event.success and event.request not in KEEP_OPEN
    return isinstance(event, Ended)


class Exchange(Generic[T]):
    """One request on its way."""

    def __init__(self, call: Call[T], connection: Connection) -> None:
        self.call = call
        self.connection = connection
        self.pending: Notification | None = None
        self.refusal: BaseException | None = None
        self._answer: Answer | None = None
        self._closed = False

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._answer is not None or self._closed

    def request_packet(self) -> bytes:
        """Return the packet with the request."""
        return self.connection.session.send_request(self.call.request)

    def check_time(self, seconds: float, *, is_over: bool) -> None:
        """Accept no notification when the time is over: CRIU would go on, perhaps to the end."""
        if is_over and self.pending is not None:
            raise self.timed_out(seconds)

    def answer_packet(self) -> bytes | None:
        """Return the packet that answers the pending notification, if one is; let go of what came with it."""
        notification, self.pending = self.pending, None
        if notification is None:
            return None
        if notification.descriptor is not None and notification.descriptor.fileno() >= 0:
            # The end of a master hangs up the session: better not restored than ended at once.
            notification.descriptor.close()
            if notification.refusal is None:
                notification.refuse("nobody took the terminal's master (detach the descriptor to keep it)")
        # CRIU waits for the answer: anything else from it breaks the protocol, and raises here.
        self.connection.receive_now()
        self.refusal = self.refusal or notification.refusal
        accept = notification.refusal is None
        external = notification.external if accept and notification.script == Script.QUERY_EXT_FILES else ()
        return self.connection.session.send_answer(accept=accept, external=external)

    def take(self, event: Notified | Answer | Ended) -> Notification | None:
        """Take in an event; return the notification to be answered, or None at the end.

        Raise what the end was if it was not success.
        """
        if isinstance(event, Notified):
            descriptor = Descriptor(event.descriptors[0]) if event.descriptors else None
            self.pending = Notification(parse_script(event.script), event.pid, descriptor)
            return self.pending
        if isinstance(event, Ended):
            self._closed = True
            self.connection.session.receive_end()
            if self.refusal is not None:
                # Not undone by an answer, so perhaps not at all.
                self.refusal.add_note(str(self.died()))
                raise self.refusal
            raise self.died()
        self._answer = event
        if self.refusal is not None:
            raise self._annotated(self.refusal, event)
        if not event.success:
            raise self._failure(event)
        return None

    def result(self) -> T:
        """Return what the answer says."""
        if self._answer is None:
            raise LocalProtocolError(f"{self.call.name}: it is not answered yet")
        return self.call.result(self._answer.response)

    @property
    def succeeded(self) -> bool:
        """Whether CRIU did what it was asked."""
        return self._answer is not None and self._answer.success

    # ---- errors --------------------------------------------------------------------

    def _output(self) -> str:
        worker = self.connection.worker
        return worker.output() if isinstance(worker, Worker) else ""

    def _failure(self, answer: Answer) -> CriuError:
        opts = self.call.request.opts
        error = failure(self.call.name, answer.response, log=self.call.log, output=self._output())
        if error.message.startswith(NEVER_ATTACHED) and (why := _why_not_attached(opts.pid, opts.ps)):
            error.hint = why
        return error

    def _annotated(self, error: BaseException, answer: Answer) -> BaseException:
        """Say in a note what CRIU answered to a refusal."""
        if not answer.success:
            error.add_note(f"CRIU undid it: {self._failure(answer)}")
        else:
            pid = answer.response.restore.pid
            what = f" as pid {pid}" if pid else ""
            error.add_note(f"{self.call.name}: CRIU had gone too far to undo it, and completed it{what}")
        return error

    def died(self, reason: str = "CRIU closed the connection without an answer") -> CriuDied:
        """Make the error for a connection that was closed; the worker has been given time to end."""
        worker = self.connection.worker
        status = worker.poll() if isinstance(worker, Worker) else None
        if status is not None:
            reason += f" and ended with {'signal' if status < 0 else 'exit status'} {abs(status)}"
        output = self._output()
        lines = self.call.log.errors() if self.call.log is not None else ()
        # What is printed at the end may be no more than libc's last words.
        said = [*output.splitlines()[-3:], *lines]
        if said:
            reason += f": {said[-1]}"
        return CriuDied(
            self.call.name,
            reason,
            log_errors=lines[-MAX_LINES:],
            log_file=self.call.log.name if self.call.log is not None and self.call.log.is_written else None,
            output=output,
            hint=hint_for(self.call.name, None, "\n".join(said)),
        )

    def timed_out(self, seconds: float) -> CriuTimeout:
        """Make the error for an answer that did not come in time."""
        waiting = f"the hook for {self.pending.script}" if self.pending is not None else "CRIU"
        log = self.call.log
        return CriuTimeout(
            self.call.name,
            f"{waiting} took longer than {seconds:g} s",
            log_errors=log.errors()[-MAX_LINES:] if log is not None else (),
            log_file=log.name if log is not None and log.is_written else None,
            output=self._output(),
        )

    # ---- undoing -----------------------------------------------------------------------

    def begin_undo(self) -> bool:
        """Tell CRIU that nobody listens any more; return whether it needs time to undo what it did."""
        if self.over:
            return False
        refusal = None
        if self.pending is not None:
            self.pending.refuse("the request was abandoned")
            with contextlib.suppress(OSError, RemoteProtocolError):
                refusal = self.answer_packet()
        if refusal is not None:
            # The packet is small and CRIU reads nothing else: there is room for it.
            self.connection.send_now(refusal, self.call.name)
        needs_time = self.call.delicate and self.connection.session.state is not State.FAILED
        if not needs_time and self.connection.worker is not None:
            # Before its stream ends: a worker that ends by itself leaves page servers to nobody.
            self.connection.worker.kill()
        self.connection.shut_down()
        return needs_time

    def take_undone(self, event: Notified | Answer | Ended) -> None:
        """Take in an event while undoing: notifications fail by themselves."""
        if isinstance(event, Notified):
            for descriptor in event.descriptors:
                os.close(descriptor)
            self.connection.session.send_answer(accept=False)
        elif isinstance(event, Answer):
            self._answer = event
        else:
            self._closed = True
            self.connection.session.receive_end()

    def receive_undone(self) -> Notified | Answer | Ended | None:
        """Receive what has come while undoing; nonsense ends it."""
        try:
            return self.connection.receive_now()
        except RemoteProtocolError:
            return Ended()

    def settle(self, error: BaseException) -> bool:
        """Tell whether CRIU has done it nevertheless, in time; else note in the error what became of it."""
        if isinstance(error, CriuTimeout) and self.succeeded and self.refusal is None:
            return True
        if self._answer is not None:
            self._annotated(error, self._answer)
            if self._answer.success:
                # What was cancelled is seen by nobody.
                log.warning("%s: CRIU had gone too far to undo it, and completed it", self.call.name)
        elif self.call.delicate and self._closed:
            error.add_note(str(self.died()))
        elif self.call.delicate:
            error.add_note(f"{self.call.name}: CRIU did not undo it in time and was killed")
        return False


def _why_not_attached(pid: int, page_server: schema.PageServerInfo) -> str | None:
    """Say why CRIU could not hold a process that is there; it says "No such process" in any case."""
    fields = status_of(pid)
    if not fields:
        return None
    if (tracer := fields.get("TracerPid", "0")) != "0":
        return f"process {pid} is traced by process {tracer}: another CRIU, or a debugger"
    if "VmSize" not in fields:
        return f"process {pid} is a kernel thread, or has ended and waits to be reaped"
    if page_server.address or page_server.port:
        where = f"{page_server.address}:{page_server.port}"
        return f"process {pid} is there: could the page server at {where} not be reached?"
    return f"process {pid} is there, but CRIU may not attach to it (a warning in its log says why)"
