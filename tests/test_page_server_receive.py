"""Receiving what a dumper uploads: whole images or none, and none that CRIU would not restore from."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import given, settings

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Server
from criupy.errors import ImageError, PageServerError, UffdError
from criupy.images import PagemapStyle, check_pages, present_pages, read_pagemap, read_shared_pagemap
from criupy.page_server import Account, Config, Ending, PageServer, _writer, open_page_receiver
from criupy.testing.wait import until
from images_writer import Run, pagemap
from page_server_clients import (
    ADD,
    ADD_F,
    CLOSE,
    FORCE_CLOSE,
    GET,
    HOLE,
    OPEN,
    OPEN2,
    PAGE,
    PARENT,
    PE_LAZY,
    PE_PRESENT,
    Dumper,
    frame,
    loopback,
    shmem,
    task,
)
from rpc_victims import disk

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("nothing_is_left")

BASE = 0x10000000


def page(n: int) -> bytes:
    return n.to_bytes(8, "little") * (PAGE // 8)


def pages(first: int, nr: int) -> bytes:
    return b"".join(map(page, range(first, first + nr)))


@dataclass(slots=True, eq=False)
class Receiving:
    """A receiver, and dumpers that run in threads of their own."""

    server: PageServer
    directory: Path
    frame_size: int

    async def dump(self, steps: Callable[[Dumper], T]) -> T:
        """Connect, and do in a thread what a dumper does."""

        def run() -> T:
            with Dumper(socket.create_connection(("127.0.0.1", self.server.port)), self.frame_size) as dumper:
                return steps(dumper)

        return await trio.to_thread.run_sync(run)

    async def end(self) -> Account:
        """Wait until all connections have ended and return the last one's account."""
        await until(lambda: self.server.last is not None and not self.server._peers)
        assert self.server.last is not None
        return self.server.last

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@contextlib.asynccontextmanager
async def receive(directory: Path, frame_size: int = 32, **options: Any) -> AsyncIterator[Receiving]:
    directory.mkdir(exist_ok=True)
    more = {name: options.pop(name) for name in ("prev_images_dir", "auto_dedup") if name in options}
    async with open_page_receiver(Config(directory, **options), **more) as server:
        yield Receiving(server, directory, frame_size)


@pytest.fixture(params=[24, 32])
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ---- images ------------------------------------------------------------------------------------------


