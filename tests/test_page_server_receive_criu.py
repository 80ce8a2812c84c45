"""Real CRIUs that dump to our page server, and restore what it wrote, byte by byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

import criupy
from criupy.images import PageFlags, Pagemap, check_pages, read_dump, read_pagemap, read_shared_pagemap
from criupy.page_server import Config, Ending, PageServer, open_page_receiver
from criupy.testing.criu_linux import Criu
from criupy.testing.wait import until as wait_until
from page_server_clients import PAGE, PE_PARENT, PE_PRESENT, Dumper, shmem, task
from rpc_victims import disk, state_of, subreaper, until, until_reaped

pytestmark = [pytest.mark.criu, pytest.mark.spread, pytest.mark.usefixtures("nothing_is_left")]

# Two processes with memory of their own and some in common. Every page has its number, but for some that were
# never touched; on SIGUSR1 each looks at every byte.
_VICTIM = """
import mmap, os, signal, sys
path, nr = sys.argv[1], 2000
os.chdir("/")
def fill(area, salt):
    for n in range(nr):
        if n % 7:
            area[4096 * n : 4096 * n + 4096] = (salt + n).to_bytes(8, "little") * 512
def good(area, salt):
    return all(
        area[4096 * n : 4096 * n + 4096] == (salt + n).to_bytes(8, "little") * 512 if n % 7
        else not any(area[4096 * n : 4096 * n + 4096])
        for n in range(nr)
    )
