"""The session without a socket: its table, what it refuses of us and of CRIU, and what any bytes do to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._session import KEEP_OPEN, Answer, Notified, Session, State, type_name

KINDS = cast("list[schema.RequestType.ValueType]", sorted(schema.RequestType.DESCRIPTOR.values_by_number))
REQUESTS = [kind for kind in KINDS if kind not in {schema.EMPTY, schema.NOTIFY}]
PAYLOADS: dict[schema.RequestType.ValueType, dict[str, Any]] = {
    schema.RESTORE: {"restore": schema.RestoreAnswer(pid=5)},
    schema.PAGE_SERVER: {"ps": schema.PageServerInfo(port=6)},
    schema.PAGE_SERVER_CHLD: {"ps": schema.PageServerInfo(port=6, pid=7)},
    schema.FEATURE_CHECK: {"features": schema.FeatureSet(mem_track=True)},
    schema.VERSION: {"version": schema.VersionAnswer(major_number=4, minor_number=2)},
    schema.WAIT_PID: {"status": 0},
}
ANSWERED_AS = {schema.PAGE_SERVER_CHLD: schema.PAGE_SERVER}


def request(
    kind: schema.RequestType.ValueType, *, keep_open: bool = False, notify: bool = False
) -> schema.Request:
    """A request that CRIU would take."""
    message = schema.Request(type=kind, keep_open=keep_open)
    message.opts.images_dir_fd = -1
    if notify:
        message.opts.notify_scripts = True
    if kind == schema.FEATURE_CHECK:
        message.features.mem_track = True
    return message


def answer(kind: schema.RequestType.ValueType, *, success: bool = True) -> schema.Response:
    """What CRIU answers to it."""
    message = schema.Response(type=ANSWERED_AS.get(kind, kind), success=success)
    if success:
        message.MergeFrom(schema.Response(**PAYLOADS.get(kind, {})))
    return message


def notification(script: str = "pre-dump", **more: int) -> schema.Response:
    return schema.Response(type=schema.NOTIFY, success=True, notify=schema.Notify(script=script, **more))


def receive(session: Session, response: schema.Response, *descriptors: int) -> Notified | Answer:
    return session.receive(response.SerializeToString(), descriptors)


def busy(
    kind: schema.RequestType.ValueType = schema.DUMP, *, keep_open: bool = False, notify: bool = False
) -> Session:
    session = Session()
    session.send_request(request(kind, keep_open=keep_open, notify=notify))
    return session


def notified() -> Session:
    session = busy(notify=True)
    receive(session, notification())
    return session


def pre_dumped() -> Session:
    session = busy(schema.PRE_DUMP)
    receive(session, answer(schema.PRE_DUMP))
    return session


def last() -> Session:
    session = busy(schema.CHECK)
    receive(session, answer(schema.CHECK))
    return session


def closed() -> Session:
    session = Session()
    session.receive_end()
    return session


def failed() -> Session:
    session = Session()
    with pytest.raises(RemoteProtocolError):
        session.receive(b"?")
    return session


#: A session in each state.
MAKE: dict[State, Callable[[], Session]] = {
    State.IDLE: Session,
    State.BUSY: busy,
    State.NOTIFIED: notified,
    State.PRE_DUMPED: pre_dumped,
    State.LAST: last,
    State.CLOSED: closed,
    State.FAILED: failed,
}


@pytest.mark.parametrize("state", State)
def test_each_state_is_reached(state: State) -> None:
    assert MAKE[state]().state is state


# ---- what we may send --------------------------------------------------------------------


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_a_request_and_its_answer(kind: schema.RequestType.ValueType) -> None:
    session = Session()
    asked = request(kind)
    assert session.send_request(asked) == asked.SerializeToString()
    assert session.state is State.BUSY
    told = receive(session, answer(kind))
    assert told == Answer(kind, answer(kind))
    assert isinstance(told, Answer)
    assert told.success
    assert session.state is (State.PRE_DUMPED if kind == schema.PRE_DUMP else State.LAST)


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_a_failure(kind: schema.RequestType.ValueType) -> None:
    session = busy(kind)
    told = receive(session, answer(kind, success=False))
    assert isinstance(told, Answer)
    assert not told.success
    assert session.state is State.LAST


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_a_connection_is_kept_only_where_criu_keeps_it(kind: schema.RequestType.ValueType) -> None:
    session = Session()
    asked = request(kind, keep_open=True)
    if kind not in KEEP_OPEN:
        with pytest.raises(
            LocalProtocolError, match=f"^{type_name(kind)}: CRIU keeps a connection open only"
        ):
            session.send_request(asked)
        assert session.state is State.IDLE
        return
    for success in (True, False, True):
        session.send_request(asked)
        receive(session, answer(kind, success=success))
        assert session.state is State.IDLE


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_notifications_may_be_asked_for_only_where_they_come(kind: schema.RequestType.ValueType) -> None:
    session = Session()
    if kind in {schema.DUMP, schema.RESTORE}:
        session.send_request(request(kind, notify=True))
        assert session.state is State.BUSY
        return
    with pytest.raises(LocalProtocolError, match="notifications come only with DUMP and RESTORE"):
        session.send_request(request(kind, notify=True))
    assert session.state is State.IDLE


@pytest.mark.parametrize("kind", [schema.EMPTY, schema.NOTIFY], ids=schema.RequestType.Name)
def test_what_is_no_request(kind: schema.RequestType.ValueType) -> None:
    session = Session()
    with pytest.raises(LocalProtocolError, match=f"^{type_name(kind)}: no request of its own"):
        session.send_request(schema.Request(type=kind))
    assert session.state is State.IDLE


def test_what_would_crash_criu() -> None:
    session = Session()
    with pytest.raises(LocalProtocolError, match="DUMP: without options CRIU crashes"):
        session.send_request(schema.Request(type=schema.DUMP))
    with pytest.raises(LocalProtocolError, match="FEATURE_CHECK: without features CRIU crashes"):
        session.send_request(schema.Request(type=schema.FEATURE_CHECK))
    assert session.state is State.IDLE


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (State.BUSY, "VERSION: the answer to DUMP has not come yet"),
        (State.NOTIFIED, "VERSION: a notification waits for its answer"),
        (State.PRE_DUMPED, "VERSION: after PRE_DUMP the connection takes only PRE_DUMP or DUMP"),
        (State.LAST, "VERSION: CRIU ends the connection after CHECK; use another one"),
        (State.CLOSED, "VERSION: CRIU has closed the connection"),
        (State.FAILED, "VERSION: the connection failed"),
    ],
    ids=lambda value: value.value if isinstance(value, State) else "",
)
def test_no_request_out_of_turn(state: State, why: str) -> None:
    session = MAKE[state]()
    with pytest.raises(LocalProtocolError, match=f"^{re.escape(why)}$"):
        session.send_request(request(schema.VERSION))
    assert session.state is state


@pytest.mark.parametrize("state", [state for state in State if state is not State.NOTIFIED])
def test_no_answer_without_a_notification(state: State) -> None:
    session = MAKE[state]()
    with pytest.raises(LocalProtocolError, match="there is no notification to answer"):
        session.send_answer(accept=True)
    assert session.state is state


@pytest.mark.parametrize("accept", [True, False])
def test_an_answer_to_a_notification(accept: bool) -> None:
    session = notified()
    packet = session.send_answer(accept=accept)
    assert schema.Request.FromString(packet) == schema.Request(type=schema.NOTIFY, notify_success=accept)
    assert session.state is State.BUSY


def test_an_answer_with_external_resources() -> None:
    session = notified()
    message = schema.Request.FromString(
        session.send_answer(accept=True, external=["mnt[/a]:a", "dev[8/1]:b"])
    )
    assert message.notify_success
    assert list(message.opts.external) == ["mnt[/a]:a", "dev[8/1]:b"]


def test_what_cannot_be_encoded_is_not_sent() -> None:
    session = notified()
    with pytest.raises(ValueError, match="surrogates"):
        session.send_answer(accept=True, external=["\udc80"])
    assert session.state is State.NOTIFIED


def test_pre_dumps_and_the_dump_that_ends_them() -> None:
    session = Session()
    for _ in range(3):
        session.send_request(request(schema.PRE_DUMP))
        receive(session, answer(schema.PRE_DUMP))
        assert session.state is State.PRE_DUMPED
    session.send_request(request(schema.DUMP, notify=True))
    receive(session, notification())
    session.send_answer(accept=True)
    receive(session, answer(schema.DUMP))
    assert session.state is State.LAST


def test_a_kept_connection_ends_with_a_last_request() -> None:
    session = Session()
    session.send_request(request(schema.VERSION, keep_open=True))
    receive(session, answer(schema.VERSION))
    session.send_request(request(schema.DUMP))
    receive(session, answer(schema.DUMP))
    with pytest.raises(LocalProtocolError, match="CRIU ends the connection after DUMP"):
        session.send_request(request(schema.VERSION))


# ---- what CRIU may send ----------------------------------------------------------------------


def fails(session: Session, packet: bytes, message: str, *descriptors: int, truncated: bool = False) -> None:
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        session.receive(packet, descriptors, truncated=truncated)
    assert caught.value.data == packet
    assert session.state is State.FAILED


@pytest.mark.parametrize("state", [state for state in State if state is not State.BUSY])
def test_nothing_unasked(state: State) -> None:
    for packet in (answer(schema.DUMP), answer(schema.VERSION), notification()):
        fails(
            MAKE[state](),
            packet.SerializeToString(),
            rf"^CRIU sent something unasked \({state.value}\) at byte",
        )


def test_two_answers() -> None:
    session = busy()
    receive(session, answer(schema.DUMP))
    fails(session, answer(schema.DUMP).SerializeToString(), r"unasked \(last\)")


def test_the_offset_counts_all_bytes_before() -> None:
    session = busy(notify=True)
    before = 0
    for script in ("pre-dump", "post-dump"):
        receive(session, notification(script))
        before += len(notification(script).SerializeToString())
        session.send_answer(accept=True)
    with pytest.raises(RemoteProtocolError, match=f"at byte {before}: ff ff$") as caught:
        session.receive(b"\xff\xff")
    assert caught.value.offset == before


@pytest.mark.parametrize("state", State)
def test_the_end_of_the_connection(state: State) -> None:
    session = MAKE[state]()
    assert session.receive_end() is (state in {State.BUSY, State.NOTIFIED})
    assert session.state is State.CLOSED


@pytest.mark.parametrize("kind", PAYLOADS, ids=schema.RequestType.Name)
def test_success_needs_what_was_asked_for(kind: schema.RequestType.ValueType) -> None:
    bare = schema.Response(type=ANSWERED_AS.get(kind, kind), success=True)
    field = next(iter(PAYLOADS[kind]))
    fails(busy(kind), bare.SerializeToString(), f"^the answer to {type_name(kind)} has no {field} at byte 0")


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_an_answer_of_another_type(kind: schema.RequestType.ValueType) -> None:
    for other in REQUESTS:
        if other == ANSWERED_AS.get(kind, kind):
            continue
        wrong = schema.Response(type=other, success=True)
        fails(
            busy(kind), wrong.SerializeToString(), f"^{type_name(kind)} was answered as {type_name(other)} at"
        )


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_empty_is_a_refusal(kind: schema.RequestType.ValueType) -> None:
    empty = schema.Response(type=schema.EMPTY, success=False)
    told = receive(busy(kind), empty)
    assert isinstance(told, Answer)
    assert (told.request, told.success) == (kind, False)
    empty.success = True
    fails(busy(kind), empty.SerializeToString(), f"^{type_name(kind)} was answered with EMPTY, success at")


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"", "expected type and success in every response at byte 0$"),
        (b"garbage", "this does not parse at byte 0: 67 61"),
        (b"\xff" * 100, r"this does not parse at byte 0: (ff ){32}\.\.\.$"),
        (b"\x08\x01", "expected type and success"),
        (b"\x10\x01", "expected type and success"),
        (b"\x08\x63\x10\x01", "expected type and success"),  # a type that nobody knows
        (b"\x08\x01\x10\x01" + b"\x1a\x02", "this does not parse"),  # dump, cut
        (b"\x08\x06\x10\x01" + b"\x2a\x03\x0a\x01\xff", "is not UTF-8|this does not parse"),
    ],
    ids=["empty", "garbage", "long garbage", "no success", "no type", "new type", "cut", "not UTF-8"],
)
def test_what_is_no_response(packet: bytes, message: str) -> None:
    fails(busy(notify=True), packet, message)


def test_a_version_that_is_no_text() -> None:
    packet = answer(schema.VERSION)
    packet.version.gitid = "v4.2"
    broken = packet.SerializeToString().replace(b"v4.2", b"\xff4.2")
    fails(busy(schema.VERSION), broken, "is not UTF-8|does not parse")


def test_unknown_fields_are_overlooked() -> None:
    told = busy().receive(answer(schema.DUMP).SerializeToString() + b"\xca\x3e\x03abc" + b"\xc0\x3e\x05")
    assert isinstance(told, Answer)
    assert told.success


def test_a_message_cut_through_a_character() -> None:
    failure = schema.Response(type=schema.DUMP, success=False, cr_errmsg=b"no file \xc3")
    told = receive(busy(), failure)
    assert isinstance(told, Answer)
    assert told.response.cr_errmsg == b"no file \xc3"


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_a_cut_answer_is_no_success_without_its_payload(kind: schema.RequestType.ValueType) -> None:
    """Cut anywhere, an answer is refused, or says what the whole one says of success."""
    whole = answer(kind).SerializeToString()
    for size in range(len(whole)):
        session = busy(kind)
        try:
            told = session.receive(whole[:size])
        except RemoteProtocolError:
            assert session.state is State.FAILED
        else:
            assert isinstance(told, Answer)
            assert told.response.success


@pytest.mark.parametrize("trailing", [b"\x00", b"\x08", b"\x12\x05ab", b"\xff"])
def test_an_answer_with_something_behind(trailing: bytes) -> None:
    fails(busy(), answer(schema.DUMP).SerializeToString() + trailing, "this does not parse")


@pytest.mark.parametrize("kind", REQUESTS, ids=schema.RequestType.Name)
def test_a_notification_nobody_asked_for(kind: schema.RequestType.ValueType) -> None:
    fails(busy(kind), notification().SerializeToString(), "^a notification that was not asked for at byte 0")


def test_a_second_notification_before_the_first_is_answered() -> None:
    fails(notified(), notification("post-dump").SerializeToString(), r"unasked \(notified\)")


def test_an_answer_while_a_notification_waits() -> None:
    fails(notified(), answer(schema.DUMP).SerializeToString(), r"unasked \(notified\)")


def test_a_notification_without_a_script() -> None:
    fails(busy(notify=True), notification("").SerializeToString(), "^a notification without a script at")
    bare = schema.Response(type=schema.NOTIFY, success=True)
    fails(busy(notify=True), bare.SerializeToString(), "^a notification without a script at")


def test_what_a_notification_carries() -> None:
    session = busy(schema.RESTORE, notify=True)
    assert receive(session, notification("pre-restore")) == Notified("pre-restore", None, ())
    session.send_answer(accept=True)
    assert receive(session, notification("post-restore", pid=0)) == Notified("post-restore", 0, ())
    session.send_answer(accept=True)
    assert receive(session, notification("orphan-pts-master"), 17) == Notified(
        "orphan-pts-master", None, (17,)
    )
    session.send_answer(accept=True)
    assert receive(session, notification("some-day")) == Notified("some-day", None, ())


def test_descriptors_where_none_belong() -> None:
    fails(busy(), answer(schema.DUMP).SerializeToString(), "^a descriptor came with an answer at", 17)
    script = notification("pre-dump").SerializeToString()
    fails(busy(notify=True), script, "^1 descriptors came with pre-dump at", 17)
    script = notification("orphan-pts-master").SerializeToString()
    fails(busy(notify=True), script, "^2 descriptors came with orphan-pts-master at", 17, 18)
    fails(
        busy(notify=True),
        script,
        "^more descriptors than CRIU sends, or than could be received here at",
        17,
        truncated=True,
    )


# ---- anything ----------------------------------------------------------------------------------

SESSIONS = st.one_of(
    st.sampled_from(list(State)).map(lambda state: MAKE[state]()),
    st.builds(lambda kind: busy(kind), st.sampled_from(REQUESTS)),  # noqa: PLW0108 (its other arguments)
    st.builds(
        lambda kind, keep: busy(kind, keep_open=keep and kind in KEEP_OPEN),
        st.sampled_from(REQUESTS),
        st.booleans(),
    ),
    st.just(schema.RESTORE).map(lambda kind: busy(kind, notify=True)),
)
RESPONSES = st.builds(
    lambda kind, success, rest: schema.Response(type=kind, success=success).SerializeToString() + rest,
    st.sampled_from(KINDS),
    st.booleans(),
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([schema.Response(**payload).SerializeToString() for payload in PAYLOADS.values()]),
        st.text(max_size=10).map(
            lambda text: schema.Response(notify=schema.Notify(script=text)).SerializeToString()
        ),
    ),
)


@given(
    SESSIONS,
    st.lists(st.one_of(st.binary(max_size=60), RESPONSES), max_size=4),
    st.lists(st.integers(3, 9), max_size=2),
    st.booleans(),
)
def test_any_packets(session: Session, packets: list[bytes], descriptors: list[int], truncated: bool) -> None:
    """Whatever comes is one of the two events, or breaks the protocol and ends the session."""
    for packet in packets:
        before = session.state
        try:
            event = session.receive(packet, tuple(descriptors), truncated=truncated)
        except RemoteProtocolError as error:
            assert error.data == packet
            assert session.state is State.FAILED
            with pytest.raises(LocalProtocolError):
                session.send_request(request(schema.VERSION))
            continue
        assert before is State.BUSY
        if isinstance(event, Notified):
            assert session.state is State.NOTIFIED
            assert isinstance(event.script, str)
            assert event.script
            session.send_answer(accept=True)
        else:
            assert session.state in {State.IDLE, State.LAST, State.PRE_DUMPED}
            assert isinstance(event.response.cr_errmsg, bytes)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_end_the_session(packet: bytes) -> None:
    session = busy(notify=True)
    try:
        session.receive(packet)
    except RemoteProtocolError:
        assert session.state is State.FAILED
    else:
        response = schema.Response.FromString(packet)
        assert response.type in {schema.DUMP, schema.NOTIFY, schema.EMPTY}
