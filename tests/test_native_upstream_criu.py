"""The fetcher of a relay against a real live source: criu dump --lazy-pages."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")
if not sys.platform.startswith("linux"):
    pytest.skip("CRIU runs on Linux only", allow_module_level=True)

from criupy._uffd.image_linux import Image
from criupy._uffd.pager_linux import Link
from criupy._uffd.server_linux import Server
from criupy._uffd.upstream_linux import Upstream, UpstreamState
from criupy.images import lazy_extents, read_mm, read_pagemap, read_pstree
from criupy.testing.criu_linux import Criu, Source, lazy_dump
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import start_workload
from page_server_clients import PAGE, Destination, loopback

SPEC = WorkloadSpec(size=32 << 20, tree=2, areas=4, reserve=8 << 20)


class Fetched:
    """What an upstream has of a lazy dump: a file and where its extents are, for each process."""

    def __init__(self, images: Path) -> None:
        self.files: dict[int, int] = {}
        self.extents: dict[int, list[tuple[int, int, int]]] = {}
        self.images: list[Image] = []
        for entry in read_pstree(images):
            found = lazy_extents(read_pagemap(images, entry.pid), read_mm(images, entry.pid))
            data, total = array("Q"), 0
            for nr in found.nr_pages:
                data.append(total)
                total += nr
            self.files[entry.pid] = os.memfd_create("pages")
            self.extents[entry.pid] = list(zip(found.starts, found.nr_pages, data, strict=True))
            self.images.append(Image(entry.pid, found.starts, found.nr_pages, data))

    def fetch_from(self, upstream: Upstream, source: Source) -> None:
        for pid, image in zip(self.files, self.images, strict=True):
            upstream.add_image(image, os.dup(self.files[pid]))
        with socket.create_connection((source.address, source.port)) as connection:
            upstream.start(connection.detach(), source.frame_size)

    def page(self, pid: int, address: int) -> bytes:
        for start, nr, data in self.extents[pid]:
            if start <= address < start + nr * PAGE:
                return os.pread(self.files[pid], PAGE, data * PAGE + address - start)
        raise AssertionError(f"{address:#x} of {pid} is not lazy")

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


@contextlib.contextmanager
def fetched(images: Path) -> Iterator[Fetched]:
    with contextlib.closing(Fetched(images)) as made:
        yield made


async def reached(upstream: Upstream, link: Link) -> UpstreamState:
    await until(lambda: upstream.snapshot().link is not Link.OPEN)
    state = upstream.snapshot()
    assert state.link is link, state
    return state


async def test_everything_is_fetched(criu: Criu, room: Path) -> None:
    """While a client asks for some of it; then the source may end its process."""
    async with (
        start_workload(SPEC, room) as workload,
        lazy_dump(criu, workload.pid, room / "images") as source,
    ):
        pids = workload.pids
        with (
            fetched(room / "images") as pages,
            Upstream(link_timeout=30) as upstream,
            Server(stall_timeout=30, idle_timeout=None) as server,
        ):
            pages.fetch_from(upstream, source)
            server.add_upstream(upstream)
            ours, theirs = loopback()
            with Destination(ours) as destination:
                server.serve(theirs.detach())
                for run in reversed(list(SPEC.runs())):
                    address = run.start + (run.nr_pages - 1) * PAGE
                    expected = SPEC.page(1, run.first + run.nr_pages - 1)
                    assert await trio.to_thread.run_sync(destination.get, pids[1], address) == expected
            await until(lambda: upstream.snapshot().complete)
            for task, pid in enumerate(pids):
                for run in SPEC.runs():
                    for n in range(run.nr_pages):
                        assert pages.page(pid, run.start + n * PAGE) == SPEC.page(task, run.first + n)
            upstream.close()
            assert (await reached(upstream, Link.CLOSED)).close_status == 0
        await source.job.succeed()
        assert (await workload.wait()).signal == 9


async def test_after_a_reset_the_process_goes_on(criu: Criu, room: Path) -> None:
    async with (
        start_workload(SPEC, room) as workload,
        lazy_dump(criu, workload.pid, room / "images") as source,
    ):
        with fetched(room / "images") as pages, Upstream(link_timeout=30) as upstream:
            pages.fetch_from(upstream, source)
            await until(lambda: upstream.snapshot().pages_kept > 0)
            upstream.reset()
            await reached(upstream, Link.RESET)
        assert (await source.job.wait()).code == 1
        assert await workload.is_running()