private = mmap.mmap(-1, 4096 * nr, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
shared = mmap.mmap(-1, 4096 * nr)
fill(private, 1 << 32)
fill(shared, 1 << 33)
salt = 1 << 32
if os.fork() == 0:
    path += ".child"
    salt = 1 << 34
    fill(private, salt)
asked = 0
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
while True:
    asked += 1
    said = "good" if good(private, salt) and good(shared, 1 << 33) else "bad"
    with open(path, "w") as file:
        file.write("%s %d" % (said, asked))
    signal.sigwait([signal.SIGUSR1])
"""


@dataclass(slots=True)
class Victim:
    """Two processes whose memory can be judged; ``pids`` has the parent first."""

    process: subprocess.Popen[bytes]
    paths: tuple[Path, Path]
    pids: tuple[int, ...] = ()
    asked: int = 1

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """Kill them, dumped or restored or neither, and reap them."""
        for pid in self.pids or (self.pid,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            until_reaped(pid)

    def have_said(self, what: str) -> bool:
        return all(path.exists() and path.read_text() == what for path in self.paths)

    def assert_good(self) -> None:
        self.asked += 1
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1)
        until(lambda: all(path.read_text().endswith(f" {self.asked}") for path in self.paths), "no answer")
        assert self.have_said(f"good {self.asked}"), [path.read_text() for path in self.paths]


@contextlib.contextmanager
def victim(directory: Path) -> Iterator[Victim]:
    path = directory / "said"
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _VICTIM, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    found = Victim(process, (path, path.with_name("said.child")))
    with subreaper():
        try:
            until(lambda: found.have_said("good 1"), "it does not start")
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            found.pids = process.pid, int(child)
            yield found
        finally:
            found.kill()
            process.wait()


@contextlib.asynccontextmanager
async def restored(criu: Criu, dumped: Victim, images: Path) -> AsyncIterator[None]:
    """Restore what was dumped and killed, on this machine."""
    for pid in dumped.pids:
        await trio.to_thread.run_sync(until_reaped, pid)
    result = await criupy.AsyncCriu(criu.path).restore(images_dir=images)
    assert result.pid == dumped.pid
    yield


@contextlib.asynccontextmanager
async def receive(directory: Path, **options: Any) -> AsyncIterator[PageServer]:
    directory.mkdir(exist_ok=True)
    more = {name: options.pop(name) for name in ("prev_images_dir", "auto_dedup") if name in options}
    async with open_page_receiver(Config(directory, **options), **more) as server:
        yield server


async def ended(server: PageServer) -> Ending:
    await wait_until(lambda: server.last is not None and not server._peers)
    assert server.last is not None
    assert server.last.ending is not None
    return server.last.ending


@pytest.mark.parametrize("apart", [False, True])
async def test_dump_to_us_and_restore(criu: Criu, apart: bool, tmp_path: Path) -> None:
    """Both write into one directory, or each into its own and what is in them is put together."""
    images, pages = tmp_path / "images", tmp_path / ("pages" if apart else "images")
    images.mkdir()
    with victim(tmp_path) as process:
        async with receive(pages, once=True) as server:
            client = criupy.AsyncCriu(criu.path)
            await client.dump(process.pid, images_dir=images, page_server=("127.0.0.1", server.port))
            await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.CLOSED
            assert server.last.frame_size == criu.frame_size
        if apart:
            for path in pages.iterdir():
                shutil.copy(path, images)
        found = read_dump(images)
        assert found.shared
        async with restored(criu, process, images):
            process.assert_good()


async def test_no_restore_overlooks_a_missing_pagemap(criu: Criu, tmp_path: Path) -> None:
    """The page server relies on it when it replaces images."""
    images = tmp_path / "images"
    images.mkdir()
    client = criupy.AsyncCriu(criu.path)
    with victim(tmp_path) as process:
        async with receive(images) as server:
            await client.dump(process.pid, images_dir=images, page_server=("127.0.0.1", server.port))
        for pid in process.pids:
            await trio.to_thread.run_sync(until_reaped, pid)
        pagemaps = sorted(images.glob("pagemap-*.img"))
        assert len(pagemaps) == 3
        for pagemap in pagemaps:
            aside = pagemap.rename(tmp_path / "aside")
            with pytest.raises(criupy.CriuError):
                await client.restore(images_dir=images)
            aside.rename(pagemap)
        async with restored(criu, process, images):
            process.assert_good()


async def test_dump_to_us_by_a_socket_that_stays_open(criu: Criu, tmp_path: Path) -> None:
    """As it is when another program made the connection and gave it to CRIU."""
    images = tmp_path / "images"
    images.mkdir()
    with victim(tmp_path) as process:
        async with receive(images, once=True) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as kept:
                await criupy.AsyncCriu(criu.path).dump(process.pid, images_dir=images, ps_socket=kept)
                with trio.fail_after(10):
                    await server.wait()
            assert server.last is not None
            assert server.last.ending is Ending.CLOSED
        async with restored(criu, process, images):
            process.assert_good()


async def test_pre_dump_to_us(criu: Criu, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    async with criupy.AsyncCriu(criu.path) as client:
        if not (await client.feature_check("mem_track")).mem_track:
            pytest.skip("pre-dumps need a kernel with CONFIG_MEM_SOFT_DIRTY")
        with victim(tmp_path) as process:
            async with receive(tmp_path / "pages", once=True) as server:
                await client.pre_dump(
                    process.pid, images_dir=images, page_server=("127.0.0.1", server.port), track_mem=True
                )
                await server.wait()
                assert server.last is not None
                assert server.last.ending is Ending.CLOSED
            process.assert_good()
            assert len(read_pagemap(tmp_path / "pages", process.pid)) > 100


# ---- chains ------------------------------------------------------------------------------------------------


def level(page: int) -> int:
    """Tell which of three dumps a page was changed before; later ones have other bytes of nearly all."""
    return (page * 7 // 3) % 3


def upload(dumper: Dumper, image: int, pagemap: Pagemap, content: bytes, number: int) -> None:
    """Upload one of three dumps: what changed since the one before, the rest is left to that."""
    assert dumper.open(image) is (number > 0)
    done = 0
    for start, nr, flags in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True):
        assert flags & PageFlags.PRESENT.value
        for n in range(nr):
            if level(done) < number:
                dumper.entry(image, start + n * PAGE, 1, PE_PARENT)
            else:
                data = content[done * PAGE : done * PAGE + PAGE] if level(done) == number else b"\xee" * PAGE
                dumper.add(image, start + n * PAGE, data, flags | PE_PRESENT)
            done += 1


@pytest.mark.parametrize("auto_dedup", [False, True])
async def test_a_chain_of_two_parents(criu: Criu, auto_dedup: bool, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    with victim(tmp_path) as process:
        await criupy.AsyncCriu(criu.path).dump(process.pid, images_dir=full)
        pagemaps = {task(pid): read_pagemap(full, pid) for pid in process.pids}
        for piece in read_dump(full).shared:
            pagemaps[shmem(piece.shmid)] = read_shared_pagemap(full, piece.shmid)
        assert len(pagemaps) == 3
        for number in range(3):
            previous = f"../{number - 1}" if number else None
            room = tmp_path / str(number)
            async with receive(room, prev_images_dir=previous, auto_dedup=auto_dedup) as server:
                await trio.to_thread.run_sync(
                    partial(push, server.port, criu.frame_size, pagemaps, full, room, number)
                )
                assert await ended(server) is Ending.CLOSED
        for path in full.glob("*.img"):
            if not path.name.startswith(("pagemap-", "pages-")):
                shutil.copy(path, tmp_path / "2")
        used = [sum(p.stat().st_blocks for p in (tmp_path / str(n)).glob("pages-*")) for n in range(3)]
        whole = sum(p.stat().st_blocks for p in full.glob("pages-*"))
        if auto_dedup:
            assert sum(used) <= whole + 1024  # a file with holes has a larger tree of extents
        else:
            assert sum(used) > 1.5 * whole
        async with restored(criu, process, tmp_path / "2"):
            process.assert_good()


def push(
    port: int, frame_size: int, pagemaps: dict[int, Pagemap], full: Path, room: Path, number: int
) -> None:
    with Dumper(socket.create_connection(("127.0.0.1", port)), frame_size) as dumper:
        for image, pagemap in pagemaps.items():
            assert dumper.has_parent(image) == (number > 0)
            upload(dumper, image, pagemap, check_pages(full, pagemap).read_bytes(), number)
        shutil.copy(full / "inventory.img", room)  # the last that a dump writes
        assert dumper.close() == 0


# ---- failures --------------------------------------------------------------------------------------------


async def dump_fails(criu: Criu, process: Victim, images: Path, port: int) -> criupy.CriuError:
    images.mkdir(exist_ok=True)
    with trio.fail_after(60):
        with pytest.raises(criupy.CriuError) as caught:
            await criupy.AsyncCriu(criu.path).dump(
                process.pid, images_dir=images, page_server=("127.0.0.1", port), log_level=4
            )
    assert state_of(process.pid) in {"S", "R"}
    process.assert_good()
    return caught.value


async def test_a_full_disk_fails_the_dump(criu: Criu, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    with disk(pages, "size=4m"), victim(tmp_path) as process:
        async with receive(pages) as server:
            await dump_fails(criu, process, tmp_path / "images", server.port)
            assert await ended(server) is Ending.DISK
            assert list(pages.iterdir()) == []


async def test_a_refused_image_fails_the_dump(criu: Criu, tmp_path: Path) -> None:
    """No inode is left: the answer to OPEN2 never comes."""
    pages = tmp_path / "pages"
    pages.mkdir()
    with disk(pages, "nr_inodes=2"), victim(tmp_path) as process:
        async with receive(pages) as server:
            (pages / "the last").touch()
            await dump_fails(criu, process, tmp_path / "images", server.port)
            assert await ended(server) is Ending.REFUSED


async def test_a_status_that_is_not_0_fails_the_dump(
    criu: Criu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All has come, but it cannot be given its names."""
    from criupy.page_server import _writer

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(_writer, "_sync_directory", fail)
    with victim(tmp_path) as process:
        async with receive(tmp_path / "pages") as server:
            await dump_fails(criu, process, tmp_path / "images", server.port)
            assert await ended(server) is Ending.REFUSED
            assert list((tmp_path / "pages").iterdir()) == []


async def test_a_cut_fails_the_dump(criu: Criu, tmp_path: Path) -> None:
    with victim(tmp_path) as process:
        async with receive(tmp_path / "pages") as server:
            native = server._native
            ask: Callable[..., None] = native.answer

            def cut_instead(serial: int, answer: int, fd: int = -1) -> None:
                native.cut(serial)
                ask(serial, answer, fd)

            native.answer = cut_instead  # type: ignore[method-assign]
            await dump_fails(criu, process, tmp_path / "images", server.port)
            assert await ended(server) is Ending.CUT
            assert list((tmp_path / "pages").iterdir()) == []
