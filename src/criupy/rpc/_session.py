"""One connection to CRIU's RPC, sans IO.

CRIU's end is a worker (``criu swrk``, or what ``criu service`` forks for each
connection) on an AF_UNIX SOCK_SEQPACKET socket: one protobuf message a packet,
requests this way, answers and notifications that way. (CRIU:
criu/cr-service.c.)

``TRANSITIONS`` is the table of states: what it does not have may not be sent, and
breaks the protocol when it is received. CRIU closes in any state when it dies. It
keeps a connection open only when the request asks for it and is of a type in
KEEP_OPEN; any other type with keep_open set is closed without an answer, so that is
refused here. Only DUMP and RESTORE notify, and only when the request says
notify_scripts. An answer has the type of its request, but for PAGE_SERVER_CHLD,
which is answered as PAGE_SERVER, and EMPTY, which is CRIU's way to refuse what it
does not know.

Rules of this file: packets go in and out as bytes, descriptors as numbers that
are looked at by nobody; what breaks the protocol raises and ends the session.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from google.protobuf.message import DecodeError

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.rpc import _schema_pb2 as schema

__all__ = ["KEEP_OPEN", "TRANSITIONS", "Answer", "Notified", "Session", "State", "Step", "type_name"]

KEEP_OPEN: Final = frozenset(
    {
        schema.PAGE_SERVER,
        schema.PAGE_SERVER_CHLD,
        schema.CPUINFO_DUMP,
        schema.CPUINFO_CHECK,
        schema.FEATURE_CHECK,
        schema.VERSION,
    }
)

_NOTIFIES: Final = frozenset({schema.DUMP, schema.RESTORE})
_ANSWERED_AS: Final = {schema.PAGE_SERVER_CHLD: schema.PAGE_SERVER}

_Payload: TypeAlias = Literal["restore", "ps", "features", "version", "status"]

#: What a successful answer to each type must hold.
_PAYLOAD: Final[dict[schema.RequestType.ValueType, _Payload]] = {
    schema.RESTORE: "restore",
    schema.PAGE_SERVER: "ps",
    schema.PAGE_SERVER_CHLD: "ps",
    schema.FEATURE_CHECK: "features",
    schema.VERSION: "version",
    schema.WAIT_PID: "status",
}


class State(enum.Enum):
    """Where a session stands; failed when CRIU broke the protocol."""

    IDLE = "idle"
    BUSY = "busy"
    NOTIFIED = "notified"
    PRE_DUMPED = "pre-dumped"
    LAST = "last"
    CLOSED = "closed"
    FAILED = "failed"


class Step(enum.Enum):
    """What is sent or received."""

    REQUEST = "we send a request"
    NEXT = "we send PRE_DUMP or DUMP"
    NOTIFICATION = "CRIU notifies"
    REPLY = "we answer that"
    KEPT = "CRIU answers, and the connection is kept open"
    PRE_DUMPED = "CRIU answers a PRE_DUMP that went well"
    LAST = "CRIU answers otherwise"
    END = "CRIU closes"


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.IDLE: {Step.REQUEST: State.BUSY, Step.END: State.CLOSED},
    State.BUSY: {
        Step.NOTIFICATION: State.NOTIFIED,
        Step.KEPT: State.IDLE,
        Step.PRE_DUMPED: State.PRE_DUMPED,
        Step.LAST: State.LAST,
        Step.END: State.CLOSED,
    },
    State.NOTIFIED: {Step.REPLY: State.BUSY, Step.END: State.CLOSED},
    State.PRE_DUMPED: {Step.NEXT: State.BUSY, Step.END: State.CLOSED},
    State.LAST: {Step.END: State.CLOSED},
    State.CLOSED: {Step.END: State.CLOSED},
    State.FAILED: {Step.END: State.CLOSED},
}


@dataclass(frozen=True, slots=True)
class Notified:
    """CRIU waits for an answer to this script; ``descriptors`` came with it."""

    script: str
    pid: int | None
    descriptors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request of type ``request``."""

    request: schema.RequestType.ValueType
    response: schema.Response

    @property
    def success(self) -> bool:
        """Whether CRIU did what it was asked."""
        return self.response.success


def type_name(request: schema.RequestType.ValueType) -> str:
    """Return the name of a request's type in CRIU's schema."""
    names = schema.RequestType.DESCRIPTOR.values_by_number
    return names[request].name if request in names else str(request)


def _is_text(field: object) -> bool:
    # What is no UTF-8 comes out as bytes, though the schema says string; protobuf's Python version raises.
    return isinstance(field, str)


