"""Page-server frames: layouts, unknown bits, and telling the frame size."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.page_server import (
    Command,
    Frame,
    FrameSize,
    ImageType,
    Incoming,
    PageFlags,
    decode_image_id,
    detect_frame_size,
    encode_image_id,
)

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
SIZES: list[FrameSize] = [24, 32]
each_size = pytest.mark.parametrize("size", SIZES)


def test_layouts() -> None:
    frame = Frame(Command.ADD_F, 3, 0x7F0000001000, 42, PageFlags.PRESENT)
    assert frame.encode(24) == struct.pack("<IIQQ", 6 | 4 << 16, 3, 0x7F0000001000, 42)
    assert frame.encode(32) == struct.pack("<IIQQQ", 6 | 4 << 16, 0, 3, 0x7F0000001000, 42)


@settings(deadline=None)
@given(
    command=U16, flags=U16, nr_pages=U64, address=U64, dst_id=U64, padding=st.binary(min_size=4, max_size=4)
)
def test_every_frame_survives(
    command: int, flags: int, nr_pages: int, address: int, dst_id: int, padding: bytes
) -> None:
    """Commands and flags that nobody knows yet keep their bits; padding is never looked at."""
    frame = Frame(Command(command), nr_pages, address, dst_id, PageFlags(flags))
    assert frame.command.value == command
    assert frame.flags.value == flags
    data = frame.encode(32)
    assert Frame.decode(data[:4] + padding + data[8:], 32) == frame
    short = Frame(frame.command, nr_pages & 0xFFFFFFFF, address, dst_id, frame.flags)
    assert Frame.decode(short.encode(24), 24) == short


def test_unknown_command_has_a_name() -> None:
    assert Command(0x99).name == "UNKNOWN_0x99"
    assert Command(7) is Command.GET
    with pytest.raises(ValueError, match="is not a valid Command"):
        Command(1 << 16)


def test_values_that_do_not_fit() -> None:
    with pytest.raises(LocalProtocolError, match="does not fit a frame of 24 bytes"):
        Frame(Command.GET, 1 << 32, 0x10000, 1).encode(24)
    assert len(Frame(Command.GET, 1 << 32, 0x10000, 1).encode(32)) == 32
    with pytest.raises(LocalProtocolError, match="does not fit"):
        Frame(Command.GET, 1, -4096, 1).encode(32)


def test_image_ids() -> None:
    assert encode_image_id(ImageType.TASK, 42) == 42 << 8 | 1
    assert encode_image_id(ImageType.SHMEM, 42) == 42 << 8 | 2
    assert decode_image_id(42 << 8 | 1) == (ImageType.TASK, 42)
    assert decode_image_id(42 << 8 | 11) == (ImageType.TASK, 42)
    assert decode_image_id(42 << 8 | 28) == (ImageType.SHMEM, 42)
    for low in (0, 3, 12, 255):
        assert decode_image_id(42 << 8 | low) is None


GARBAGE = st.binary(min_size=4, max_size=4)
ADDRESSES = st.integers(16, (1 << 52) - 1).map(lambda page: page << 12)
IMAGE_IDS = st.builds(encode_image_id, st.sampled_from(ImageType), st.integers(1, 1 << 40))


@settings(deadline=None)
@given(garbage=GARBAGE, address=ADDRESSES, nr_pages=st.integers(1, 0xFFFF), pid=st.integers(1, 1 << 22))
def test_detection_by_get(garbage: bytes, address: int, nr_pages: int, pid: int) -> None:
    frame = Frame(Command.GET, nr_pages, address, pid)
    assert detect_frame_size(frame.encode(24)) == 24
    long = frame.encode(32)
    assert detect_frame_size((long[:4] + garbage + long[8:])[:24]) == 32


@settings(deadline=None)
@given(
    garbage=GARBAGE,
    command=st.sampled_from([Command.ADD, Command.ADD_F, Command.HOLE]),
    address=ADDRESSES,
    nr_pages=st.integers(1, (1 << 32) - 1),
    image_id=IMAGE_IDS,
    flags=st.sampled_from([1, 2, 4, 6]),
)
def test_detection_by_upload(
    garbage: bytes, command: Command, address: int, nr_pages: int, image_id: int, flags: int
) -> None:
    frame = Frame(command, nr_pages, address, image_id, PageFlags(flags))
    assert detect_frame_size(frame.encode(24)) == 24
    long = frame.encode(32)
    assert detect_frame_size((long[:4] + garbage + long[8:])[:24]) == 32


@settings(deadline=None)
@given(
    garbage=GARBAGE,
    command=st.sampled_from([Command.OPEN, Command.OPEN2, Command.PARENT]),
    image_id=IMAGE_IDS,
)
def test_detection_by_open(garbage: bytes, command: Command, image_id: int) -> None:
    frame = Frame(command, dst_id=image_id)
    assert detect_frame_size(frame.encode(24)) == 24
    long = frame.encode(32)
    assert detect_frame_size((long[:4] + garbage + long[8:])[:24]) == 32


@settings(deadline=None)
@given(garbage=GARBAGE, command=st.sampled_from([Command.CLOSE, Command.FORCE_CLOSE]))
def test_close_tells_nothing(garbage: bytes, command: Command) -> None:
    assert detect_frame_size(Frame(command).encode(24)) is None
    long = Frame(command).encode(32)
    assert detect_frame_size((long[:4] + garbage + long[8:])[:24]) is None


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: xy",
        struct.pack("<I4xQQ", 8, 1, 0x10000),
        struct.pack("<I4xQQ", 4, 0, 0x123),  # OPEN2 whose third word is neither an id nor an address
        bytes(24),
    ],
)
def test_no_client_begins_so(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="expected the first frame") as caught:
        detect_frame_size(head)
    assert caught.value.offset == 0


def test_detection_wants_24_bytes() -> None:
    with pytest.raises(LocalProtocolError):
        detect_frame_size(bytes(23))


@settings(deadline=None)
@given(chunks=st.lists(st.binary(max_size=9), max_size=9), takes=st.lists(st.integers(0, 12), max_size=20))
def test_incoming_keeps_every_byte(chunks: list[bytes], takes: list[int]) -> None:
    incoming = Incoming()
    for chunk in chunks:
        if chunk:
            incoming.feed(chunk)
    everything = b"".join(chunks)
    position = 0
    for size in takes:
        left = everything[position:]
        assert incoming.length == len(left)
        assert incoming.offset == position
        assert incoming.peek(size) == left[:size]
        taken = incoming.take(size)
        assert taken == (left[:size] if len(left) >= size else None)
        position += len(taken or b"")
    while incoming.length:
        piece = incoming.take_piece(4)
        assert 1 <= len(piece) <= 4
        assert piece == everything[position : position + len(piece)]
        position += len(piece)
    assert position == len(everything)


def test_pieces_are_not_copied() -> None:
    data = bytearray(b"abcdef")
    incoming = Incoming()
    incoming.feed(data)
    assert incoming.take(2) == b"ab"
    piece = incoming.take_piece(100)
    data[2] = ord("X")
    assert bytes(piece) == b"Xdef"
