"""The restore socket: every conversation whole, byte by byte and with something behind it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.restore_socket import (
    NEED_DATA,
    ConnectionClosed,
    Event,
    RestoreFinished,
    RestoreSocketDecoder,
    RestoreSocketEncoder,
    State,
    Task,
    Zombie,
)

PIDS = st.integers(1, 1 << 22)

#: What a restorer sends: bytes with the descriptors that travel with their first one.
Sent = tuple[bytes, tuple[str, ...]]


def pid(value: int) -> Sent:
    return struct.pack("=i", value), ()


def uffd(*names: str) -> Sent:
    return b"\0", names


FINISHED: Sent = (struct.pack("=I", 0x52535446), ())
EOF: Sent = (b"", ())


def whole(decoder: RestoreSocketDecoder[str], sent: list[Sent]) -> list[Event[str]]:
    """Feed each message as it was sent."""
    events: list[Event[str]] = []
    for data, descriptors in sent:
        decoder.receive(data, descriptors)
        drain(decoder, events)
    return events


def byte_by_byte(decoder: RestoreSocketDecoder[str], sent: list[Sent]) -> list[Event[str]]:
    """Feed single bytes; a descriptor comes with the first of its message."""
    events: list[Event[str]] = []
    for data, descriptors in sent:
        if not data:
            decoder.receive(b"")
            drain(decoder, events)
        for index in range(len(data)):
            decoder.receive(data[index : index + 1], descriptors if index == 0 else ())
            drain(decoder, events)
    return events


def drain(decoder: RestoreSocketDecoder[str], events: list[Event[str]]) -> None:
    while (event := decoder.next_event()) is not NEED_DATA:
        events.append(event)
        if isinstance(event, ConnectionClosed):
            break


Feeder = Callable[[RestoreSocketDecoder[str], list[Sent]], list[Event[str]]]
each_way = pytest.mark.parametrize("feed", [whole, byte_by_byte])


@each_way
def test_a_restore(feed: Feeder) -> None:
    decoder = RestoreSocketDecoder[str]()
    sent = [pid(10), uffd("a"), pid(-11), pid(12), uffd("b"), FINISHED, EOF]
    assert feed(decoder, sent) == [
        Task(10, "a"),
        Zombie(11),
        Task(12, "b"),
        RestoreFinished(),
        ConnectionClosed(),
    ]
    assert decoder.state is State.CLOSED


@settings(deadline=None)
@given(tasks=st.lists(st.tuples(PIDS, st.booleans()), unique_by=lambda task: task[0], max_size=20))
def test_what_the_encoder_says_is_decoded(tasks: list[tuple[int, bool]]) -> None:
    encoder = RestoreSocketEncoder()
    sent: list[Sent] = []
    expected: list[Event[str]] = []
    for number, dead in tasks:
        if dead:
            sent.append((encoder.zombie(number), ()))
            expected.append(Zombie(number))
        else:
            sent += [(encoder.task(number), ()), (encoder.descriptor_byte(), (f"fd{number}",))]
            expected.append(Task(number, f"fd{number}"))
    sent += [(encoder.finished(), ()), EOF]
    expected += [RestoreFinished(), ConnectionClosed()]
    for feed in (whole, byte_by_byte):
        assert feed(RestoreSocketDecoder(), sent) == expected


def test_says_what_to_read_next() -> None:
    decoder = RestoreSocketDecoder[str]()
    steps: list[tuple[int, bool, Sent]] = [
        (4, False, (b"\x05\0", ())),
        (2, False, (b"\0\0", ())),
        (1, True, uffd("a")),
        (4, False, pid(-6)),
        (4, False, FINISHED),
        (1, False, EOF),
    ]
    for wanted, descriptor, (data, descriptors) in steps:
        assert decoder.bytes_wanted == wanted
        assert decoder.descriptor_wanted is descriptor
        decoder.receive(data, descriptors)
        drain(decoder, [])
    assert decoder.bytes_wanted == 0


def test_wants_nothing_while_an_event_waits() -> None:
    decoder = RestoreSocketDecoder[str]()
    decoder.receive(pid(-6)[0])
    assert decoder.bytes_wanted == 0
    with pytest.raises(LocalProtocolError, match="1 bytes where 0 were wanted"):
        decoder.receive(b"x")


def test_reading_ahead_is_refused() -> None:
    decoder = RestoreSocketDecoder[str]()
    with pytest.raises(LocalProtocolError, match="5 bytes where 4 were wanted"):
        decoder.receive(pid(10)[0] + b"\0")


BROKEN: list[tuple[list[Sent], int, str]] = [
    ([EOF], 0, "before restore-finished: the restore failed"),
    ([pid(-5), EOF], 4, "before restore-finished"),
    ([pid(10), EOF], 4, "where the userfaultfd of pid 10 should be"),
    ([pid(10), uffd("a"), EOF], 5, "before restore-finished"),
    ([(b"\x01", ()), EOF], 0, "ended inside a pid"),
    ([pid(-5), (b"\x01\0\0", ()), EOF], 4, "ended inside a pid"),
    ([pid(0)], 0, "expected a pid or restore-finished, received 0"),
    ([pid((1 << 22) + 1)], 0, "received 4194305"),
    ([pid(-(1 << 31))], 0, "received -2147483648"),
    ([pid(0x52535445)], 0, "received"),
    ([pid(10), uffd("a"), pid(-10)], 5, "pid 10 was announced twice"),
    ([pid(10), uffd()], 4, "expected one userfaultfd for pid 10, received 0"),
    ([pid(10), uffd("a", "b")], 4, "received 2 descriptors"),
    ([(pid(10)[0], ("a",))], 0, "a descriptor came with a pid"),
    ([(FINISHED[0], ("a",))], 0, "a descriptor came with a pid"),
    ([FINISHED, (b"x", ())], 4, "something follows restore-finished"),
    ([FINISHED, (b"x", ("a",))], 4, "something follows restore-finished"),
]


@each_way
@pytest.mark.parametrize(("sent", "offset", "message"), BROKEN)
def test_broken(feed: Feeder, sent: list[Sent], offset: int, message: str) -> None:
    decoder = RestoreSocketDecoder[str]()
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        feed(decoder, sent)
    assert caught.value.offset == offset
    assert decoder.state is State.FAILED
    assert decoder.bytes_wanted == 0
    with pytest.raises(LocalProtocolError, match="has failed"):
        decoder.next_event()


@settings(deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    """Fed as a socket would be, with a descriptor wherever one is due."""
    decoder = RestoreSocketDecoder[str]()
    position = 0
    error = None
    try:
        while wanted := decoder.bytes_wanted:
            chunk = data[position : position + wanted]
            decoder.receive(chunk, ("fd",) if chunk and decoder.descriptor_wanted else ())
            position += len(chunk)
            drain(decoder, [])
    except RemoteProtocolError as caught:
        error = caught
    if error is None:
        assert decoder.state is State.CLOSED
    else:
        assert 0 <= error.offset <= len(data)


def test_nothing_after_the_end() -> None:
    decoder = RestoreSocketDecoder[str]()
    whole(decoder, [FINISHED, EOF])
    with pytest.raises(LocalProtocolError, match="already ended"):
        decoder.receive(b"x")
    assert decoder.next_event() == ConnectionClosed()


def test_encoder_keeps_the_order() -> None:
    encoder = RestoreSocketEncoder()
    for number in (0, -1, (1 << 22) + 1):
        with pytest.raises(LocalProtocolError, match="expected 1 to 4194304"):
            encoder.task(number)
    with pytest.raises(LocalProtocolError, match="announce a task first"):
        encoder.descriptor_byte()
    encoder.task(5)
    for call in (encoder.finished, lambda: encoder.task(6), lambda: encoder.zombie(6)):
        with pytest.raises(LocalProtocolError, match="a userfaultfd is to be sent"):
            call()
    encoder.descriptor_byte()
    encoder.finished()
    with pytest.raises(LocalProtocolError, match="the restore has finished"):
        encoder.task(6)
