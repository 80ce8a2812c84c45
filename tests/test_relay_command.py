"""The command that relays: how it starts, stops, and what it says."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy.images import MARKER
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.page_server import Behaviour
from criupy.testing.page_server import PageServer as Source
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from page_server_clients import Destination
from page_server_command import Running, command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

SPEC = WorkloadSpec(size=1 << 20)


@dataclass(slots=True, eq=False)
class Relayed:
    images: WrittenImages
    source: Source
    relay: Running
    work: Path

    async def take_a_page(self) -> Destination:
        """Be a stock destination."""
        stock = self.relay.connect()
        task = self.images.tasks[0]
        await trio.to_thread.run_sync(stock.get, task.pid, task.runs[0].start)
        return stock

    async def ended(self) -> int:
        return await trio.to_thread.run_sync(self.relay.ended)

    @property
    def goes_on(self) -> bool:
        assert self.source.end is not None
        return self.source.end.source_goes_on


@contextlib.asynccontextmanager
async def relayed(room: Path, *words: str) -> AsyncIterator[Relayed]:
    images = write_images(room / "images", SPEC, style="lazy")
    work = room / "relay"
    work.mkdir()
    source = Source(images, Behaviour())
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        upstream = f"{source.address}:{source.port}"
        start = partial(command, images.directory, work, "--upstream", upstream, *words, lazy_pages=False)
        stack = contextlib.ExitStack()
        with stack:
            relay = await trio.to_thread.run_sync(stack.enter_context, start())
            yield Relayed(images, source, relay, work)
        await source.ended.wait()
    assert source.violations == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "criupy.page_server", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


async def abort(work: Path) -> subprocess.CompletedProcess[str]:
    return await trio.to_thread.run_sync(run, "--abort", "-W", str(work))


async def test_it_ends_with_the_source(room: Path) -> None:
    async with relayed(room, "--stats-file", "stats.json", "--display-stats") as r:
        stock = await r.take_a_page()
        assert await trio.to_thread.run_sync(stock.close) == 0
        assert await r.ended() == 0
        assert not r.goes_on
        assert r.relay.errors == r.relay.warnings == []
        stats = json.loads((r.work / "stats.json").read_text())
        assert stats["fate"] == "closed"
        assert stats["upstream"]["pages_total"] == SPEC.size // 4096
        assert stats["endings"] == {"closed": 1}
    assert not (r.work / "criupy-relay.socket").exists()


async def test_a_stop_before_a_destination_lets_the_source_go_on(room: Path) -> None:
    async with relayed(room) as r:
        r.relay.stop()
        assert "asked to stop, and no destination has come" in await trio.to_thread.run_sync(r.relay.failed)
        assert r.goes_on


async def test_a_stop_does_not_take_the_source_from_its_destination(room: Path) -> None:
    async with relayed(room) as r:
        stock = await r.take_a_page()
        r.relay.stop()
        await until(lambda: bool(r.relay.warnings))
        assert "the destination needs the source" in r.relay.warnings[0]
        task = r.images.tasks[0]
        await trio.to_thread.run_sync(stock.get, task.pid, task.runs[0].start)
        assert await trio.to_thread.run_sync(stock.close) == 0
        assert await r.ended() == 0
        assert not r.goes_on


async def test_a_second_stop_leaves_it_frozen(room: Path) -> None:
    async with relayed(room) as r:
        stock = await r.take_a_page()
        r.relay.stop()
        await until(lambda: bool(r.relay.warnings))
        r.relay.stop(signal.SIGINT)
        assert await r.ended() == 1
        stock.sock.close()
        assert "stopped with the source frozen" in r.relay.errors[-1]
        assert r.source.end is None
        done = await abort(r.work)
        assert (done.returncode, done.stdout) == (0, "the source goes on\n"), done.stderr
        await r.source.ended.wait()
        assert r.goes_on


@pytest.mark.parametrize(
    ("style", "says"),
    [("full", "no source has them"), (None, "inventory.img")],
    ids=["full images", "no images"],
)
def test_images_that_no_source_serves(room: Path, style: str | None, says: str) -> None:
    images = room / "images"
    images.mkdir()
    if style is not None:
        write_images(images, SPEC, style="full")
    done = run("--upstream", "127.0.0.1:1", "-D", str(images))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()[-1:]
    assert says in line
    assert not (images / MARKER).exists()


def test_a_source_that_is_not_there(room: Path) -> None:
    images = write_images(room / "images", SPEC, style="lazy").directory
    done = run("--upstream", "127.0.0.1:1", "-D", str(images))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "Error (" in line]
    assert len(errors) == 1
    assert "is the dump waiting there" in errors[0]
    assert not (images / "criupy-relay.socket").exists()


def test_abort_with_nobody_there(room: Path) -> None:
    done = run("--abort", "-W", str(room))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no relay is there" in done.stderr
