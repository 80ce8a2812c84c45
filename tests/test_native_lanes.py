"""The pager with two lanes to a page server of ours: who is asked for what, and a lane that is lost."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from criupy._uffd.pager_linux import BULK, URGENT, Link, Outcome, Phase
from native_lanes import both, ended, lazy, running
from native_peer import (
    ADD_F_PRESENT,
    FINISHED,
    Restore,
    Source,
    content,
    remote_image,
)
from native_target import MADV_DONTNEED, PAGE, Target
from test_native_uffd import usable

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]


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


# ---- who is asked for what -----------------------------------------------------------------


def test_demand_passes_what_is_in_flight_in_bulk(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 32)
    both(restore, bulk, urgent)
    running(restore, bulk)
    first = bulk.get()
    assert first == (16, addr, 77)
    order = target.start("read", addr + 20 * PAGE, PAGE)
    # The window is full and stays so: nothing but the other lane can bring it.
    assert urgent.answer() == (1, addr + 20 * PAGE, 77)
    assert order.result() == content(77, addr + 20 * PAGE)
    bulk.reply(first)
    bulk.serve()
    urgent.serve()
    ended(restore)
    assert target.call("read", addr, 32 * PAGE) == content(77, addr, 32)
    assert (bulk.joined(), urgent.joined()) == ("FIN", "FIN without a word")
    assert restore.pager.snapshot().urgent_link == Link.CLOSED
    assert not urgent.said
    assert not urgent.runs


def test_demand_without_the_urgent_lane_goes_with_bulk(
    restore: Restore, target: Target, bulk: Source
) -> None:
    addr = lazy(restore, target, 4)
    restore.link_lane(bulk)
    order = target.start("read", addr + PAGE, PAGE)
    assert bulk.answer() == (1, addr + PAGE, 77)
    assert order.result() == content(77, addr + PAGE)


def test_the_urgent_lane_alone_asks_for_nothing_in_the_background(
    restore: Restore, target: Target, urgent: Source
) -> None:
    addr = lazy(restore, target, 2)
    restore.link_lane(urgent, URGENT)
    restore.finish()
    restore.until(lambda stats: stats.phase == Phase.RUNNING)
    for page in range(2):
        order = target.start("read", addr + page * PAGE, PAGE)
        assert urgent.answer() == (1, addr + page * PAGE, 77)
        assert order.result() == content(77, addr + page * PAGE)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.urgent_link) == (Outcome.COMPLETE, Link.NONE, Link.CLOSED)
    assert urgent.ending() == "FIN"


def test_a_page_in_flight_in_bulk_arrives_though_bulk_stands_still(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 16)
    both(restore, bulk, urgent)
    running(restore, bulk)
    asked = bulk.get()
    orders = [target.start("write", addr + page * PAGE, b"its own") for page in (3, 4)]
    assert [urgent.answer() for _ in orders] == [(1, addr + page * PAGE, 77) for page in (3, 4)]
    for order in orders:
        order.result()
    stats = restore.until(lambda stats: stats.pages_demand == 2)
    assert stats.nr_outstanding == 16
    # What comes second changes nothing.
    bulk.reply(asked)
    assert bulk.close() == "FIN"
    ended(restore)
    expected = bytearray(content(77, addr, 16))
    for page in (3, 4):
        expected[page * PAGE : page * PAGE + 7] = b"its own"
    assert target.call("read", addr, 16 * PAGE) == expected
    stats = restore.pager.snapshot()
    assert (stats.pages_received, stats.pages_existing) == (18, 0)
    assert urgent.ending() == "FIN"


def test_the_second_reply_does_not_bring_back_what_was_dropped(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 16)
    both(restore, bulk, urgent)
    running(restore, bulk)
    asked = bulk.get()
    order = target.start("read", addr, PAGE)
    urgent.answer()
    order.result()
    assert target.call("madvise", addr, PAGE, MADV_DONTNEED) == 0
    bulk.reply(asked)
    assert bulk.close() == "FIN"
    ended(restore)
    assert target.call("read", addr, 16 * PAGE) == bytes(PAGE) + content(77, addr + PAGE, 15)


def test_who_waited_in_bulk_is_asked_for_when_the_urgent_lane_comes(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 16)
    restore.link_lane(bulk)
    running(restore, bulk)
    bulk.get()
    order = target.start("read", addr + 5 * PAGE, PAGE)
    restore.until(lambda stats: stats.nr_faults == 1)
    restore.link_lane(urgent, URGENT)
    assert urgent.answer() == (1, addr + 5 * PAGE, 77)
    assert order.result() == content(77, addr + 5 * PAGE)


def test_a_reply_that_is_just_arriving_is_waited_for_until_it_stands_still(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 16)
    both(restore, bulk, urgent)
    running(restore, bulk)
    asked = bulk.get()
    whole = bulk.header(ADD_F_PRESENT, *asked) + content(77, addr, 16)
    sent = nr_faults = 0

    def trickles(stats: Stats) -> bool:
        nonlocal sent
        sent += bulk.sock.send(whole[sent : sent + 16])
        return int(stats.nr_faults) == nr_faults

    while sent < 500:
        trickles(restore.pager.snapshot())
    for page in range(15, 7, -1):
        order = target.start("read", addr + page * PAGE, PAGE)
        nr_faults += 1
        restore.until(trickles)
        try:
            urgent.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        # On a busy machine it may have stood still for that long.
        urgent.answer()
        order.result()
    else:
        pytest.fail("each was asked for at once")
    assert urgent.answer() == (1, addr + page * PAGE, 77)
    assert order.result() == content(77, addr + page * PAGE)
    bulk.sock.sendall(whole[sent:])
    assert bulk.close() == "FIN"
    ended(restore)
    assert target.call("read", addr, 16 * PAGE) == content(77, addr, 16)
    assert restore.pager.snapshot().pages_received == 16 + nr_faults


def test_everything_arrives_over_a_window_by_measurement(
    target: Target, bulk: Source, urgent: Source
) -> None:
    with Restore() as restore:
        addr, uffd = target.lazy(4000)
        runs = [(first, 90 if first % 200 else 7) for first in range(0, 4000, 100)]
        restore.pager.add_task(77, uffd, remote_image(77, [(addr + first * PAGE, nr) for first, nr in runs]))
        both(restore, bulk, urgent)
        bulk.serve()
        urgent.serve()
        restore.finish()
        touched = [target.call("read", addr + first * PAGE, PAGE) for first, _ in reversed(runs)]
        ended(restore)
        assert (bulk.joined(), urgent.joined()) == ("FIN", "FIN without a word")
        assert touched == [content(77, addr + first * PAGE) for first, _ in reversed(runs)]
        got = target.call("read", addr, 4000 * PAGE)
        for first, nr in runs:
            end = first + nr
            assert got[first * PAGE : end * PAGE] == content(77, addr + first * PAGE, nr)
            assert got[end * PAGE : (first + 100) * PAGE] == bytes((first + 100 - end) * PAGE)
        assert bulk.runs


# ---- a lane is lost ------------------------------------------------------------------------


@pytest.mark.parametrize("asked_twice", [False, True])
def test_without_bulk_demand_goes_on_and_bulk_comes_back(
    restore: Restore, target: Target, bulk: Source, urgent: Source, asked_twice: bool
) -> None:
    addr = lazy(restore, target, 48)
    both(restore, bulk, urgent)
    running(restore, bulk)
    bulk.get()
    order = None
    if asked_twice:
        order = target.start("read", addr + 3 * PAGE, PAGE)
        request = urgent.get()
    bulk.sock.close()
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.urgent_link, stats.urgent_error) == (errno.EPIPE, Link.OPEN, 0)
    assert stats.nr_outstanding == (1 if asked_twice else 0)
    if order is not None:
        urgent.reply(request)
        assert order.result() == content(77, addr + 3 * PAGE)
    order = target.start("read", addr + 7 * PAGE, 2 * PAGE)
    assert [urgent.answer()[1] for _ in range(2)] == [addr + 7 * PAGE, addr + 8 * PAGE]
    assert order.result() == content(77, addr + 7 * PAGE, 2)
    restore.pager.drop_link()
    with Source() as again:
        restore.link_lane(again)
        again.serve()
        urgent.serve()
        ended(restore)
        assert target.call("read", addr, 48 * PAGE) == content(77, addr, 48)
        assert again.joined() == "FIN"
        assert again.said == [FINISHED, 0x1023]
        stats = restore.pager.snapshot()
        assert (stats.link, stats.link_error) == (Link.CLOSED, 0)
    assert urgent.joined() == "FIN without a word"


def test_a_wait_in_flight_in_bulk_alone_is_asked_for_when_bulk_is_lost(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    """Its reply was just arriving, so that it was not asked for a second time."""
    addr = lazy(restore, target, 16)
    both(restore, bulk, urgent)
    running(restore, bulk)
    asked = bulk.get()
    order = target.start("read", addr + 12 * PAGE, PAGE)
    request = urgent.get()
    bulk.sock.sendall(bulk.header(ADD_F_PRESENT, *asked) + content(77, addr))
    bulk.sock.close()
    restore.until(lambda stats: stats.link == Link.LOST)
    late = target.start("read", addr + 13 * PAGE, PAGE)
    assert urgent.get() == (1, addr + 13 * PAGE, 77)
    urgent.reply(request)
    urgent.reply((1, addr + 13 * PAGE, 77))
    assert order.result() + late.result() == content(77, addr + 12 * PAGE, 2)


def test_without_the_urgent_lane_bulk_carries_demand_until_it_comes_back(
    restore: Restore, target: Target, bulk: Source, urgent: Source
) -> None:
    addr = lazy(restore, target, 48)
    both(restore, bulk, urgent)
    running(restore, bulk)
    background = bulk.get()
    in_flight = target.start("read", addr + 2 * PAGE, PAGE)
    elsewhere = target.start("read", addr + 40 * PAGE, PAGE)
    assert {urgent.get()[1], urgent.get()[1]} == {addr + 2 * PAGE, addr + 40 * PAGE}
    urgent.sock.close()
    # One is in flight there, the other is not.
    assert bulk.get() == (1, addr + 40 * PAGE, 77)
    stats = restore.until(lambda stats: stats.urgent_link == Link.LOST)
    assert (stats.link, stats.urgent_error, stats.link_error) == (Link.OPEN, errno.EPIPE, 0)
    bulk.reply(background)
    bulk.reply((1, addr + 40 * PAGE, 77))
    assert in_flight.result() == content(77, addr + 2 * PAGE)
    assert elsewhere.result() == content(77, addr + 40 * PAGE)
    restore.pager.drop_link(URGENT)
    stats = restore.obeyed()
    assert (stats.urgent_link, stats.urgent_error) == (Link.NONE, 0)
    with Source() as again:
        restore.link_lane(again, URGENT)
        order = target.start("read", addr + 30 * PAGE, PAGE)
        assert again.answer() == (1, addr + 30 * PAGE, 77)
        assert order.result() == content(77, addr + 30 * PAGE)
        again.serve()
        bulk.serve()
        ended(restore)
        assert (bulk.joined(), again.joined()) == ("FIN", "FIN without a word")
    assert target.call("read", addr, 48 * PAGE) == content(77, addr, 48)


@pytest.mark.parametrize("lane", [BULK, URGENT])
def test_a_silent_lane_is_lost_and_the_other_is_not(
    target: Target, bulk: Source, urgent: Source, lane: int
) -> None:
    with Restore(link_timeout=0.1, window_pages=16) as restore:
        addr = lazy(restore, target, 16)
        both(restore, bulk, urgent)
        if lane == BULK:
            restore.finish()
            stats = restore.until(lambda stats: stats.link == Link.LOST)
            assert (stats.link_error, stats.urgent_link) == (errno.ETIMEDOUT, Link.OPEN)
        else:
            order = target.start("read", addr, PAGE)
            stats = restore.until(lambda stats: stats.urgent_link == Link.LOST)
            assert (stats.urgent_error, stats.link) == (errno.ETIMEDOUT, Link.OPEN)
            assert bulk.answer() == (1, addr, 77)
            assert order.result() == content(77, addr)
