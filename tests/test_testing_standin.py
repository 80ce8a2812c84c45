"""The stand-in restorer, the image writer and the page server, against CRIU's own lazy-pages daemon."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
import trio

from criupy.testing.control_linux import Order, RestorerState, WorkloadError
from criupy.testing.criu_linux import (
    Criu,
    CriuJob,
    lazy_pages_daemon,
    our_command,
    page_server,
    stock_command,
)
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.page_server import Behaviour, End, PageServer
from criupy.testing.spec import AREA_BASE, PAGE, ZOMBIE_STATUS, WorkloadSpec
from criupy.testing.workload_linux import Standin, start_standin

pytestmark = pytest.mark.usefixtures("workload_program")

MIB = 1 << 20
SPECS = [
    WorkloadSpec(size=8 * MIB),
    WorkloadSpec(size=2 * MIB, areas=4, adjacent=True, tree=5, threads=2, zombie=True),
    WorkloadSpec(size=2 * MIB, areas=2, fragmented=True, reserve=64 * MIB, children=1),
]
NAMES = ["one", "tree", "fragmented"]


def count_style(criu: Criu) -> Literal["old", "new"]:
    return "new" if criu.frame_size == 32 else "old"


@contextlib.asynccontextmanager
async def migration(
    criu: Criu, images: WrittenImages, room: Path, server: PageServer | None = None, early: int = 0
) -> AsyncIterator[tuple[CriuJob, Standin]]:
    """A stock daemon for these images with the stand-in connected to it."""
    work = room / "work"
    source = (server.address, server.port) if server else None
    async with (
        lazy_pages_daemon(stock_command(criu), images.directory, work, source=source) as daemon,
        start_standin(images.spec, work / "lazy-pages.socket", work, early=early) as standin,
    ):
        yield daemon, standin


async def all_good(standin: Standin) -> None:
    for task in range(standin.spec.tree):
        result = await standin.worker(task).verify()
        assert result.is_good, (task, result)


@pytest.mark.criu
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
async def test_from_the_page_server(criu: Criu, spec: WorkloadSpec, room: Path) -> None:
    images = write_images(room / "images", spec, count=count_style(criu))
    server = PageServer(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with migration(criu, images, room, server, early=4) as (daemon, standin):
            await standin.finish()
            assert standin.early_result_is_good
            await all_good(standin)
            await daemon.succeed()
            await server.ended.wait()
            await all_good(standin)
            if spec.zombie:
                assert await standin.worker().reap_zombie() == ZOMBIE_STATUS << 8
    assert server.end is End.CLOSED
    assert server.violations == []
    assert server.pages_sent >= spec.populated_pages * spec.tree
    assert {request.pid for request in server.requests} == {task.pid for task in images.tasks}


@pytest.mark.criu
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
async def test_from_local_images(criu: Criu, spec: WorkloadSpec, room: Path) -> None:
    images = write_images(room / "images", spec, style="full", count=count_style(criu))
    async with migration(criu, images, room) as (daemon, standin):
        await standin.finish()
        await all_good(standin)
        await daemon.succeed()


@pytest.mark.criu
async def test_written_images_satisfy_the_stock_page_server(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(size=4 * MIB, tree=2)
    images = write_images(room / "images", spec, style="full", count=count_style(criu))
    work = room / "work"
    async with (
        page_server(criu, images.directory, room) as source,
        lazy_pages_daemon(
            stock_command(criu), images.directory, work, source=(source.address, source.port)
        ) as daemon,
        start_standin(spec, work / "lazy-pages.socket", work) as standin,
    ):
        await standin.finish()
        await all_good(standin)
        await daemon.succeed()
        await source.job.succeed()


@pytest.mark.criu
async def test_memory_that_changes_during_the_transfer(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(size=16 * MIB, children=1)
    images = write_images(room / "images", spec, count=count_style(criu))
    server = PageServer(images, Behaviour(delay=0.0005))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with migration(criu, images, room, server) as (daemon, standin):
            await standin.finish()
            worker, child = standin.worker(), standin.child()
            assert standin.sees_forks
            await worker.move(512, 1024, 0x40_0000_0000)
            await worker.discard(2048, 64)
            await worker.unmap(3000, 100)
            await worker.fork(child)
            assert (await child.verify()).is_good
            assert (await worker.verify()).is_good
            await child.exit()
            await daemon.succeed()
    assert server.violations == []


@pytest.mark.criu
async def test_abandoned_before_finish(criu: Criu, room: Path) -> None:
    images = write_images(room / "images", WorkloadSpec(tree=3), count=count_style(criu))
    server = PageServer(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with migration(criu, images, room, server) as (daemon, standin):
            await standin.wait_registered()
            assert (await standin.abandon()).code == 4
            assert standin.control.restorer_state is RestorerState.ABANDONED
            assert (await daemon.wait()).code == 1
            await server.ended.wait()
    # the stock daemon's bug: it says CLOSE, and a real source would have been killed
    assert server.end is not None
    assert server.end is End.CLOSED
    assert not server.end.source_goes_on


@pytest.mark.criu
async def test_veto(criu: Criu, room: Path) -> None:
    images = write_images(room / "images", WorkloadSpec(tree=2), count=count_style(criu))
    async with migration(criu, images, room) as (daemon, standin):
        await standin.wait_registered()
        daemon.kept.kill()
        await daemon.wait()
        with pytest.raises(WorkloadError, match="did not finish: vetoed"):
            await standin.finish()
        assert (await standin.wait()).code == 3


async def receive_task(connection: trio.socket.SocketType) -> tuple[int, int]:
    (pid,) = struct.unpack("=i", await connection.recv(4))
    if pid < 0:
        return pid, -1
    _, control, _, _ = await connection.recvmsg(1, socket.CMSG_SPACE(4))
    ((_, _, descriptor),) = control
    (uffd,) = struct.unpack("=i", descriptor)
    return pid, uffd


@contextlib.asynccontextmanager
async def listening(path: Path) -> AsyncIterator[trio.socket.SocketType]:
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        yield listener


async def test_what_is_sent_and_when(room: Path) -> None:
    spec = WorkloadSpec(tree=3, zombie=True)
    with contextlib.ExitStack() as stack:
        async with (
            listening(room / "socket") as listener,
            start_standin(spec, room / "socket", room, pid_base=700) as standin,
        ):
            connection, _ = await listener.accept()
            stack.enter_context(connection)
            found = [await receive_task(connection) for _ in range(4)]
            for _, uffd in found[:3]:
                stack.enter_context(open(uffd, "rb", buffering=0))  # noqa: PTH123
            assert [pid for pid, _ in found] == [700, 701, 702, -703]
            await standin.wait_registered()
            with trio.move_on_after(0.02) as quiet:
                await connection.recv(1)
            assert quiet.cancelled_caught
            await standin.finish()
            assert await connection.recv(64) == struct.pack("=I", 0x5253_5446)
            assert await connection.recv(64) == b""
            assert await standin.is_running()


async def test_silence_after_some_tasks(room: Path) -> None:
    async with (
        listening(room / "socket") as listener,
        start_standin(WorkloadSpec(tree=3), room / "socket", room, announce=1) as standin,
    ):
        connection, _ = await listener.accept()
        with connection:
            _, uffd = await receive_task(connection)
            with open(uffd, "rb", buffering=0):  # noqa: PTH123
                await standin.wait_announced(1)
                await trio.sleep(0.01)
                assert standin.control.get("nr_announced") == 1
                assert (await standin.abandon()).code == 4
                assert await connection.recv(64) == b""


async def test_without_privilege(room: Path) -> None:
    """Closing a descriptor zeroes the missing pages: what a stand-in must be able to tell."""
    spec = WorkloadSpec(size=16 * PAGE)
    async with (
        listening(room / "socket") as listener,
        start_standin(spec, room / "socket", room, user_mode_only=True, no_fork_event=True) as standin,
    ):
        connection, _ = await listener.accept()
        with connection:
            _, uffd = await receive_task(connection)
            with open(uffd, "rb", buffering=0):  # noqa: PTH123
                await standin.finish()
                assert standin.is_user_mode_only
                assert not standin.sees_forks
                refused = await standin.worker().read_by_syscall()
                assert (refused.checked, refused.refused) == (16, 16)
                assert await standin.worker().resident() == 0
            result = await standin.worker().verify()
            assert (result.checked, result.zero) == (16, 16)


# linux/userfaultfd.h, from 6.6 on: _IOWR(0xaa, 8, struct uffdio_poison)
UFFDIO_POISON = 0xC020_AA08


async def test_poisoned_pages_are_told_apart(room: Path) -> None:
    spec = WorkloadSpec(size=16 * PAGE)
    async with (
        listening(room / "socket") as listener,
        start_standin(spec, room / "socket", room) as standin,
    ):
        connection, _ = await listener.accept()
        with connection:
            _, uffd = await receive_task(connection)
            with open(uffd, "rb", buffering=0):  # noqa: PTH123
                await standin.finish()
                try:
                    fcntl.ioctl(uffd, UFFDIO_POISON, struct.pack("=4Q", AREA_BASE, 6 * PAGE, 0, 0))
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        pytest.skip("this kernel has no UFFDIO_POISON (6.6 has)")
                    raise
            result = await standin.worker().verify()
            assert (result.checked, result.poisoned, result.zero) == (16, 6, 10)
            by_syscall = await standin.worker().read_by_syscall()
            assert (by_syscall.checked, by_syscall.refused, by_syscall.zero) == (16, 6, 10)
            touched = await standin.worker().touch(Order.SEQUENTIAL)
            assert (touched.touches, touched.poisoned) == (16, 6)


async def test_nobody_listens(room: Path) -> None:
    with pytest.raises(WorkloadError, match=r"socket: No such file"):
        async with start_standin(WorkloadSpec(), room / "socket", room) as standin:
            await standin.finish()


@pytest.mark.criu
async def test_touch_order_is_measured_under_transfer(criu: Criu, room: Path) -> None:
    spec = WorkloadSpec(size=8 * MIB, samples=1 << 12)
    images = write_images(room / "images", spec, count=count_style(criu))
    server = PageServer(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with migration(criu, images, room, server) as (daemon, standin):
            worker = standin.worker()
            worker.start_touching(Order.RANDOM)  # told before it runs: it touches from its first instant
            await standin.finish()
            result = await worker.wait()
            assert (result.is_good, result.touches) == (True, spec.main_pages)
            assert len(worker.samples) == spec.main_pages
            assert 0 < result.stall_ns <= result.total_ns
            await daemon.succeed()


async def test_touches_while_restore_finished_is_withheld(room: Path) -> None:
    images = write_images(room / "images", WorkloadSpec(tree=2, threads=3, samples=64, fragmented=True))
    server = PageServer(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        work = room / "work"
        async with (
            lazy_pages_daemon(
                our_command(), images.directory, work, source=(server.address, server.port)
            ) as daemon,
            start_standin(
                images.spec, work / "lazy-pages.socket", room, withheld=20, withheld_pause_us=100
            ) as standin,
        ):
            await standin.wait_registered()
            samples = [standin.worker(0, thread).samples for thread in range(3)]
            # Every second page was populated, and only such a one is touched; two may want the same.
            assert all(5 <= len(found) <= 20 for found in samples)
            assert standin.worker(0).result.is_good
            assert not standin.worker(1).samples
            assert {request.pid for request in server.requests} == {100}
            await standin.finish()
            await daemon.succeed()
    assert server.end is End.CLOSED