class Session:
    """What may be sent and what was received, on one connection."""

    def __init__(self) -> None:
        self._state = State.IDLE
        self._request: schema.RequestType.ValueType = schema.EMPTY
        self._keep_open = False
        self._notifies = False
        self._received = 0
        self._last = schema.EMPTY

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    def send_request(self, request: schema.Request) -> bytes:
        """Return the packet that asks this; its answer has to be received before another request."""
        kind = request.type
        name = type_name(kind)
        allowed = TRANSITIONS[self._state]
        step = Step.REQUEST if Step.REQUEST in allowed else Step.NEXT
        if step not in allowed:
            raise LocalProtocolError(f"{name}: {self._why_not()}")
        if step is Step.NEXT and kind not in {schema.PRE_DUMP, schema.DUMP}:
            raise LocalProtocolError(f"{name}: after PRE_DUMP the connection takes only PRE_DUMP or DUMP")
        if kind in {schema.EMPTY, schema.NOTIFY}:
            raise LocalProtocolError(f"{name}: no request of its own")
        if request.keep_open and kind not in KEEP_OPEN:
            kept = ", ".join(sorted(map(type_name, KEEP_OPEN)))
            raise LocalProtocolError(f"{name}: CRIU keeps a connection open only after {kept}")
        if request.opts.notify_scripts and kind not in _NOTIFIES:
            raise LocalProtocolError(f"{name}: notifications come only with DUMP and RESTORE")
        if kind == schema.DUMP and not request.HasField("opts"):
            raise LocalProtocolError("DUMP: without options CRIU crashes")
        if kind == schema.FEATURE_CHECK and not request.HasField("features"):
            raise LocalProtocolError("FEATURE_CHECK: without features CRIU crashes")
        packet = request.SerializeToString()
        self._state = allowed[step]
        self._request = kind
        self._keep_open = request.keep_open
        self._notifies = request.opts.notify_scripts
        return packet

    def send_answer(self, *, accept: bool, external: Sequence[str] = ()) -> bytes:
        """Return the packet that answers a notification; ``external`` is for query-ext-files."""
        if Step.REPLY not in TRANSITIONS[self._state]:
            raise LocalProtocolError("there is no notification to answer")
        message = schema.Request(type=schema.NOTIFY, notify_success=accept)
        if external:
            # Required by CRIU's schema, and read by nobody here.
            message.opts.images_dir_fd = -1
            message.opts.external.extend(external)
        packet = message.SerializeToString()
        self._advance(Step.REPLY)
        return packet

    def receive(
        self, packet: bytes, descriptors: tuple[int, ...] = (), *, truncated: bool = False
    ) -> Notified | Answer:
        """Take in a packet, and the numbers of the descriptors that came with it.

        ``truncated`` tells that there were more than fit.
        """
        offset = self._received
        self._received += len(packet)
        if Step.LAST not in TRANSITIONS[self._state]:
            raise self._fail(f"CRIU sent something unasked ({self._state.value})", offset, packet)
        if truncated:
            raise self._fail(
                "more descriptors than CRIU sends, or than could be received here", offset, packet
            )
        try:
            response = schema.Response.FromString(packet)
        except (DecodeError, UnicodeDecodeError):
            raise self._fail("expected a response of CRIU, this does not parse", offset, packet) from None
        if not response.HasField("type") or not response.HasField("success"):
            raise self._fail("expected type and success in every response", offset, packet)
        if response.type == schema.NOTIFY:
            return self._notified(response, descriptors, offset, packet)
        self._check_answer(response, descriptors, offset, packet)
        if self._request == schema.PRE_DUMP and response.success:
            self._advance(Step.PRE_DUMPED)
        else:
            self._last = self._request
            self._advance(Step.KEPT if self._keep_open else Step.LAST)
        return Answer(self._request, response)

    def _check_answer(
        self, response: schema.Response, descriptors: tuple[int, ...], offset: int, packet: bytes
    ) -> None:
        payload = _PAYLOAD.get(self._request)
        if descriptors:
            raise self._fail("a descriptor came with an answer", offset, packet)
        if response.type not in (_ANSWERED_AS.get(self._request, self._request), schema.EMPTY):
            raise self._fail(
                f"{type_name(self._request)} was answered as {type_name(response.type)}", offset, packet
            )
        if response.type == schema.EMPTY and response.success:
            raise self._fail(f"{type_name(self._request)} was answered with EMPTY, success", offset, packet)
        if response.success and payload is not None and not response.HasField(payload):
            raise self._fail(f"the answer to {type_name(self._request)} has no {payload}", offset, packet)
        version = response.version
        if self._request == schema.VERSION and not (_is_text(version.gitid) and _is_text(version.name)):
            raise self._fail("the answer to VERSION has text that is not UTF-8", offset, packet)

    def receive_end(self) -> bool:
        """Take in that CRIU closed; tell whether it still owed an answer."""
        owed = self._state in {State.BUSY, State.NOTIFIED}
        self._advance(Step.END)
        return owed

    def _notified(
        self, response: schema.Response, descriptors: tuple[int, ...], offset: int, packet: bytes
    ) -> Notified:
        if not self._notifies:
            raise self._fail("a notification that was not asked for", offset, packet)
        if not response.notify.script:
            raise self._fail("a notification without a script", offset, packet)
        if not _is_text(response.notify.script):
            raise self._fail("a notification's script is not UTF-8", offset, packet)
        if descriptors and (len(descriptors) > 1 or response.notify.script != "orphan-pts-master"):
            raise self._fail(
                f"{len(descriptors)} descriptors came with {response.notify.script}", offset, packet
            )
        self._advance(Step.NOTIFICATION)
        pid = response.notify.pid if response.notify.HasField("pid") else None
        return Notified(response.notify.script, pid, descriptors)

    def _advance(self, step: Step) -> None:
        self._state = TRANSITIONS[self._state][step]

    def _why_not(self) -> str:
        match self._state:
            case State.BUSY:
                return f"the answer to {type_name(self._request)} has not come yet"
            case State.NOTIFIED:
                return "a notification waits for its answer"
            case State.LAST:
                return f"CRIU ends the connection after {type_name(self._last)}; use another one"
            case State.CLOSED:
                return "CRIU has closed the connection"
            case _:
                return "the connection failed"

    def _fail(self, message: str, offset: int, packet: bytes) -> RemoteProtocolError:
        self._state = State.FAILED
        return RemoteProtocolError(message, offset=offset, data=packet)
