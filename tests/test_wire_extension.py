"""What our two ends say to each other beyond CRIU's protocol."""

from __future__ import annotations

import pytest

from criupy.errors import LocalProtocolError, RemoteProtocolError
from criupy.wire.extension import (
    HELLO_LENGTH,
    MAX_RUN_PAGES,
    MAX_RUNS,
    Hello,
    Lane,
    Refusal,
    decode_runs,
    encode_getv,
    encode_plain,
    encode_refused,
)
from criupy.wire.page_server import Command, Frame, detect_frame_size

KEY = bytes(range(32))
HELLO = Hello(b"s" * 16, Lane.URGENT, 7)


def test_a_hello_is_understood_with_the_same_key() -> None:
    data = HELLO.encode(KEY)
    frame = Frame.decode(data[:32], 32)
    assert (frame.command, frame.nr_pages) == (Command.HELLO, HELLO_LENGTH)
    assert len(data) == 32 + HELLO_LENGTH
    assert Hello.decode(data[32:], KEY) == HELLO
    assert detect_frame_size(data[:24]) == 32


@pytest.mark.parametrize("bit", [0, 70, 100, 150, 255, 511])
def test_a_hello_that_was_changed_is_refused(bit: int) -> None:
    body = bytearray(HELLO.encode(KEY)[32:])
    body[bit // 8] ^= 1 << bit % 8
    assert Hello.decode(bytes(body), KEY) in {Refusal.KEY, Refusal.VERSION}


def test_a_hello_with_another_key_is_refused_unless_there_is_none() -> None:
    body = HELLO.encode(bytes(32))[32:]
    assert Hello.decode(body, KEY) is Refusal.KEY
    assert Hello.decode(body, None) == HELLO


def test_runs_go_into_one_frame() -> None:
    runs = [(0x10000, 3), (0x40000, 1), (0x7F0000000000, 12)]
    data = encode_getv(42, runs)
    frame = Frame.decode(data[:32], 32)
    assert (frame.command, frame.nr_pages, frame.address, frame.dst_id) == (Command.GETV, 16, 3, 42)
    assert decode_runs(frame, data[32:]) == runs
    with pytest.raises(RemoteProtocolError, match="not what its frame says"):
        decode_runs(frame, data[32:-16])


@pytest.mark.parametrize(
    "runs",
    [[], [(0x10000, 1)] * (MAX_RUNS + 1), [(0x10000, MAX_RUN_PAGES + 1)], [(0x10001, 1)], [(0x10000, 0)]],
    ids=["none", "too many", "too long", "not a page", "empty"],
)
def test_runs_that_cannot_be_asked_for(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(LocalProtocolError, match="encode_getv"):
        encode_getv(42, runs)


def test_the_rest_are_bare_frames() -> None:
    assert Frame.decode(encode_plain(Command.ABORT), 32) == Frame(Command.ABORT)
    assert Frame.decode(encode_refused(Refusal.TAKEN), 32) == Frame(Command.REFUSED, 2)
