"""Writing what a dumper uploads: pagemap and pages images as CRIU's own page server writes them.

Nothing here has its final name before the dumper has said that it is through:

    open     pages-N.img.partial is made; is there a parent?
    finish   it is on disk, and so is pagemap-ID.img.partial, which needs all entries
    commit   all of them get their names, the pages before the pagemaps that tell of them
    discard  all of them go away

So a pagemap image in the directory is always whole, and so are its pages. An
upload into a directory that has the same pagemaps replaces them, and a new one
is never beside an old one, which would look like a dump and is none. So commit
goes in steps, each of which is on disk before the next:

    1. The new pages get their names. All that was there before is still whole.
    2. The old pagemaps go. From here on pagemaps are missing, which no restore overlooks,
    3. until the new ones have their names.
    4. The old pages go, as nobody tells of them any more.

That is what a machine that goes down leaves, with pages of nobody perhaps.
When a step fails, what is new is removed: after the first one the old images
are still whole, later some or all of them are lost.

That all has come does not say that the dump succeeded: CRIU ends its session
in good order also when it failed after the pages went. Nothing here can know
it, but from ``inventory.img``, which a dump writes shortly before (and a
pre-dump afterwards).

The parent of the images is where the link ``parent`` in the directory leads.
A page that is said to be in it must be, or the images could never be restored;
with ``auto_dedup`` the parents give the blocks of pages back that were uploaded
again. CRIU does that while the pages come; here it is done when all has come
and the inventory is there, for a dump that fails must not cost the one before.
(CRIU: criu/page-xfer.c, criu/cr-dump.c, criu/pagemap.c, criu/image.c.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from criupy.errors import ImageError
from criupy.images import (
    PageFlags,
    Pagemap,
    PagemapStyle,
    check_pages,
    pagemap_path,
    pages_path,
    parent_chain,
    read_pagemap,
    read_shared_pagemap,
    shared_pagemap_path,
    write_pagemap,
)
from criupy.wire.page_server import PAGE_SHIFT, ImageType

__all__ = ["Finished", "ImagesDirectory", "PunchHole", "UploadedImages"]

PunchHole: TypeAlias = Callable[[int, int, int], None]

#: CRIU's page server counts from here, so that it and a dump can write into one directory (criu/image.c).
_FIRST_PAGES_ID: Final = 0x10001
_PARTIAL: Final = ".partial"
_LEFT_OVER: Final = re.compile(r"(pages|pagemap|pagemap-shmem)-\d+\.img\.partial")

_BLOCK: Final = 512  # bytes; whatever the file system's are (stat(2))
#: Nanoseconds by which a file's time may be older than the clock says.
_CLOCK_STEP: Final = 20_000_000

_PRESENT: Final = PageFlags.PRESENT.value
_PARENT: Final = PageFlags.PARENT.value

#: First bytes, one after the last; of addresses or of a file.
Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a commit wrote, in all; ``warnings`` are what could not be given back of the parents."""

    images: int
    pages: int
    bytes_given_back: int
    warnings: tuple[str, ...]


class ImagesDirectory:
    """The directory that uploads go into, and what is being written there."""

    def __init__(self, path: Path, *, auto_dedup: bool = False, punch_hole: PunchHole | None = None) -> None:
        if auto_dedup and punch_hole is None:
            raise ValueError("auto_dedup: expected a function that punches holes")
        self.path = path
        self._punch_hole = punch_hole if auto_dedup else None
        self._lock = threading.Lock()
        self._next_id = _FIRST_PAGES_ID
        self._uploading: set[Path] = set()
        #: Images that got their names.
        self.nr_committed: int = 0

    def remove_left_overs(self) -> int:
        """Remove what a page server that died was writing; only when no other one is alive here."""
        found = [path for path in self.path.iterdir() if _LEFT_OVER.fullmatch(path.name)]
        for path in found:
            path.unlink()
        return len(found)

    def parents(self) -> tuple[Path, ...]:
        """Return the directories that these images are based on, the nearest first."""
        return parent_chain(self.path)

    def has_parent(self, image_type: ImageType, number: int) -> bool:
        """Tell whether the parent images have this pagemap."""
        parents = self.parents()
        return bool(parents) and _pagemap_path(parents[0], image_type, number).exists()

    def _reserve(self, pagemap: Path) -> int:
        """Reserve a pagemap's name and a number for its pages."""
        with self._lock:
            if pagemap in self._uploading:
                raise OSError(errno.EBUSY, "another connection uploads it at this moment", pagemap.name)
            while self._is_taken(self._next_id):
                self._next_id += 1
            self._uploading.add(pagemap)
            self._next_id += 1
            return self._next_id - 1

    def _is_taken(self, pages_id: int) -> bool:
        path = pages_path(self.path, pages_id)
        return path.exists() or _partial(path).exists()

    def _release(self, pagemaps: set[Path]) -> None:
        with self._lock:
            self._uploading -= pagemaps


