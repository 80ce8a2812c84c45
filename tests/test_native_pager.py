"""The pager with a real process, real page faults, and a scripted source."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from array import array
from collections.abc import Iterator

import pytest

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link, NoticeKind, Outcome, Phase, ReplyFault
from native_peer import ADD_F_PRESENT, FORCE_CLOSE, Restore, Source, content, remote_image
from native_target import PAGE, Target
from test_native_uffd import usable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(usable()), reason=usable()),
    pytest.mark.usefixtures("no_descriptor_is_left"),
]


@pytest.fixture(params=[24, 32])
def source(request: pytest.FixtureRequest, no_descriptor_is_left: None) -> Iterator[Source]:
    with Source(request.param) as source:
        yield source


@pytest.fixture
def restore(no_descriptor_is_left: None) -> Iterator[Restore]:
    with Restore() as restore:
        yield restore


def one_task(restore: Restore, target: Target, source: Source, nr_pages: int = 16) -> int:
    """Hand over a target with lazy memory; its address."""
    addr, uffd = target.lazy(nr_pages)
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, nr_pages)]))
    restore.link(source)
    return addr


# ---- pages ---------------------------------------------------------------------------


def test_a_fault_is_served_before_restore_finished(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source)
    order = target.start("read", addr + 5 * PAGE, PAGE)
    assert source.answer() == (1, addr + 5 * PAGE, 77)
    assert order.result() == content(77, addr + 5 * PAGE)
    stats = restore.until(lambda stats: stats.pages_demand == 1)
    assert stats.nr_faults == 1
    assert sum(stats.latency) == 1
    assert stats.latency_max_ns == stats.latency_sum_ns > 0
    assert stats.phase == Phase.RESTORING
    assert stats.nr_requests == stats.nr_demand_requests == 1


def test_a_fault_before_the_link_is_asked_for_when_it_opens(
    restore: Restore, target: Target, source: Source
) -> None:
    addr, uffd = target.lazy(4)
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, 4)]))
    order = target.start("read", addr, PAGE)
    restore.until(lambda stats: stats.nr_faults == 1)
    restore.link(source)
    assert source.answer() == (1, addr, 77)
    assert order.result() == content(77, addr)


@pytest.mark.parametrize("short", [1, 3, 1 << 30])
def test_everything_arrives_and_the_source_is_told(
    restore: Restore, target: Target, source: Source, short: int
) -> None:
    addr = one_task(restore, target, source, nr_pages=100)
    source.short = short
    source.serve()
    restore.finish()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert source.joined() == "FIN"
    assert (stats.outcome, stats.link, stats.close_status) == (Outcome.COMPLETE, Link.CLOSED, 0)
    assert stats.pages_received == stats.pages_background == stats.pages_total == 100
    assert stats.pages_missing == stats.nr_outstanding == stats.nr_live == 0
    assert stats.created_ns < stats.finished_ns <= stats.drained_ns <= stats.ended_ns
    assert target.call("read", addr, 100 * PAGE) == content(77, addr, 100)
    assert [(n.kind, n.a) for n in restore.notices if n.kind != NoticeKind.NOT_LOCKED] == [
        (NoticeKind.TASK_DONE, 77)
    ]


def test_a_fault_overtakes_the_background(target: Target, source: Source) -> None:
    with Restore(window_pages=1, request_pages=1) as restore:
        addr = one_task(restore, target, source, nr_pages=8)
        restore.finish()
        first = source.get()
        assert first == (1, addr, 77)
        order = target.start("read", addr + 6 * PAGE, PAGE)
        assert source.get() == (1, addr + 6 * PAGE, 77)
        source.reply(first)
        source.reply((1, addr + 6 * PAGE, 77))
        assert order.result() == content(77, addr + 6 * PAGE)
        # It goes on behind the fault, then round.
        assert [source.answer()[1] for _ in range(6)] == [addr + n * PAGE for n in (7, 1, 2, 3, 4, 5)]
        assert source.close() == "FIN"
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert target.call("read", addr, 8 * PAGE) == content(77, addr, 8)


def test_a_fault_asks_for_pages_behind_its_own(target: Target, source: Source) -> None:
    """As many as are missing, were not asked for and lie in the extent; none before the tasks run."""
    with Restore(window_pages=1, request_pages=8, fault_around_pages=4) as restore:
        addr, uffd = target.lazy(32)
        restore.pager.add_task(77, uffd, remote_image(77, [(addr, 8), (addr + 8 * PAGE, 24)]))
        restore.link(source)
        early = target.start("read", addr + 20 * PAGE, PAGE)
        assert source.answer() == (1, addr + 20 * PAGE, 77)
        early.result()
        restore.finish()
        asked = [source.get()]
        assert asked[0] == (8, addr + 21 * PAGE, 77)
        orders = []
        # Up to the end of the extent, a page that is there, as many as there may be, what was asked for.
        for page, nr in ((6, 2), (18, 2), (10, 4), (8, 2)):
            orders.append(target.start("read", addr + page * PAGE, PAGE))
            asked.append(source.get())
            assert asked[-1] == (nr, addr + page * PAGE, 77)
        for request in asked:
            source.reply(request)
        source.serve()
        for order in orders:
            order.result()
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert target.call("read", addr, 32 * PAGE) == content(77, addr, 32)


def test_single_pages_do_not_queue_up_on_a_short_link(target: Target, source: Source) -> None:
    """Each costs a source about as much as many in one request, so a fault waits behind few of them."""
    with Restore(window_pages=0, request_pages=64) as restore:
        addr, uffd = target.lazy(64)
        extents = [(addr + n * PAGE, 1) for n in range(0, 64, 2)]
        restore.pager.add_task(77, uffd, remote_image(77, extents))
        restore.link(source)
        restore.finish()
        asked = [source.get() for _ in range(6)]
        assert asked == [(1, address, 77) for address, _ in extents[:6]]
        order = target.start("read", extents[20][0], PAGE)
        assert source.get() == (1, extents[20][0], 77)
        assert restore.until(lambda stats: stats.nr_faults == 1).nr_outstanding == 7
        for request in [*asked, (1, extents[20][0], 77)]:
            source.reply(request)
        assert order.result() == content(77, extents[20][0])
        source.serve()
        assert restore.until(lambda stats: stats.phase == Phase.ENDED).pages_received == 32


def test_a_page_is_there_before_the_rest_of_its_reply(target: Target, source: Source) -> None:
    with Restore(request_pages=64) as restore:
        addr = one_task(restore, target, source, nr_pages=64)
        restore.finish()
        request = source.get()
        assert request == (64, addr, 77)
        data = source.header(ADD_F_PRESENT, *request) + content(77, addr, 64)
        order = target.start("read", addr + 2 * PAGE, PAGE)
        restore.until(lambda stats: stats.nr_faults == 1)
        source.sock.sendall(data[: 32 + 3 * PAGE + 100])
        assert order.result() == content(77, addr + 2 * PAGE)
        stats = restore.until(lambda stats: stats.pages_received >= 3)
        assert (stats.pages_received, stats.nr_outstanding) == (3, 61)
        source.sock.sendall(data[32 + 3 * PAGE + 100 :])
        assert source.close() == "FIN"
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert target.call("read", addr, 64 * PAGE) == content(77, addr, 64)


@pytest.mark.parametrize("nr_copiers", [0, 1, 3])
def test_much_in_bulk_with_and_without_copiers(target: Target, source: Source, nr_copiers: int) -> None:
    with Restore(nr_copiers=nr_copiers, nr_buffers=8, request_pages=300) as restore:
        addr = one_task(restore, target, source, nr_pages=2000)
        source.serve()
        restore.finish()
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert (stats.outcome, stats.pages_background) == (Outcome.COMPLETE, 2000)
        assert target.call("read", addr, 2000 * PAGE) == content(77, addr, 2000)


def test_neighbouring_extents_and_two_tasks(restore: Restore, source: Source) -> None:
    with Target.spawn() as one, Target.spawn() as two:
        places = []
        for pid, task in ((11, one), (12, two)):
            addr, uffd = task.lazy(16)
            restore.pager.add_task(
                pid, uffd, remote_image(pid, [(addr, 3), (addr + 3 * PAGE, 4), (addr + 9 * PAGE, 2)])
            )
            places.append((pid, task, addr))
        restore.link(source)
        source.serve()
        restore.finish()
        touches = [(pid, task.start("read", addr, 16 * PAGE), addr) for pid, task, addr in places]
        for pid, touch, addr in touches:
            expected = (
                content(pid, addr, 7) + bytes(2 * PAGE) + content(pid, addr + 9 * PAGE, 2) + bytes(5 * PAGE)
            )
            assert touch.result() == expected
        restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert source.joined() == "FIN"


def test_a_page_that_is_there_is_kept(restore: Restore, target: Target, source: Source) -> None:
    addr = target.call("map", 8)
    uffd = target.uffd()
    target.call("write", addr + 2 * PAGE, b"its own" * 100)
    assert target.call("register", addr, 8 * PAGE) == 0
    target.call("close_uffd")
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, 8)]))
    restore.link(source)
    source.serve()
    restore.finish()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert stats.pages_existing == 1
    got = target.call("read", addr, 8 * PAGE)
    assert got[: 2 * PAGE] == content(77, addr, 2)
    assert got[2 * PAGE : 3 * PAGE] == b"its own" * 100 + bytes(PAGE - 700)
    assert got[3 * PAGE :] == content(77, addr + 3 * PAGE, 5)
    assert source.joined() == "FIN"


def test_a_shared_socket_ends_with_force_close(restore: Restore, target: Target, source: Source) -> None:
    addr, uffd = target.lazy(1)
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, 1)]))
    with socket.socket(fileno=os.dup(source.client.fileno())):
        restore.link(source, shared=True)
        restore.finish()
        source.answer()
        assert source.frame() == (FORCE_CLOSE, 0, 0, 0)
        source.sock.sendall(struct.pack("<i", 3))
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert stats.close_status == 3
    assert source.ending() == "FIN"
    assert target.call("read", addr, PAGE) == content(77, addr)


def test_installing_before_registration_loses_nothing(
    restore: Restore, target: Target, source: Source
) -> None:
    """criu hands the descriptor over before it registers the areas."""
    addr = target.call("map", 8)
    uffd = target.uffd()
    assert target.call("register", addr + 4 * PAGE, 4 * PAGE) == 0
    restore.pager.add_task(77, uffd, remote_image(77, [(addr, 8)]))
    restore.link(source)
    # One run across the border of what is registered.
    order = target.start("read", addr + 4 * PAGE, PAGE)
    source.answer()
    assert order.result() == content(77, addr + 4 * PAGE)
    assert target.call("register", addr, 4 * PAGE) == 0
    target.call("close_uffd")
    source.serve()
    restore.finish()
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert target.call("read", addr, 8 * PAGE) == content(77, addr, 8)
    assert source.joined() == "FIN"


def test_a_pager_of_nothing(restore: Restore, source: Source) -> None:
    """All tasks were zombies."""
    restore.link(source)
    restore.finish()
    assert source.close() == "FIN"
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link) == (Outcome.COMPLETE, Link.CLOSED)


def test_tables_that_do_not_fit_are_refused() -> None:
    two = array("Q", [0x10000, 0x20000])
    for tables in ((two, array("Q", [1])), (two, array("I", [1, 1])), (two, two, array("Q", [1]))):
        with pytest.raises(ValueError, match=r"expected an array\('Q'\) of 2 extents"):
            Image(1, *tables)
    with pytest.raises(ValueError, match="expected 2 bytes, got 1"):
        Image(1, two, array("Q", [1, 1]), None, b"\0")


def test_an_image_is_given_once(restore: Restore, target: Target) -> None:
    addr, uffd = target.lazy(1)
    image = remote_image(77, [(addr, 1)])
    restore.pager.add_task(77, uffd, image)
    with pytest.raises(ValueError, match="was handed over"):
        restore.pager.add_task(78, -1, image)


# ---- what a source may do wrong --------------------------------------------------------


@pytest.mark.parametrize(
    ("cmd", "nr", "offset", "id", "fault"),
    [
        (6, 1, 0, 77, ReplyFault.COMMAND),
        (7, 1, 0, 77, ReplyFault.COMMAND),
        (4 << 16 | 6, 1, PAGE, 77, ReplyFault.ADDRESS),
        (4 << 16 | 6, 1, 0, 78, ReplyFault.ID),
        (4 << 16 | 6, 2, 0, 77, ReplyFault.COUNT),
        (4 << 16 | 6, 0, 0, 77, ReplyFault.COUNT),
    ],
)
def test_a_bad_reply_ends_the_link(
    restore: Restore,
    target: Target,
    source: Source,
    cmd: int,
    nr: int,
    offset: int,
    id: int,
    fault: ReplyFault,
) -> None:
    addr = one_task(restore, target, source)
    good = target.start("read", addr + PAGE, PAGE)
    source.answer()
    assert good.result() == content(77, addr + PAGE)
    order = target.start("read", addr, PAGE)
    source.get()
    source.sock.sendall(source.header(cmd, nr, addr + offset, id) + b"x" * 100)
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault) == (errno.EPROTO, fault)
    bad = stats.bad_reply
    assert (bad.cmd, bad.nr_pages, bad.vaddr, bad.dst_id) == (cmd, nr, addr + offset, id)
    assert stats.bad_reply_offset == source.frame_size + PAGE
    assert not order.done()
    restore.pager.abort()
    assert source.ending() == "RST"


def test_a_bad_reply_behind_a_good_one(restore: Restore, target: Target, source: Source) -> None:
    """The read that takes the last byte of one takes the next header along."""
    addr = one_task(restore, target, source)
    one = target.start("read", addr, PAGE)
    first = source.get()
    two = target.start("read", addr + 4 * PAGE, PAGE)
    source.get()
    source.sock.sendall(
        source.header(4 << 16 | 6, *first) + content(77, addr) + source.header(4 << 16 | 6, 1, addr, 77)
    )
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert one.result() == content(77, addr)
    assert stats.reply_fault == ReplyFault.ADDRESS
    assert stats.bad_reply_offset == source.frame_size + PAGE
    assert not two.done()


@pytest.mark.parametrize("extra", [1, 24, 32, 5000])
def test_bytes_nobody_asked_for(restore: Restore, target: Target, source: Source, extra: int) -> None:
    one_task(restore, target, source)
    source.sock.sendall(b"\x07" * extra)
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault) == (errno.EPROTO, ReplyFault.UNASKED)
    assert stats.bad_reply_offset == 0


def test_bytes_behind_the_last_reply(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source, nr_pages=1)
    order = target.start("read", addr, PAGE)
    source.reply(source.get(), data=content(77, addr) + b"?")
    assert order.result() == content(77, addr)
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert (stats.link_error, stats.reply_fault) == (errno.EPROTO, ReplyFault.UNASKED)


def test_a_silent_source_is_lost(target: Target, source: Source) -> None:
    with Restore(link_timeout=0.05) as restore:
        addr = one_task(restore, target, source)
        # Silence with nothing outstanding is no fault of its.
        restore.obeyed()
        order = target.start("read", addr, PAGE)
        source.get()
        stats = restore.until(lambda stats: stats.link == Link.LOST)
        assert stats.link_error == errno.ETIMEDOUT
        assert stats.nr_outstanding == 0
        assert not order.done()


def test_the_longest_patience(target: Target, source: Source) -> None:
    with Restore(link_timeout=(2**64 - 2**14) / 1e9) as restore:
        addr = one_task(restore, target, source)
        order = target.start("read", addr, PAGE)
        request = source.get()
        target.start("read", addr + 2 * PAGE, PAGE)
        source.get()
        assert restore.until(lambda stats: stats.nr_requests == 2).link == Link.OPEN
        source.reply(request)
        assert order.result() == content(77, addr)


@pytest.mark.parametrize("where", [0, 10, 2000])
def test_a_source_that_closes(restore: Restore, target: Target, source: Source, where: int) -> None:
    """At a border, inside a header, inside a page."""
    addr = one_task(restore, target, source)
    order = target.start("read", addr, PAGE)
    request = source.get()
    answer = source.header(4 << 16 | 6, *request) + content(77, addr)
    source.sock.sendall(answer[:where])
    source.sock.close()
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert stats.link_error == errno.EPIPE
    assert not order.done()


def test_a_source_that_resets(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source)
    order = target.start("read", addr, PAGE)
    source.get()
    source.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    source.sock.close()
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert stats.link_error == errno.ECONNRESET
    assert not order.done()


# ---- how it ends -------------------------------------------------------------------------


def criu_notices(restore: Restore) -> str:
    """What criu sees of an abort: its end of the restore socket."""
    try:
        restore.criu.sendall(b"TFSR")
    except BrokenPipeError:
        return "EPIPE"
    return "sent"


@pytest.mark.parametrize("watched", [True, False])
def test_abort_before_restore_finished(
    restore: Restore, target: Target, source: Source, watched: bool
) -> None:
    one_task(restore, target, source)
    if watched:
        restore.watch()
    restore.pager.abort()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link) == (Outcome.VETOED, Link.RESET)
    assert source.ending() == "RST"
    if watched:
        assert criu_notices(restore) == "EPIPE"


def test_abort_when_restore_finished_is_already_sent(target: Target, source: Source) -> None:
    """Whatever is told first, the four bytes in the socket decide."""
    with Restore() as restore:
        addr = one_task(restore, target, source, nr_pages=4)
        restore.criu.sendall(b"FTSR")  # little-endian 0x52535446
        restore.watch()
        restore.pager.abort()
        source.serve()
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert stats.outcome == Outcome.COMPLETE
        assert source.joined() == "FIN"
        assert target.call("read", addr, 4 * PAGE) == content(77, addr, 4)


@pytest.mark.parametrize("word", [b"", b"F", b"FTS", b"FTSX"])
def test_a_restore_that_fails(restore: Restore, target: Target, source: Source, word: bytes) -> None:
    one_task(restore, target, source)
    restore.watch()
    restore.criu.sendall(word)
    restore.criu.close()
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link) == (Outcome.RESTORE_FAILED, Link.RESET)
    assert stats.error == (errno.EPROTO if len(word) == 4 else 0)
    assert source.ending() == "RST"


def test_restore_finished_in_pieces(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source, nr_pages=2)
    restore.watch()
    source.serve()
    for byte in b"FTSR":
        restore.criu.sendall(bytes([byte]))
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert source.joined() == "FIN"
    assert target.call("read", addr, 2 * PAGE) == content(77, addr, 2)


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_a_link_that_comes_after_the_end_is_reset(
    restore: Restore, target: Target, source: Source, how: str
) -> None:
    """The restore may fail while the connection is being made: the source must go on."""
    restore.watch()
    if how == "abort":
        restore.pager.abort()
    else:
        restore.criu.close()
    restore.until(lambda stats: stats.phase == Phase.ENDED)
    restore.link(source)
    assert source.ending() == "RST"
    assert restore.obeyed().link == Link.RESET


def test_destroy_before_restore_finished_resets(target: Target, source: Source) -> None:
    with Restore() as restore:
        one_task(restore, target, source)
        restore.watch()
    assert source.ending() == "RST"


def test_rollback_resets_once_every_task_is_dead(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source)
    restore.finish()
    source.get()
    restore.pager.give_up()
    order = target.start("read", addr, PAGE)
    restore.until(lambda stats: stats.nr_faults == 1)
    assert not order.done()
    target.kill()
    restore.pager.probe()
    assert restore.until(lambda stats: stats.nr_live == 0).nr_gone == 1
    restore.pager.end(reset=True)
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link) == (Outcome.GIVEN_UP, Link.RESET)
    assert source.ending() == "RST"
    assert (NoticeKind.TASK_GONE, 77, 16) in [(n.kind, n.a, n.b) for n in restore.notices]


def test_giving_up_reads_what_is_outstanding_and_closes(
    restore: Restore, target: Target, source: Source
) -> None:
    addr = one_task(restore, target, source, nr_pages=64)
    restore.finish()
    requests = [source.get() for _ in range(4)]  # all of it
    restore.pager.give_up()
    restore.pager.end(reset=False)
    restore.until(lambda stats: stats.phase == Phase.CLOSING)
    for request in requests:
        source.reply(request)
    assert source.close() == "FIN"
    stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
    assert (stats.outcome, stats.link, stats.close_status) == (Outcome.GIVEN_UP, Link.CLOSED, 0)
    assert stats.pages_poisoned == 64
    assert target.start("write_to_pipe", addr, PAGE).outcome() == (None, errno.EFAULT)


def test_a_poisoned_task_is_never_run_twice(restore: Restore, target: Target, source: Source) -> None:
    """It may run on, so the source must not, whatever was asked for."""
    one_task(restore, target, source, nr_pages=1)
    restore.finish()
    request = source.get()
    restore.pager.poison()
    restore.pager.end(reset=True)
    restore.until(lambda stats: stats.phase == Phase.CLOSING)
    source.reply(request)
    assert source.close() == "FIN"


def test_poison_kills_who_waits_and_who_touches(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source)
    restore.finish()
    (nr, *_) = source.answer()
    assert nr == 16
    with contextlib.ExitStack() as stack:
        # All of it arrived, so there is nothing to poison and nothing to fear.
        stack.callback(restore.pager.poison)
        assert target.call("read", addr, 16 * PAGE) == content(77, addr, 16)
    assert restore.obeyed().pages_poisoned == 0
    assert target.call("read", addr, 16 * PAGE) == content(77, addr, 16)


def test_a_lost_source_never_means_zeros(restore: Restore, target: Target, source: Source) -> None:
    addr = one_task(restore, target, source, nr_pages=64)
    child = None
    restore.finish()
    for _ in range(2):
        source.answer()
    child = target.fork()
    source.sock.close()
    stats = restore.until(lambda stats: stats.link == Link.LOST)
    assert stats.phase == Phase.RUNNING
    missing = stats.pages_missing // 2
    assert missing > 0
    waiting = child.start("write_to_pipe", addr + 63 * PAGE, PAGE)
    restore.pager.poison()
    stats = restore.obeyed()
    assert stats.pages_poisoned == stats.pages_missing + 2 * missing
    assert stats.nr_live == 0
    assert waiting.outcome() == (None, errno.EFAULT)
    for task in (target, child):
        for page in range(64):
            got, error = task.start("write_to_pipe", addr + page * PAGE, PAGE).outcome()
            if page < 64 - missing:
                assert got == content(77, addr + page * PAGE)
            else:
                assert (got, error) == (None, errno.EFAULT)
    child.start("read", addr + 63 * PAGE, 1)
    assert target.call("wait", child.pid) == -7
    target.start("read", addr + 62 * PAGE, 1)
    assert target.exit_code() == -7
    restore.pager.end(reset=False)
    restore.until(lambda stats: stats.phase == Phase.ENDED)


def test_destroy_alone_poisons(target: Target, source: Source) -> None:
    with Restore() as restore:
        addr = one_task(restore, target, source)
        restore.finish()
        source.get()
        restore.until(lambda stats: stats.phase == Phase.RUNNING)
    assert target.start("write_to_pipe", addr, PAGE).outcome() == (None, errno.EFAULT)
    assert source.ending() == "FIN"


def test_destroy_alone_of_a_restore_that_finished_unseen(target: Target, source: Source) -> None:
    with Restore() as restore:
        addr = one_task(restore, target, source)
        restore.criu.sendall(b"FTSR")
        restore.watch()
    assert target.start("write_to_pipe", addr, PAGE).outcome() == (None, errno.EFAULT)


def test_a_task_that_dies_while_pages_are_in_flight(restore: Restore, source: Source) -> None:
    with Target.spawn() as one, Target.spawn() as two:
        a, uffd = one.lazy(16)
        restore.pager.add_task(11, uffd, remote_image(11, [(a, 16)]))
        b, uffd = two.lazy(16)
        restore.pager.add_task(12, uffd, remote_image(12, [(b, 16)]))
        restore.link(source)
        restore.finish()
        requests = [source.get(), source.get()]
        one.kill()
        for request in requests:
            source.reply(request)
        assert source.close() == "FIN"
        stats = restore.until(lambda stats: stats.phase == Phase.ENDED)
        assert (stats.nr_gone, stats.pages_dropped, stats.outcome) == (1, 16, Outcome.COMPLETE)
        assert two.call("read", b, 16 * PAGE) == content(12, b, 16)
        assert NoticeKind.TASK_GONE in [n.kind for n in restore.notices]
