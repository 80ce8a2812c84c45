"""Pagemap images: which pages a dump has, and where their bytes are.

A pagemap image is a head with the number of its pages image, then one record
per run of pages. It can hold millions of records and a restore waits for it,
so no Python object may be made per record beyond its numbers. Records are
read in batches, and protobuf's C code parses each batch twice:

1. framed anew as one message with a repeated field. This judges the records
   one by one. Unknown fields need no search: protobuf keeps them aside, so
   once they are dropped, the batch encodes to fewer bytes than were parsed.
   A field that comes twice shows in the same way.
2. end to end, as one message whose fields repeat. This yields columns. As no
   record has a field twice, a column as long as the batch has exactly one
   value of every record, and its order is that of the records.

Then the columns are checked whole. A batch that raises any doubt on the way
goes through ``_decode_entry`` one record at a time, which alone decides what
is an error and knows the offset.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain, compress, repeat
from operator import add, le, lshift, or_
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from criupy.errors import ImageError
from criupy.images import _framing, _schema_pb2
from criupy.images._framing import ImageFile, StrPath, open_image, regular_file_size
from criupy.images._tasks import ADDRESS_END, PAGE_SHIFT, PAGE_SIZE, check_pid, parse_message

# Larger batches are slower: their Python objects leave the cache.
_BATCH: Final = 2048


class PageFlags(enum.IntFlag, boundary=enum.KEEP):
    """Flags of a pagemap entry (CRIU: criu/include/pagemap.h)."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4


# PARENT stands alone: such pages have no bytes in this dump.
_FLAGS: Final = frozenset((1, 2, 4, 6))


class PagemapStyle(enum.Enum):
    """Which field the dumper counts pages in."""

    #: Up to CRIU 4.1.1: field 2, 32 bits wide.
    OLD = "old"
    #: From CRIU 4.2 on: field 5, 64 bits wide, and field 2 zero.
    NEW = "new"


@dataclass(frozen=True, slots=True)
class Pagemap:
    """The pagemap of one task as parallel arrays, one element an entry, in address order.

    ``starts`` are dump-time addresses (array 'Q'), of shared memory offsets, ``nr_pages`` counts ('Q'),
    ``flags`` PageFlags ('B'). ``style`` is None when there is no entry to
    tell it by.
    """

    path: Path
    pages_id: int
    starts: array[int]
    nr_pages: array[int]
    flags: array[int]
    style: PagemapStyle | None

    def __len__(self) -> int:
        return len(self.starts)


def read_pagemap(images_dir: StrPath, pid: int) -> Pagemap:
    """Read ``pagemap-PID.img``; entries must ascend without overlap."""
    check_pid(pid)
    return _read_entries(pagemap_path(images_dir, pid))


def read_shared_pagemap(images_dir: StrPath, shmid: int) -> Pagemap:
    """Read ``pagemap-shmem-SHMID.img``, the pagemap of a piece of shared memory."""
    return _read_entries(shared_pagemap_path(images_dir, shmid))


def _read_entries(path: Path) -> Pagemap:
    with open_image(path.parent, path.name, _framing.PAGEMAP) as image:
        pages_id = _read_head(image)
        starts, nr_pages, flags = array("Q"), array("Q"), array("B")
        style: PagemapStyle | None = None
        end = 0
        for offset, bodies in _batches(image):
            columns = _decode_quickly(bodies, style, end)
            if columns is None:
                columns = _decode_carefully(image, offset, bodies, style, end)
            style = columns.style
            starts.extend(columns.starts)
            nr_pages.extend(columns.nr_pages)
            flags.extend(columns.flags)
            end = starts[-1] + (nr_pages[-1] << PAGE_SHIFT)
        return Pagemap(image.path, pages_id, starts, nr_pages, flags, style)


def read_pagemap_style(images_dir: StrPath, pid: int) -> PagemapStyle | None:
    """Tell the style of ``pagemap-PID.img`` by its first entry, None when it has none."""
    check_pid(pid)
    path = pagemap_path(images_dir, pid)
    with open_image(path.parent, path.name, _framing.PAGEMAP) as image:
        _read_head(image)
        record = image.read_record()
        return None if record is None else _decode_entry(image, *record)[3]


