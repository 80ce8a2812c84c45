"""The two hosts of the container tests, and what is asked of them again and again."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criupy.runc import AsyncRunc, Runc
from criupy.runc._mounts_linux import mounts_below
from criupy.testing.containers_linux import Host, Lab, find_root, open_lab
from criupy.testing.criu_linux import Criu, find_criu
from rpc_clients import Client

NAME = "web"


def usable() -> tuple[Criu, Path]:
    """Return the CRIU and the root file system to test with, or skip."""
    found, reasons = find_criu()
    if not found:
        pytest.skip("; ".join(reasons))
    criu = found[0]
    kernel = tuple(map(int, platform.release().split("-")[0].split(".")[:2]))
    if criu.version < (4, 2) and kernel >= (6, 16):
        pytest.skip(f"a server's sockets need criu 4.2 on this kernel, there is {criu}")
    if shutil.which("runc") is None:
        pytest.skip("there is no runc on PATH")
    root = find_root()
    if root is None:
        pytest.skip("there is no root file system for containers (tools/setup root makes one)")
    return criu, root


@contextlib.contextmanager
def open_hosts(directory: Path) -> Iterator[tuple[Lab, Criu]]:
    """Make the hosts."""
    criu, root = usable()
    before = criu_mounts()
    try:
        with open_lab(directory, root, criu.path) as lab:
            yield lab, criu
    finally:
        for place in criu_mounts() - before:
            subprocess.run(["umount", "--lazy", place], check=True)


def criu_mounts() -> set[str]:
    """What a CRIU that is killed while it tries what the kernel can do leaves mounted."""
    return {place for place in mounts_below(Path("/tmp")) if place.startswith("/tmp/.criu.")}


def runc_on(host: Host, criu: Criu, kind: str, *, grace: float = 10.0) -> Client:
    """Make a client of a kind whose runC runs in a host's network."""
    make = AsyncRunc if kind == "trio" else Runc
    return Client(make(host.runc_program(), root=host.root, criu=criu.path, grace=grace))


def wait_until(seconds: float, what: str, is_so: Callable[[], bool]) -> None:
    """Wait for something that happens elsewhere."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def processes(host: Host, name: str) -> list[int]:
    """List the processes of a program that run in a host's network."""
    found = []
    network = Path("/run/netns", host.network).stat().st_ino
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            is_there = (entry / "ns" / "net").stat().st_ino == network
            if is_there and (entry / "comm").read_text().strip() == name:
                found.append(pid)
    return found


def kill(pid: int) -> None:
    """Kill a process that may just have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