@dataclass(slots=True)
class _Image:
    image_type: ImageType
    number: int
    pages_id: int
    path: Path
    pages_path: Path
    style: PagemapStyle
    parent: Pagemap | None  # until it is finished
    pages: int = 0
    present: tuple[Range, ...] = ()  # of addresses; what the parents need not have any more


class UploadedImages:
    """The images of one upload. One call at a time; each may block on the disk.

    What goes wrong is an OSError, or an ImageError that says what the parent
    images lack; then the upload is to be discarded.
    """

    def __init__(self, directory: ImagesDirectory) -> None:
        self._directory = directory
        self._path = directory.path
        self._done: list[_Image] = []
        self._image: _Image | None = None
        self._pages_fd = -1
        self._created: set[Path] = set()
        self._began = time.time_ns()
        #: Whether a commit that failed has cost what was there before.
        self.has_cost_the_old: bool = False

    def open(self, image_type: ImageType, number: int, style: PagemapStyle) -> tuple[int, bool]:
        """Begin an image; return where to write its pages, which stay ours, and if there is a parent."""
        if self._image is not None:
            raise ValueError("open: the image before is not finished")
        path = _pagemap_path(self._path, image_type, number)
        if any(image.path == path for image in self._done):
            raise OSError(errno.EEXIST, "it was uploaded before on this connection", path.name)
        parents = self._directory.parents()
        parent = None
        if parents and (parents[0] / path.name).exists():
            # What is wrong with it is told before the pages come.
            parent = _read(parents[0], image_type, number)
            check_pages(parents[0], parent)
        pages_id = self._directory._reserve(path)
        pages = pages_path(self._path, pages_id)
        self._image = _Image(image_type, number, pages_id, path, pages, style, parent)
        self._pages_fd = self._create(_partial(pages))
        return self._pages_fd, parent is not None

    def finish(self, starts: array[int], nr_pages: array[int], flags: array[int]) -> None:
        """End the image, if there is one, with its entries; all pages are written."""
        image = self._image
        if image is None:
            return
        if _PARENT in flags:
            self._check_holes(image, starts, nr_pages, flags)
        if self._directory._punch_hole is not None and image.parent is not None:
            image.present = tuple(_joined(_with_flag(starts, nr_pages, flags, _PRESENT)))
        image.parent = None
        image.pages = sum(count for count, flag in zip(nr_pages, flags, strict=True) if flag & _PRESENT)
        size = os.fstat(self._pages_fd).st_size
        if size != image.pages << PAGE_SHIFT:
            raise OSError(
                errno.EIO, f"it has {size} bytes, {image.pages} pages were received", image.pages_path.name
            )
        os.fsync(self._pages_fd)
        fd, self._pages_fd = self._pages_fd, -1
        os.close(fd)
        with os.fdopen(self._create(_partial(image.path)), "wb") as file:
            write_pagemap(file, image.pages_id, starts, nr_pages, flags, image.style)
            file.flush()
            os.fsync(file.fileno())
        self._done.append(image)
        self._image = None

    def commit(self) -> Finished:
        """Give all images their names; nothing is left to discard."""
        if self._image is not None:
            raise ValueError("commit: the last image is not finished")
        old = {image.path: self._old_pages(image) for image in self._done if os.path.lexists(image.path)}
        named: list[Path] = []
        orphans: list[Path] = []
        try:
            self._name([image.pages_path for image in self._done], named)
            for path, pages in old.items():
                path.unlink()
                self.has_cost_the_old = True
                orphans += pages
            if old:
                _sync_directory(self._path)
            self._name([image.path for image in self._done], named)
        except BaseException:
            _remove([*reversed(named), *orphans])  # a pagemap before its pages
            with contextlib.suppress(OSError):
                _sync_directory(self._path)
            raise
        done, self._done = self._done, []
        self._created.clear()
        self.has_cost_the_old = False
        self._directory._release({image.path for image in done})
        self._directory.nr_committed += len(done)
        _remove(orphans)
        given_back, warnings = self._deduplicate(done)
        return Finished(len(done), sum(image.pages for image in done), given_back, tuple(warnings))

    def discard(self) -> None:
        """Remove what was not committed."""
        fd, self._pages_fd = self._pages_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # nothing of it is wanted
                os.close(fd)
        images = self._done if self._image is None else [*self._done, self._image]
        self._done, self._image = [], None
        _remove(list(self._created))
        self._created.clear()
        self._directory._release({image.path for image in images})

    def _create(self, path: Path) -> int:
        """Make a file for us alone: the memory of a process is nobody else's business."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        self._created.add(path)
        return fd

    def _name(self, paths: list[Path], named: list[Path]) -> None:
        """Give files their names, which are on disk then; ``named`` grows by those that have theirs."""
        for path in paths:
            _partial(path).replace(path)
            named.append(path)
        _sync_directory(self._path)

    def _old_pages(self, image: _Image) -> list[Path]:
        """Name the pages of a pagemap that is about to be replaced, if they are known and there."""
        try:
            pagemap = _read(self._path, image.image_type, image.number)
        except ImageError:
            return []
        path = pages_path(self._path, pagemap.pages_id)
        return [path] if path.exists() else []  # else their number may be one of ours now

    def _check_holes(
        self, image: _Image, starts: array[int], nr_pages: array[int], flags: array[int]
    ) -> None:
        """Check that the parent has all pages that the dumper left to it."""
        holes = _joined(_with_flag(starts, nr_pages, flags, _PARENT))
        parent = image.parent
        if parent is None:
            start, _ = next(holes)
            raise ImageError(
                image.path,
                None,
                f"expected a parent that has the page at {start:#x}: the dump is incremental, "
                "and these images have no parent with this pagemap",
            )
        # Lazy pages that are not there either went elsewhere with the parent's own dump.
        there = _joined(_with_flag(parent.starts, parent.nr_pages, parent.flags, _PRESENT | _PARENT))
        end = 0
        begin = 0
        for start, stop in holes:
            while end <= start:
                begin, end = next(there, (1 << 65, 1 << 65))
            if not (begin <= start and stop <= end):
                missing = start if begin > start else end
                raise ImageError(
                    parent.path,
                    None,
                    f"expected the page at {missing:#x}, which the dumper left to this parent",
                )

    def _deduplicate(self, images: list[_Image]) -> tuple[int, list[str]]:
        """Give back what the parents have and nobody will read there; failing at it harms nothing."""
        punch_hole = self._directory._punch_hole
        if punch_hole is None or not any(image.present for image in images):
            return 0, []
        if not self._has_succeeded():
            why = "no inventory.img came, which would say that the dump succeeds"
            return 0, [f"{self._path}: its parents give nothing back: {why}; use `criu dedup` when it has"]
        given_back = 0
        warnings = []
        try:
            parents = self._directory.parents()
        except (OSError, ImageError) as error:
            return 0, [f"{self._path}: nothing is given back of its parents: {error}"]
        for parent in parents:
            for image in images:
                try:
                    if image.present and (parent / image.path.name).exists():
                        given_back += _punch(punch_hole, parent, image)
                except (OSError, ImageError) as error:
                    warnings.append(
                        f"{parent / image.path.name}: its pages take more room than they need: {error}"
                    )
        return given_back, warnings

    def _has_succeeded(self) -> bool:
        """Tell whether the dump has written its last image here: it need not write where its pages go."""
        try:
            return (self._path / "inventory.img").stat().st_mtime_ns >= self._began - _CLOCK_STEP
        except OSError:
            return False


def _pagemap_path(directory: Path, image_type: ImageType, number: int) -> Path:
    name = shared_pagemap_path if image_type is ImageType.SHMEM else pagemap_path
    return name(directory, number)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _read(directory: Path, image_type: ImageType, number: int) -> Pagemap:
    read = read_shared_pagemap if image_type is ImageType.SHMEM else read_pagemap
    return read(directory, number)


def _remove(paths: list[Path]) -> None:
    """Remove files as far as that can be done."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- ranges --------------------------------------------------------------------------------------


