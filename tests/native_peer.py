"""The other ends of a pager: a scripted source, and what a test waits for."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import BULK, Notice, Pager
from criupy.wire.extension import HELLO_LENGTH, Refusal, decode_runs, encode_refused
from criupy.wire.page_server import Command, Frame
from native_target import PAGE

if TYPE_CHECKING:
    from criupy._uffd._native import Stats

GET, ADD_F_PRESENT, CLOSE, FORCE_CLOSE = 7, 4 << 16 | 6, 0x1023, 0x1024
HELLO, GETV, FINISHED, REFUSED = 0x6301, 0x6302, 0x6303, 0x6305
GETV_PRESENT = 4 << 16 | GETV
RESTORE_FINISHED = struct.pack("=I", 0x52535446)
FRAMES = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4sQQQ")}
GARBAGE = b"\xde\xad\xbe\xef"


def content(task_id: int, address: int, nr_pages: int = 1) -> bytes:
    """The bytes that the source has there: none of its pages is like another, none is zeros."""
    pages = range(address // PAGE, address // PAGE + nr_pages)
    return b"".join(struct.pack("<QQ", task_id, page) * (PAGE // 16) for page in pages)


class Source:
    """A page server on loopback that does what the test says, one frame at a time."""

    def __init__(self, frame_size: int = 32) -> None:
        self.frame_size = frame_size
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            self.sock, _ = listener.accept()
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.requests: list[tuple[int, int, int]] = []
        self.short = 1 << 30  # the longest answer that answer() gives
        self.runs: list[list[tuple[int, int]]] = []  # of each GETV that serve() answered
        self.said: list[int] = []  # what else serve() was told
        self._thread: threading.Thread | None = None
        self._end = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.sock.close()

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                break
            data += piece
        return data

    def frame(self) -> tuple[int, int, int, int]:
        """Wait for the next frame: command, pages, address, id."""
        return self._decode(self.receive(self.frame_size))

    def _decode(self, data: bytes) -> tuple[int, int, int, int]:
        assert len(data) == self.frame_size, f"the stream ended with {data!r}"
        fields = FRAMES[self.frame_size].unpack(data)
        return fields[0], *fields[-3:]

    def get(self) -> tuple[int, int, int]:
        """Wait for a GET: pages, address, id."""
        cmd, *request = self.frame()
        assert cmd == GET
        nr_pages, address, task_id = request
        self.requests.append((nr_pages, address, task_id))
        return nr_pages, address, task_id

    def header(self, cmd: int, nr_pages: int, address: int, task_id: int) -> bytes:
        padding = () if self.frame_size == 24 else (GARBAGE,)
        return FRAMES[self.frame_size].pack(cmd, *padding, nr_pages, address, task_id)

    def reply(self, request: tuple[int, int, int], *, data: bytes | None = None) -> None:
        nr_pages, address, task_id = request
        self.sock.sendall(
            self.header(ADD_F_PRESENT, nr_pages, address, task_id)
            + (content(task_id, address, nr_pages) if data is None else data)
        )

    def getv(self) -> tuple[int, list[tuple[int, int]]]:
        """Wait for a GETV: id, and the runs of (address, pages)."""
        cmd, nr_pages, nr_runs, task_id = self.frame()
        assert cmd == GETV
        return task_id, self._runs(nr_pages, nr_runs)

    def _runs(self, nr_pages: int, nr_runs: int) -> list[tuple[int, int]]:
        return decode_runs(Frame(Command.GETV, nr_pages, nr_runs), self.receive(16 * nr_runs))

    def reply_all(self, task_id: int, runs: Sequence[tuple[int, int]]) -> None:
        """Answer a GETV."""
        self.sock.sendall(
            self.header(GETV_PRESENT, sum(nr for _, nr in runs), len(runs), task_id)
            + b"".join(content(task_id, *run) for run in runs)
        )

    def refuse(self, reason: Refusal) -> None:
        self.sock.sendall(encode_refused(reason))

    def answer(self) -> tuple[int, int, int]:
        """Answer the next GET with at most `short` pages."""
        nr_pages, address, task_id = self.get()
        self.reply((min(nr_pages, self.short), address, task_id))
        return nr_pages, address, task_id

    def ending(self) -> str:
        """Wait for the end of the stream: FIN or RST, after what frames of a close."""
        data = b""
        try:
            while piece := self.sock.recv(65536):
                data += piece
        except ConnectionResetError:
            return "RST" if not data else f"RST after {data.hex()}"
        return "FIN" if not data else f"FIN after {data.hex()}"

    def close(self, status: int = 0, *, command: int = CLOSE) -> str:
        """Expect a close, answer it, and tell how the stream ends after it."""
        assert self.frame() == (command, 0, 0, 0)
        self.sock.sendall(struct.pack("<i", status))
        return self.ending()

    def serve(self) -> None:
        """Answer everything from now on in a thread, until joined() finds the end."""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while data := self.receive(self.frame_size):
            cmd, nr_pages, address, task_id = self._decode(data)
            if cmd == GET:
                self.requests.append((nr_pages, address, task_id))
                self.reply((min(nr_pages, self.short), address, task_id))
            elif cmd == GETV:
                self.runs.append(self._runs(nr_pages, address))
                self.reply_all(task_id, self.runs[-1])
            else:
                self.said.append(cmd)
                if cmd == HELLO:
                    self.receive(HELLO_LENGTH)
                elif cmd == CLOSE:
                    self.sock.sendall(struct.pack("<i", 0))
                    self._end = self.ending()
                    return
                else:
                    assert cmd == FINISHED
        self._end = "FIN without a word"

    def joined(self) -> str:
        assert self._thread is not None
        self._thread.join()
        return self._end


def remote_image(
    task_id: int, extents: Sequence[tuple[int, int]], *, not_inherited: bytes | None = None
) -> Image:
    """An image of (address, nr_pages) extents whose pages a source has."""
    starts, nr_pages = ([extent[i] for extent in extents] for i in (0, 1))
    return Image(task_id, array("Q", starts), array("Q", nr_pages), None, not_inherited)


class Restore:
    """A pager in a restore, with the test in the place of criu."""

    def __init__(self, **config: Any) -> None:
        small = {"nr_buffers": 4, "request_pages": 16, "fault_around_pages": 1, "nr_copiers": 1}
        self.pager = Pager(**{"link_timeout": 3600.0, **small, **config})
        self.criu, self._theirs = socket.socketpair()
        self.notices: list[Notice] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.pager.close()
        self.criu.close()
        self._theirs.close()

    def link(self, source: Source, *, shared: bool = False) -> None:
        self.pager.set_link(source.client.detach(), frame_size=source.frame_size, shared=shared)

    def link_lane(self, source: Source, lane: int = BULK, preamble: bytes = b"") -> None:
        self.pager.set_link(
            source.client.detach(), frame_size=32, extended=True, lane=lane, preamble=preamble
        )

    def watch(self) -> None:
        self.pager.watch_restore(self._theirs.detach())

    def finish(self) -> None:
        """Announce that all tasks are there, and that the restore has finished."""
        self.watch()
        self.criu.sendall(RESTORE_FINISHED)

    def until(self, condition: Callable[[Stats], bool]) -> Stats:
        """Wait until the counters fulfil a condition; they are published every 20 ms."""
        while True:
            stats = self.pager.snapshot()
            self.notices += self.pager.notices()
            if condition(stats):
                return stats
            time.sleep(0.001)

    def obeyed(self) -> Stats:
        """Wait until every command so far was carried out."""
        return self.until(self.pager.obeyed)


def open_files() -> set[str]:
    """What this process has open, but for how often."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        # The listing's own is gone by then.
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{fd.name} {fd.readlink()}")
    return found
