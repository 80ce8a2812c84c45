"""The userfaultfd ioctls on this kernel: every outcome that can be provoked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from criupy._uffd._native import ffi, lib
from native_target import MADV_DONTNEED, PAGE, PROT_READ, UFFD_USER_MODE_ONLY, Target

UFFDIO_COPY, MODE_DONTWAKE = 0xC028AA03, 1
FILLED = [bytes([value]) * PAGE for value in range(1, 17)]


def usable() -> str:
    fd = lib.criupy_uffd_open(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return (
            f"userfaultfd for kernel-mode faults: {os.strerror(-fd)} (vm.unprivileged_userfaultfd=1 or root)"
        )
    result = lib.criupy_uffd_api(fd, 1 << 1, ffi.new("uint64_t *"))
    os.close(fd)
    return "" if result == 0 else f"UFFD_FEATURE_EVENT_FORK: {os.strerror(-result)} (CAP_SYS_PTRACE)"


def offers(feature: int) -> bool:
    fd = lib.criupy_uffd_open(os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    offered = ffi.new("uint64_t *")
    assert lib.criupy_uffd_api(fd, 0, offered) == 0
    os.close(fd)
    return bool(offered[0] & feature)


pytestmark = pytest.mark.skipif(bool(usable()), reason=usable())
HAS_POISON = not usable() and offers(1 << 14)
needs_poison = pytest.mark.skipif(not HAS_POISON, reason="UFFDIO_POISON needs Linux 6.6")


@pytest.fixture
def target() -> Iterator[Target]:
    with Target.spawn() as target:
        yield target


class Lazy:
    """16 lazy pages of a target, and the calls on them by page number."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.addr, self.uffd = target.lazy(16, keep=True)
        self.data = ffi.new("uint8_t[]", b"".join(FILLED))

    def _do(self, call: Callable[..., int], *args: Any) -> tuple[int, int]:
        progress = ffi.new("uint64_t *", 77)
        result = call(self.uffd, *args, progress)
        return -result, progress[0]

    def copy(self, page: int, nr: int) -> tuple[int, int]:
        """Outcome (an errno) and progress in bytes."""
        return self._do(lib.criupy_uffd_copy, self.addr + page * PAGE, self.data + page * PAGE, nr * PAGE)

    def zeropage(self, page: int, nr: int) -> tuple[int, int]:
        return self._do(lib.criupy_uffd_zeropage, self.addr + page * PAGE, nr * PAGE)

    def poison(self, page: int, nr: int) -> tuple[int, int]:
        return self._do(lib.criupy_uffd_poison, self.addr + page * PAGE, nr * PAGE)

    def read(self, page: int, nr: int = 1) -> bytes:
        data: bytes = self.target.call("read", self.addr + page * PAGE, nr * PAGE)
        return data

    def next_message(self) -> tuple[int, bytes]:
        """Wait for one message: its event and its body."""
        os.set_blocking(self.uffd, True)
        message = os.read(self.uffd, 32)
        os.set_blocking(self.uffd, False)
        assert len(message) == 32
        return message[0], message[8:]


@pytest.fixture
def lazy(target: Target) -> Iterator[Lazy]:
    lazy = Lazy(target)
    yield lazy
    os.close(lazy.uffd)


def test_copy_puts_the_bytes_in_place(lazy: Lazy) -> None:
    assert lazy.copy(0, 16) == (0, 16 * PAGE)
    assert lazy.read(0, 16) == b"".join(FILLED)


def test_copy_stops_at_a_page_that_is_there(lazy: Lazy) -> None:
    assert lazy.copy(3, 1) == (0, PAGE)
    lazy.target.call("write", lazy.addr + 3 * PAGE, b"its own")
    assert lazy.copy(0, 16) == (errno.EAGAIN, 3 * PAGE)
    assert lazy.copy(3, 13) == (errno.EEXIST, 0)
    assert lazy.copy(4, 12) == (0, 12 * PAGE)
    assert lazy.read(0, 3) == b"".join(FILLED[:3])
    assert lazy.read(3) == b"its own" + FILLED[3][7:]


def test_copy_onto_a_page_wakes_nobody(lazy: Lazy) -> None:
    """The page a thread waits for may have come without a wake."""
    order = lazy.target.start("read", lazy.addr, PAGE)
    event, _ = lazy.next_message()
    assert event == 0x12  # UFFD_EVENT_PAGEFAULT
    source = int(ffi.cast("uintptr_t", lazy.data))
    fcntl.ioctl(lazy.uffd, UFFDIO_COPY, struct.pack("<QQQQq", lazy.addr, source, PAGE, MODE_DONTWAKE, 0))
    assert lazy.copy(0, 1) == (errno.EEXIST, 0)
    assert not order.done()
    assert lib.criupy_uffd_wake(lazy.uffd, lazy.addr, PAGE) == 0
    assert order.result() == FILLED[0]


