"""What cannot be served: wrong images, nobody at the other end, nonsense on the restore socket."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from criupy._uffd.image_linux import Image
from criupy.errors import LazyPagesError, UffdError
from criupy.lazy_pages._daemon_linux import Config, open_lazy_pages
from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import RestorerState, WorkloadError
from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Standin, start_standin
from serving import MIB, SPEC, all_good, serve, user_faults
from test_daemon_stopping import blocking, full_backlog

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

TREE = WorkloadSpec(size=MIB, tree=3)

VETOED = 3  # exit status of a stand-in whose restore was refused


async def vetoed(standin: Standin) -> None:
    with pytest.raises(WorkloadError):
        await standin.finish()
    assert standin.control.restorer_state is not RestorerState.FINISHED


# ---- images -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pstree.img", "inventory.img", "mm-100.img", "pagemap-100.img"])
async def test_missing_image(room: Path, name: str) -> None:
    images = write_images(room / "images", SPEC)
    (images.directory / name).unlink()
    async with serve(room, images=images) as s:
        assert name in await s.failure()
        assert not s.source.accepted.is_set()


async def test_truncated_pages(room: Path) -> None:
    images = write_images(room / "images", SPEC, style="full")
    pages = images.directory / "pages-1.img"
    os.truncate(pages, pages.stat().st_size - 4096)
    async with serve(room, images=images, style="full") as s:
        assert str(pages) in await s.failure()


async def test_pages_that_vanish_before_the_restore(room: Path) -> None:
    """What was read when the daemon started is what is served."""
    async with serve(room, style="full") as s:
        await trio.testing.wait_all_tasks_blocked(0.05)  # it has them
        (s.images.directory / "pages-1.img").unlink()
        async with s.restore(early=1) as standin:
            await standin.finish()
            await all_good(standin)


async def test_pages_that_cannot_be_opened(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image, path: Path) -> None:
        raise UffdError("open the pages file", errno.ENODEV)

    monkeypatch.setattr(Image, "attach", fail)
    async with serve(room, style="full") as s:
        text = await s.failure()
        assert "pages-1.img" in text
        assert os.strerror(errno.ENODEV) in text


async def test_lazy_images_without_a_source(room: Path) -> None:
    images = write_images(room / "images", SPEC)
    async with serve(room, images=images, style="full") as s:
        assert "--page-server" in await s.failure()


async def test_images_of_another_dump(room: Path) -> None:
    async with serve(room) as s, s.restore(pid_base=500, early=1) as standin:
        text = await s.failure()
        assert "pid 500" in text
        assert "--images-dir" in text
        await vetoed(standin)
        assert await s.source_goes_on()


async def test_images_of_another_dump_and_the_restore_has_finished(room: Path) -> None:
    """Nobody knows which of its pages are missing: only its end keeps it from reading zeros."""
    async with serve(room) as s, s.restore(pid_base=500) as standin:
        blocking(standin)
        text = await s.failure()
        assert "pid 500" in text
        # Killed; or vetoed, when the first pid was read before the restore had finished.
        ended = await standin.wait()
        assert ("killed" in text and ended.signal == signal.SIGKILL) or (
            "vetoed" in text and ended.code == VETOED
        )
        assert await s.source_goes_on()


async def test_restore_of_fewer_tasks(room: Path) -> None:
    """It is in another dump's images that there are more."""
    images = write_images(room / "images", TREE)
    async with serve(room, images=images) as s:
        async with start_standin(SPEC, s.daemon.socket_path, room) as standin:
            await standin.finish()
            text = await s.failure()
            assert "before all tasks came" in text
            assert "killed" in text
            assert (await standin.wait()).signal == 9
        assert await s.source_goes_on()


# ---- the source -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("host", "words"),
    [("127.0.0.1", "Connection refused"), ("::1", "[::1]:"), ("no-such-host.invalid", "no such host")],
)
async def test_nobody_there(room: Path, host: str, words: str) -> None:
    async with serve(room, page_server=(host, free_port())) as s, s.restore(early=1) as standin:
        text = await s.failure()
        assert words in text
        await vetoed(standin)
        assert not s.source.accepted.is_set()


async def test_connect_timeout(room: Path) -> None:
    async with (
        full_backlog() as address,
        serve(room, page_server=address, connect_timeout=0.2) as s,
        s.restore(early=1) as standin,
    ):
        assert "--connect-timeout" in await s.failure()
        await vetoed(standin)


async def test_nobody_there_and_the_restore_has_finished(room: Path) -> None:
    async with serve(room, page_server=("127.0.0.1", free_port())) as s, s.restore() as standin:
        blocking(standin)
        assert "refused" in await s.failure()
        # Vetoed in time, or killed: the source has everything, and nothing runs on without it.
        ended = await standin.wait()
        assert ended.code == VETOED or ended.signal == signal.SIGKILL


