"""A scripted source for an upstream, in a test's own words: one connection, blocking, on a thread."""

from __future__ import annotations

import socket
import struct
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from criupy._uffd.image_linux import Image
from page_server_clients import ADD_F_PRESENT, CLOSE, FORCE_CLOSE, GET, HANG, PAGE, frame, loopback

BASE = 0x10_0000_0000
EXTENTS = [(0, 300), (301, 1), (1000, 700), (1700, 40), (5000, 255)]
"""Of each task: the first page from BASE on, and how many; the last but one begins where one ends."""

FRAMES = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4xQQQ")}


@dataclass(frozen=True)
class Memory:
    """The lazy pages of some tasks."""

    pids: tuple[int, ...] = (100, 101)
    extents: tuple[tuple[int, int], ...] = tuple(EXTENTS)

    @property
    def pages_per_task(self) -> int:
        return sum(nr for _, nr in self.extents)

    def image(self, pid: int) -> Image:
        starts = array("Q", [BASE + first * PAGE for first, _ in self.extents])
        return Image(pid, starts, array("Q", [nr for _, nr in self.extents]), array("Q", self.offsets()))

    def offsets(self) -> list[int]:
        """Return where the extents' pages are in a pages file."""
        found, offset = [], 0
        for _, nr in self.extents:
            found.append(offset)
            offset += nr
        return found

    def page(self, pid: int, address: int) -> bytes:
        return struct.pack("<QQ", pid, address) * (PAGE // 16)

    def pages(self, pid: int, address: int, nr: int) -> bytes:
        return b"".join(self.page(pid, address + n * PAGE) for n in range(nr))

    def file(self, pid: int) -> bytes:
        """Return all that the pages file should hold."""
        return b"".join(self.pages(pid, BASE + first * PAGE, nr) for first, nr in self.extents)

    def run(self, address: int) -> int:
        """Return how many pages there are from an address on; 0 where none is lazy."""
        page = (address - BASE) // PAGE
        return next((first + nr - page for first, nr in self.extents if first <= page < first + nr), 0)


Get = tuple[int, int, int]
"""Pages, address and pid."""


@dataclass
class Source:
    """Answers GETs in order; ``edit`` may change an answer's bytes or end the connection by raising.

    It is called with the number of the request, the request and the answer as it should be.
    """

    memory: Memory
    frame_size: int = 32
    max_pages: int = 1024
    status: int = 0
    edit: Callable[[int, Get, bytes], bytes] | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    requests: list[Get] = field(default_factory=list)
    asked: threading.Condition = field(default_factory=threading.Condition)
    end: str = ""
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self.theirs, self.sock = loopback()
        self.sock.settimeout(HANG)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)
        self._reader = threading.Thread(target=self._read, name="source-reader", daemon=True)
        self._waiting: list[tuple[int, int, int, int]] = []
        self._over = False
        self._reader.start()
        self._thread.start()

    def take_socket(self) -> int:
        """Give the upstream its end."""
        return self.theirs.detach()

    def close(self) -> None:
        """Wait for the end of the connection."""
        self.gate.set()
        if self.theirs.fileno() >= 0:
            self.theirs.close()
        self._join()
        self.sock.close()

    def _join(self) -> None:
        for thread in (self._reader, self._thread):
            thread.join(HANG)
            assert not thread.is_alive()

    def ended(self) -> str:
        """Wait until the upstream has ended the connection; say how."""
        self._join()
        return self.end

    def wait_for_requests(self, nr: int) -> None:
        with self.asked:
            assert self.asked.wait_for(lambda: len(self.requests) >= nr, HANG), self.requests

    def _read(self) -> None:
        size = self.frame_size
        buffer = b""
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                self.end = "reset"
                break
            if not data:
                self.end = self.end or "fin"
                break
            buffer += data
            with self.asked:
                while len(buffer) >= size:
                    words = FRAMES[size].unpack(buffer[:size])
                    buffer = buffer[size:]
                    self._waiting.append(words)
                    if words[0] == GET:
                        self.requests.append(words[1:])
                    self.asked.notify_all()
        with self.asked:
            self._over = True
            self.asked.notify_all()

    def _run(self) -> None:
        try:
            self._answer_all()
        except ConnectionResetError:
            self.end = "reset"  # the reader is not told, too
        except (OSError, StopIteration):
            pass

    def _answer_all(self) -> None:
        number = 0
        while True:
            with self.asked:
                self.asked.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                command, *words = self._waiting.pop(0)
            while not self.gate.wait(0.01) and not self._over:
                pass
            if command in {CLOSE, FORCE_CLOSE}:
                self.sock.sendall(struct.pack("<i", self.status))
                continue
            nr, address, pid = words
            available = self.memory.run(address)
            if command != GET or not available or not nr or nr > min(available, 1024) or address % PAGE:
                self.violations.append(f"{command:#x} of {nr} pages at {address:#x} of {pid}")
                return
            nr = min(nr, self.max_pages)
            answer = frame(self.frame_size, ADD_F_PRESENT, nr, address, pid)
            answer += self.memory.pages(pid, address, nr)
            if self.edit is not None:
                answer = self.edit(number, (words[0], address, pid), answer)
            number += 1
            self.sock.sendall(answer)
