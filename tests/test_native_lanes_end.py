"""The pager with a page server of ours: what they tell each other, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from criupy._uffd.pager_linux import BULK, URGENT, Link, Outcome, Phase, ReplyFault
from criupy.errors import UffdError
from criupy.wire.extension import Hello, Lane, Refusal
from native_lanes import both, ended, lazy, running
from native_peer import (
    FINISHED,
    GET,
    HELLO,
    REFUSED,
    Restore,
    Source,
    content,
)
from native_target import PAGE, Target
from test_native_uffd import needs_poison, usable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]

SESSION = bytes(range(16))
KEY = b"k" * 32


@pytest.fixture
def bulk(no_descriptor_is_left: None) -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def urgent(no_descriptor_is_left: None) -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def restore(no_descriptor_is_left: None) -> Iterator[Restore]:
    with Restore(window_pages=16) as restore:
        yield restore


# ---- what they tell each other -------------------------------------------------------------


@pytest.mark.parametrize("lane", [BULK, URGENT])
@pytest.mark.parametrize("pieces", [[32], [1, 3, 8, 20]])
@pytest.mark.parametrize("asked", [True, False])
def test_refused(
    restore: Restore,
    target: Target,
    bulk: Source,
    urgent: Source,
    lane: int,
    pieces: list[int],
    asked: bool,
) -> None:
    addr = lazy(restore, target, 4)
    source, other = (bulk, urgent) if lane == BULK else (urgent, bulk)
    restore.link_lane(source, lane) if lane == BULK else both(restore, bulk, urgent)
    order = target.start("read", addr, PAGE) if asked else None
    if asked:
        source.get()
    refused = source.header(REFUSED, Refusal.TAKEN, 0, 0)
    for nr in pieces:
        restore.obeyed()
        source.sock.sendall(refused[:nr])
        refused = refused[nr:]
    stats = restore.until(lambda stats: stats.refused != 0)
    assert stats.refused == Refusal.TAKEN
    errors = (stats.link_error, stats.urgent_error)
    states = (stats.link, stats.urgent_link)
    assert (errors[lane], states[lane]) == (errno.EACCES, Link.LOST)
    assert stats.reply_fault == ReplyFault.NONE
    if lane == BULK:
        restore.link_lane(other, URGENT)
    if order is None:
        order = target.start("read", addr, PAGE)
    assert other.answer() == (1, addr, 77)
    assert order.result() == content(77, addr)
    restore.pager.drop_link(lane)
    assert restore.obeyed().refused == 0


def test_refused_in_the_place_of_a_status(restore: Restore, target: Target, bulk: Source) -> None:
    addr = lazy(restore, target, 1)
    restore.link_lane(bulk)
    running(restore, bulk)
    bulk.answer()
    assert bulk.frame() == (0x1023, 0, 0, 0)
    bulk.refuse(Refusal.ENDED)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.link_error) == (Outcome.COMPLETE, Link.LOST, errno.EACCES)
    assert (stats.refused, stats.close_status) == (Refusal.ENDED, -1)
    assert target.call("read", addr, PAGE) == content(77, addr)


def test_a_stock_source_cannot_refuse(restore: Restore, target: Target, bulk: Source) -> None:
    lazy(restore, target, 1)
    restore.link(bulk)
    bulk.refuse(Refusal.KEY)
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault, stats.refused) == (errno.EPROTO, ReplyFault.UNASKED, 0)


@pytest.mark.parametrize("extra", [b"\x07", b"\x05", struct.pack("<I", REFUSED + 1), b"\x05\x63\x00\x01"])
def test_nothing_but_a_refusal_may_come_unasked(
    restore: Restore, target: Target, bulk: Source, extra: bytes
) -> None:
    lazy(restore, target, 1)
    restore.link_lane(bulk)
    bulk.sock.sendall(extra)
    if extra == b"\x05":  # as a refusal begins: it may go on
        restore.obeyed()
        assert restore.until(lambda stats: stats.bytes_received == 1).link == Link.OPEN
        bulk.sock.sendall(b"\x05")
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault) == (errno.EPROTO, ReplyFault.UNASKED)


def test_a_refusal_that_does_not_go_on(target: Target, bulk: Source) -> None:
    with Restore(link_timeout=0.05) as restore:
        lazy(restore, target, 1)
        restore.link_lane(bulk)
        bulk.sock.sendall(struct.pack("<I", REFUSED))
        stats = restore.until(lambda stats: stats.link == Link.LOST)
        assert (stats.link_error, stats.refused) == (errno.ETIMEDOUT, 0)


def test_the_preamble_comes_first_and_finished_behind_it(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    """Each connection of the lane for bulk is told once, and the other lane never."""
    addr = lazy(restore, target, 16)
    hellos = [Hello(SESSION, lane, counter) for counter in (1, 2) for lane in (Lane.BULK, Lane.URGENT)]

    def said_hello(source: Source) -> Hello:
        assert source.frame()[0] == HELLO
        decoded = Hello.decode(source.receive(64), KEY)
        assert isinstance(decoded, Hello)
        return decoded

    restore.link_lane(bulk, BULK, hellos[0].encode(KEY))
    restore.link_lane(urgent, URGENT, hellos[1].encode(KEY))
    assert [said_hello(bulk), said_hello(urgent)] == hellos[:2]
    restore.finish()
    assert bulk.frame() == (FINISHED, 0, 0, 0)
    assert bulk.get() == (16, addr, 77)
    bulk.sock.close()
    urgent.sock.close()
    restore.until(lambda stats: stats.link == stats.urgent_link == Link.LOST)
    with Source() as bulk_again, Source() as urgent_again:
        # Once bulk is there it does not take long.
        for lane, source, hello in ((URGENT, urgent_again, hellos[3]), (BULK, bulk_again, hellos[2])):
            restore.pager.drop_link(lane)
            restore.link_lane(source, lane, hello.encode(KEY))
            source.serve()
        ended(restore)
        assert bulk_again.joined() == "FIN"
        assert bulk_again.said == [HELLO, FINISHED, 0x1023]
        assert urgent_again.joined() == "FIN without a word"
        assert urgent_again.said == [HELLO]
    assert target.call("read", addr, 16 * PAGE) == content(77, addr, 16)


def test_a_stock_source_is_told_nothing(restore: Restore, target: Target, bulk: Source) -> None:
    lazy(restore, target, 1)
    restore.link(bulk)
    restore.finish()
    assert bulk.frame()[0] == GET


@pytest.mark.parametrize(
    "wrong",
    [
        {"lane": URGENT},
        {"lane": 2, "extended": True},
        {"lane": -1, "extended": True},
        {"frame_size": 24, "extended": True},
        {"extended": True, "preamble": bytes(129)},
        {"frame_size": 28},
    ],
)
def test_what_is_no_lane_is_not_taken(restore: Restore, bulk: Source, wrong: dict[str, Any]) -> None:
    with pytest.raises(UffdError) as caught:
        restore.pager.set_link(bulk.client.fileno(), **{"frame_size": 32, **wrong})
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(UffdError):
        restore.pager.drop_link(2)


# ---- how it ends ---------------------------------------------------------------------------


def test_close_waits_for_both_lanes(restore: Restore, target: Target, bulk: Source, urgent: Source) -> None:
    addr = lazy(restore, target, 16)
    both(restore, bulk, urgent)
    running(restore, bulk)
    background = bulk.get()
    order = target.start("read", addr + 15 * PAGE, PAGE)
    request = urgent.get()
    bulk.reply(background)
    assert order.result() == content(77, addr + 15 * PAGE)
    # All is there, but the urgent lane still owes an answer.
    stats = restore.until(lambda stats: stats.phase == Phase.CLOSING)
    bulk.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        bulk.frame()
    bulk.sock.settimeout(None)
    assert (stats.link, stats.urgent_link, stats.nr_outstanding) == (Link.OPEN, Link.OPEN, 1)
    urgent.reply(request)
    assert bulk.close(status=5) == "FIN"
    assert urgent.ending() == "FIN"
    ended(restore)
    stats = restore.pager.snapshot()
    assert (stats.link, stats.urgent_link, stats.close_status) == (Link.CLOSED, Link.CLOSED, 5)


def test_bulk_that_is_lost_while_closing_ends_the_pager(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 1)
    both(restore, bulk, urgent)
    running(restore, bulk)
    bulk.answer()
    assert bulk.frame() == (0x1023, 0, 0, 0)
    bulk.sock.close()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.link_error) == (Outcome.COMPLETE, Link.LOST, errno.EPIPE)
    assert (stats.close_status, stats.urgent_link) == (-1, Link.CLOSED)
    assert urgent.ending() == "FIN"
    assert target.call("read", addr, PAGE) == content(77, addr)


def test_all_arrived_while_bulk_was_lost(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 2)
    both(restore, bulk, urgent)
    running(restore, bulk)
    bulk.get()
    bulk.sock.close()
    restore.until(lambda stats: stats.link == Link.LOST)
    urgent.serve()
    assert target.call("read", addr, 2 * PAGE) == content(77, addr, 2)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.urgent_link) == (Outcome.COMPLETE, Link.LOST, Link.CLOSED)
    assert urgent.joined() == "FIN without a word"


@pytest.mark.parametrize("lane", [BULK, URGENT])
def test_a_lane_that_comes_after_the_end_is_closed(
    restore: Restore, target: Target, bulk: Source, urgent: Source, lane: int
) -> None:
    lazy(restore, target, 1)
    restore.link_lane(bulk)
    bulk.serve()
    restore.finish()
    ended(restore)
    assert bulk.joined() == "FIN"
    restore.link_lane(urgent, lane, b"not said")
    assert urgent.ending() == "FIN"


def test_a_lane_in_the_place_of_one_that_was_lost_while_closing(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    """It is too late to drop the first; that one is closed all the same."""
    addr = lazy(restore, target, 1)
    both(restore, bulk, urgent)
    running(restore, bulk)
    background = bulk.get()
    order = target.start("read", addr, PAGE)
    urgent.answer()
    assert order.result() == content(77, addr)
    restore.until(lambda stats: stats.phase == Phase.CLOSING)
    urgent.sock.close()
    restore.until(lambda stats: stats.urgent_link == Link.LOST)
    restore.pager.drop_link(URGENT)
    with Source() as late:
        restore.link_lane(late, URGENT, b"not said")
        assert late.ending() == "FIN"
    bulk.reply(background)
    assert bulk.close() == "FIN"
    ended(restore)


def abort(restore: Restore) -> None:
    restore.pager.abort()


def fail(restore: Restore) -> None:
    restore.watch()
    restore.criu.close()


@pytest.mark.parametrize("how", [abort, fail])
def test_a_restore_that_comes_to_nothing_resets_both(
    restore: Restore, target: Target, bulk: Source, urgent: Source, how: Callable[[Restore], None]
) -> None:
    lazy(restore, target, 4)
    both(restore, bulk, urgent)
    how(restore)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.link, stats.urgent_link) == (Link.RESET, Link.RESET)
    assert (bulk.ending(), urgent.ending()) == ("RST", "RST")
    with Source() as late:
        restore.link_lane(late, URGENT, b"not said")
        assert late.ending() == "RST"


def test_rollback_resets_both(restore: Restore, target: Target, bulk: Source, urgent: Source) -> None:
    lazy(restore, target, 4)
    both(restore, bulk, urgent)
    running(restore, bulk)
    bulk.get()
    restore.pager.give_up()
    target.kill()
    restore.pager.probe()
    restore.pager.end(reset=True)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.urgent_link) == (Outcome.GIVEN_UP, Link.RESET, Link.RESET)
    assert (bulk.ending(), urgent.ending()) == ("RST", "RST")


@needs_poison
def test_giving_up_reads_what_both_owe(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 32)
    both(restore, bulk, urgent)
    running(restore, bulk)
    background = bulk.get()
    waiting = target.start("write_to_pipe", addr + 20 * PAGE, PAGE)
    request = urgent.get()
    restore.pager.give_up()
    restore.pager.end(reset=False)
    restore.until(lambda stats: stats.phase == Phase.CLOSING)
    assert waiting.outcome() == (None, errno.EFAULT)
    bulk.reply(background)
    urgent.reply(request)
    assert bulk.close() == "FIN"
    assert urgent.ending() == "FIN"
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.pages_poisoned, stats.close_status) == (Outcome.GIVEN_UP, 32, 0)


@needs_poison
def test_destroy_alone_closes_both(target: Target, bulk: Source, urgent: Source) -> None:
    with Restore(window_pages=16) as restore:
        addr = lazy(restore, target, 16)
        both(restore, bulk, urgent)
        running(restore, bulk)
        bulk.get()
        restore.until(lambda stats: stats.phase == Phase.RUNNING)
    assert target.start("write_to_pipe", addr, PAGE).outcome() == (None, errno.EFAULT)
    assert (bulk.ending(), urgent.ending()) == ("FIN", "FIN")
    with contextlib.suppress(OSError):
        bulk.sock.close()