def _with_flag(starts: array[int], nr_pages: array[int], flags: array[int], wanted: int) -> Iterator[Range]:
    """Yield the addresses of the entries that have one of the flags."""
    for start, count, flag in zip(starts, nr_pages, flags, strict=True):
        if flag & wanted:
            yield start, start + (count << PAGE_SHIFT)


def _joined(ranges: Iterator[Range]) -> Iterator[Range]:
    """Join ranges that touch; they ascend."""
    begin = end = 0
    for start, stop in ranges:
        if start != end:
            if begin != end:
                yield begin, end
            begin = start
        end = stop
    if begin != end:
        yield begin, end


def _in_file(pagemap: Pagemap, present: tuple[Range, ...]) -> Iterator[Range]:
    """Yield where a pages file has the pages of these addresses."""
    wanted = iter(present)
    begin, end = next(wanted, (1 << 65, 1 << 65))
    offset = 0
    for start, count, flag in zip(pagemap.starts, pagemap.nr_pages, pagemap.flags, strict=True):
        stop = start + (count << PAGE_SHIFT)
        if not flag & _PRESENT:
            continue
        while begin < stop:
            low, high = max(begin, start), min(end, stop)
            if low < high:
                yield offset + low - start, offset + high - start
            if end > stop:
                break
            begin, end = next(wanted, (1 << 65, 1 << 65))
        offset += stop - start


def _punch(punch_hole: PunchHole, parent: Path, image: _Image) -> int:
    pagemap = _read(parent, image.image_type, image.number)
    holes = _joined(_in_file(pagemap, image.present))
    with check_pages(parent, pagemap).open("r+b") as file:
        before = os.fstat(file.fileno()).st_blocks
        for start, stop in holes:
            punch_hole(file.fileno(), start, stop - start)
        return max(0, before - os.fstat(file.fileno()).st_blocks) * _BLOCK