def one_style(found: Iterable[tuple[Path, PagemapStyle | None]]) -> PagemapStyle | None:
    """Tell the style that all pagemaps of a dump have, None when none has an entry."""
    first: tuple[Path, PagemapStyle] | None = None
    for path, style in found:
        if style is None:
            continue
        if first is None:
            first = path, style
        elif first[1] is not style:
            raise ImageError(
                path,
                None,
                f"expected {first[1].value} page counts as in {first[0].name}, "
                f"found {style.value} ones: the images are not of one dump",
            )
    return None if first is None else first[1]


def entry_offset(pagemap: Pagemap, index: int) -> int:
    """Find the byte offset of an entry by reading the image again; for error messages."""
    with open_image(pagemap.path.parent, pagemap.path.name, _framing.PAGEMAP) as image:
        _read_head(image)
        for number, (offset, _) in enumerate(image.records()):
            if number == index:
                return offset
        raise image.error(image.position, "expected the entries read before: the image has changed")


def pagemap_path(images_dir: StrPath, pid: int) -> Path:
    """Name the pagemap image of a task."""
    return Path(images_dir, f"pagemap-{pid}.img")


def shared_pagemap_path(images_dir: StrPath, shmid: int) -> Path:
    """Name the pagemap image of a piece of shared memory."""
    return Path(images_dir, f"pagemap-shmem-{shmid}.img")


def pages_path(images_dir: StrPath, pages_id: int) -> Path:
    """Name the raw image with the bytes of a pagemap's PRESENT entries."""
    return Path(images_dir, f"pages-{pages_id}.img")


def present_pages(pagemap: Pagemap) -> int:
    """Count the pages whose bytes are in the pages image."""
    return sum(compress(pagemap.nr_pages, flag_mask(pagemap, PageFlags.PRESENT)))


def flag_mask(pagemap: Pagemap, flag: PageFlags) -> bytes:
    """Make a byte per entry: 1 where it has the flag, else 0."""
    bits = flag.value
    table = bytes(1 if byte & bits else 0 for byte in range(8)).ljust(256, b"\0")  # no flag is above
    return pagemap.flags.tobytes().translate(table)


def check_pages(images_dir: StrPath, pagemap: Pagemap) -> Path:
    """Check that the pages image is as long as the PRESENT entries need; return its path."""
    path = pages_path(images_dir, pagemap.pages_id)
    size = regular_file_size(path, "pages")
    needed = present_pages(pagemap) << PAGE_SHIFT
    if size < needed:
        raise ImageError(
            path,
            size,
            f"expected {needed} bytes as {pagemap.path.name} says, the image is truncated: copy it again",
        )
    return path


def _read_head(image: ImageFile) -> int:
    record = image.read_record()
    if record is None:
        raise image.error(image.position, "expected a head with pages_id, the image is truncated")
    offset, data = record
    head = parse_message(image, offset, data, _schema_pb2.PagemapHead)
    _refuse_unknown(image, offset, head, "head")
    if not head.HasField("pages_id"):
        raise image.error(offset, "expected a head with pages_id")
    return head.pages_id


