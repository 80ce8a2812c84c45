"""A lazy dump made a full one: its images on disk, with the pages that only its source has.

A spool is a directory of its own, filled in three steps:

    prepare  all that the images have is copied there, and the pages files are made with room
             for what is missing; everything is called NAME.partial
    open     the missing pages are written to their places, by whoever gets them from the source
    commit   everything is on disk, then it gets its names: the pagemaps after their pages, and
             the inventory, without which CRIU restores nothing, after all others

What a machine that goes down leaves is a directory without an inventory, or a
whole image. A restore from it needs neither the source nor the images that it was made of; of
an incremental dump it still needs the parents, which are not copied.

In a lazy dump's pages file are the PRESENT pages only, in the order of the
entries. In the spool the LAZY ones are between them, and their entries are
LAZY and PRESENT, as in a full dump. (CRIU: criu/pagemap.c, criu/page-xfer.c.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import mul
from pathlib import Path
from typing import Final

from criupy.errors import ImageError, PageServerError
from criupy.images import (
    MARKER,
    PAGE_SIZE,
    PageFlags,
    Pagemap,
    check_pages,
    is_zombie,
    pagemap_path,
    parent_chain,
    read_inventory,
    read_pagemap,
    read_pstree,
    write_pagemap,
)
from criupy.page_server._copying import CLOEXEC, copy_range, reading

__all__ = ["MissingPages", "Spool", "SpooledTask", "has_ended", "is_complete"]

_PARTIAL: Final = ".partial"
_INVENTORY: Final = "inventory.img"
_PARENT_LINK: Final = "parent"
#: In a spool: its source has ended, so it may be restored from.
_ENDED: Final = "criupy-source-ended"

_PARENT: Final = PageFlags.PARENT.value
_LAZY: Final = PageFlags.LAZY.value
_PRESENT: Final = PageFlags.PRESENT.value
_FULL: Final = _LAZY | _PRESENT

# bytes.translate over the flags of all entries: 1 for those meant
_IS_MISSING: Final = bytes(flags & _FULL == _LAZY for flags in range(256))
_WILL_HAVE_BYTES: Final = bytes(flags & _FULL != 0 for flags in range(256))
_IN_SPOOL: Final = bytes(flags | _PRESENT if flags & _LAZY else flags for flags in range(256))

_NO_RESERVING: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class MissingPages:
    """The pages that only the source has, as parallel arrays in address order, one element an entry.

    ``starts`` are dump-time addresses (array 'Q'), ``nr_pages`` counts ('Q');
    ``page_indices`` ('Q') tell where the first page of each goes in the spool's pages file.
    """

    starts: array[int]
    nr_pages: array[int]
    page_indices: array[int]


@dataclass(frozen=True, slots=True)
class SpooledTask:
    """What is to be fetched of one process, nothing perhaps; ``pages`` is where it will be found."""

    pid: int
    entries: MissingPages
    pages: Path


class Spool:
    """The directory that a lazy dump becomes a full one in. One call at a time; each may block on the disk.

    Raises ImageError for images that are not as CRIU writes them, PageServerError
    for a directory that cannot be used, or a disk that is full.
    """

    def __init__(self, images_dir: Path, directory: Path) -> None:
        self.images_dir = images_dir
        self.directory = directory
        #: What was made here: its final name, and how many bytes it must have (None: as many as it has).
        self._made: dict[str, int | None] = {}
        self._is_committed = False
        self._is_ours = self._claim()

    def prepare(self) -> list[SpooledTask]:
        """Copy what the images have and make room for the rest; on failure nothing is left behind."""
        try:
            return self._prepare()
        except BaseException:
            self.discard()
            raise

    def open(self, task: SpooledTask) -> int:
        """Open a task's pages file to write, and read, at any place; the caller closes it."""
        try:
            return os.open(_partial(task.pages), os.O_RDWR | CLOEXEC)
        except OSError as error:
            raise PageServerError(f"{_partial(task.pages)}: it cannot be opened: {error.strerror}") from error

    def commit(self) -> None:
        """All pages are written: put everything on disk, then give it its names.

        After a failure the directory has no image, and is to be discarded.
        """
        if self._is_committed:
            raise ValueError("commit: it is done already")
        try:
            for name, size in self._made.items():
                if name != _PARENT_LINK:
                    self._put_on_disk(name, size)
            if self._is_ours:
                self._sync_directory(self.directory.resolve().parent)
            for names in self._by_order():
                for name in names:
                    with self._writing(name):
                        _partial(self.directory / name).replace(self.directory / name)
                self._sync_directory(self.directory)
        except BaseException:
            # Nobody knows how much of it is on disk.
            with contextlib.suppress(OSError):
                (self.directory / _INVENTORY).unlink(missing_ok=True)
            raise
        self._is_committed = True

    def note_end(self, has_ended: bool) -> None:
        """Note on disk whether the source has ended: then the process is here, and nowhere else."""
        path = self.directory / _ENDED
        with self._writing(_ENDED):
            if has_ended:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | CLOEXEC, 0o600))
            else:
                path.unlink(missing_ok=True)
        self._sync_directory(self.directory)

    def discard(self) -> None:
        """Remove what was not committed, as far as that can be done."""
        if self._is_committed:
            return
        for names in reversed(self._by_order()):
            for name in names:
                for path in (self.directory / name, _partial(self.directory / name)):
                    with contextlib.suppress(OSError):
                        path.unlink()
        self._made.clear()
        if self._is_ours:
            with contextlib.suppress(OSError):  # something of somebody else's may be in it by now
                self.directory.rmdir()

    def _claim(self) -> bool:
        """Make the directory, or see that it is empty; return whether it was made here."""
        directory = self.directory
        try:
            directory.mkdir(0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise PageServerError(f"{directory}: the spool cannot be made: {error.strerror}") from error
        else:
            return True
        try:
            if self.images_dir.exists() and directory.samefile(self.images_dir):
                raise PageServerError(
                    f"{directory}: expected another directory for the spool than the images'"
                )
            names = sorted(path.name for path in directory.iterdir())
        except OSError as error:
            raise PageServerError(f"{directory}: it cannot be a spool: {error.strerror}") from error
        if names:
            if _INVENTORY in names:
                why = "it has images that are not those of this dump, made full"
            elif any(name.endswith(_PARTIAL) for name in names):
                why = "it has what is left of a spool that was not finished; remove it if nobody writes it"
            else:
                why = f"it has {names[0]}"
            raise PageServerError(f"{directory}: expected an empty directory for the spool, {why}")
        return False

    def _prepare(self) -> list[SpooledTask]:
        read_inventory(self.images_dir)  # the dump has been written
        parents = parent_chain(self.images_dir)
        done: set[str] = set()
        tasks = [self._prepare_task(pid, done, has_parent=bool(parents)) for pid in _pids(self.images_dir)]
        for path in self._other_files(done):
            self._copy(path)
        if parents:
            # Where the link is relative it would lead elsewhere from here.
            with self._writing(_PARENT_LINK):
                _partial(self.directory / _PARENT_LINK).symlink_to(parents[0])
                self._made[_PARENT_LINK] = None
        return tasks

    def _prepare_task(self, pid: int, done: set[str], *, has_parent: bool) -> SpooledTask:
        """Make the pagemap and the pages file of a task, whose names are added to ``done``."""
        pagemap = read_pagemap(self.images_dir, pid)
        pages = check_pages(self.images_dir, pagemap)
        if pages.name in done:
            raise ImageError(pagemap.path, None, f"expected a pages image of its own, not {pages.name} again")
        if _PARENT in pagemap.flags and not has_parent:
            raise ImageError(
                pagemap.path,
                None,
                "expected the images that these are based on, there is no link to them: "
                "a spool without them could not be restored",
            )
        done.update((pages.name, pagemap.path.name))
        flags = pagemap.flags.tobytes()
        missing = flags.translate(_IS_MISSING)
        first_pages = array(
            "Q", accumulate(map(mul, pagemap.nr_pages, flags.translate(_WILL_HAVE_BYTES)), initial=0)
        )
        entries = MissingPages(
            array("Q", compress(pagemap.starts, missing)),
            array("Q", compress(pagemap.nr_pages, missing)),
            array("Q", compress(first_pages, missing)),
        )
        if pagemap.style is None or not entries.starts:
            self._copy(pages)
            self._copy(pagemap.path)
        else:
            self._make_room(pages, pagemap, first_pages[-1] * PAGE_SIZE)
            with self._creating(pagemap.path.name) as fd, os.fdopen(os.dup(fd), "wb") as file:
                write_pagemap(
                    file,
                    pagemap.pages_id,
                    pagemap.starts,
                    pagemap.nr_pages,
                    array("B", flags.translate(_IN_SPOOL)),
                    pagemap.style,
                )
        return SpooledTask(pid, entries, self.directory / pages.name)

    def _make_room(self, pages: Path, pagemap: Pagemap, size: int) -> None:
        """Make a pages file of this size, with the PRESENT pages in their new places."""
        with self._creating(pages.name, size) as fd, reading(pages) as source:
            os.ftruncate(fd, size)
            try:
                # A disk that is too small shows now. (Where the file system knows no such call, glibc
                # touches every block instead. macOS has nothing like it.)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in _NO_RESERVING:
                    raise
            for old, new, count in _present_runs(pagemap):
                copy_range(pages, source, old * PAGE_SIZE, fd, new * PAGE_SIZE, count * PAGE_SIZE)

    def _other_files(self, done: set[str]) -> Iterator[Path]:
        """Yield what is in the images' directory besides, and belongs to the dump.

        Logs do not, nor the relay's marker, which is a secret, nor what a page server is writing.
        """
        try:
            found = sorted(self.images_dir.iterdir())
        except OSError as error:
            raise ImageError(self.images_dir, None, f"it cannot be read: {error.strerror}") from error
        for path in found:
            if path.name in done or path.name == MARKER or path.name.endswith((".log", _PARTIAL)):
                continue
            try:
                is_file = stat.S_ISREG(path.stat().st_mode)  # also of what a link leads to
            except OSError as error:
                raise ImageError(path, None, f"it cannot be read: {error.strerror}") from error
            if is_file:
                yield path

    def _copy(self, path: Path) -> None:
        with reading(path) as source:
            size = os.fstat(source).st_size
            with self._creating(path.name, size) as fd:
                copy_range(path, source, 0, fd, 0, size)

    @contextlib.contextmanager
    def _creating(self, name: str, size: int | None = None) -> Iterator[int]:
        """Make a file for us alone, under its name with a suffix; it will have ``size`` bytes, if known."""
        with self._writing(name, size):
            path = _partial(self.directory / name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | CLOEXEC, 0o600)
            self._made[name] = size
            try:
                yield fd
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _writing(self, name: str, size: int | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needs = f", it takes {size} bytes" if size is not None and error.errno in _NO_ROOM else ""
            raise PageServerError(
                f"{self.directory / name}: the spool cannot be written: {error.strerror}{needs}"
            ) from error

    def _put_on_disk(self, name: str, size: int | None) -> None:
        with self._writing(name):
            fd = os.open(_partial(self.directory / name), os.O_RDONLY | CLOEXEC)
            try:
                found = os.fstat(fd).st_size
                os.fsync(fd)
            finally:
                os.close(fd)
        if size is not None and found != size:
            raise PageServerError(
                f"{self.directory / name}: expected {size} bytes, it has {found}: somebody else writes it"
            )

    def _by_order(self) -> list[list[str]]:
        """Sort what was made into what gets its name first, then the pagemaps, then the inventory."""
        order: list[list[str]] = [[], [], []]
        for name in self._made:
            order[2 if name == _INVENTORY else 1 if name.startswith("pagemap-") else 0].append(name)
        return order

    def _sync_directory(self, path: Path) -> None:
        with self._writing("."):
            fd = os.open(path, os.O_RDONLY | CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def has_ended(directory: Path) -> bool:
    """Tell whether the source of a finished spool is known to have ended."""
    return (directory / _ENDED).exists()


def is_complete(directory: Path, images_dir: Path) -> bool:
    """Tell whether a directory has the finished spool of this dump."""
    names = (_INVENTORY, "pstree.img")
    if not (directory / _INVENTORY).exists():
        return False
    read_inventory(images_dir)
    pids = _pids(images_dir)
    sources = (read_pagemap(images_dir, pid) for pid in pids)
    try:
        return all(
            (directory / name).read_bytes() == (images_dir / name).read_bytes() for name in names
        ) and all(_is_spooled(directory, pid, source) for pid, source in zip(pids, sources, strict=True))
    except OSError as error:
        raise PageServerError(f"{directory}: it cannot be read: {error}") from error


def _is_spooled(directory: Path, pid: int, source: Pagemap) -> bool:
    if not pagemap_path(directory, pid).exists():
        return False
    spooled = read_pagemap(directory, pid)
    check_pages(directory, spooled)
    return (
        (spooled.pages_id, spooled.starts, spooled.nr_pages, spooled.style)
        == (source.pages_id, source.starts, source.nr_pages, source.style)
    ) and spooled.flags.tobytes() == source.flags.tobytes().translate(_IN_SPOOL)


def _pids(images_dir: Path) -> list[int]:
    """List the processes that have memory."""
    return [entry.pid for entry in read_pstree(images_dir) if not is_zombie(images_dir, entry.pid)]


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _present_runs(pagemap: Pagemap) -> Iterator[tuple[int, int, int]]:
    """Yield pages that stay together as (index in the old pages file, in the new one, how many)."""
    old = new = run = 0
    for count, flags in zip(pagemap.nr_pages, pagemap.flags, strict=True):
        if flags & _PRESENT:
            run += count
        elif flags & _LAZY:
            if run:
                yield old, new, run
            old, new, run = old + run, new + run + count, 0
    if run:
        yield old, new, run
