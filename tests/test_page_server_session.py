"""Whom a relay lets in."""

from __future__ import annotations

import pytest

from criupy.page_server._session import Session
from criupy.wire.extension import Hello, Lane, Refusal

KEY = bytes(range(32))
OURS, OTHER = b"o" * 16, b"x" * 16


def hello(session: bytes, lane: Lane, counter: int, key: bytes = KEY) -> bytes:
    return Hello(session, lane, counter).encode(key)[32:]


@pytest.fixture
def session() -> Session:
    return Session(KEY)


def test_two_lanes_of_one_destination(session: Session) -> None:
    # They may come in any order.
    assert session.hello(1, hello(OURS, Lane.URGENT, 0)) is None
    assert session.hello(0, hello(OURS, Lane.BULK, 0)) is None
    assert session.begin(0) is None
    assert session.begin(1) is None
    assert (session.is_taken, session.is_connected) == (True, True)
    assert session.speaks_for(0)
    assert not session.speaks_for(1)


def test_a_lane_comes_back_in_place_of_what_was_there(session: Session) -> None:
    session.hello(0, hello(OURS, Lane.BULK, 0))
    assert session.lost(0)
    assert (session.is_taken, session.is_connected) == (True, False)
    assert session.hello(1, hello(OURS, Lane.BULK, 1)) is None
    # Here the connection before still looks alive.
    assert session.hello(2, hello(OURS, Lane.BULK, 5)) == 1
    assert not session.lost(1)
    assert session.is_connected
    assert session.speaks_for(2)


@pytest.mark.parametrize("counter", [0, 2, 3])
def test_what_was_overheard_is_refused(session: Session, counter: int) -> None:
    session.hello(0, hello(OURS, Lane.BULK, 3))
    session.lost(0)
    assert session.hello(1, hello(OURS, Lane.BULK, counter)) is Refusal.REPLAYED
    assert not session.is_connected
    assert session.hello(2, hello(OURS, Lane.BULK, 4)) is None


def test_another_destination_is_refused_also_while_the_first_is_lost(session: Session) -> None:
    session.hello(0, hello(OURS, Lane.BULK, 0))
    for _ in range(2):
        assert session.hello(1, hello(OTHER, Lane.BULK, 9)) is Refusal.TAKEN
        assert session.begin(2) is Refusal.TAKEN
        session.lost(0)
    assert session.hello(3, hello(OURS, Lane.BULK, 1)) is None


def test_a_wrong_key_takes_nothing(session: Session) -> None:
    assert session.hello(0, hello(OURS, Lane.BULK, 0, bytes(32))) is Refusal.KEY
    assert not session.is_taken
    session.hello(1, hello(OURS, Lane.BULK, 0))
    assert session.hello(2, hello(OURS, Lane.BULK, 1, bytes(32))) is Refusal.KEY
    assert session.speaks_for(1)


def test_a_stock_one_has_one_connection(session: Session) -> None:
    assert session.begin(0) is None
    assert session.begin(0) is None
    assert session.speaks_for(0)
    assert session.begin(1) is Refusal.TAKEN
    assert session.hello(2, hello(OURS, Lane.BULK, 0)) is Refusal.TAKEN
    session.lost(0)
    assert session.begin(3) is Refusal.TAKEN
    assert session.is_taken