@pytest.mark.parametrize("name", ["copy", "zeropage", pytest.param("poison", marks=needs_poison)])
class TestEveryCall:
    def test_where_nothing_is_registered(self, target: Target, name: str) -> None:
        lazy = Lazy(target)
        lazy.addr = target.call("map", 16)
        assert getattr(lazy, name)(0, 16) == (errno.ENOENT, 0)
        os.close(lazy.uffd)

    def test_where_nothing_is_mapped(self, lazy: Lazy, name: str) -> None:
        order = lazy.target.start("munmap", lazy.addr, 16 * PAGE)
        assert lazy.next_message()[0] == 0x16  # UFFD_EVENT_UNMAP
        assert order.result() == 0
        assert getattr(lazy, name)(5, 1) == (errno.ENOENT, 0)

    def test_across_a_border_that_moved(self, lazy: Lazy, name: str) -> None:
        assert lazy.target.call("mprotect", lazy.addr + 8 * PAGE, 8 * PAGE, PROT_READ) == 0
        assert getattr(lazy, name)(0, 16) == (errno.ENOENT, 0)
        assert getattr(lazy, name)(7, 2) == (errno.ENOENT, 0)
        assert getattr(lazy, name)(0, 8) == (0, 8 * PAGE)
        assert getattr(lazy, name)(8, 8) == (0, 8 * PAGE)

    def test_while_an_event_is_not_read(self, lazy: Lazy, name: str) -> None:
        order = lazy.target.start("madvise", lazy.addr, 4 * PAGE, MADV_DONTNEED)
        while getattr(lazy, name)(8, 1) != (errno.EAGAIN, 0):
            # The thread has not come that far yet; page 8 is in the way now.
            assert not order.done()
        assert lazy.next_message()[0] == 0x15  # UFFD_EVENT_REMOVE
        assert order.result() == 0
        assert getattr(lazy, name)(9, 1) == (0, PAGE)

    def test_after_the_process_died(self, lazy: Lazy, name: str) -> None:
        lazy.target.kill()
        assert getattr(lazy, name)(0, 16) == (errno.ESRCH, 0)

    @pytest.mark.parametrize(("page", "nr"), [(0, 0), (1 << 50, 1), (0, 1 << 51)])
    def test_with_a_range_that_cannot_be(self, lazy: Lazy, name: str, page: int, nr: int) -> None:
        assert getattr(lazy, name)(page, nr) == (errno.EINVAL, 0)


def test_copy_from_nowhere(lazy: Lazy) -> None:
    progress = ffi.new("uint64_t *")
    nowhere = ffi.cast("void *", PAGE)
    assert lib.criupy_uffd_copy(lazy.uffd, lazy.addr, nowhere, PAGE, progress) == -errno.EFAULT
    assert progress[0] == 0


def test_zeropage_reads_zeros_and_stops_at_a_page(lazy: Lazy) -> None:
    assert lazy.copy(2, 1) == (0, PAGE)
    assert lazy.zeropage(0, 16) == (errno.EAGAIN, 2 * PAGE)
    assert lazy.zeropage(2, 1) == (errno.EEXIST, 0)
    assert lazy.read(0, 3) == bytes(2 * PAGE) + FILLED[2]


@needs_poison
def test_poison_is_an_error_to_system_calls_and_stops_at_a_page(lazy: Lazy) -> None:
    assert lazy.copy(2, 1) == (0, PAGE)
    assert lazy.poison(0, 4) == (errno.EAGAIN, 2 * PAGE)
    assert lazy.poison(2, 1) == (errno.EEXIST, 0)
    assert lazy.poison(3, 1) == (0, PAGE)
    assert lazy.target.start("write_to_pipe", lazy.addr, PAGE).outcome() == (None, errno.EFAULT)
    assert lazy.read(2) == FILLED[2]


@needs_poison
def test_poison_survives_the_descriptor_and_kills_who_touches(target: Target) -> None:
    lazy = Lazy(target)
    assert lazy.poison(0, 16) == (0, 16 * PAGE)
    assert target.call("close_uffd") == 0
    os.close(lazy.uffd)
    target.start("read", lazy.addr + 5 * PAGE, 1)
    assert target.exit_code() == -signal.SIGBUS


@needs_poison
def test_copy_over_poison_heals_it(lazy: Lazy) -> None:
    assert lazy.poison(0, 4) == (0, 4 * PAGE)
    assert lazy.copy(0, 4) == (0, 4 * PAGE)
    assert lazy.read(0, 4) == b"".join(FILLED[:4])


def test_register_and_unregister(lazy: Lazy) -> None:
    assert lib.criupy_uffd_unregister(lazy.uffd, lazy.addr, 16 * PAGE) == 0
    assert lazy.copy(0, 1) == (errno.ENOENT, 0)
    assert lazy.read(0) == bytes(PAGE)
    assert lazy.target.call("register", lazy.addr, 16 * PAGE) == 0
    assert lazy.target.call("register", lazy.addr, PAGE - 1) == -errno.EINVAL
    assert lazy.copy(0, 1) == (errno.EEXIST, 0)


def test_the_handshake_is_done_once(lazy: Lazy) -> None:
    assert lib.criupy_uffd_api(lazy.uffd, 0, ffi.new("uint64_t *")) < 0


def test_alive_tells_and_touches_nothing(target: Target) -> None:
    lazy = Lazy(target)
    assert lib.criupy_uffd_alive(lazy.uffd) == 1
    # Also where memory is registered at the address that it uses.
    low = 0x10000
    assert target.call("map", 1, low) == low
    assert target.call("register", low, PAGE) == 0
    assert lib.criupy_uffd_alive(lazy.uffd) == 1
    lazy.addr = low
    assert lazy.copy(0, 1) == (0, PAGE)
    assert lib.criupy_uffd_alive(lazy.uffd) == 1
    assert lazy.read(0) == FILLED[0]
    # ... and while an event waits to be read.
    order = target.start("munmap", low, PAGE)
    while lazy.zeropage(0, 1)[0] != errno.EAGAIN:
        pass
    assert lib.criupy_uffd_alive(lazy.uffd) == 1
    lazy.next_message()
    assert order.result() == 0
    target.kill()
    assert lib.criupy_uffd_alive(lazy.uffd) == 0
    os.close(lazy.uffd)
