"""The page client against a real live source: criu dump --lazy-pages."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from criupy.images import (
    NO_PAGE_INDEX,
    LazyExtents,
    PageFlags,
    frame_size,
    is_zombie,
    lazy_extents,
    read_mm,
    read_pagemap,
    read_pstree,
)
from criupy.wire.page_client import NEED_DATA, PageClient, Payload, Reply, Request, Status
from real_dump import PAGE, RUNS, Workload, criu_binaries, workload
from rpc_victims import state_of, until

pytestmark = [
    pytest.mark.criu,
    pytest.mark.skipif(os.geteuid() != 0, reason="criu dump needs root"),
    pytest.mark.skipif(
        not criu_binaries(), reason="no CRIU in CRIUPY_CRIU, in criupy's caches or on PATH: run make test"
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def live_source(criu: Path, work: Workload, images: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Dump the process lazily; give criu, which holds its pages, and the port it serves them on."""
    port = free_port()
    ready, tell = os.pipe()
    command = [criu, "dump", "--no-default-config", "-t", work.pid, "-D", images, "-o", "dump.log", "-v4"]
    command += ["--lazy-pages", "--address", "127.0.0.1", "--port", port, "--status-fd", tell]
    process = subprocess.Popen([str(word) for word in command], pass_fds=[tell])
    os.close(tell)
    try:
        with os.fdopen(ready, "rb") as status:
            assert status.read(1) == b"\0", (images / "dump.log").read_text()[-3000:]
        yield process, port
    finally:
        process.kill()
        process.wait()


def fetch(connection: socket.socket, client: PageClient, request: Request) -> bytes:
    """Ask for pages until all have come, however short the answers are."""
    got = b""
    while len(got) < request.nr_pages * PAGE:
        done = len(got) // PAGE
        address = request.address + len(got)
        connection.sendall(client.get(request.pid, address, request.nr_pages - done))
        last = False
        while not last:
            event = client.next_event()
            if event is NEED_DATA:
                client.receive(connection.recv(client.bytes_wanted))
            elif isinstance(event, Payload):
                got += event.data
                last = event.last
            else:
                assert isinstance(event, Reply)
                assert event.request.address == address
    return got


def live_extents(images: Path, pid: int) -> LazyExtents:
    pagemap = read_pagemap(images, pid)
    # What is lazy has no bytes here, and what has bytes is not lazy.
    assert set(pagemap.flags) == {PageFlags.LAZY, PageFlags.PRESENT}
    found = lazy_extents(pagemap, read_mm(images, pid))
    assert set(found.present) == {0}
    assert set(found.page_indices) == {NO_PAGE_INDEX}
    return found


@pytest.mark.parametrize("binary", criu_binaries(), ids=lambda path: path.parts[-3])
def test_fetching_everything_ends_the_source(binary: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with workload(tmp_path, guards=False) as work, live_source(binary, work, images) as (source, port):
        size = frame_size(images)
        assert size is not None
        tasks = [task.pid for task in read_pstree(images) if not is_zombie(images, task.pid)]
        assert tasks == [work.pid]
        found = live_extents(images, work.pid)
        assert found.total_pages > RUNS
        client = PageClient(size)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for start, nr_pages, *_ in found:
                data = fetch(connection, client, Request(work.pid, start, nr_pages))
                if start in work.written:
                    assert data == bytes([work.written.index(start) + 1]) * PAGE
            connection.sendall(client.close())
            while (event := client.next_event()) is NEED_DATA:
                client.receive(connection.recv(client.bytes_wanted))
            assert event == Status(0)
        assert source.wait() == 0
        assert work.process.wait() == -9


@pytest.mark.parametrize("binary", criu_binaries(), ids=lambda path: path.parts[-3])
def test_a_reset_lets_the_source_go_on(binary: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with workload(tmp_path, guards=False) as work, live_source(binary, work, images) as (source, port):
        size = frame_size(images)
        assert size is not None
        start, *_ = next(iter(live_extents(images, work.pid)))
        client = PageClient(size)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert len(fetch(connection, client, Request(work.pid, start, 1))) == PAGE
        assert source.wait() == 1
        until(lambda: state_of(work.pid) == "S", "it does not go on to sleep")
