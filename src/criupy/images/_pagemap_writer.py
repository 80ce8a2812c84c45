"""Writing pagemap images: quickly, as there can be millions of entries and a dumper stands still for it."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, Final

from criupy.images._framing import COMMON_MAGIC, PAGEMAP
from criupy.images._pagemap import PagemapStyle
from criupy.images._schema_pb2 import PagemapEntry, PagemapHead
from criupy.images._tasks import PAGE_SHIFT

_BATCH: Final = 4096
_MAX_RESTS: Final = 1 << 16

_size: Final = struct.Struct("<I").pack

# An address's varint is three bytes for its low 21 bits, of which a page has 512, and those of the rest.
_LOW_BITS: Final = 21
_LOW_VARINTS: Final = tuple(
    bytes((0x80, 0x80 | page << 5 & 0x7F, 0x80 | page >> 2)) for page in range(1 << _LOW_BITS - PAGE_SHIFT)
)
_VADDR_TAG: Final = PagemapEntry(vaddr=0).SerializeToString()[:1]


def write_pagemap(
    file: BinaryIO,
    pages_id: int,
    starts: array[int],
    nr_pages: array[int],
    flags: array[int],
    style: PagemapStyle,
) -> None:
    """Write a pagemap image from what a Pagemap has; ``pages_id`` is the number of its pages image.

    The entries are taken for what ``read_pagemap`` accepts, and not checked
    again. A page count that the old style has no room for is a ValueError.
    """
    head = PagemapHead(pages_id=pages_id).SerializeToString()
    file.write(struct.pack("<II", COMMON_MAGIC, PAGEMAP.magic) + _size(len(head)) + head)
    records = _records(starts, nr_pages, flags, style)
    while batch := b"".join(islice(records, _BATCH)):
        file.write(batch)


def _records(
    starts: array[int], nr_pages: array[int], flags: array[int], style: PagemapStyle
) -> Iterator[bytes]:
    """Encode entries, each behind its size, from parts encoded before: protobuf lets them be put together."""
    rests: dict[tuple[int, int], bytes] = {}
    high = -1
    high_varint = b""
    sizes = [_size(length) for length in range(64)]
    for start, count, flag in zip(starts, nr_pages, flags, strict=True):
        rest = rests.get((count, flag))
        if rest is None:
            if len(rests) > _MAX_RESTS:
                rests.clear()
            rest = rests[count, flag] = _without_address(count, flag, style)
        if start >> _LOW_BITS != high:
            high = start >> _LOW_BITS
            high_varint = PagemapEntry(vaddr=high).SerializeToString()[1:]
        if high:
            low = _LOW_VARINTS[start >> PAGE_SHIFT & 0x1FF]
            body = b"".join((_VADDR_TAG, low, high_varint, rest))
        else:
            body = PagemapEntry(vaddr=start).SerializeToString() + rest
        yield sizes[len(body)] + body


def _without_address(count: int, flag: int, style: PagemapStyle) -> bytes:
    if style is PagemapStyle.NEW:
        entry = PagemapEntry(compat_nr_pages=0, flags=flag, nr_pages=count)  # the 0 is required
    else:
        entry = PagemapEntry(compat_nr_pages=count, flags=flag)
    return entry.SerializeToString()
