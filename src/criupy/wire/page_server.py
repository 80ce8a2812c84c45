"""The page-server protocol over TCP: frames, and what both sides share.

Everything is a frame ``{cmd, nr_pages, address, dst_id}`` of little-endian
integers as CRIU's C struct lays them out, so its size depends on who sends:

    24 bytes  u32 cmd, u32 nr_pages,       u64 address, u64 dst_id   CRIU 3.17 to 4.1.1
    32 bytes  u32 cmd, u32 of padding, u64 nr_pages, u64 address, u64 dst_id   CRIU 4.2 on

No version is exchanged. A client is told (the images know, see
``criupy.images.frame_size``); a server sees it in the first frame, see
``detect_frame_size``. The padding is whatever lay on the sender's stack.

``cmd`` is ``flags << 16 | command`` for every frame with pages, the bare
command otherwise. (CRIU: criu/page-xfer.c, criu/include/pagemap.h.)
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

from criupy.errors import LocalProtocolError, RemoteProtocolError

FrameSize: TypeAlias = Literal[24, 32]

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
ADDRESS_END: Final = 1 << 64

#: The most pages our client asks for at once. A stock server answers with 1024
#: at most, and a larger count would read like an address when a server detects
#: the frame size.
MAX_GET_PAGES: Final = 0xFFFF

_COMMAND_MASK: Final = 0xFFFF
_FLAGS_SHIFT: Final = 16

STATUS: Final = struct.Struct("<i")

_STRUCTS: Final[dict[FrameSize, struct.Struct]] = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4xQQQ")}


class Command(enum.IntEnum):
    """What a frame asks for; numbers we do not know become pseudo-members."""

    ADD = 1
    HOLE = 2
    OPEN = 3
    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    GET = 7
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024
    # Not CRIU's: see criupy.wire.extension.
    HELLO = 0x6301
    GETV = 0x6302
    FINISHED = 0x6303
    ABORT = 0x6304
    REFUSED = 0x6305

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or not 0 <= value <= _COMMAND_MASK:
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN_{value:#x}"
        member._value_ = value
        return member


class PageFlags(enum.IntFlag, boundary=enum.KEEP):
    """Flags of the pages a frame is about; unknown bits are kept."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4


NO_FLAGS: Final = PageFlags(0)

_ADDS: Final = frozenset((Command.ADD, Command.HOLE, Command.ADD_F))
_OPENS: Final = frozenset((Command.OPEN, Command.OPEN2, Command.PARENT))
_CLOSES: Final = frozenset((Command.CLOSE, Command.FORCE_CLOSE))

# Low byte of dst_id in OPEN, OPEN2, PARENT and ADD: what the id numbers. 1 is
# a task and 2 shared memory; the rest was sent by CRIU before 3.3.
_TASK_TYPES: Final = frozenset((1, 10, 11, 16, 17))
_SHMEM_TYPES: Final = frozenset((2, 27, 28, 29, 32, 33, 34))
_TYPE_BITS: Final = 8


class ImageType(enum.Enum):
    """Which pagemap the pages of an upload belong to."""

    TASK = 1
    SHMEM = 2


def encode_image_id(image_type: ImageType, number: int) -> int:
    """Make the dst_id that names a pagemap in OPEN2, PARENT and ADD_F."""
    return number << _TYPE_BITS | image_type.value


