"""A lazy dump and the pages of its source become a full dump, all of it or nothing."""

from __future__ import annotations

import errno
import operator
import os
import socket
import subprocess
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, combinations, count
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import images_writer as writer
from criupy.errors import ImageError, PageServerError
from criupy.images import (
    MARKER,
    RelayMarker,
    is_zombie,
    pagemap_path,
    pages_path,
    read_dump,
    read_pagemap,
    read_pstree,
    write_marker,
    write_pagemap,
)
from criupy.page_server import Config, open_page_server
from criupy.page_server._images import load_tasks
from criupy.page_server._spool import Spool, SpooledTask, is_complete
from criupy.testing.control_linux import Order
from criupy.testing.criu_linux import Criu, Source, lazy_dump, lazy_pages_daemon, our_command, restore
from criupy.testing.images import WrittenImages, WrittenTask, write_images
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import start_workload
from page_server_clients import Destination

PAGE = 4096
MIB = 1 << 20
SPEC = WorkloadSpec(size=96 * PAGE, areas=3, tree=2, zombie=True, fragmented=True)


def lazy_images(tmp_path: Path, spec: WorkloadSpec = SPEC, **options: Any) -> WrittenImages:
    return write_images(tmp_path / "images", spec, source_pages=tmp_path / "source", **options)


def fetch(spool: Spool, task: SpooledTask, written: WrittenTask) -> None:
    """Write what the source has to where the spool wants it."""
    entries = task.entries
    source = written.pages.read_bytes()
    assert list(entries.starts) == [run.start for run in written.runs]
    fd = spool.open(task)
    for index, nr, offset in zip(entries.page_indices, entries.nr_pages, written.offsets, strict=True):
        os.pwrite(fd, source[offset : offset + nr * PAGE], index * PAGE)
    os.close(fd)


def filled(images: WrittenImages, directory: Path) -> Spool:
    """Make a spool that lacks nothing but the commit."""
    spool = Spool(images.directory, directory)
    for task, written in zip(spool.prepare(), images.tasks, strict=True):
        fetch(spool, task, written)
    return spool


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ---- what a spool is ------------------------------------------------------------------------------


@pytest.mark.parametrize("nr", ["old", "new"])
@pytest.mark.parametrize("entry_pages", [1, 7, 1024])
def test_it_is_what_a_full_dump_would_have_been(
    nr: Literal["old", "new"], entry_pages: int, tmp_path: Path
) -> None:
    images = lazy_images(tmp_path, count=nr, entry_pages=entry_pages)
    spool = filled(images, tmp_path / "spool")
    assert all(name.endswith(".partial") for name in names(tmp_path / "spool"))
    spool.commit()
    full = write_images(tmp_path / "full", SPEC, style="full", count=nr, entry_pages=entry_pages)
    assert contents(tmp_path / "spool") == contents(full.directory)
    read_dump(tmp_path / "spool")
    for served, written in zip(load_tasks(tmp_path / "spool"), images.tasks, strict=True):
        pages = served.pages.read_bytes()
        assert served.pid == written.pid
        for run, index in zip(written.runs, served.entries.page_indices, strict=True):
            for n in range(run.nr_pages):
                page = pages[(index + n) * PAGE : (index + n + 1) * PAGE]
                assert page == SPEC.page(written.task, run.first + n)


def test_it_is_for_nobody_else_to_read(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    for path in images.directory.iterdir():
        path.chmod(0o644)
    filled(images, tmp_path / "spool").commit()
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "spool").iterdir()} == {0o600}


