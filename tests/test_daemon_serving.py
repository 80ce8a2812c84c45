"""The daemon serves a restore: every byte is right, and the source hears that it may end."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import Order
from criupy.testing.images import write_images
from criupy.testing.page_server import Behaviour, End
from criupy.testing.spec import ZOMBIE_STATUS, WorkloadSpec
from serving import MIB, SPEC, all_good, needs_root, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

TREE = WorkloadSpec(size=2 * MIB, areas=4, adjacent=True, tree=5, threads=2, zombie=True)
SCATTERED = WorkloadSpec(size=2 * MIB, areas=2, fragmented=True, reserve=64 * MIB)


@pytest.mark.parametrize("count", ["old", "new"])
@pytest.mark.parametrize("spec", [SPEC, TREE, SCATTERED], ids=["one", "tree", "scattered"])
async def test_from_a_source(room: Path, spec: WorkloadSpec, count: Literal["old", "new"]) -> None:
    async with serve(room, spec, count=count) as s, s.restore(early=4) as standin:
        await standin.finish()
        assert standin.early_result_is_good
        await all_good(standin)
        done = await s.daemon.wait()
        await all_good(standin)  # the descriptors are closed: what was missed would be zeros now
        if spec.zombie:
            assert await standin.worker().reap_zombie() == ZOMBIE_STATUS << 8
        assert not await s.source_goes_on()
        assert s.source.end is End.CLOSED
        assert {request.pid for request in s.source.requests} == {task.pid for task in s.images.tasks}
    pages = spec.populated_pages * spec.tree
    assert done.state is State.COMPLETE
    assert (done.tasks, done.pages_total, done.pages_missing) == (spec.tree, pages, 0)
    assert done.pages_demand + done.pages_background == pages
    assert (done.pages_dropped, done.pages_poisoned) == (0, 0)
    assert done.drain is not None
    assert 0 < done.drain <= done.elapsed


@pytest.mark.parametrize("spec", [SPEC, TREE, SCATTERED], ids=["one", "tree", "scattered"])
async def test_from_local_images(room: Path, spec: WorkloadSpec) -> None:
    async with serve(room, spec, style="full") as s, s.restore(early=4) as standin:
        await standin.finish()
        assert standin.early_result_is_good
        await all_good(standin)
        done = await s.daemon.wait()
        await all_good(standin)
    assert (done.state, done.pages_received) == (State.COMPLETE, spec.populated_pages * spec.tree)
    assert done.requests == done.bytes_received == 0


BEHAVIOURS = {
    "one-page-answers": Behaviour(max_pages=1),
    "short-answers": Behaviour(short=7),
    "short-and-slow": Behaviour(short=3, delay=0.002, max_pages=64),
    "10-ms-away": Behaviour(delay=0.01),
}


@pytest.mark.parametrize("count", ["old", "new"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=BEHAVIOURS.keys())
async def test_answers_may_be_short_or_late(
    room: Path, behaviour: Behaviour, count: Literal["old", "new"]
) -> None:
    spec = WorkloadSpec(size=2 * MIB, threads=3)
    async with serve(room, spec, behaviour=behaviour, count=count) as s, s.restore(early=1) as standin:
        await standin.finish()
        for thread in range(3):
            standin.worker(thread=thread).start_touching(Order.RANDOM)
        for thread in range(3):
            assert (await standin.worker(thread=thread).wait()).is_good
        await s.daemon.wait()
        await all_good(standin)
        assert not await s.source_goes_on()
        assert s.source.pages_sent == s.daemon.statistics().pages_received


async def test_pagemap_entries_longer_than_a_request(room: Path) -> None:
    """Images of a full dump have entries of any length; a page server may clamp what it answers."""
    async with (
        serve(room, entry_pages=1 << 20, behaviour=Behaviour(max_pages=100)) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


async def test_without_privilege(room: Path) -> None:
    async with serve(room) as s, s.restore(user_mode_only=True, no_fork_event=True, early=2) as standin:
        await standin.finish()
        assert standin.is_user_mode_only
        assert not standin.sees_forks
        await all_good(standin)
        assert (await s.daemon.wait()).state is State.COMPLETE
        assert (await standin.worker().read_by_syscall()).is_good


@needs_root
async def test_as_nobody() -> None:
    """The daemon itself needs no privilege: criu makes the userfaultfd."""
    with tempfile.TemporaryDirectory(prefix="criupy-test-") as name:  # pytest's own is closed to others
        room = Path(name)
        (room / "work").mkdir()
        for directory in (room, room / "work"):
            directory.chmod(0o777)
        await serve_as_nobody(room)


async def serve_as_nobody(room: Path) -> None:
    os.seteuid(65534)
    try:
        async with serve(room) as s:
            os.seteuid(0)
            async with s.restore() as standin:
                await standin.finish()
                await all_good(standin)
                await s.daemon.wait()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("frame", [24, 32])
async def test_a_page_server_of_another_version(room: Path, frame: Literal[24, 32]) -> None:
    """criu page-server speaks its own version's frames, whatever wrote the images."""
    count: Literal["old", "new"] = "new" if frame == 24 else "old"
    async with (
        serve(room, count=count, server_frame=frame, frame_size=frame) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert not await s.source_goes_on()


async def test_by_name(room: Path) -> None:
    async with serve(room, host="localhost") as s, s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


async def test_over_ipv6(room: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"::1: {error.strerror}")
    async with serve(room, address="::1") as s, s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert s.source.end is End.CLOSED


# ---- the caller's view -----------------------------------------------------------------


async def test_the_source_is_connected_to_only_when_the_restore_is(room: Path) -> None:
    """A live source accepts once, and who leaves it after that ends its dump."""
    async with serve(room) as s:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert s.daemon.statistics().state is State.WAITING
        assert s.daemon.socket_path.is_socket()
        assert not s.source.accepted.is_set()
        async with s.restore() as standin:
            await s.source.accepted.wait()
            assert not s.daemon.socket_path.exists()
            await standin.finish()
            await s.daemon.wait()


async def test_statistics_over_time(room: Path) -> None:
    async with serve(room, behaviour=Behaviour(delay=0.05)) as s:
        assert s.daemon.statistics().drain is None
        async with s.restore(early=1) as standin:
            await standin.wait_registered()
            before = s.daemon.statistics()
            assert (before.state, before.tasks) == (State.RESTORING, 1)
            assert before.pages_total == SPEC.populated_pages
            await standin.finish()
            while (now := s.daemon.statistics()).state is not State.TRANSFERRING:
                await trio.lowlevel.checkpoint()
            assert 0 < now.pages_missing < SPEC.populated_pages
            assert now.drain is None
            done = await s.daemon.wait()
        assert s.daemon.statistics() is done is await s.daemon.wait()
    assert s.daemon.statistics() is done
    assert done.pages_demand >= 1
    assert done.faults >= 1
    assert sum(done.latency) >= 1
    assert (done.latency_us(50) or 0) >= 50_000 * 15 / 16  # the answer to the early touch took as long
    assert done.latency_max_ns <= done.latency_sum_ns


async def test_waiters_may_come_and_go(room: Path) -> None:
    async with serve(room, behaviour=Behaviour(delay=0.02)) as s, s.restore() as standin:
        found: list[State] = []

        async def wait() -> None:
            found.append((await s.daemon.wait()).state)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            with trio.CancelScope() as impatient:
                impatient.cancel()
                await s.daemon.wait()
            assert impatient.cancelled_caught
            await standin.finish()
        assert found == [State.COMPLETE] * 2
        await all_good(standin)


async def test_leaving_the_block_waits_for_the_end(room: Path) -> None:
    async with serve(room, behaviour=Behaviour(delay=0.02)) as s:
        standin_room = s.restore()
        standin = await standin_room.__aenter__()
        await standin.finish()
        assert s.daemon.statistics().state is not State.COMPLETE
    try:
        assert s.daemon.statistics().state is State.COMPLETE
        await all_good(standin)
    finally:
        await standin_room.__aexit__(None, None, None)


async def test_two_daemons_at_once(room: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "work").mkdir()
    spec = WorkloadSpec(size=MIB, seed=2)
    async with serve(room) as one, serve(other, spec) as two, one.restore() as a, two.restore() as b:
        await b.finish()
        await a.finish()
        await all_good(a)
        await all_good(b)
        await one.daemon.wait()
        await two.daemon.wait()


# ---- a socket that somebody else made ---------------------------------------------------


async def test_inherited_socket(room: Path) -> None:
    """FORCE_CLOSE tells the source not to wait for the end of a stream that others hold open."""
    async with serve(room, inherit=True) as s, s.restore(early=1) as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()
        assert s.source.closed_by == "FORCE_CLOSE"
        assert not s.source.ended.is_set()


async def test_inherited_socket_is_reset_despite_duplicates(room: Path) -> None:
    async with serve(room, inherit=True) as s, s.restore() as standin:
        await standin.abandon()
        await s.failure()
        assert await s.source_goes_on()


async def test_inherited_socket_is_reset_when_no_restore_comes(room: Path) -> None:
    """A mere close would be a FIN, by which a source ends its process."""
    async with serve(room, inherit=True) as s:
        s.daemon.stop()
        await s.failure()
        assert await s.source_goes_on()


async def test_inherited_socket_is_reset_for_want_of_images(room: Path) -> None:
    images = write_images(room / "images", SPEC)
    (room / "images" / "pstree.img").unlink()
    async with serve(room, images=images, inherit=True) as s:
        assert "pstree.img" in await s.failure()
        assert await s.source_goes_on()


@pytest.mark.parametrize("what", ["closed", "file", "unconnected", "datagram"])
async def test_an_inherited_descriptor_that_is_no_connection(room: Path, what: str) -> None:
    with contextlib.ExitStack() as stack:
        kind = socket.SOCK_DGRAM if what == "datagram" else socket.SOCK_STREAM
        sock = stack.enter_context(socket.socket(type=kind))
        fd = os.dup(sock.fileno())
        stack.callback(os.close, fd)
        if what == "file":
            file = stack.enter_context(Path("/dev/null").open("rb"))
            os.dup2(file.fileno(), fd)
        number = 1 << 20 if what == "closed" else fd
        async with serve(room, ps_socket=number) as s:
            assert f"--ps-socket {number}: " in await s.failure()
