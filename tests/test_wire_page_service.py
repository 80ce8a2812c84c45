"""The server's codec: requests whole, byte by byte, with trailing data; answers only in order."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_client import PageClient, Reply, Status
from criupy.wire.page_server import Command, Frame, FrameSize, ImageType, PageFlags, encode_image_id
from criupy.wire.page_service import (
    NEED_DATA,
    Add,
    Close,
    ConnectionClosed,
    Get,
    Open,
    PageService,
    Parent,
    Payload,
    ServerEvent,
    State,
)

PAGE = 4096
BASE = 0x7F0000000000
SIZES: list[FrameSize] = [24, 32]
each_size = pytest.mark.parametrize("size", SIZES)
each_chunk = pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
TASK = encode_image_id(ImageType.TASK, 42)
SHMEM = encode_image_id(ImageType.SHMEM, 9)

Answer = Callable[[PageService, ServerEvent], object]


def frames(size: FrameSize, *what: Frame | bytes) -> bytes:
    """Encode frames as CRIU sends them: with garbage in the padding."""
    out = b""
    for item in what:
        if isinstance(item, bytes):
            out += item
            continue
        data = item.encode(size)
        out += data if size == 24 else data[:4] + b"\xde\xad\xbe\xef" + data[8:]
    return out


def feed(service: PageService, data: bytes, chunk: int, *, eof: bool = False) -> list[ServerEvent]:
    events: list[ServerEvent] = []
    for piece in [data[i : i + chunk] for i in range(0, len(data), chunk)] + ([b""] if eof else []):
        service.receive(piece)
        while (event := service.next_event()) is not NEED_DATA:
            before = events[-1] if events else None
            if isinstance(event, Payload) and isinstance(before, Payload) and not before.last:
                joined = memoryview(bytes(before.data) + bytes(event.data))
                events[-1] = Payload(before.offset, joined, event.last)
            else:
                events.append(event)
            if isinstance(event, ConnectionClosed):
                break
    return events


@each_size
@each_chunk
@pytest.mark.parametrize("told", [True, False])
def test_serving(size: FrameSize, chunk: int, told: bool) -> None:
    service = PageService(size if told else None)
    data = frames(
        size,
        Frame(Command.GET, 3, BASE, 10),
        Frame(Command.GET, 1, BASE + PAGE, 11),
        Frame(Command.CLOSE),
    )
    assert feed(service, data, chunk, eof=True) == [
        Get(10, BASE, 3),
        Get(11, BASE + PAGE, 1),
        Close(force=False),
        ConnectionClosed(after_close=True),
    ]
    assert service.frame_size == size
    assert service.unanswered == 3
    assert Frame.decode(service.answer_get(2), size) == Frame(Command.ADD_F, 2, BASE, 10, PageFlags.PRESENT)
    assert Frame.decode(service.answer_get(1), size) == Frame(
        Command.ADD_F, 1, BASE + PAGE, 11, PageFlags.PRESENT
    )
    assert service.answer_close(-3) == struct.pack("<i", -3)
    assert service.unanswered == 0


@each_size
@each_chunk
@pytest.mark.parametrize("told", [True, False])
def test_an_upload(size: FrameSize, chunk: int, told: bool) -> None:
    service = PageService(size if told else None)
    data = frames(
        size,
        Frame(Command.PARENT, dst_id=TASK),
        Frame(Command.OPEN2, dst_id=TASK),
        Frame(Command.ADD_F, 2, BASE, TASK, PageFlags.PRESENT | PageFlags.LAZY),
        b"\1" * (2 * PAGE),
        Frame(Command.ADD_F, 5, BASE + 2 * PAGE, TASK, PageFlags.LAZY),
        Frame(Command.OPEN, dst_id=SHMEM),
        Frame(Command.ADD, 1, 0x10000, SHMEM),
        b"\2" * PAGE,
        Frame(Command.HOLE, 7, 0x20000, SHMEM),
        Frame(Command.FORCE_CLOSE),
    )
    assert feed(service, data, chunk, eof=True) == [
        Parent(ImageType.TASK, 42),
        Open(ImageType.TASK, 42, wants_answer=True),
        Add(ImageType.TASK, 42, BASE, 2, PageFlags.PRESENT | PageFlags.LAZY),
        Payload(0, memoryview(b"\1" * (2 * PAGE)), last=True),
        Add(ImageType.TASK, 42, BASE + 2 * PAGE, 5, PageFlags.LAZY),
        Open(ImageType.SHMEM, 9, wants_answer=False),
        Add(ImageType.SHMEM, 9, 0x10000, 1, PageFlags.PRESENT),
        Payload(0, memoryview(b"\2" * PAGE), last=True),
        Add(ImageType.SHMEM, 9, 0x20000, 7, PageFlags.PARENT),
        Close(force=True),
        ConnectionClosed(after_close=True),
    ]
    assert service.answer_parent(has_parent=True) == struct.pack("<i", 1)
    assert service.answer_open(has_parent=False) == b"\0"
    assert service.answer_close() == bytes(4)


@each_size
@each_chunk
def test_close_of_unknown_size(size: FrameSize, chunk: int) -> None:
    """The first 24 bytes are answered; the rest of a long one is swallowed."""
    service = PageService()
    data = frames(size, Frame(Command.CLOSE))
    assert feed(service, data[:24], chunk) == [Close(force=False)]
    assert service.answer_close() == bytes(4)
    assert feed(service, data[24:], chunk, eof=True) == [ConnectionClosed(after_close=True)]
    assert service.frame_size is None


@pytest.mark.parametrize(("size", "told"), [(24, False), (24, True), (32, True)])
@pytest.mark.parametrize("extra", [1, 3, 9])
def test_something_behind_close(size: FrameSize, told: bool, extra: int) -> None:
    service = PageService(size if told else None)
    with pytest.raises(RemoteProtocolError, match="something follows CLOSE"):
        feed(service, frames(size, Frame(Command.CLOSE)) + b"x" * extra, 1 << 20, eof=True)
    assert service.state is State.FAILED


@each_size
def test_plain_end(size: FrameSize) -> None:
    assert feed(PageService(), b"", 1, eof=True) == [ConnectionClosed(after_close=False)]
    service = PageService(size)
    get = frames(size, Frame(Command.GET, 1, BASE, 10))
    assert feed(service, get, 1, eof=True) == [Get(10, BASE, 1), ConnectionClosed(after_close=False)]


@each_size
@pytest.mark.parametrize("told", [True, False])
def test_end_inside_a_frame(size: FrameSize, told: bool) -> None:
    get = frames(size, Frame(Command.GET, 1, BASE, 10))
    for cut in range(1, size):
        service = PageService(size if told else None)
        with pytest.raises(RemoteProtocolError, match="ended inside a frame") as caught:
            feed(service, get[:cut], 1 << 20, eof=True)
        assert caught.value.offset == 0
        assert caught.value.data == get[:cut]


@each_size
def test_end_inside_an_upload(size: FrameSize) -> None:
    add = frames(size, Frame(Command.ADD, 1, BASE, TASK), bytes(100))
    with pytest.raises(RemoteProtocolError, match="ended inside the pages of an upload") as caught:
        feed(PageService(size), add, 1, eof=True)
    assert caught.value.offset == size + 100


@each_size
@each_chunk
@pytest.mark.parametrize("trailing", [b"", b"x" * 40])
@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(Command.GET, 0, BASE, 10), "GET: no pages"),
        (Frame(Command.GET, 1, BASE + 8, 10), "GET: address 0x7f0000000008 is not page-aligned"),
        (Frame(Command.GET, 2, (1 << 64) - PAGE, 10), "GET: 2 pages from .* leave 64-bit addresses"),
        (Frame(Command.ADD_F, 0, BASE, TASK), "ADD_F: no pages"),
        (Frame(Command.ADD, 1, BASE, 42 << 8), "ADD: unknown image type"),
        (Frame(Command.OPEN2, dst_id=42 << 8 | 5), "OPEN2: unknown image type in dst_id 0x2a05"),
        (Frame(Command(99)), "unknown command 99"),
    ],
)
def test_wrong_requests(size: FrameSize, chunk: int, trailing: bytes, frame: Frame, message: str) -> None:
    service = PageService()
    good = frames(size, Frame(Command.GET, 1, BASE, 10))
    bad = frames(size, frame)
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        feed(service, good + bad + trailing, chunk)
    assert caught.value.offset == size
    assert caught.value.data == bad
    with pytest.raises(LocalProtocolError, match="has failed"):
        service.next_event()


def test_no_client_at_all() -> None:
    service = PageService()
    with pytest.raises(RemoteProtocolError, match="expected the first frame"):
        feed(service, b"GET / HTTP/1.1\r\nHost: here\r\n", 3)
    assert service.state is State.FAILED


def test_answers_only_in_order() -> None:
    service = PageService(32)
    with pytest.raises(LocalProtocolError, match="nothing is to be answered"):
        service.answer_get(1)
    feed(
        service,
        frames(
            32,
            Frame(Command.GET, 2, BASE, 10),
            Frame(Command.OPEN2, dst_id=TASK),
            Frame(Command.PARENT, dst_id=TASK),
            Frame(Command.CLOSE),
        ),
        1 << 20,
    )
    for count in (0, 3):
        with pytest.raises(LocalProtocolError, match="expected 1 to 2 pages"):
            service.answer_get(count)
    with pytest.raises(LocalProtocolError, match="Get is to be answered"):
        service.answer_close()
    with pytest.raises(LocalProtocolError, match="Get is to be answered"):
        service.answer_parent(has_parent=False)
    service.answer_get(2)
    with pytest.raises(LocalProtocolError, match="Open is to be answered"):
        service.answer_get(1)
    service.answer_open(has_parent=True)
    with pytest.raises(LocalProtocolError, match="Parent is to be answered"):
        service.answer_open(has_parent=True)
    service.answer_parent(has_parent=False)
    service.answer_close()
    with pytest.raises(LocalProtocolError, match="nothing is to be answered"):
        service.answer_close()


@each_size
def test_client_and_service_understand_each_other(size: FrameSize) -> None:
    client, service = PageClient(size), PageService()
    service.receive(client.get(10, BASE, 5) + client.get(10, BASE + 5 * PAGE, 2) + client.close())
    pages = bytes(range(256)) * (PAGE // 256)
    got: list[object] = []
    while True:
        match service.next_event():
            case Get(_, _, nr_pages):
                count = min(3, nr_pages)
                client.receive(service.answer_get(count) + pages * count)
            case Close():
                client.receive(service.answer_close())
                break
    while (event := client.next_event()).__class__ is not Status:
        got.append(event.nr_pages if isinstance(event, Reply) else bytes(event.data))  # type: ignore[union-attr]
    assert b"".join(x for x in got if isinstance(x, bytes)) == pages * 5
    assert [x for x in got if isinstance(x, int)] == [3, 2]
