"""Page-server frames and the histogram in C, against the Python codec and plain arithmetic."""

from __future__ import annotations

import struct
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from criupy._uffd._native import ffi, lib
from criupy.wire.page_server import Command, Frame, FrameSize, PageFlags

SIZES: tuple[FrameSize, FrameSize] = (24, 32)
sizes = st.sampled_from(SIZES)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
GUARD = b"\xa5" * 8


def encode(cmd: int, nr_pages: int, vaddr: int, dst_id: int, size: int) -> bytes | int:
    """Encode in C; the bytes, or the error. Nothing but ``size`` bytes may be written."""
    frame = ffi.new("struct criupy_frame *", (cmd, nr_pages, vaddr, dst_id))
    out = bytearray(GUARD * 8)
    result = lib.criupy_frame_encode(frame, ffi.from_buffer("uint8_t[]", out), size)
    written = size if result == 0 else 0
    assert out[written:] == (GUARD * 8)[written:]
    return bytes(out[:size]) if result == 0 else int(result)


def decode(data: bytes) -> tuple[int, int, int, int]:
    frame = ffi.new("struct criupy_frame *")
    assert lib.criupy_frame_decode(frame, data, len(data)) == 0
    return frame.cmd, frame.nr_pages, frame.vaddr, frame.dst_id


@given(cmd=u32, nr_pages=u64, vaddr=u64, dst_id=u64, size=sizes)
def test_both_codecs_write_the_same_bytes(
    cmd: int, nr_pages: int, vaddr: int, dst_id: int, size: FrameSize
) -> None:
    encoded = encode(cmd, nr_pages, vaddr, dst_id, size)
    if size == 24 and nr_pages >= 1 << 32:
        assert encoded == -75  # EOVERFLOW
        return
    assert isinstance(encoded, bytes)
    model = Frame(Command(cmd & 0xFFFF), nr_pages, vaddr, dst_id, PageFlags(cmd >> 16))
    assert encoded == model.encode(size)
    assert decode(encoded) == (cmd, nr_pages, vaddr, dst_id)


@given(data=st.sampled_from(SIZES).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
def test_both_codecs_read_any_bytes_alike(data: bytes) -> None:
    model = Frame.decode(data, 24 if len(data) == 24 else 32)
    cmd = model.flags << 16 | model.command
    assert decode(data) == (cmd, model.nr_pages, model.address, model.dst_id)


@given(cmd=u32, padding=u32, nr_pages=u64, vaddr=u64, dst_id=u64)
def test_padding_is_never_looked_at(cmd: int, padding: int, nr_pages: int, vaddr: int, dst_id: int) -> None:
    data = struct.pack("<IIQQQ", cmd, padding, nr_pages, vaddr, dst_id)
    assert decode(data) == (cmd, nr_pages, vaddr, dst_id)


@pytest.mark.parametrize("size", [0, 1, 16, 23, 25, 28, 31, 33, 64])
def test_other_sizes_are_refused_and_nothing_is_written(size: int) -> None:
    assert encode(7, 1, 0x10000, 1, size) == -22
    frame = ffi.new("struct criupy_frame *", (1, 2, 3, 4))
    assert lib.criupy_frame_decode(frame, bytes(64), size) == -22
    assert (frame.cmd, frame.nr_pages, frame.vaddr, frame.dst_id) == (1, 2, 3, 4)


def test_the_constants_are_those_of_the_python_codec() -> None:
    assert lib.CRIUPY_CMD_GET == Command.GET
    assert lib.CRIUPY_CMD_ADD_F == Command.ADD_F
    assert lib.CRIUPY_CMD_CLOSE == Command.CLOSE
    assert lib.CRIUPY_CMD_FORCE_CLOSE == Command.FORCE_CLOSE
    assert PageFlags.PRESENT == lib.CRIUPY_PE_PRESENT


GET = {"cmd": 7, "nr_pages": 10, "vaddr": 0x7F0000000000, "dst_id": 1234}
GOOD = {**GET, "cmd": 4 << 16 | 6}


def check(**changed: int) -> int:
    reply: Any = ffi.new("struct criupy_frame *", {**GOOD, **changed})
    return int(lib.criupy_reply_check(reply, ffi.new("struct criupy_frame *", GET)))


@pytest.mark.parametrize("nr", [1, 2, 9, 10])
def test_a_reply_may_be_short(nr: int) -> None:
    assert check(nr_pages=nr) == 0


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"cmd": 6}, lib.CRIUPY_REPLY_COMMAND),
        ({"cmd": 2 << 16 | 6}, lib.CRIUPY_REPLY_COMMAND),
        ({"cmd": 4 << 16 | 7}, lib.CRIUPY_REPLY_COMMAND),
        ({"cmd": 0}, lib.CRIUPY_REPLY_COMMAND),
        ({"cmd": 6 << 16 | 6}, lib.CRIUPY_REPLY_COMMAND),
        ({"vaddr": GET["vaddr"] + 4096}, lib.CRIUPY_REPLY_ADDRESS),
        ({"vaddr": 0}, lib.CRIUPY_REPLY_ADDRESS),
        ({"dst_id": 1235}, lib.CRIUPY_REPLY_ID),
        ({"dst_id": 1234 + (1 << 32)}, lib.CRIUPY_REPLY_ID),
        ({"nr_pages": 0}, lib.CRIUPY_REPLY_COUNT),
        ({"nr_pages": 11}, lib.CRIUPY_REPLY_COUNT),
        ({"nr_pages": 1 << 63}, lib.CRIUPY_REPLY_COUNT),
        ({"nr_pages": (1 << 52) + 1}, lib.CRIUPY_REPLY_COUNT),
    ],
)
def test_a_reply_that_answers_something_else_is_refused(changed: dict[str, int], fault: int) -> None:
    assert check(**changed) == fault


def bucket(ns: int) -> int:
    return int(lib.criupy_histogram_bucket(ns))


@given(a=u64, b=u64)
def test_buckets_are_monotone(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert bucket(low) <= bucket(high)
    assert bucket(low) >= 0
    assert bucket(high) < lib.CRIUPY_NR_BUCKETS


@given(ns=st.integers(16, (1 << 43) - 1))
def test_a_bucket_is_a_sixteenth_of_its_power_of_two(ns: int) -> None:
    width = 1 << ns.bit_length() - 5
    start = ns - ns % width
    assert bucket(start) == bucket(ns) == bucket(start + width - 1)
    assert bucket(start - 1) == bucket(ns) - 1
    assert bucket(start + width) == min(bucket(ns) + 1, lib.CRIUPY_NR_BUCKETS - 1)


def test_every_bucket_is_used_once_at_the_edges() -> None:
    assert [bucket(ns) for ns in range(33)] == [*range(32), 32]
    assert bucket((1 << 43) - 1) == lib.CRIUPY_NR_BUCKETS - 1
    assert bucket(1 << 43) == bucket((1 << 64) - 1) == lib.CRIUPY_NR_BUCKETS - 1
