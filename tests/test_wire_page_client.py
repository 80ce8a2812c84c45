"""The page client against bytes made by hand, in chunks of every size, and against the service."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_client import (
    NEED_DATA,
    ClientEvent,
    ConnectionClosed,
    PageClient,
    Payload,
    Reply,
    Request,
    State,
    Status,
)
from criupy.wire.page_server import FrameSize

PAGE = 4096
BASE = 0x7F0000000000
SIZES: list[FrameSize] = [24, 32]
each_size = pytest.mark.parametrize("size", SIZES)
chunk_sizes = pytest.mark.parametrize("chunk", [1, 7, PAGE, 1 << 20])


def header(size: FrameSize, cmd: int, nr_pages: int, address: int, dst_id: int) -> bytes:
    if size == 24:
        return struct.pack("<IIQQ", cmd, nr_pages, address, dst_id)
    return struct.pack("<IIQQQ", cmd, 0xDEADBEEF, nr_pages, address, dst_id)


def answer(size: FrameSize, nr_pages: int, address: int, pid: int, fill: int = 1) -> bytes:
    return header(size, 6 | 4 << 16, nr_pages, address, pid) + bytes([fill]) * (nr_pages * PAGE)


def events_of(client: PageClient) -> Iterator[ClientEvent]:
    while (event := client.next_event()) is not NEED_DATA:
        yield event
        if isinstance(event, ConnectionClosed):
            return


def feed(client: PageClient, data: bytes, chunk: int, *, eof: bool = False) -> list[ClientEvent]:
    """Feed in chunks and join the payloads of one answer."""
    events: list[ClientEvent] = []
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)] + ([b""] if eof else [])
    for piece in chunks:
        client.receive(piece)
        for event in events_of(client):
            before = events[-1] if events else None
            if isinstance(event, Payload) and isinstance(before, Payload) and not before.last:
                assert event.request == before.request
                assert event.offset == before.offset + len(before.data)
                joined = memoryview(bytes(before.data) + bytes(event.data))
                events[-1] = Payload(event.request, before.offset, joined, event.last)
            else:
                events.append(event)
    return events


@each_size
@chunk_sizes
def test_a_session(size: FrameSize, chunk: int) -> None:
    client = PageClient(size)
    first, second = Request(10, BASE, 2), Request(11, BASE + 8 * PAGE, 4)
    assert client.get(10, BASE, 2) == (
        struct.pack("<IIQQ", 7, 2, BASE, 10) if size == 24 else struct.pack("<IIQQQ", 7, 0, 2, BASE, 10)
    )
    client.get(11, BASE + 8 * PAGE, 4)
    assert client.outstanding == 2
    close = client.close()
    assert close == struct.pack("<I", 0x1023) + bytes(size - 4)
    data = answer(size, 2, BASE, 10, 1) + answer(size, 3, BASE + 8 * PAGE, 11, 2) + struct.pack("<i", 0)
    assert feed(client, data, chunk, eof=True) == [
        Reply(first, 2),
        Payload(first, 0, memoryview(b"\1" * (2 * PAGE)), last=True),
        Reply(second, 3),
        Payload(second, 0, memoryview(b"\2" * (3 * PAGE)), last=True),
        Status(0),
        ConnectionClosed(),
    ]
    assert client.outstanding == 0
    assert client.state is State.CLOSED


@each_size
def test_a_failure_status_and_force(size: FrameSize) -> None:
    client = PageClient(size)
    assert client.close(force=True)[:4] == struct.pack("<I", 0x1024)
    assert feed(client, struct.pack("<i", -1), 1, eof=True) == [Status(-1), ConnectionClosed()]


@each_size
def test_bytes_wanted_never_reads_ahead(size: FrameSize) -> None:
    client = PageClient(size)
    assert client.bytes_wanted == 0
    client.get(10, BASE, 2)
    client.get(10, BASE + 2 * PAGE, 1)
    client.close()
    data = answer(size, 1, BASE, 10) + answer(size, 1, BASE + 2 * PAGE, 10) + bytes(4)
    reads = []
    while wanted := client.bytes_wanted:
        reads.append(wanted)
        client.receive(data[:wanted])
        data = data[wanted:]
        list(events_of(client))
    assert reads == [size, PAGE, size, PAGE, 4]
    assert data == b""


def test_payload_is_what_was_received() -> None:
    client = PageClient(32)
    client.get(10, BASE, 1)
    buffer = bytearray(answer(32, 1, BASE, 10))
    client.receive(buffer)
    assert isinstance(client.next_event(), Reply)
    payload = client.next_event()
    assert isinstance(payload, Payload)
    buffer[32] = 0xEE
    assert payload.data[0] == 0xEE


ADD_F = 6 | 4 << 16
WRONG = [
    (header(32, 6, 1, BASE, 10), "expected ADD_F with PRESENT, received ADD_F with flags 0x0"),
    (header(32, 6 | 6 << 16, 1, BASE, 10), "received ADD_F with flags 0x6"),
    (header(32, 7 | 4 << 16, 1, BASE, 10), "received GET with flags 0x4"),
    (header(32, 0x77, 1, BASE, 10), "received UNKNOWN_0x77"),
    (header(32, ADD_F, 1, BASE + PAGE, 10), "expected the answer for 0x7f0000000000 of pid 10"),
    (header(32, ADD_F, 1, BASE, 11), "received 0x7f0000000000 of 11"),
    (header(32, ADD_F, 0, BASE, 10), "expected 1 to 2 pages, received 0"),
    (header(32, ADD_F, 3, BASE, 10), "expected 1 to 2 pages, received 3"),
    (header(32, ADD_F, 1 << 63, BASE, 10), "expected 1 to 2 pages"),
    (header(24, ADD_F, 1, BASE, 10) + bytes(8), "is the frame size of 32 bytes right"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
@pytest.mark.parametrize("trailing", [b"", b"x" * 50])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_wrong_answers(data: bytes, message: str, trailing: bytes, chunk: int) -> None:
    client = PageClient(32)
    client.get(10, BASE - PAGE, 1)
    client.get(10, BASE, 2)
    good = answer(32, 1, BASE - PAGE, 10)
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        feed(client, good + data + trailing, chunk)
    assert caught.value.offset == len(good)
    assert caught.value.data == data
    assert client.state is State.FAILED
    with pytest.raises(LocalProtocolError, match="has failed"):
        client.next_event()
    with pytest.raises(LocalProtocolError, match="failed"):
        client.get(10, BASE, 1)


@each_size
def test_every_early_end_is_noticed(size: FrameSize) -> None:
    data = answer(size, 1, BASE, 10) + answer(size, 1, BASE + PAGE, 10) + bytes(4)
    cuts = [*range(size + 2), size + PAGE - 1, size + PAGE, 2 * size + PAGE, *range(len(data) - 6, len(data))]
    for cut in cuts:
        client = PageClient(size)
        client.get(10, BASE, 1)
        client.get(10, BASE + PAGE, 1)
        client.close()
        with pytest.raises(RemoteProtocolError, match="the page server closed the connection") as caught:
            feed(client, data[:cut], 1 << 20, eof=True)
        assert caught.value.offset <= cut


def test_unasked_bytes() -> None:
    client = PageClient(24)
    with pytest.raises(RemoteProtocolError, match="not asked for"):
        feed(client, b"x", 1)
    client = PageClient(24)
    client.close()
    with pytest.raises(RemoteProtocolError, match="something follows the status"):
        feed(client, bytes(5), 5)
    client = PageClient(24)
    with pytest.raises(RemoteProtocolError, match="nothing was outstanding, without CLOSE"):
        feed(client, b"", 1, eof=True)


@pytest.mark.parametrize(
    ("pid", "address", "nr_pages", "message"),
    [
        (0, BASE, 1, "pid 0"),
        (1 << 31, BASE, 1, "pid"),
        (1, BASE + 1, 1, "not page-aligned"),
        (1, BASE, 0, "no pages"),
        (1, BASE, -1, "no pages"),
        (1, (1 << 64) - PAGE, 2, "leave 64-bit"),
        (1, BASE, 65536, "at most 65535"),
    ],
)
def test_requests_that_cannot_be(pid: int, address: int, nr_pages: int, message: str) -> None:
    client = PageClient(32)
    with pytest.raises(LocalProtocolError, match=message):
        client.get(pid, address, nr_pages)
    assert client.outstanding == 0


def test_nothing_is_asked_after_close() -> None:
    client = PageClient(32)
    client.close()
    with pytest.raises(LocalProtocolError, match="closing"):
        client.get(1, BASE, 1)
    with pytest.raises(LocalProtocolError, match="closing"):
        client.close()


@settings(deadline=None)
@given(
    size=st.sampled_from(SIZES),
    requests=st.lists(
        st.tuples(st.integers(1, 1 << 22), st.integers(16, 1 << 40), st.integers(1, 3), st.integers(1, 3)),
        max_size=5,
    ),
    cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
)
def test_any_chunks_give_the_same(
    size: FrameSize, requests: list[tuple[int, int, int, int]], cuts: list[int]
) -> None:
    client = PageClient(size)
    data = b""
    for fill, (pid, page, nr_pages, short) in enumerate(requests):
        client.get(pid, page * PAGE, nr_pages)
        data += answer(size, min(nr_pages, short), page * PAGE, pid, fill)
    client.close()
    data += struct.pack("<i", 5)
    position = 0
    got: list[tuple[int, bytes]] = []
    index = 0
    statuses = []
    while position < len(data):
        cut = cuts[index % len(cuts)]
        index += 1
        client.receive(data[position : position + cut])
        position += cut
        for event in events_of(client):
            match event:
                case Reply(request, count):
                    assert request == Request(
                        *(requests[len(got)][i] * (PAGE if i == 1 else 1) for i in range(3))
                    )
                    got.append((count, b""))
                case Payload(_, offset, piece, last):
                    count, before = got[-1]
                    assert offset == len(before)
                    got[-1] = (count, before + piece)
                    assert last == (len(got[-1][1]) == count * PAGE)
                case Status(status):
                    statuses.append(status)
                case _:
                    pytest.fail(f"unexpected {event}")
    assert got == [(min(n, s), bytes([i]) * (min(n, s) * PAGE)) for i, (_, _, n, s) in enumerate(requests)]
    assert statuses == [5]
