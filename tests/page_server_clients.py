"""A destination of the page server, in a test's own words: frames by struct, sockets blocking."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Self

PAGE = 4096
GET, ADD_F_PRESENT, CLOSE, FORCE_CLOSE = 7, 4 << 16 | 6, 0x1023, 0x1024
FRAMES = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4sQQQ")}
GARBAGE = b"\xde\xad\xbe\xef"
"""What 4.2 leaves in the padding of a frame."""

HANG = 30.0


def frame(size: int, command: int, nr_pages: int = 0, address: int = 0, dst_id: int = 0) -> bytes:
    """Encode a frame as a CRIU with frames of this size does."""
    if size == 24:
        return FRAMES[24].pack(command, nr_pages, address, dst_id)
    return FRAMES[32].pack(command, GARBAGE, nr_pages, address, dst_id)


class Destination:
    """A connection to a page server."""

    def __init__(self, sock: socket.socket, frame_size: int = 32) -> None:
        self.sock = sock
        self.frame_size = frame_size
        sock.settimeout(HANG)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, command: int, nr_pages: int = 0, address: int = 0, dst_id: int = 0) -> None:
        self.sock.sendall(frame(self.frame_size, command, nr_pages, address, dst_id))

    def receive(self, size: int) -> bytes:
        """Receive so many bytes; fewer at the end of the stream."""
        data = bytearray()
        while len(data) < size and (piece := self.sock.recv(min(size - len(data), 1 << 20))):
            data += piece
        return bytes(data)

    def is_over(self) -> bool:
        """Tell whether nothing more comes, because the server has ended the connection."""
        try:
            return not self.sock.recv(1)
        except ConnectionResetError:
            return True

    def answer(self) -> tuple[int, int, int, bytes]:
        """Receive an answer: its pages' number, address, process and bytes."""
        head = self.receive(self.frame_size)
        if self.frame_size == 24:
            command, nr_pages, address, pid = FRAMES[24].unpack(head)
        else:
            command, _, nr_pages, address, pid = FRAMES[32].unpack(head)
        assert command == ADD_F_PRESENT
        return nr_pages, address, pid, self.receive(nr_pages * PAGE)

    def get(self, pid: int, address: int, nr_pages: int = 1) -> bytes:
        """Ask for pages, again where an answer is shorter, and return them."""
        data = b""
        while nr_pages:
            self.send(GET, nr_pages, address, pid)
            got, where, whose, pages = self.answer()
            assert (where, whose, len(pages)) == (address, pid, got * PAGE)
            assert 1 <= got <= nr_pages
            data += pages
            address += got * PAGE
            nr_pages -= got
        return data

    def close(self, command: int = CLOSE) -> int:
        """End the session and return the status; the connection is closed then."""
        self.send(command)
        (status,) = struct.unpack("<i", self.receive(4))
        self.sock.close()
        return int(status)


def loopback() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def resident() -> int:
    """Return the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


# ---- what a dumper does ----------------------------------------------------------------------------

ADD, HOLE, OPEN, OPEN2, PARENT, ADD_F = 1, 2, 3, 4, 5, 6
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4


def task(pid: int) -> int:
    """Name the pagemap of a task."""
    return pid << 8 | 1


def shmem(shmid: int) -> int:
    """Name the pagemap of a piece of shared memory."""
    return shmid << 8 | 2


class Dumper(Destination):
    """A connection of a dump to a page server; ``sent`` is what it has sent so far."""

    def open(self, image: int) -> bool:
        """Begin an image; return whether there is a parent."""
        self.send(OPEN2, dst_id=image)
        return bool(self.receive(1)[0])

    def has_parent(self, image: int) -> int:
        self.send(PARENT, dst_id=image)
        return int(struct.unpack("<i", self.receive(4))[0])

    def add(self, image: int, address: int, data: bytes, flags: int = PE_PRESENT) -> None:
        """Send pages."""
        self.send(flags << 16 | ADD_F, len(data) // PAGE, address, image)
        self.sock.sendall(data)

    def entry(self, image: int, address: int, nr_pages: int, flags: int = PE_PARENT) -> None:
        """Send an entry without pages."""
        self.send(flags << 16 | ADD_F, nr_pages, address, image)