Entries = list[tuple[int, int, int]]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.sampled_from([1, 2, 4, 6]))),
    st.sampled_from(["old", "new"]),
    st.booleans(),
)
def test_any_entries(
    tmp_path_factory: pytest.TempPathFactory, gaps: Entries, style: str, by_kernel: bool
) -> None:
    """Each page of the spool is told by what it is: one of the images, or one of the source."""
    room = tmp_path_factory.mktemp("room")
    images = room / "images"
    images.mkdir()
    (images / "parent").symlink_to(room)
    runs, address = [], 0x10000
    for gap, nr_pages, flags in gaps:
        address += gap * PAGE
        runs.append(writer.Run(address, nr_pages, flags))
        address += nr_pages * PAGE
    writer.write_dump(images, 7, runs, [writer.vma_body(0x10000, address + PAGE)], style)
    there = [page for run in runs if (run.flags or 0) & 4 for page in pages_of(run)]
    (images / "pages-1.img").write_bytes(b"".join(bytes_of(page, b"images") for page in there))
    spool = Spool(images, room / "spool")
    fails = mock.patch.object(os, "copy_file_range", side_effect=OSError(errno.EXDEV, "no"))
    with mock.MagicMock() if by_kernel else fails:
        (task,) = spool.prepare()
    fd = spool.open(task)
    entries = task.entries
    lazy = [run for run in runs if run.flags == 2]
    assert [(run.vaddr, run.nr_pages) for run in lazy] == list(
        zip(entries.starts, entries.nr_pages, strict=True)
    )
    for run, index in zip(lazy, entries.page_indices, strict=True):
        os.pwrite(fd, b"".join(bytes_of(page, b"source") for page in pages_of(run)), index * PAGE)
    os.close(fd)
    spool.commit()
    assert is_complete(room / "spool", images)

    before, after = read_pagemap(images, 7), read_pagemap(room / "spool", 7)
    assert (after.starts, after.nr_pages, after.style) == (before.starts, before.nr_pages, before.style)
    assert after.flags == array("B", [6 if flags & 2 else flags for flags in before.flags])
    assert (room / "spool/pages-1.img").read_bytes() == b"".join(
        bytes_of(page, b"source" if run.flags == 2 else b"images")
        for run in runs
        if run.flags != 1
        for page in pages_of(run)
    )


def pages_of(run: writer.Run) -> range:
    assert run.vaddr is not None
    return range(run.vaddr, run.vaddr + run.nr_pages * PAGE, PAGE)


def bytes_of(page: int, where: bytes) -> bytes:
    return (b"%x of %s" % (page, where)).ljust(PAGE)


def test_nothing_to_fetch(tmp_path: Path) -> None:
    full = write_images(tmp_path / "full", SPEC, style="full")
    spool = Spool(full.directory, tmp_path / "spool")
    assert [list(task.entries.starts) for task in spool.prepare()] == [[], []]
    spool.commit()
    assert contents(tmp_path / "spool") == contents(full.directory)


def test_what_belongs_to_the_dump_and_what_does_not(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    write_marker(images, RelayMarker(bytes(32), None))
    for name in ("dump.log", "pages-9.img.partial", "stats-dump", "descriptors.json", "pagemap-shmem-3.img"):
        (images / name).write_bytes(name.encode())
    (images / "tmpfs-5.tar.gz.img").symlink_to("descriptors.json")
    (images / "work").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(images / "lazy-pages.socket"))
        Spool(images, tmp_path / "spool").prepare()
    made = {name.removesuffix(".partial") for name in names(tmp_path / "spool")}
    left_out = {"dump.log", "pages-9.img.partial", "work", "lazy-pages.socket", MARKER}
    assert made == names(images) - left_out
    assert (tmp_path / "spool/tmpfs-5.tar.gz.img.partial").read_bytes() == b"descriptors.json"


def test_the_parent_is_found_from_elsewhere(tmp_path: Path) -> None:
    parent = write_images(tmp_path / "parent-images", SPEC, style="full")
    images = lazy_images(tmp_path)
    (images.directory / "parent").symlink_to("../parent-images")
    filled(images, tmp_path / "spool").commit()
    assert read_dump(tmp_path / "spool").parents == (parent.directory.resolve(),)
    assert (tmp_path / "spool/parent").readlink() == parent.directory.resolve()


# ---- a finished one is known again ----------------------------------------------------------------