def decode_image_id(dst_id: int) -> tuple[ImageType, int] | None:
    """Split such a dst_id; None when its type is unknown."""
    low = dst_id & ((1 << _TYPE_BITS) - 1)
    if low in _TASK_TYPES:
        return ImageType.TASK, dst_id >> _TYPE_BITS
    if low in _SHMEM_TYPES:
        return ImageType.SHMEM, dst_id >> _TYPE_BITS
    return None


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; ``dst_id`` is the raw pid in a GET and its answer, an image id elsewhere."""

    command: Command
    nr_pages: int = 0
    address: int = 0
    dst_id: int = 0
    flags: PageFlags = NO_FLAGS

    def encode(self, size: FrameSize) -> bytes:
        """Encode to ``size`` bytes; raise LocalProtocolError for values that do not fit."""
        try:
            return _STRUCTS[size].pack(
                self.flags << _FLAGS_SHIFT | self.command, self.nr_pages, self.address, self.dst_id
            )
        except struct.error as error:
            raise LocalProtocolError(f"{self}: does not fit a frame of {size} bytes: {error}") from error

    @classmethod
    def decode(cls, data: bytes, size: FrameSize) -> Self:
        """Decode exactly ``size`` bytes; any bytes are some frame."""
        cmd, nr_pages, address, dst_id = _STRUCTS[size].unpack(data)
        return cls(Command(cmd & _COMMAND_MASK), nr_pages, address, dst_id, PageFlags(cmd >> _FLAGS_SHIFT))


def detect_frame_size(head: bytes) -> FrameSize | None:
    """Tell a client's frame size by the first 24 bytes it sent.

    None means a leading CLOSE, which is the same in both: answer it, then
    ignore up to 8 more bytes. Raise RemoteProtocolError for what no client
    starts with. Bytes 4 to 7 are never looked at: in a long frame they are
    garbage.
    """
    if len(head) != 24:
        raise LocalProtocolError(f"detect_frame_size: expected 24 bytes, got {len(head)}")
    cmd, second, third = struct.unpack("<I4xQQ", head)
    command = Command(cmd & _COMMAND_MASK)
    if command in _CLOSES:
        return None
    if command is Command.GET:
        # Short: the address, and no mapping starts below 64 KiB. Long: a
        # count, and no client asks for 256 MiB at once.
        return 24 if second > MAX_GET_PAGES else 32
    if command is Command.HELLO:
        return 32
    if command in _OPENS or command in _ADDS:
        # Short: dst_id with a type in its low byte. Long: the address, which
        # is page-aligned (0 in OPEN), and no type is zero.
        if decode_image_id(third) is not None:
            return 24
        if third % PAGE_SIZE == 0:
            return 32
    raise RemoteProtocolError("expected the first frame of a page-server client", offset=0, data=head)


class Incoming:
    """Received bytes in the pieces they came in, so that pages are passed on and not copied."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self.length: int = 0
        #: Bytes taken so far.
        self.offset: int = 0
        self.eof: bool = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take in what was received by reference; no bytes are the end of the stream."""
        if self.eof:
            raise LocalProtocolError("receive: the stream has already ended")
        if not data:
            self.eof = True
            return
        self._pieces.append(memoryview(data).cast("B"))
        self.length += len(self._pieces[-1])

    def peek(self, size: int) -> bytes:
        """Copy out the next ``size`` bytes, or what there is of them, and leave them."""
        out = b""
        for piece in self._pieces:
            out += piece[: size - len(out)]
            if len(out) == size:
                break
        return out

    def take(self, size: int) -> bytes | None:
        """Take exactly ``size`` bytes; None when there are fewer."""
        if self.length < size:
            return None
        data = self.peek(size)
        left = size
        while left:
            left -= len(self.take_piece(left))
        return data

    def take_piece(self, limit: int) -> memoryview:
        """Take up to ``limit`` bytes that lie together, as a view of what was fed."""
        piece = self._pieces.popleft()
        if len(piece) > limit:
            self._pieces.appendleft(piece[limit:])
            piece = piece[:limit]
        self.length -= len(piece)
        self.offset += len(piece)
        return piece


def check_run(address: int, nr_pages: int) -> str | None:
    """Say what is wrong with a run of pages; None when nothing is."""
    if address % PAGE_SIZE:
        return f"address {address:#x} is not page-aligned"
    if nr_pages < 1:
        return "no pages"
    if address + (nr_pages << PAGE_SHIFT) > ADDRESS_END:
        return f"{nr_pages} pages from {address:#x} on leave 64-bit addresses"
    return None