def _batches(image: ImageFile) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (offset of the first record, messages) up to the end of the file."""
    while True:
        offset = image.position
        if bodies := image.read_short_messages(_BATCH):
            yield offset, bodies
        elif record := image.read_record():
            yield offset, [record[1]]
        else:
            return


@dataclass(frozen=True, slots=True)
class _Columns:
    style: PagemapStyle | None
    starts: list[int]
    nr_pages: list[int]
    flags: list[int]


# Tag of PagemapBatch.entries (field 1, length-delimited) and a one-byte length.
_PREFIXES: Final = tuple(b"\x0a" + bytes((length,)) for length in range(128))


def _decode_quickly(bodies: list[bytes], style: PagemapStyle | None, end: int) -> _Columns | None:
    """Decode a batch, or return None when anything about it is unusual.

    ``end`` is where the entry before ended, ``style`` that of the entries
    before.
    """
    try:
        prefixes = [_PREFIXES[length] for length in map(len, bodies)]
        blob = b"".join(chain.from_iterable(zip(prefixes, bodies, strict=True)))
        batch = _schema_pb2.PagemapBatch.FromString(blob)
    except (IndexError, DecodeError):
        return None
    batch.DiscardUnknownFields()
    if batch.ByteSize() != len(blob):
        return None

    columns = _schema_pb2.PagemapColumns.FromString(b"".join(bodies))
    starts = list(columns.vaddr)
    compat = list(columns.compat_nr_pages)
    counts = list(columns.nr_pages)
    flags = list(columns.flags)
    if not len(bodies) == len(starts) == len(compat) == len(flags):
        return None
    if not counts:
        found = PagemapStyle.OLD
        counts = compat
    elif len(counts) == len(bodies) and not any(compat):
        found = PagemapStyle.NEW
    else:
        return None
    if style not in (None, found) or 0 in counts or any(columns.in_parent) or not _FLAGS.issuperset(flags):
        return None

    ends = list(map(add, starts, map(lshift, counts, repeat(PAGE_SHIFT))))
    if (
        reduce(or_, starts) % PAGE_SIZE
        or ends[-1] > ADDRESS_END
        or starts[0] < end
        or not all(map(le, ends, starts[1:]))
    ):
        return None
    return _Columns(found, starts, counts, flags)


def _decode_carefully(
    image: ImageFile, offset: int, bodies: list[bytes], style: PagemapStyle | None, end: int
) -> _Columns:
    """Decode a batch entry by entry, raising an ImageError for the first bad one."""
    starts: list[int] = []
    counts: list[int] = []
    all_flags: list[int] = []
    for body in bodies:
        start, count, flags, found = _decode_entry(image, offset, body)
        if style is not None and style is not found:
            raise image.error(
                offset,
                f"expected the page count in the {style.value} field as in the entries before, "
                f"it is in the {found.value} one: the image is damaged",
            )
        if start < end:
            raise image.error(
                offset,
                f"expected ascending entries without overlap, {start:#x} is below {end:#x}, "
                "the end of the one before",
            )
        style = found
        end = start + (count << PAGE_SHIFT)
        starts.append(start)
        counts.append(count)
        all_flags.append(flags)
        offset += 4 + len(body)
    return _Columns(style, starts, counts, all_flags)


def _decode_entry(image: ImageFile, offset: int, body: bytes) -> tuple[int, int, int, PagemapStyle]:
    """Decode one entry to (start, nr_pages, flags, style), checking all that it says by itself."""
    entry = parse_message(image, offset, body, _schema_pb2.PagemapEntry)
    _refuse_unknown(image, offset, entry, "entry")
    for field in ("vaddr", "compat_nr_pages"):
        if not entry.HasField(field):
            raise image.error(offset, f"expected the field {field} in every pagemap entry")

    if entry.HasField("nr_pages"):
        style = PagemapStyle.NEW
        count = entry.nr_pages
        if entry.compat_nr_pages:
            raise image.error(
                offset,
                f"expected one page count, found {entry.compat_nr_pages} in the old field "
                f"and {count} in the new one",
            )
    else:
        style = PagemapStyle.OLD
        count = entry.compat_nr_pages
    start = entry.vaddr
    if start % PAGE_SIZE:
        raise image.error(offset, f"expected a page-aligned address, found {start:#x}")
    if not count:
        raise image.error(offset, f"expected at least one page at {start:#x}, the count is zero")
    if start + (count << PAGE_SHIFT) > ADDRESS_END:
        raise image.error(
            offset, f"expected pages within 64-bit addresses, found {count} pages from {start:#x} on"
        )

    # Before there were flags, in_parent said it all (criu/pagemap.c, init_compat_pagemap_entry).
    if entry.in_parent:
        flags = entry.flags | PageFlags.PARENT.value
    else:
        flags = entry.flags if entry.HasField("flags") else PageFlags.PRESENT.value
    if flags not in _FLAGS:
        raise image.error(
            offset,
            f"expected the flags PARENT, LAZY, PRESENT or LAZY with PRESENT, found {flags:#x}: "
            "damaged, or written by a newer CRIU",
        )
    return start, count, flags, style


def _refuse_unknown(
    image: ImageFile,
    offset: int,
    message: _schema_pb2.PagemapHead | _schema_pb2.PagemapEntry,
    what: str,
) -> None:
    unknown = UnknownFieldSet(message)
    numbers = sorted({unknown[index].field_number for index in range(len(unknown))})
    if numbers:
        listed = ", ".join(map(str, numbers))
        raise image.error(
            offset,
            f"expected a pagemap {what} as CRIU up to 4.2 writes it, found the unknown field {listed}: "
            "written by a newer CRIU or with compressed pages; dump again without compression",
        )