def test_a_complete_spool_is_recognised(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    directory = tmp_path / "spool"
    assert not is_complete(directory, images.directory)
    spool = filled(images, directory)
    assert not is_complete(directory, images.directory)
    spool.commit()
    spool.discard()  # of nothing
    assert is_complete(directory, images.directory)
    with pytest.raises(PageServerError, match="it has images that are not those of this dump"):
        Spool(images.directory, directory)
    other = write_images(
        tmp_path / "other", WorkloadSpec(size=95 * PAGE, tree=2), source_pages=tmp_path / "source-other"
    )
    assert not is_complete(directory, other.directory)
    assert not is_complete(images.directory, images.directory)
    (directory / "pages-1.img").write_bytes(b"")
    with pytest.raises(ImageError, match="the image is truncated"):
        is_complete(directory, images.directory)


def test_a_dump_that_is_broken_has_no_spool(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    filled(images, tmp_path / "spool").commit()
    (images.directory / "inventory.img").unlink()
    with pytest.raises(ImageError):
        is_complete(tmp_path / "spool", images.directory)


# ---- refusals -------------------------------------------------------------------------------------


def test_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/theirs").touch()
    with pytest.raises(PageServerError, match="expected an empty directory for the spool, it has theirs"):
        Spool(images, tmp_path / "spool")
    with pytest.raises(PageServerError, match="another directory for the spool than the images'"):
        Spool(images, images)
    with pytest.raises(PageServerError, match="Not a directory"):
        Spool(images, tmp_path / "spool/theirs")
    with pytest.raises(PageServerError, match="cannot be made: No such file"):
        Spool(images, tmp_path / "not/there")
    assert names(tmp_path / "spool") == {"theirs"}


def test_left_overs_of_one_that_was_not_finished(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    spool = Spool(images, tmp_path / "spool")
    spool.prepare()
    before = contents(tmp_path / "spool")
    with pytest.raises(PageServerError, match="what is left of a spool that was not finished"):
        Spool(images, tmp_path / "spool")
    assert contents(tmp_path / "spool") == before
    spool.discard()
    assert not (tmp_path / "spool").exists()


def test_discarding_leaves_what_was_there(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    (tmp_path / "spool").mkdir()
    spool = Spool(images, tmp_path / "spool")
    spool.prepare()
    (tmp_path / "spool/theirs").touch()
    spool.discard()
    assert names(tmp_path / "spool") == {"theirs"}


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("inventory.img", Path.unlink, "inventory.img: expected a readable inventory image"),
        ("pstree.img", Path.unlink, "pstree.img: expected a readable pstree image"),
        ("pagemap-101.img", lambda path: path.write_bytes(b"no"), "the image is truncated"),
        ("pages-2.img", Path.unlink, "pages-2.img: expected a readable pages image"),
        ("pages-2.img", a_directory, "expected a pages image, this is no regular file"),
        ("pages-2.img", lambda path: path.write_bytes(b""), "the image is truncated"),
        ("fs-1.img", lambda path: path.symlink_to("nowhere"), "fs-1.img: it cannot be read: No such file"),
        ("parent", lambda path: path.symlink_to("nowhere"), "expected the images that these are based on"),
    ],
)
def test_images_that_cannot_be_read(
    name: str, spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    images = lazy_images(tmp_path).directory
    spoil(images / name)
    with pytest.raises(ImageError, match=message):
        Spool(images, tmp_path / "spool").prepare()
    assert not (tmp_path / "spool").exists()


def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    writer.write_dump(tmp_path, 7, [writer.Run(0x10000, 1, 2), writer.Run(0x11000, 1, 1)], [])
    with pytest.raises(ImageError, match="there is no link to them"):
        Spool(tmp_path, tmp_path / "spool").prepare()


def test_two_tasks_of_one_pages_image(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    (images / "pagemap-101.img").write_bytes((images / "pagemap-100.img").read_bytes())
    with pytest.raises(ImageError, match=r"pagemap-101.img: .* not pages-1.img again"):
        Spool(images, tmp_path / "spool").prepare()


def test_pages_that_vanish_while_they_are_copied(tmp_path: Path) -> None:
    images = lazy_images(tmp_path).directory
    real = os.copy_file_range

    def cut(*arguments: Any) -> int:
        (images / "pages-1.img").write_bytes(b"")
        return real(*arguments)

    with (
        mock.patch.object(os, "copy_file_range", cut),
        pytest.raises(ImageError, match=r"pages-1.img, byte 0: expected 16384 more bytes"),
    ):
        Spool(images, tmp_path / "spool").prepare()
    assert not (tmp_path / "spool").exists()


# ---- the disk -------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "spool", str(path)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting needs root, and CAP_SYS_ADMIN")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_disk_without_room_for_what_will_come(tmp_path: Path) -> None:
    images = lazy_images(tmp_path, WorkloadSpec(size=2 * MIB))
    with small_disk(tmp_path / "disk", MIB) as disk:
        spool = Spool(images.directory, disk / "spool")
        with pytest.raises(PageServerError) as raised:
            spool.prepare()
        assert names(disk) == set()
        size = 2 * MIB + 4 * PAGE
        assert str(raised.value) == (
            f"{disk}/spool/pages-1.img: the spool cannot be written: "
            f"No space left on device, it takes {size} bytes"
        )
    with small_disk(tmp_path / "disk2", 3 * MIB) as disk:
        filled(images, disk / "spool").commit()
        assert is_complete(disk / "spool", images.directory)


def test_a_disk_without_room_for_the_other_images(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    (images.directory / "ghost-file-1.img").write_bytes(bytes(3 * MIB))
    with small_disk(tmp_path / "disk", 2 * MIB) as disk:
        spool = Spool(images.directory, disk / "spool")
        with pytest.raises(PageServerError, match=r"ghost-file-1.img.*No space left on device"):
            spool.prepare()
        assert names(disk) == set()


def test_a_file_system_that_cannot_reserve(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    with mock.patch.object(os, "posix_fallocate", side_effect=OSError(errno.EOPNOTSUPP, "no")):
        filled(images, tmp_path / "spool").commit()
    assert is_complete(tmp_path / "spool", images.directory)


def test_a_file_that_others_have_changed(tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    spool = filled(images, tmp_path / "spool")
    os.truncate(tmp_path / "spool/pages-2.img.partial", PAGE)
    with pytest.raises(PageServerError, match=r"pages-2.img: expected \d+ bytes, it has 4096"):
        spool.commit()
    (tmp_path / "spool/pages-2.img.partial").unlink()
    with pytest.raises(PageServerError, match=r"pages-2.img: the spool cannot be written: No such file"):
        spool.commit()
    with pytest.raises(PageServerError, match=r"pages-2.img.partial: it cannot be opened: No such file"):
        spool.open(SpooledTask(101, mock.Mock(), tmp_path / "spool/pages-2.img"))
    spool.discard()
    assert not (tmp_path / "spool").exists()


def test_a_commit_is_made_once(tmp_path: Path) -> None:
    spool = filled(lazy_images(tmp_path), tmp_path / "spool")
    spool.commit()
    with pytest.raises(ValueError, match="done already"):
        spool.commit()


Call = tuple[str, ...]


@contextmanager
def disk_calls(fails: Callable[[], bool] = bool) -> Iterator[list[Call]]:
    """Yield what is done about names, as it grows; a call for which ``fails`` says so does nothing else."""
    done: list[Call] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if fails():
                raise OSError(errno.EIO, "Input/output error", name)
            done.append((name, *(path.name for path in arguments if isinstance(path, Path))))
            return real(*arguments, **named)

        return call

    with (
        mock.patch.object(Path, "replace", patched("replace", Path.replace)),
        mock.patch.object(Path, "unlink", patched("unlink", Path.unlink)),
        mock.patch.object(os, "fsync", patched("fsync", os.fsync)),
    ):
        yield done


@pytest.mark.parametrize("fails", [operator.eq, operator.ge], ids=["one-call", "all-from-then-on"])
def test_a_commit_that_fails_anywhere(fails: Callable[[int, int], bool], tmp_path: Path) -> None:
    images = lazy_images(tmp_path)
    for n in count():
        directory = tmp_path / str(n)
        spool = filled(images, directory)
        numbers = count()
        failed = None
        with disk_calls(lambda n=n, numbers=numbers: fails(next(numbers), n)) as done:  # type: ignore[misc]
            try:
                spool.commit()
            except PageServerError as error:
                failed = error
        if failed is None:
            assert is_complete(directory, images.directory)
            break
        assert "Input/output error" in str(failed)
        assert str(failed).startswith(str(directory))
        has_all = ("replace", "inventory.img.partial", "inventory.img") in done
        # Only when the disk takes nothing at all any more can it be that there is an image all the same.
        assert is_complete(directory, images.directory) == (has_all and fails is operator.ge)
        spool.discard()
        assert not directory.exists()
    assert n > 25


def test_a_machine_that_goes_down(tmp_path: Path) -> None:
    """Of what was done since the last fsync, any part may be on disk."""
    images = lazy_images(tmp_path, WorkloadSpec(size=4 * PAGE))
    spool = filled(images, tmp_path / "spool")
    on_disk = contents(tmp_path / "spool")
    with disk_calls() as done:
        spool.commit()
    seen = set()
    numbers = count()
    step: list[Call] = []
    for call in [*done, ("fsync",)]:
        if call[0] == "replace":
            step.append(call)
            continue
        for part in chain.from_iterable(combinations(step, length) for length in range(len(step) + 1)):
            path = tmp_path / f"down{next(numbers)}"
            path.mkdir()
            for name, content in renamed(on_disk, list(part)).items():
                (path / name).write_bytes(content)
            seen.add((is_complete(path, images.directory), (path / "inventory.img").exists()))
        on_disk, step = renamed(on_disk, step), []
    assert seen == {(False, False), (True, True)}
    first = next(n for n, call in enumerate(done) if call[0] == "replace")
    assert first > len(contents(tmp_path / "spool"))  # what has a name is on disk


def renamed(files: dict[str, bytes], calls: list[Call]) -> dict[str, bytes]:
    files = dict(files)
    for _, old, new in calls:
        files[new] = files.pop(old)
    return files


# ---- real ones ------------------------------------------------------------------------------------


def fetch_from(source: Source, spool: Spool, tasks: list[SpooledTask]) -> None:
    """Get every missing page from a live source, and let it go."""
    connection = socket.create_connection((source.address, source.port))
    with Destination(connection, source.frame_size) as client:
        for task in tasks:
            fd = spool.open(task)
            entries = task.entries
            for start, nr_pages, index in zip(
                entries.starts, entries.nr_pages, entries.page_indices, strict=True
            ):
                os.pwrite(fd, client.get(task.pid, start, nr_pages), index * PAGE)
            os.close(fd)
        spool.commit()
        assert client.close() == 0


def move_to_a_parent(images: Path, parent: Path) -> None:
    """Make the dump one that is based on another, which has all pages that are not lazy."""
    parent.mkdir()
    (images / "parent").symlink_to("../before")
    for entry in read_pstree(images):
        if is_zombie(images, entry.pid):
            continue
        pagemap = read_pagemap(images, entry.pid)
        assert pagemap.style is not None
        pages_path(images, pagemap.pages_id).rename(pages_path(parent, pagemap.pages_id))
        pages_path(images, pagemap.pages_id).touch()
        left = array("B", [1 if flags == 4 else flags for flags in pagemap.flags])
        with pagemap.path.open("wb") as file:
            write_pagemap(file, pagemap.pages_id, pagemap.starts, pagemap.nr_pages, left, pagemap.style)
        there = [n for n, flags in enumerate(pagemap.flags) if flags == 4]
        starts = array("Q", [pagemap.starts[n] for n in there])
        nr_pages = array("Q", [pagemap.nr_pages[n] for n in there])
        with pagemap_path(parent, entry.pid).open("wb") as file:
            flags = array("B", [4] * len(there))
            write_pagemap(file, pagemap.pages_id, starts, nr_pages, flags, pagemap.style)


@pytest.mark.criu
@pytest.mark.usefixtures("workload_program", "nothing_is_left")
@pytest.mark.parametrize("based", [False, True], ids=["alone", "on-a-parent"])
async def test_a_spool_is_restored(criu: Criu, room: Path, based: bool) -> None:
    spec = WorkloadSpec(size=24 * MIB, areas=3, tree=2, fragmented=True, zombie=True)
    images, directory = room / "images", room / "spool"
    async with start_workload(spec, room) as workload:
        async with lazy_dump(criu, workload.pid, images) as source:
            if based:
                move_to_a_parent(images, room / "before")
            spool = Spool(images, directory)
            tasks = await trio.to_thread.run_sync(spool.prepare)
            assert all(task.entries.starts for task in tasks)
            await trio.to_thread.run_sync(fetch_from, source, spool, tasks)
            await source.job.succeed()
        assert (await workload.wait()).signal == 9
        assert is_complete(directory, images)
        await trio.Path(images).rename(room / "gone")
        async with restore(criu, directory, room / "work", workload.pid, lazy=False) as restored:
            workload.control.gone = restored.gone
            await restored.finished()
            workload.worker().start_touching(Order.RANDOM, count=1000)
            assert (await workload.worker().wait()).is_good
            for task in range(2):
                assert (await workload.worker(task).verify()).is_good


@pytest.mark.criu
@pytest.mark.usefixtures("workload_program", "nothing_is_left")
@pytest.mark.parametrize("images_of", ["dump", "spool"])
async def test_a_spool_is_served(criu: Criu, room: Path, images_of: str) -> None:
    """To who has the images of the lazy dump, whose source is gone, or a copy of the spool."""
    spec = WorkloadSpec(size=12 * MIB, areas=3, tree=2, fragmented=True)
    images, directory = room / "images", room / "spool"
    async with start_workload(spec, room) as workload:
        async with lazy_dump(criu, workload.pid, images) as source:
            spool = Spool(images, directory)
            tasks = await trio.to_thread.run_sync(spool.prepare)
            await trio.to_thread.run_sync(fetch_from, source, spool, tasks)
            await source.job.succeed()
        there = images if images_of == "dump" else directory
        async with (
            open_page_server(Config(directory)) as server,
            lazy_pages_daemon(
                our_command(), there, room / "work", source=(server.address, server.port)
            ) as daemon,
            restore(criu, there, room / "work", workload.pid) as restored,
        ):
            workload.control.gone = restored.gone
            await restored.finished()
            await daemon.succeed()
            for task in range(2):
                assert (await workload.worker(task).verify()).is_good
