"""A process with lazy memory that does what a test says, one thread per order.

Run as a program it obeys orders from a descriptor; :class:`Target` is the
test's end. A thread per order, because an order may wait for a page.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Self

from criupy._uffd._native import ffi, lib

PAGE = 4096
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED = 4
MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 102, 103
PROT_READ, PROT_WRITE = 1, 2
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_FIXED = 2, 0x20, 0x10
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # FORK, REMAP, REMOVE, UNMAP
UFFD_USER_MODE_ONLY = 1

Outcome = tuple[Any, int]  # what the order returned, and errno


class Obeying:
    """The orders, in the process with the lazy memory."""

    def __init__(self, orders: Connection) -> None:
        self.orders = orders
        self.threads: dict[int, threading.Thread] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.libc = ctypes.CDLL(None, use_errno=True)
        for name in ("mmap", "mremap"):
            getattr(self.libc, name).restype = ctypes.c_size_t
        self.uffd = self.for_child = -1

    def _call(self, name: str, *args: int | bytes) -> Outcome:
        ctypes.set_errno(0)
        wide = [ctypes.c_size_t(arg) if isinstance(arg, int) else arg for arg in args]
        result = getattr(self.libc, name)(*wide)
        return result, ctypes.get_errno()

    def map(self, nr_pages: int, hint: int = 0) -> Outcome:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | (_MAP_FIXED if hint else 0)
        return self._call("mmap", hint, nr_pages * PAGE, PROT_READ | PROT_WRITE, flags, 2**64 - 1, 0)

    def open_uffd(self) -> Outcome:
        self.uffd = lib.criupy_uffd_open(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.uffd >= 0:
            result = lib.criupy_uffd_api(self.uffd, _EVENTS, ffi.new("uint64_t *"))
            assert result == 0
        return self.uffd, 0

    def close_uffd(self) -> Outcome:
        os.close(self.uffd)
        return 0, 0

    def register(self, addr: int, length: int) -> Outcome:
        return lib.criupy_uffd_register(self.uffd, addr, length, ffi.new("uint64_t *")), 0

    def read(self, addr: int, length: int) -> Outcome:
        out = ctypes.create_string_buffer(length)
        self.libc.memcpy(out, ctypes.c_size_t(addr), ctypes.c_size_t(length))
        return out.raw, 0

    def write(self, addr: int, data: bytes) -> Outcome:
        self.libc.memcpy(ctypes.c_size_t(addr), data, ctypes.c_size_t(len(data)))
        return None, 0

    def write_to_pipe(self, addr: int, length: int) -> Outcome:
        """Touch through a system call; the bytes that went in, or the errno."""
        reading, writing = os.pipe()
        try:
            got, error = self._call("write", writing, addr, length)
            return os.read(reading, length) if got > 0 else None, error
        finally:
            os.close(reading)
            os.close(writing)

    def madvise(self, addr: int, length: int, advice: int) -> Outcome:
        return self._call("madvise", addr, length, advice)

    def munmap(self, addr: int, length: int) -> Outcome:
        return self._call("munmap", addr, length)

    def mprotect(self, addr: int, length: int, prot: int) -> Outcome:
        return self._call("mprotect", addr, length, prot)

    def mremap(self, addr: int, old: int, new: int, flags: int, to: int = 0) -> Outcome:
        return self._call("mremap", addr, old, new, flags, to)

    def wait(self, pid: int) -> Outcome:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0

    def fork(self) -> None:
        # Not in a thread: a child has only the one that forked.
        pid = os.fork()
        if pid:
            os.close(self.for_child)
            self.orders.send(pid)
            return
        self.orders.close()
        self.orders = Connection(self.for_child)
        self.threads, self.outcomes = {}, {}

    def _run(self, key: int, order: Callable[..., Outcome], args: tuple[Any, ...]) -> None:
        self.outcomes[key] = order(*args)

    def serve(self) -> None:
        while True:
            try:
                verb, *rest = self.orders.recv()
            except EOFError:
                # Threads may wait for pages that never come.
                os._exit(0)
            if verb == "start":
                key, name, args = rest
                thread = threading.Thread(
                    target=self._run, args=(key, getattr(self, name), args), daemon=True
                )
                self.threads[key] = thread
                thread.start()
            elif verb == "result":
                self.threads.pop(rest[0]).join()
                self.orders.send(self.outcomes.pop(rest[0]))
            elif verb == "done":
                self.orders.send(not self.threads[rest[0]].is_alive())
            elif verb == "uffd":
                send_handle(self.orders, self.uffd, rest[0])
            elif verb == "prepare fork":
                self.for_child = recv_handle(self.orders)
            elif verb == "fork":
                self.fork()


class Order:
    """One order that was started."""

    def __init__(self, target: Target, key: int) -> None:
        self._target, self._key = target, key

    def outcome(self) -> Outcome:
        """Wait until it is carried out; what it returned and errno."""
        self._target.orders.send(("result", self._key))
        outcome: Outcome = self._target.orders.recv()
        return outcome

    def result(self) -> Any:
        return self.outcome()[0]

    def done(self) -> bool:
        self._target.orders.send(("done", self._key))
        return bool(self._target.orders.recv())


class Target:
    """The test's end of such a process, or of a child that it forked."""

    def __init__(self, pid: int, orders: Connection, process: subprocess.Popen[bytes] | None) -> None:
        self.pid, self.orders, self.process = pid, orders, process
        self.children: list[Target] = []
        self._keys = iter(range(1 << 30))

    @classmethod
    def spawn(cls) -> Target:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )
        return cls(process.pid, Connection(ours.detach()), process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self.children:
            child.__exit__()
        self.orders.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        elif self.alive():
            os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}

    def kill(self) -> None:
        """Kill it and wait until its address space is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait()

    def start(self, name: str, *args: Any) -> Order:
        key = next(self._keys)
        self.orders.send(("start", key, name, args))
        return Order(self, key)

    def call(self, name: str, *args: Any) -> Any:
        return self.start(name, *args).result()

    def prepare_fork(self) -> Connection:
        """Hand over what the child will be reached by."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.orders.send(("prepare fork",))
            send_handle(self.orders, theirs.fileno(), self.pid)
        return Connection(ours.detach())

    def begin_fork(self) -> None:
        """Start to fork; nothing else may be ordered until end_fork()."""
        self.orders.send(("fork",))

    def end_fork(self, orders: Connection) -> Target:
        pid = self.orders.recv()
        child = Target(pid, orders, None)
        self.children.append(child)
        return child

    def fork(self) -> Target:
        orders = self.prepare_fork()
        self.begin_fork()
        return self.end_fork(orders)

    def lazy(self, nr_pages: int, *, keep: bool = False) -> tuple[int, int]:
        """Map and register memory; its address and a userfaultfd for it that is ours alone."""
        addr = self.call("map", nr_pages)
        uffd = self.uffd()
        assert self.call("register", addr, nr_pages * PAGE) == 0
        if not keep:
            self.call("close_uffd")
        return int(addr), uffd

    def uffd(self) -> int:
        """Make a userfaultfd with all events; the target has it, too, until close_uffd."""
        fd = self.call("open_uffd")
        assert fd >= 0, os.strerror(-fd)
        self.orders.send(("uffd", os.getpid()))
        return int(recv_handle(self.orders))


if __name__ == "__main__":
    Obeying(Connection(int(sys.argv[1]))).serve()
