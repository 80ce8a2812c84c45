"""The frame around every checkpoint image.

An image is the common magic, the magic of its type, then records of
``{u32 size; message}`` in little-endian order until the end of the file. The
inventory has only its own magic, and a service image (statistics) starts with
another one in the place of the common. (CRIU: criu/include/magic.h, criu/image.c,
criu/protobuf.c.) No image says how many records it has, so a cut exactly
between two records can only be noticed by whoever knows what has to be there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from criupy.errors import ImageError

StrPath: TypeAlias = str | os.PathLike[str]

COMMON_MAGIC: Final = 0x54564319
SERVICE_MAGIC: Final = 0x55105940

#: First bytes of what a whole image may have been packed with.
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "LZ4",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
}

_READ_SIZE: Final = 256 * 1024

#: What a record with a short message has in bytes, most of the time.
_SHORT_RECORD: Final = 32


@dataclass(frozen=True, slots=True)
class ImageKind:
    """Describe one type of image: its name, magic and largest sane message in bytes."""

    name: str
    magic: int
    max_message: int


# The limits are far above what CRIU writes and far below what would hurt; an
# mm image holds one message with every VMA of the task (about 60 bytes each).
INVENTORY: Final = ImageKind("inventory", 0x58313116, 1 << 20)
PSTREE: Final = ImageKind("pstree", 0x50273030, 16 << 20)
CORE: Final = ImageKind("core", 0x55053847, 16 << 20)
MM: Final = ImageKind("mm", 0x57492820, 256 << 20)
PAGEMAP: Final = ImageKind("pagemap", 0x56084025, 64 << 10)
STATS: Final = ImageKind("statistics", 0x57093306, 64 << 10)


@dataclass(slots=True)
class ImageFile:
    """An open image; ``position`` is the byte after what was read so far."""

    path: Path
    kind: ImageKind
    size: int
    position: int
    file: BinaryIO

    def error(self, offset: int | None, expected: str) -> ImageError:
        return ImageError(self.path, offset, expected)

    def read_record(self) -> tuple[int, bytes] | None:
        """Read the next record as (its offset, the message); None at the end of the file."""
        offset = self.position
        if offset == self.size:
            return None
        head = self.file.read(4)
        length = int.from_bytes(head, "little")
        left = self.size - offset - 4
        if left < 0 or len(head) < 4:
            raise self.error(
                offset,
                f"expected a 4-byte message size, {max(0, self.size - offset)} bytes are left: "
                "the image is truncated",
            )
        if length > self.kind.max_message:
            raise self.error(
                offset,
                f"expected a message of at most {self.kind.max_message} bytes, its size says {length}: "
                "the image is damaged",
            )
        message = self.file.read(length) if length <= left else b""
        if length > left or len(message) < length:
            raise self.error(
                offset,
                f"expected a message of {length} bytes, {left} are left: the image is truncated",
            )
        self.position = offset + 4 + length
        return offset, message

    def read_short_messages(self, limit: int) -> list[bytes]:
        """Read up to ``limit`` messages of less than 128 bytes, in a loop with nothing else in it.

        Stop before a record that is longer, cut off or missing: what it is,
        is for read_record to say.
        """
        block = self.file.read(limit * _SHORT_RECORD)
        end = len(block)
        position = 0
        bodies: list[bytes] = []
        append = bodies.append
        for _ in range(limit):
            start = position + 4
            # The upper bytes of the size; at the end of the block fewer than three.
            if block[position + 1 : start] != b"\0\0\0" or (length := block[position]) > 127:
                break
            stop = start + length
            if stop > end:
                break
            append(block[start:stop])
            position = stop
        self.position += position
        self.file.seek(self.position)
        return bodies

    def read_only_record(self) -> tuple[int, bytes]:
        """Read the record of an image that has exactly one."""
        record = self.read_record()
        if record is None:
            raise self.error(self.position, f"expected one {self.kind.name} message, the image has none")
        if self.position != self.size:
            raise self.error(
                self.position, f"expected the end after one {self.kind.name} message, more follows"
            )
        return record

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, message) up to the end of the file."""
        while (record := self.read_record()) is not None:
            yield record


@contextmanager
def open_image(images_dir: StrPath, name: str, kind: ImageKind) -> Iterator[ImageFile]:
    """Open an image and check its magics; every refusal is an ImageError."""
    path = Path(images_dir, name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Also keeps us from blocking on a FIFO.
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ImageError(path, None, f"expected a {kind.name} image, this is {what}")
        file = path.open("rb", buffering=_READ_SIZE)
    except OSError as error:
        raise _unreadable(path, kind.name, error) from error
    with file:
        image = ImageFile(path, kind, os.fstat(file.fileno()).st_size, 0, file)
        try:
            _check_magic(image)
            yield image
        except OSError as error:
            raise _unreadable(path, kind.name, error) from error


def _unreadable(path: Path, what: str, error: OSError) -> ImageError:
    hint = ""
    if isinstance(error, FileNotFoundError):
        does = "had as its work directory" if what == STATS.name else "dump wrote to"
        hint = f" (is this the directory that criu {does}?)"
    return ImageError(path, None, f"expected a readable {what} image: {error.strerror}{hint}")


def regular_file_size(path: Path, what: str) -> int:
    """Tell the length in bytes of a raw image, or raise an ImageError saying why there is none."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, what, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, None, f"expected a {what} image, this is no regular file")
    return status.st_size


def _check_magic(image: ImageFile) -> None:
    if image.kind is INVENTORY:
        magics: tuple[int, ...] = (image.kind.magic,)
    else:
        magics = (SERVICE_MAGIC if image.kind is STATS else COMMON_MAGIC, image.kind.magic)
    head = image.file.read(4 * len(magics))
    if not head:
        raise image.error(0, f"expected a {image.kind.name} image, the file is empty")
    for start, name in _COMPRESSED.items():
        if head.startswith(start):
            raise image.error(0, f"expected a {image.kind.name} image, this is {name}-compressed: unpack it")
    for index, magic in enumerate(magics):
        offset = 4 * index
        word = head[offset : offset + 4]
        if len(word) < 4:
            raise image.error(offset, f"expected the magic {magic:#010x}: the image is truncated")
        found = int.from_bytes(word, "little")
        if found != magic:
            raise image.error(offset, f"expected the magic {magic:#010x}, found {found:#010x}{_hint(found)}")
    image.position = len(head)


def _hint(magic: int) -> str:
    if magic == COMMON_MAGIC:
        return ": this is no service image, but one of a dump"
    if magic == SERVICE_MAGIC:
        return ": this is one of CRIU's service images (statistics, irmap cache)"
    for kind in (INVENTORY, PSTREE, CORE, MM, PAGEMAP, STATS):
        if magic == kind.magic:
            return f": this is the start of a {kind.name} image"
    return ""