# ---- the restore socket -----------------------------------------------------------------------


async def test_only_one_restore(room: Path) -> None:
    async with serve(room) as s, s.restore() as standin:
        await until(lambda: not s.daemon.socket_path.exists())
        (room / "second").mkdir()
        with pytest.raises(WorkloadError, match="No such file"):
            async with start_standin(SPEC, s.daemon.socket_path, room / "second") as second:
                await second.finish()
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


async def test_a_second_in_the_queue_is_refused(room: Path) -> None:
    """It may connect before the first is accepted; then it hears the end of the stream."""
    async with serve(room) as s:
        path = os.fspath(s.daemon.socket_path)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.connect(path)
            second.connect(path)
            second.settimeout(None)
            await s.source.accepted.wait()
            assert await trio.to_thread.run_sync(end_of, second)
            first.close()
            await s.failure()
        assert await s.source_goes_on()


def end_of(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


async def send(sock: trio.socket.SocketType, data: bytes, descriptors: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    await sock.sendmsg([data], rights)


PID = struct.pack("=i", 100)
NONSENSE: dict[str, tuple[list[tuple[bytes, int]], str]] = {
    "end-at-once": ([], "before restore-finished"),
    "zero-pid": ([(struct.pack("=i", 0), 0)], "pid"),
    "text": ([(b"GET / HTTP/1.1\r\n\r\n", 0)], ""),
    "end-in-a-pid": ([(PID[:2], 0)], ""),
    "end-behind-a-pid": ([(PID, 0)], ""),
    "no-descriptor": ([(PID, 0), (b"\0", 0)], "descriptor"),
    "two-descriptors": ([(PID, 0), (b"\0", 2)], "descriptor"),
    "many-descriptors": ([(PID, 0), (b"\0", 40)], "descriptor"),
    "descriptor-with-the-pid": ([(PID, 1)], "descriptor"),
    "stranger": ([(struct.pack("=i", 77), 0), (b"\0", 1)], "pid 77"),
    "strange-zombie": ([(struct.pack("=i", -77), 0)], "pid 77"),
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_on_the_restore_socket(room: Path, what: str) -> None:
    messages, words = NONSENSE[what]
    async with serve(room, TREE) as s:
        with trio.socket.socket(socket.AF_UNIX) as sock, open(os.devnull, "rb") as null:  # noqa: PTH123
            await sock.connect(os.fspath(s.daemon.socket_path))
            await s.source.accepted.wait()
            for data, nr in messages:
                await send(sock, data, [null.fileno()] * nr)
            sock.shutdown(socket.SHUT_WR)
            assert words in await s.failure()
            assert s.daemon.statistics().state is State.ABORTED
            assert await s.source_goes_on()


async def test_the_same_pid_twice(room: Path) -> None:
    async with serve(room, TREE) as s:
        with trio.socket.socket(socket.AF_UNIX) as sock, open(user_faults(), "rb") as uffd:  # noqa: PTH123
            await sock.connect(os.fspath(s.daemon.socket_path))
            await s.source.accepted.wait()
            for _ in range(2):
                await send(sock, PID, [])
                await send(sock, b"\0", [uffd.fileno()])
            assert "pid 100 was announced twice" in await s.failure()
            assert await s.source_goes_on()


async def test_a_descriptor_that_is_no_userfaultfd(room: Path) -> None:
    async with serve(room) as s:
        with trio.socket.socket(socket.AF_UNIX) as sock, open(os.devnull, "rb") as null:  # noqa: PTH123
            await sock.connect(os.fspath(s.daemon.socket_path))
            await send(sock, PID, [])
            await send(sock, b"\0", [null.fileno()])
            assert "is none" in await s.failure()
            assert await s.source_goes_on()


async def test_a_stale_socket_is_replaced(room: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(room / "work" / "lazy-pages.socket"))
    async with serve(room) as s, s.restore() as standin:
        await standin.finish()
        await all_good(standin)
        await s.daemon.wait()


async def test_a_daemon_that_waits_there_already(room: Path) -> None:
    images = write_images(room / "images", SPEC, style="full")
    async with serve(room, images=images, style="full") as s:
        with pytest.raises(LazyPagesError, match="already listening"):
            async with open_lazy_pages(Config(images.directory), work_dir=room / "work"):
                pass
        async with s.restore() as standin:
            await standin.finish()
            await all_good(standin)
            await s.daemon.wait()


async def test_unwritable_work_dir(room: Path) -> None:
    images = write_images(room / "images", SPEC, style="full")
    with pytest.raises(LazyPagesError, match="--work-dir") as caught:
        async with open_lazy_pages(Config(images.directory), work_dir="/proc"):
            pass
    assert "\n" not in str(caught.value)
