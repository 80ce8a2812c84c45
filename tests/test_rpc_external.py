"""Strings that name resources outside of the tree, in the spelling of CRIU's source."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from criupy.errors import OptionError
from criupy.rpc import external
from criupy.rpc._option_encoding import encode


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (external.mnt("/mnt/data", "data"), "mnt[/mnt/data]:data"),
        (external.mnt(Path("/m]"), "data"), "mnt[/m]]:data"),
        (external.restore_mnt("data", Path("/srv/data")), "mnt[data]:/srv/data"),
        (external.dev(8, 17, "disk"), "dev[8/17]:disk"),
        (external.restore_dev("disk", "/dev/sdb1"), "dev[disk]:/dev/sdb1"),
        (external.file(0x1B, 0x2163A1), "file[1b:2163a1]"),
        (external.file(10, (1 << 64) - 1), "file[a:ffffffffffffffff]"),
        (external.tty(0x8800, 0x1A), "tty[8800:1a]"),
        (external.unix(4711), "unix[4711]"),
        (external.net(4026531840, "front"), "net[4026531840]:front"),
        (external.pid(4026531836, "app"), "pid[4026531836]:app"),
        (external.veth("eth0", "veth7"), "veth[eth0]:veth7"),
        (external.veth("eth0", "veth7", "br0"), "veth[eth0]:veth7@br0"),
        (external.macvlan("eth0", "enp1s0"), "macvlan[eth0]:enp1s0"),
    ],
)
def test_spelling(made: str, expected: str) -> None:
    assert made == expected
    assert list(encode("restore", {"external": [made]}).message.external) == [expected]


def test_automatic_mounts() -> None:
    assert external.mnt_auto() == ("mnt[]",)
    assert external.mnt_auto(masters=True) == ("mnt[]:m",)
    assert external.mnt_auto(sharing=True) == ("mnt[]:s",)
    both = external.mnt_auto(masters=True, sharing=True)
    assert both == ("mnt[]:m", "mnt[]:s")
    assert tuple(encode("dump", {"external": [*both]}).message.external) == both


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: external.mnt("data", "x"), "external: expected an absolute path, got 'data'"),
        (lambda: external.mnt("/a", ""), "external: expected text that is not empty, got ''"),
        (lambda: external.mnt("/a]:b", "x"), "external: expected text without \"]:\", got '/a]:b'"),
        (lambda: external.restore_mnt("a", "b"), "external: expected an absolute path, got 'b'"),
        (lambda: external.dev(-1, 0, "x"), "external: expected a number from 0 to 4294967295, got -1"),
        (lambda: external.file(1, 1 << 64), "external: expected a number from 0 to 18446744073709551615"),
        (lambda: external.unix(0), "external: expected a number from 1 to 4294967295, got 0"),
        (lambda: external.veth("e" * 16, "a"), "external: expected an interface's name (at most 15 bytes"),
        (lambda: external.veth("a", "b c"), "external: expected an interface's name (at most 15 bytes"),
        (lambda: external.veth("a", "b@c"), "external: expected an interface's name without @"),
        (lambda: external.macvlan("a", "b:c"), "external: expected an interface's name (at most 15 bytes"),
        (lambda: external.net(True, "x"), "external: expected a number from 0 to 4294967295, got True"),
    ],
)
def test_refused(call: Callable[[], object], message: str) -> None:
    assert refusal(call).startswith(message)


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/fd is Linux's")


@linux
def test_key_of_a_pipe() -> None:
    reading, writing = os.pipe()
    try:
        key = external.key_of(reading)
        assert key == external.key_of(writing) == f"pipe:[{os.fstat(reading).st_ino}]"
        assert key == os.readlink(f"/proc/self/fd/{reading}")  # noqa: PTH115
    finally:
        os.close(reading)
        os.close(writing)
    assert refusal(lambda: external.key_of(reading)) == (
        f"inherit_fd: expected an open descriptor, got {reading}: Bad file descriptor"
    )


@linux
def test_key_of_a_socket() -> None:
    first, second = socket.socketpair()
    with first, second:
        assert external.key_of(first) == f"socket:[{os.fstat(first.fileno()).st_ino}]"
        assert external.key_of(first) != external.key_of(second)
        assert first.send(b"x") == 1  # it was left open
    with socket.socket(socket.AF_INET) as inet:
        assert refusal(lambda: external.key_of(inet)).startswith("inherit_fd: expected a Unix socket")


@linux
def test_key_of_a_terminal() -> None:
    master, slave = os.openpty()
    try:
        status = os.fstat(slave)
        assert external.key_of(slave) == f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
    finally:
        os.close(master)
        os.close(slave)


@linux
def test_key_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        listed = subprocess.run(
            ["cat", f"/proc/{os.getpid()}/fdinfo/{file.fileno()}"], check=True, capture_output=True, text=True
        ).stdout
        mnt_id = int(listed.split("mnt_id:")[1].split()[0])
        assert external.key_of(file) == f"file[{mnt_id:x}:{path.stat().st_ino:x}]"
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        assert external.key_of(fifo) == f"file[{mnt_id:x}:{os.fstat(fifo).st_ino:x}]"
    finally:
        os.close(fifo)


@linux
def test_key_of_a_memfd() -> None:
    memfd = os.memfd_create("scratch")
    try:
        assert external.key_of(memfd) == "/memfd:scratch"
    finally:
        os.close(memfd)


@linux
def test_what_has_no_key() -> None:
    with open("/proc/self/ns/net") as namespace:  # noqa: PTH123
        message = refusal(lambda: external.key_of(namespace))
    assert message.startswith("inherit_fd: expected a pipe, a Unix socket, a terminal or a file, got net:[")
    assert message.endswith("its key is the name given to net() or pid()")


def test_nothing_here_needs_a_system() -> None:
    code = (
        "import sys; before = set(sys.modules); import criupy.rpc.external, criupy.rpc._option_encoding;"
        "print(*sorted({'fcntl', 'socket', 'trio', 'subprocess', 'termios'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
