"""Tasks that change their memory while its pages are on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio

from criupy.lazy_pages._statistics import State
from criupy.testing.control_linux import Order
from criupy.testing.images import write_images
from criupy.testing.page_server import Behaviour, PageServer
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import start_standin
from serving import MIB, all_good, needs_forks, serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

SLOW = Behaviour(delay=0.01, max_pages=64)
SPEC = WorkloadSpec(size=16 * MIB, threads=2, children=2)
ELSEWHERE = 0x40_0000_0000


@pytest.mark.parametrize("style", ["lazy", "full"])
async def test_everything_at_once(room: Path, style: str) -> None:
    """One thread touches at random while another moves, discards, unmaps and protects."""
    full = style == "full"
    async with (
        serve(room, SPEC, style="full" if full else "lazy", behaviour=SLOW) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        worker, toucher = standin.worker(), standin.worker(thread=1)
        toucher.start_touching(Order.RANDOM)
        for step in range(8):
            first = 512 * step
            await worker.move(first, 64, ELSEWHERE + step * 4 * MIB)
            await worker.discard(first + 100, 50)
            await worker.unmap(first + 200, 30)
            await worker.protect(first + 256, 128, step=3)
            await worker.write(first + 120, 10, 1)
        assert (await toucher.wait()).is_good
        assert (await worker.verify()).is_good
        done = await s.daemon.wait()
        assert done.state is State.COMPLETE
        assert (await worker.verify()).is_good
        if not full:
            assert done.events.remap and done.events.remove and done.events.unmap  # noqa: PT018


async def test_own_mprotect_splits_what_is_in_flight(room: Path) -> None:
    """No event tells of it: only the kernel's answer to the copy does."""
    async with serve(room, SPEC, behaviour=Behaviour(delay=0.02)) as s, s.restore() as standin:
        await standin.finish()
        await standin.worker().protect(0, 4096, step=1)
        assert (await standin.worker().verify()).is_good
        assert (await s.daemon.wait()).pages_dropped == 0
        await all_good(standin)


@pytest.mark.parametrize("what", ["unmap", "discard"])
async def test_more_than_4_gib_in_one_call(room: Path, what: str) -> None:
    """A 32-bit length, as the stock daemon has, ignores it and spins for ever."""
    spec = WorkloadSpec(size=4 * MIB, reserve=4096 * MIB + 16 * 4096)
    async with serve(room, spec, behaviour=Behaviour(delay=0.02)) as s, s.restore() as standin:
        await standin.finish()
        worker = standin.worker()
        await getattr(worker, what)(spec.main_pages, spec.reserve_pages)
        assert (await worker.verify()).is_good
        assert (await s.daemon.wait()).pages_dropped == 16


@needs_forks
async def test_children_have_what_the_parent_had(room: Path) -> None:
    async with serve(room, SPEC, behaviour=SLOW) as s, s.restore() as standin:
        await standin.finish()
        parent, child, grandchild = standin.worker(), standin.child(0), standin.child(1)
        await parent.move(0, 256, ELSEWHERE)
        await parent.fork(child)
        await parent.discard(1024, 128)
        await child.discard(2048, 128)
        await child.unmap(3000, 100)
        await child.fork(grandchild)
        await grandchild.move(0, 256, ELSEWHERE + 64 * MIB)
        for worker in (grandchild, child, parent):
            assert (await worker.verify()).is_good
        done = await s.daemon.wait()
        assert (done.forks, done.events.fork) == (2, 2)
        for worker in (grandchild, child, parent):
            assert (await worker.verify()).is_good
        # One fetched page serves every copy that needs it.
        assert done.pages_received < 1.2 * SPEC.populated_pages


@needs_forks
@pytest.mark.parametrize("style", ["lazy", "full"])
async def test_fork_storm(room: Path, style: str) -> None:
    full = style == "full"
    spec = WorkloadSpec(size=4 * MIB)
    async with (
        serve(room, spec, style="full" if full else "lazy", behaviour=SLOW) as s,
        s.restore() as standin,
    ):
        await standin.finish()
        result = await standin.worker().fork_many(100)
        assert result.is_good
        assert (result.value, result.checked) == (100, 100 * spec.populated_pages)
        assert (await s.daemon.wait()).state is State.COMPLETE
        await all_good(standin)


@needs_forks
async def test_a_child_that_dies_at_once(room: Path) -> None:
    async with serve(room, SPEC, behaviour=SLOW) as s, s.restore() as standin:
        await standin.finish()
        pid = await standin.worker().fork(standin.child())
        standin.kept.kill(pid)
        await standin.worker().wait_child(pid)
        assert (await s.daemon.wait()).state is State.COMPLETE
        await all_good(standin)


LIMITED = """
import json, logging, resource, sys
from pathlib import Path
import trio
from criupy.lazy_pages._daemon_linux import Config, open_lazy_pages

logging.basicConfig(stream=sys.stdout, format="%(message)s")

async def main(images, work, port, spare):
    async with open_lazy_pages(Config(Path(images), ("127.0.0.1", int(port))), work_dir=work) as daemon:
        open_now = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        limit = open_now + int(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        print("listening", flush=True)
    print(json.dumps(daemon.statistics().to_json()["state"]))

trio.run(main, *sys.argv[1:])
"""


@needs_forks
async def test_forks_wait_for_descriptors(room: Path) -> None:
    """A fork whose descriptor the daemon cannot take waits; no page of it is lost."""
    spec = WorkloadSpec(size=4 * MIB)
    images = write_images(room / "images", spec)
    server = PageServer(images, SLOW)
    output = room / "output"
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        words = [
            sys.executable,
            "-c",
            LIMITED,
            str(images.directory),
            str(room / "work"),
            str(server.port),
            "10",
        ]
        with output.open("ab") as file:
            process = await trio.lowlevel.open_process(words, stdout=file, stderr=file)
        try:
            await until(lambda: "\n" in output.read_text())
            assert output.read_text() == "listening\n"
            async with start_standin(spec, room / "work" / "lazy-pages.socket", room) as standin:
                await standin.finish()
                result = await standin.worker().fork_many(40)
                assert result.is_good
                assert result.value == 40
                assert await process.wait() == 0
                await all_good(standin)
        finally:
            process.kill()
            await process.wait()
        *warnings, last = output.read_text().splitlines()
        assert json.loads(last) == "complete"
        assert any("a fork waits for a file descriptor" in line for line in warnings)
        await server.ended.wait()
    assert server.violations == []