async def test_tasks_and_shared_memory(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> int:
        assert dumper.has_parent(task(7)) == 0
        assert dumper.open(task(7)) is False
        dumper.add(task(7), BASE, pages(0, 3), PE_PRESENT | PE_LAZY)
        dumper.entry(task(7), BASE + 8 * PAGE, 5, PE_LAZY)
        dumper.add(task(7), BASE + 16 * PAGE, pages(16, 500))
        assert dumper.open(shmem(99)) is False
        dumper.add(shmem(99), 0, pages(1000, 1))
        dumper.send(OPEN, dst_id=task(8))  # no answer
        dumper.send(ADD, 2, BASE, task(8))
        dumper.sock.sendall(pages(5, 2))
        return dumper.close()

    async with receive(tmp_path / "images", size) as r:
        assert await r.dump(dump) == 0
        account = await r.end()
        assert account.ending is Ending.CLOSED
        assert (account.pages, account.frame_size) == (506, size)
        found = read_pagemap(r.directory, 7)
        assert list(found.starts) == [BASE, BASE + 8 * PAGE, BASE + 16 * PAGE]
        assert list(found.nr_pages) == [3, 5, 500]
        assert list(found.flags) == [6, 2, 4]
        assert found.style is (PagemapStyle.OLD if size == 24 else PagemapStyle.NEW)
        assert (r.directory / f"pages-{found.pages_id}.img").read_bytes() == pages(0, 3) + pages(16, 500)
        shared = read_shared_pagemap(r.directory, 99)
        assert (r.directory / f"pages-{shared.pages_id}.img").read_bytes() == pages(1000, 1)
        other = read_pagemap(r.directory, 8)
        assert list(other.flags) == [4]
        assert (r.directory / f"pages-{other.pages_id}.img").read_bytes() == pages(5, 2)
        assert len(r.names()) == 6


async def test_images_are_as_an_independent_writer_has_them(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.add(task(7), BASE, pages(0, 3))
        return dumper.close()

    async with receive(tmp_path / "images", size) as r:
        assert await r.dump(dump) == 0
        style = "old" if size == 24 else "new"
        expected = pagemap([Run(BASE, 3, 4)], style, pages_id=0x10001)
        assert (r.directory / "pagemap-7.img").read_bytes() == expected
        assert (r.directory / "pagemap-7.img").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", [1, 7, 4096, 65536])
async def test_in_any_pieces(size: int, step: int, tmp_path: Path) -> None:
    content = pages(0, 5)
    stream = b"".join(
        [
            frame(size, 4, dst_id=task(7)),
            frame(size, PE_PRESENT << 16 | ADD_F, 1, BASE, task(7)),
            content[:PAGE],
            frame(size, PE_LAZY << 16 | ADD_F, 1, BASE + PAGE, task(7)),
            frame(size, (PE_LAZY | PE_PRESENT) << 16 | ADD_F, 4, BASE + 2 * PAGE, task(7)),
            content[PAGE:],
            frame(size, FORCE_CLOSE),
        ]
    )

    def dump(dumper: Dumper) -> bytes:
        for start in range(0, len(stream), step):
            dumper.sock.sendall(stream[start : start + step])
        return dumper.receive(5)

    async with receive(tmp_path / "images", size, stall_timeout=0.5) as r:
        assert await r.dump(dump) == b"\0" * 5
        assert (await r.end()).ending is Ending.CLOSED
        assert (r.directory / "pages-65537.img").read_bytes() == content


async def test_nothing_at_all(size: int, tmp_path: Path) -> None:
    async with receive(tmp_path / "images", size) as r:
        assert await r.dump(Dumper.close) == 0
        assert (await r.end()).ending is Ending.CLOSED
        assert r.names() == set()


async def test_an_image_without_pages(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        return dumper.close()

    async with receive(tmp_path / "images", size) as r:
        assert await r.dump(dump) == 0
        assert len(read_pagemap(r.directory, 7)) == 0
        assert (r.directory / "pages-65537.img").stat().st_size == 0


async def test_a_second_dump_replaces_the_first(size: int, tmp_path: Path) -> None:
    def dump(n: int, dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.add(task(7), BASE, page(n))
        return dumper.close()

    async with receive(tmp_path / "images", size) as r:
        for n in range(3):
            assert await r.dump(partial(dump, n)) == 0
            found = read_pagemap(r.directory, 7)
            assert (r.directory / f"pages-{found.pages_id}.img").read_bytes() == page(n)
            assert len(r.names()) == 2


async def test_many_entries(tmp_path: Path) -> None:
    nr = 20000

    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        head = partial(frame, 32, PE_PRESENT << 16 | ADD_F, 1)
        dumper.sock.sendall(b"".join(head(BASE + 2 * n * PAGE, task(7)) + page(n) for n in range(nr)))
        return dumper.close()

    async with receive(tmp_path / "images") as r:
        assert await r.dump(dump) == 0
        found = read_pagemap(r.directory, 7)
        assert list(found.starts) == [BASE + 2 * n * PAGE for n in range(nr)]
        assert (r.directory / f"pages-{found.pages_id}.img").read_bytes() == pages(0, nr)


# ---- what ends an upload --------------------------------------------------------------------------------


def opened(dumper: Dumper) -> None:
    dumper.open(task(7))
    dumper.add(task(7), BASE, pages(0, 2))


WRONG: dict[str, tuple[tuple[int, int, int, int], Ending]] = {
    "unaligned": ((ADD_F | 4 << 16, 1, BASE + 2 * PAGE + 8, task(7)), Ending.ADDRESS),
    "no-pages": ((ADD_F | 4 << 16, 0, BASE + 2 * PAGE, task(7)), Ending.COUNT),
    "too-many": ((ADD_F | 2 << 16, 0xFFFFFFFF, (1 << 64) - PAGE, task(7)), Ending.COUNT),
    "again": ((ADD_F | 4 << 16, 1, BASE, task(7)), Ending.ORDER),
    "overlapping": ((ADD_F | 4 << 16, 2, BASE + PAGE, task(7)), Ending.ORDER),
    "descending": ((HOLE, 1, BASE - PAGE, task(7)), Ending.ORDER),
    "no-flags": ((ADD_F, 1, BASE + 2 * PAGE, task(7)), Ending.FLAGS),
    "unknown-flag": ((ADD_F | 12 << 16, 1, BASE + 2 * PAGE, task(7)), Ending.FLAGS),
    "parent-and-lazy": ((ADD_F | 3 << 16, 1, BASE + 2 * PAGE, task(7)), Ending.FLAGS),
    "other-task": ((ADD_F | 4 << 16, 1, BASE + 2 * PAGE, task(8)), Ending.UNOPENED),
    "other-type": ((ADD_F | 4 << 16, 1, BASE + 2 * PAGE, shmem(7)), Ending.UNOPENED),
    "unknown-type": ((OPEN, 0, 0, 7 << 8 | 77), Ending.ID),
    "unknown-type-of-parent": ((PARENT, 0, 0, 7 << 8 | 77), Ending.ID),
    "get": ((GET, 1, BASE, 7), Ending.COMMAND),
    "unknown": ((99, 1, BASE, task(7)), Ending.COMMAND),
    "twice": ((OPEN, 0, 0, task(7)), Ending.REFUSED),
    "hole-without-parent": ((CLOSE, 0, 0, 0), Ending.REFUSED),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_frame(case: str, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments, ending = WRONG[case]

    def dump(dumper: Dumper) -> bytes:
        opened(dumper)
        if case == "hole-without-parent":
            dumper.entry(task(7), BASE + 2 * PAGE, 1)
        elif case == "twice":
            dumper.open(task(8))
        dumper.send(*arguments)
        return dumper.receive(4)

    caplog.set_level(logging.INFO, "criupy.page_server")
    async with receive(tmp_path / "images", size) as r:
        with contextlib.suppress(ConnectionResetError):
            got = await r.dump(dump)
            assert got == (b"" if case != "hole-without-parent" else (-22).to_bytes(4, "little", signed=True))
        assert (await r.end()).ending is ending
        assert r.names() == set()
    (warning,) = [line for line in caplog.records if line.levelname == "WARNING"]
    assert "nothing of it is left" in warning.getMessage()


@pytest.mark.parametrize("command", [ADD, HOLE, ADD_F | 4 << 16])
async def test_an_entry_before_anything_is_opened(command: int, size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> bytes:
        dumper.send(command, 1, BASE, task(7))
        return dumper.receive(1)

    async with receive(tmp_path / "images", size) as r:
        assert await r.dump(dump) == b""
        assert (await r.end()).ending is Ending.UNOPENED


@pytest.mark.parametrize(
    ("tail", "ending"),
    [
        (b"", Ending.EOF),
        (frame(24, CLOSE)[:23], Ending.TRUNCATED),
        (frame(24, ADD_F | 4 << 16, 3, BASE + 2 * PAGE, task(7)), Ending.TRUNCATED),
        (frame(24, ADD_F | 4 << 16, 3, BASE + 2 * PAGE, task(7)) + pages(2, 2) + b"x", Ending.TRUNCATED),
        (frame(24, CLOSE) + b"x", Ending.TRAILING),
    ],
)
async def test_a_stream_that_ends_wrongly(tail: bytes, ending: Ending, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> None:
        opened(dumper)
        dumper.sock.sendall(tail)

    async with receive(tmp_path / "images", 24) as r:
        await r.dump(dump)
        assert (await r.end()).ending is ending
        # What follows CLOSE comes too late to make whole images bad ones.
        whole = {"pagemap-7.img", "pages-65537.img"}
        assert r.names() == (whole if ending is Ending.TRAILING else set())


async def test_a_dumper_that_dies(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> None:
        opened(dumper)
        dumper.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with receive(tmp_path / "images", size) as r:
        await r.dump(dump)
        assert (await r.end()).ending is Ending.RESET
        assert r.names() == set()


async def test_a_dumper_that_dies_before_it_hears_the_status(size: int, tmp_path: Path) -> None:
    """It has all been received; that the dumper does not know it is the dumper's."""

    def dump(dumper: Dumper) -> None:
        opened(dumper)
        dumper.send(CLOSE)

    async with receive(tmp_path / "images", size) as r:
        await r.dump(dump)
        assert (await r.end()).ending in {Ending.CLOSED, Ending.RESET}
        assert r.names() == {"pagemap-7.img", "pages-65537.img"}


async def test_a_dumper_that_stands_still(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> bytes:
        opened(dumper)
        dumper.send(ADD_F | 4 << 16, 2, BASE + 2 * PAGE, task(7))
        dumper.sock.sendall(page(2))
        return dumper.receive(1)

    async with receive(tmp_path / "images", size, stall_timeout=0.2) as r:
        with contextlib.suppress(ConnectionResetError):
            assert await r.dump(dump) == b""
        assert (await r.end()).ending is Ending.STALLED
        assert r.names() == set()


async def test_the_first_frame_may_take_its_time(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> int:
        time.sleep(0.6)
        return dumper.close()

    async with receive(tmp_path / "images", size, stall_timeout=0.2) as r:
        assert await r.dump(dump) == 0


async def test_what_is_not_finished_when_it_stops(size: int, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        async with receive(tmp_path / "images", size) as r:

            def dump(dumper: Dumper) -> None:
                opened(dumper)
                stack.enter_context(dumper.sock.dup())

            await r.dump(dump)
            assert r.names() == {"pages-65537.img.partial"}
    assert list((tmp_path / "images").iterdir()) == []


async def test_two_dumpers_and_one_image(size: int, tmp_path: Path) -> None:
    async with receive(tmp_path / "images", size) as r:

        def first(dumper: Dumper) -> int:
            opened(dumper)
            trio.from_thread.run(r.dump, second)
            return dumper.close()

        def second(dumper: Dumper) -> None:
            dumper.open(task(8))
            dumper.send(OPEN, dst_id=task(7))
            assert dumper.is_over()

        assert await r.dump(first) == 0
        await r.end()
        assert r.names() == {"pagemap-7.img", "pages-65537.img"}


FRAMES = st.one_of(
    st.tuples(st.sampled_from([OPEN, OPEN2]), st.just(0), st.just(0), st.sampled_from([task(7), shmem(7)])),
    st.tuples(
        st.sampled_from([ADD, HOLE, ADD_F | 2 << 16, ADD_F | 4 << 16, ADD_F | 6 << 16, ADD_F | 5 << 16]),
        st.integers(0, 3),
        st.integers(0, 40).map(lambda n: n * PAGE // 2 * 2),
        st.sampled_from([task(7), task(7), task(7), shmem(7), 7]),
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 40), st.integers(0, 1 << 20)),
    st.just((CLOSE, 0, 0, 0)),
)


@pytest.mark.parametrize("close", [False, True])
def test_whatever_comes_an_image_is_whole(close: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Frames in any order, with the pages they say they have, or less of them."""

    @given(
        frames=st.lists(FRAMES, max_size=12),
        frame_size=st.sampled_from([24, 32]),
        cut=st.integers(0, 20000) if not close else st.just(0),
    )
    @settings(max_examples=60, deadline=None)
    def check(frames: list[tuple[int, int, int, int]], frame_size: int, cut: int) -> None:
        directory = tmp_path_factory.mktemp("images")
        stream = frame(frame_size, OPEN, dst_id=task(7))
        for command, nr, address, image in frames:
            stream += frame(frame_size, command, nr, address, image)
            has_pages = command == ADD or (command & 0xFFFF == ADD_F and command >> 16 & PE_PRESENT)
            stream += pages(address, nr) if has_pages else b""
        if close:
            stream += frame(frame_size, CLOSE)
        stream = stream[: max(24, len(stream) - cut)]

        def dump(dumper: Dumper) -> None:
            with contextlib.suppress(ConnectionError):
                dumper.sock.sendall(stream)
                dumper.sock.shutdown(socket.SHUT_WR)
                while dumper.sock.recv(4096):
                    pass

        async def main() -> None:
            async with receive(directory, frame_size) as r:
                await r.dump(dump)
                account = await r.end()
                names = r.names()
                if account.ending is not Ending.CLOSED and account.ending is not Ending.TRAILING:
                    assert names == set()
                assert not any(name.endswith(".partial") for name in names)
                for name in names:
                    if name.startswith("pagemap-"):
                        read = read_shared_pagemap if "shmem" in name else read_pagemap
                        found = read(directory, 7)
                        size = check_pages(directory, found).stat().st_size
                        assert size == present_pages(found) * PAGE

        trio.run(main)

    check()


async def test_a_pid_of_no_process(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> bytes:
        dumper.send(OPEN2, dst_id=task(0))
        return dumper.receive(1)

    async with receive(tmp_path, size) as r:
        assert await r.dump(dump) == b""
        assert (await r.end()).ending is Ending.REFUSED


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    """The native part takes no descriptor where there is nothing to write, and needs one where there is."""
    with Server(stall_timeout=30, idle_timeout=None, receives=True) as server:
        ours, theirs = loopback()
        with Dumper(ours) as dumper:
            serial = server.serve(theirs.detach())
            dumper.send(OPEN2, dst_id=task(7))
            assert select.select([server.event_fd], [], [], 30)[0]
            assert list(server.ended()) == []
            (question,) = server.questions()
            assert (question.serial, question.command, question.id) == (serial, OPEN2, task(7))
            assert list(server.questions()) == []
            with pytest.raises(UffdError, match="Invalid argument"):
                server.answer(serial, 1)
            with (tmp_path / "pages").open("wb") as file:
                with pytest.raises(UffdError, match="Invalid argument"):
                    server.answer(serial, -5, os.dup(file.fileno()))
                server.answer(serial + 1, 1, os.dup(file.fileno()))  # there is no such connection
                server.answer(serial, 1, os.dup(file.fileno()))
                assert dumper.receive(1) == b"\1"
                server.answer(serial, 1, os.dup(file.fileno()))  # it waits no more
            image = Image(7, array("Q", [BASE]), array("Q", [1]), array("Q", [0]))
            with pytest.raises(UffdError):
                server.add_image(image, 0)
            dumper.send(PARENT, dst_id=task(7))
            assert select.select([server.event_fd], [], [], 30)[0]
            # The end of the server does not wait for an answer.


# ---- the disk -----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("nr_inodes", [3, 100])
async def test_a_full_disk(
    nr_inodes: int, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    images.mkdir()

    def dump(dumper: Dumper) -> bytes:
        for pid in range(7, 12):
            dumper.open(task(pid))
            dumper.add(task(pid), BASE, pages(0, 100))
        dumper.add(task(11), BASE + 100 * PAGE, pages(0, 600))
        dumper.send(CLOSE)
        return dumper.receive(4)

    with disk(images, f"size=2m,nr_inodes={nr_inodes}"):
        async with receive(images, size) as r:
            with contextlib.suppress(ConnectionError, IndexError):
                assert await r.dump(dump) == b""
            account = await r.end()
            assert account.ending is (Ending.REFUSED if nr_inodes == 3 else Ending.DISK)
            assert r.names() == set()
    (warning,) = [line for line in caplog.records if line.levelname == "WARNING"]
    assert "No space left on device" in warning.getMessage()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_a_disk_that_is_full_when_all_has_come(size: int, tmp_path: Path) -> None:
    """The pages fit; the pagemap does not. CLOSE is answered, and not with 0."""
    images = tmp_path / "images"
    images.mkdir()

    def dump(dumper: Dumper) -> int:
        opened(dumper)
        return dumper.close()

    with disk(images, "size=8k"):
        async with receive(images, size) as r:
            assert await r.dump(dump) == -28
            assert (await r.end()).ending is Ending.REFUSED
            assert r.names() == set()


async def test_what_a_server_that_died_left_is_removed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("pages-65537.img.partial", "pagemap-shmem-5.img.partial", "mine.partial"):
        (images / name).touch()
    async with receive(images) as r:
        assert r.names() == {"mine.partial"}


async def test_only_one_receives_into_a_directory(tmp_path: Path) -> None:
    async with receive(tmp_path / "images"):
        with pytest.raises(PageServerError, match="another page server"):
            async with receive(tmp_path / "images"):
                pass  # pragma: no cover


# ---- parents ------------------------------------------------------------------------------------------


def write_parent(directory: Path, runs: list[Run], content: bytes, style: str, name: str = "7") -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"pagemap-{name}.img").write_bytes(pagemap(runs, style))
    (directory / "pages-1.img").write_bytes(content)


async def test_holes_are_the_parents(size: int, tmp_path: Path) -> None:
    style = "old" if size == 24 else "new"
    write_parent(tmp_path / "0", [Run(BASE, 4, 4), Run(BASE + 4 * PAGE, 4, 6)], pages(0, 8), style)

    def dump(dumper: Dumper) -> int:
        assert dumper.has_parent(task(7)) == 1
        assert dumper.has_parent(task(8)) == 0
        assert dumper.has_parent(shmem(7)) == 0
        assert dumper.open(task(8)) is False
        assert dumper.open(task(7)) is True
        dumper.send(HOLE, 2, BASE, task(7))
        dumper.add(task(7), BASE + 2 * PAGE, page(102))
        dumper.entry(task(7), BASE + 3 * PAGE, 5)
        return dumper.close()

    async with receive(tmp_path / "1", size, prev_images_dir="../0") as r:
        assert (r.directory / "parent").readlink() == Path("../0")
        assert await r.dump(dump) == 0
        assert list(read_pagemap(r.directory, 7).flags) == [1, 4, 1]


@pytest.mark.parametrize("hole", [(-1, 1), (3, 2), (4, 1), (6, 3), (20, 1)])
async def test_a_hole_that_the_parent_lacks(hole: tuple[int, int], tmp_path: Path) -> None:
    write_parent(tmp_path / "0", [Run(BASE, 4, 4), Run(BASE + 5 * PAGE, 3, 6)], pages(0, 7), "new")

    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.entry(task(7), BASE + hole[0] * PAGE, hole[1])
        return dumper.close()

    async with receive(tmp_path / "1", prev_images_dir="../0") as r:
        assert await r.dump(dump) == -22
        assert r.names() == {"parent"}


async def test_lazy_pages_that_went_elsewhere_are_not_in_a_parent(tmp_path: Path) -> None:
    write_parent(tmp_path / "0", [Run(BASE, 4, PE_LAZY)], b"", "new")

    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.entry(task(7), BASE, 1)
        return dumper.close()

    async with receive(tmp_path / "1", prev_images_dir="../0") as r:
        assert await r.dump(dump) == -22
        assert r.names() == {"parent"}


async def test_a_parent_whose_pages_file_is_too_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parent(tmp_path / "0", [Run(BASE, 4, 4)], pages(0, 3), "new")

    def dump(dumper: Dumper) -> bool:
        dumper.send(OPEN2, dst_id=task(7))
        return dumper.is_over()

    async with receive(tmp_path / "1", prev_images_dir="../0") as r:
        assert await r.dump(dump)
        assert (await r.end()).ending is Ending.REFUSED
    assert "pages-" in caplog.text


async def test_an_error_of_ours_ends_only_that_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.add(task(7), BASE, pages(0, 3))
        return dumper.close()

    async with receive(tmp_path / "images") as r:
        with monkeypatch.context() as patch:
            patch.setattr(_writer, "write_pagemap", mock.Mock(side_effect=MemoryError))
            assert await r.dump(dump) == -5
        assert (await r.end()).ending is Ending.REFUSED
        assert r.names() == set()
        assert "please report it" in caplog.text
        assert await r.dump(dump) == 0


def blocks(path: Path, nr: int) -> list[bool]:
    """Tell which pages of a file have blocks."""
    found = []
    with path.open("rb") as file:
        for n in range(nr):
            try:
                found.append(os.lseek(file.fileno(), n * PAGE, os.SEEK_DATA) == n * PAGE)
            except OSError:
                found.append(False)
    return found


@pytest.mark.parametrize("auto_dedup", [False, True])
async def test_what_is_uploaded_again_is_given_back(auto_dedup: bool, size: int, tmp_path: Path) -> None:
    style = "old" if size == 24 else "new"
    write_parent(tmp_path / "0", [Run(BASE, 8, 4)], pages(0, 8), style)
    write_parent(
        tmp_path / "1",
        [Run(BASE, 2, 1), Run(BASE + 2 * PAGE, 2, 4), Run(BASE + 4 * PAGE, 2, 1), Run(BASE + 6 * PAGE, 2, 6)],
        pages(102, 2) + pages(106, 2),
        style,
    )
    (tmp_path / "1" / "parent").symlink_to("../0")

    inventory = tmp_path / "2" / "inventory.img"

    def dump(close: bool, dumper: Dumper) -> int:
        inventory.unlink(missing_ok=True)
        assert dumper.open(task(7)) is True
        dumper.entry(task(7), BASE, 1)
        dumper.add(task(7), BASE + PAGE, pages(201, 2))
        dumper.entry(task(7), BASE + 3 * PAGE, 4)
        dumper.add(task(7), BASE + 7 * PAGE, pages(207, 5))
        inventory.touch()  # the last that a dump writes
        return dumper.close() if close else -1

    def failing(dumper: Dumper) -> int:
        assert dumper.open(task(7)) is True
        dumper.add(task(7), BASE + PAGE, pages(201, 2))
        return dumper.close()  # as CRIU does, whatever came in between

    async with receive(tmp_path / "2", size, prev_images_dir="../1", auto_dedup=auto_dedup) as r:
        await r.dump(partial(dump, False))
        await r.end()
        inventory.unlink()
        assert await r.dump(failing) == 0
        await r.end()
        assert all(blocks(tmp_path / "0/pages-1.img", 8))  # a failure costs no parent
        assert all(blocks(tmp_path / "1/pages-1.img", 4))
        assert await r.dump(partial(dump, True)) == 0
        await r.end()
    if not auto_dedup:
        assert (tmp_path / "0/pages-1.img").read_bytes() == pages(0, 8)
        return
    assert blocks(tmp_path / "0/pages-1.img", 8) == [True, False, False, True, True, True, True, False]
    assert blocks(tmp_path / "1/pages-1.img", 4) == [False, True, True, False]
    assert (tmp_path / "1/pages-1.img").read_bytes()[PAGE : 3 * PAGE] == page(103) + page(106)


async def test_a_parent_that_cannot_be_read(tmp_path: Path) -> None:
    """What is restored would need it, whether or not this dump leaves pages to it."""
    write_parent(tmp_path / "0", [Run(BASE, 4, 4)], pages(0, 4), "new")
    with (tmp_path / "0" / "pagemap-7.img").open("ab") as file:
        file.write(b"x")

    def dump(dumper: Dumper) -> bytes:
        dumper.send(OPEN2, dst_id=task(7))
        return dumper.receive(1)

    async with receive(tmp_path / "1", prev_images_dir="../0") as r:
        assert await r.dump(dump) == b""
        assert (await r.end()).ending is Ending.REFUSED
        assert r.names() == {"parent"}


async def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PageServerError, match="no such directory"):
        async with receive(tmp_path / "1", prev_images_dir="../0"):
            pass  # pragma: no cover
    (tmp_path / "0").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "1" / "parent").symlink_to("../2")
    with pytest.raises(PageServerError, match="does not lead to"):
        async with receive(tmp_path / "1", prev_images_dir="../0"):
            pass  # pragma: no cover


# ---- which of those who connect is the dump --------------------------------------------------------------


@pytest.mark.parametrize("size", [32], indirect=True)
async def test_who_begins_no_dump_keeps_nobody_from_it(size: int, tmp_path: Path) -> None:
    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        dumper.add(task(7), BASE, pages(0, 3))
        return dumper.close()

    def connect() -> Dumper:
        return Dumper(socket.create_connection(("127.0.0.1", r.server.port)), size)

    async with receive(tmp_path / "images", size, once=True) as r:
        connect().sock.close()
        with connect() as silent, connect() as lost, connect() as wrong:
            lost.sock.sendall(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n")
            wrong.send(GET, 1, BASE, 7)
            for one in (lost, wrong):
                assert await trio.to_thread.run_sync(one.is_over)
            assert await r.dump(dump) == 0
            assert await trio.to_thread.run_sync(silent.is_over)
        await r.server.wait()
        assert r.server.is_whole
        assert r.server.last is not None
        assert r.server.last.ending is Ending.CLOSED
        assert r.server.last.pages == 3
        assert dict(r.server.statistics.endings) == {"eof": 1, "command": 2, "cut": 1, "closed": 1}
        assert r.names() == {"pagemap-7.img", "pages-65537.img"}


@pytest.mark.parametrize("size", [32], indirect=True)
async def test_the_first_that_opens_an_image_is_the_dump(size: int, tmp_path: Path) -> None:
    async with receive(tmp_path / "images", size, once=True) as r:
        with (
            Dumper(socket.create_connection(("127.0.0.1", r.server.port)), size) as first,
            Dumper(socket.create_connection(("127.0.0.1", r.server.port)), size) as second,
        ):
            await trio.to_thread.run_sync(first.open, task(7))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                second.send(OPEN2, dst_id=task(7))
            assert await trio.to_thread.run_sync(second.is_over)
            assert await trio.to_thread.run_sync(first.close) == 0
        await r.server.wait()
        assert r.server.is_whole


async def test_a_chain_that_is_broken_gets_no_link(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "1" / "parent").symlink_to("../nowhere")
    with pytest.raises(ImageError):
        async with receive(tmp_path / "2", prev_images_dir="../1"):
            pass
    assert list((tmp_path / "2").iterdir()) == []


async def test_the_link_stays_when_images_came(size: int, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    async with receive(tmp_path / "1", size, prev_images_dir="../0") as r:
        assert (r.directory / "parent").readlink() == Path("../0")
    assert list((tmp_path / "1").iterdir()) == []

    def dump(dumper: Dumper) -> int:
        dumper.open(task(7))
        return dumper.close()

    async with receive(tmp_path / "1", size, prev_images_dir="../0") as r:
        assert await r.dump(dump) == 0
    assert (tmp_path / "1" / "parent").readlink() == Path("../0")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"\x16\x03\x01\x00\xf0" + bytes(60), "the peer speaks TLS"),
        (b"GET / HTTP/1.1\r\nHost: there\r\n\r\n", "nothing that is done here"),
    ],
)
async def test_one_line_for_a_peer_that_is_no_dump(
    said: bytes, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with receive(tmp_path / "images") as r:
        with Dumper(socket.create_connection(("127.0.0.1", r.server.port)), 32) as peer:
            peer.sock.sendall(said)
            assert await trio.to_thread.run_sync(peer.is_over)
        await r.end()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert told in record.getMessage()
