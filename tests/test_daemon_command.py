"""The command, as a process: readiness, signals, exit statuses, one line a failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from criupy.testing.control_linux import WorkloadError
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.page_server import Behaviour, End, PageServer
from criupy.testing.wait import until
from criupy.testing.workload_linux import Standin, start_standin
from serving import MIB, SPEC, all_good, needs_poison, no_lies

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program", "nothing_is_left")]

FAR = Behaviour(delay=0.1)


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    process: trio.Process
    server: PageServer
    room: Path

    @property
    def work(self) -> Path:
        return self.room / "work"

    @property
    def log(self) -> str:
        return (self.work / "log").read_text()

    @property
    def shown(self) -> str:
        return (self.room / "shown").read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if "Error (" in line]

    def restore(self) -> contextlib.AbstractAsyncContextManager[Standin]:
        return start_standin(SPEC, self.work / "lazy-pages.socket", self.room)

    async def failed(self) -> str:
        """Wait for the end; return the one line that tells of it."""
        assert await self.process.wait() == 1
        (line,) = self.errors
        return line


def ready(reader: int) -> bytes:
    with open(reader, "rb") as file:
        return file.read()


@contextlib.asynccontextmanager
async def command(
    room: Path,
    *words: str,
    behaviour: Behaviour | None = None,
    images: WrittenImages | None = None,
    inherit: bool = False,
) -> AsyncIterator[Running]:
    """The command serving SPEC, started and ready; it is killed if it is left running."""
    images = images or write_images(room / "images", SPEC)
    server = PageServer(images, behaviour or Behaviour())
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        with contextlib.ExitStack() as stack:
            passed = []
            source = ["--address", server.address, "--port", str(server.port)]
            if inherit:
                sock = socket.create_connection((server.address, server.port))
                passed.append(sock.detach())
                stack.callback(os.close, passed[0])
                source = ["--ps-socket", str(passed[0])]
            reader, writer = os.pipe()
            full = [
                *(sys.executable, "-m", "criupy.lazy_pages", "--page-server", *source, "-v4", "-o", "log"),
                *("-D", str(images.directory), "-W", str(room / "work"), "--status-fd", str(writer), *words),
            ]
            try:
                with (room / "shown").open("ab") as shown:
                    process = await trio.lowlevel.open_process(
                        full, stdout=shown, stderr=shown, pass_fds=[writer, *passed]
                    )
            finally:
                os.close(writer)
            stack.close()
        try:
            assert await trio.to_thread.run_sync(ready, reader) in {b"\0", b""}
            yield Running(process, server, room)
            await process.wait()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            if not server.accepted.is_set():
                nursery.cancel_scope.cancel()
    assert server.violations == []
    assert not (room / "work" / "lazy-pages.socket").exists()


async def test_a_restore_is_served(room: Path) -> None:
    async with command(room, "--stats-file", "stats.json", "--progress", "json") as c, c.restore() as standin:
        await standin.finish()
        await all_good(standin)
        assert await c.process.wait() == 0
        await all_good(standin)
        await c.server.ended.wait()
        assert c.server.end is End.CLOSED
        assert c.errors == []
    stats = json.loads((room / "work" / "stats.json").read_text())
    assert (stats["state"], stats["pages_total"], stats["pages_missing"]) == ("complete", 2048, 0)
    lines = [json.loads(line) for line in c.shown.splitlines()]
    assert lines[-1] == stats


async def test_progress_in_lines(room: Path) -> None:
    async with command(room, "--progress=plain", "--display-stats") as c, c.restore() as standin:
        await standin.finish()
        assert await c.process.wait() == 0
        assert "complete: 2,048 of 2,048 pages" in c.shown
        assert "Lazy memory:   2,048 pages" in c.shown


async def test_no_progress(room: Path) -> None:
    async with command(room, "--progress=none") as c, c.restore() as standin:
        await standin.finish()
        assert await c.process.wait() == 0
        assert c.shown == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signal_before_a_restore_comes(room: Path, number: signal.Signals) -> None:
    async with command(room) as c:
        await until(lambda: catches(c.process.pid, number))
        c.process.send_signal(number)
        assert "no restore had connected" in await c.failed()
        assert not c.server.accepted.is_set()


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    # Python catches SIGINT from the start; trio's own comes with SIGTERM.
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


async def test_sigterm_before_restore_finished(room: Path) -> None:
    async with command(room) as c, c.restore() as standin:
        await standin.wait_registered()
        await c.server.accepted.wait()
        c.process.terminate()
        assert "vetoed" in await c.failed()
        with pytest.raises(WorkloadError):
            await standin.finish()
        assert (await standin.wait()).code == 3
        await c.server.ended.wait()
        assert c.server.end is End.RESET


async def test_sigkill_before_restore_finished(room: Path) -> None:
    async with command(room) as c, c.restore() as standin:
        await standin.wait_registered()
        await c.server.accepted.wait()
        c.process.kill()
        assert await c.process.wait() == -signal.SIGKILL
        with pytest.raises(WorkloadError):
            await standin.finish()
        await c.server.ended.wait()
        assert c.server.end is End.RESET


async def finished(c: Running) -> None:
    await until(lambda: "restore finished" in c.log)


async def test_first_sigterm_drains(room: Path) -> None:
    async with command(room, behaviour=FAR) as c, c.restore() as standin:
        await standin.finish()
        await finished(c)
        c.process.terminate()
        assert await c.process.wait() == 0
        await all_good(standin)
        assert "asked to stop" in c.log


@needs_poison
async def test_second_sigterm(room: Path) -> None:
    words = ["--stats-file", "stats.json", "--link-timeout", "0.5"]
    async with command(room, *words, behaviour=Behaviour(silent_after=MIB)) as c, c.restore() as standin:
        await standin.finish()
        await finished(c)
        c.process.terminate()
        await until(lambda: "asked to stop" in c.log)
        c.process.terminate()
        assert "poisoned" in await c.failed()
        result = await standin.worker().verify()
        no_lies(result)
        assert json.loads((c.work / "stats.json").read_text())["pages_poisoned"] == result.poisoned > 0


@pytest.mark.parametrize("words", [["--link-timeout=0.3"], ["--stop-timeout=0.1", "--link-timeout=0.5"]])
async def test_on_failure_kill(room: Path, words: Sequence[str]) -> None:
    async with (
        command(room, "--on-failure=kill", *words, behaviour=Behaviour(silent_after=MIB)) as c,
        c.restore() as standin,
    ):
        await standin.finish()
        await finished(c)
        if len(words) > 1:
            c.process.terminate()
        assert "killed" in await c.failed()
        assert (await standin.wait()).signal == signal.SIGKILL


async def test_restore_that_fails(room: Path) -> None:
    async with command(room) as c, c.restore() as standin:
        await standin.wait_registered()
        await standin.abandon()
        assert "the restore failed" in await c.failed()
        await c.server.ended.wait()
        assert c.server.end is End.RESET


async def test_inherited_socket(room: Path) -> None:
    async with command(room, inherit=True) as c, c.restore() as standin:
        await standin.finish()
        await all_good(standin)
        assert await c.process.wait() == 0
        await c.server.ended.wait()
        assert c.server.end is End.CLOSED
        assert c.server.closed_by == "FORCE_CLOSE"


@pytest.mark.parametrize("what", ["killed", "work-dir", "images", "log"])
async def test_a_command_that_does_not_get_far_lets_the_source_go_on(room: Path, what: str) -> None:
    """The last holder of an inherited socket must not end it by a FIN."""
    images = write_images(room / "images", SPEC)
    words = {"work-dir": ["-W", "/proc"], "log": ["-o", "no/such/dir"]}.get(what, [])
    if what == "images":
        (images.directory / "pstree.img").unlink()
    async with command(room, *words, images=images, inherit=True) as c:
        if what == "killed":
            c.process.kill()
            await c.process.wait()
            (room / "work" / "lazy-pages.socket").unlink()
        assert await c.process.wait() != 0
        await c.server.ended.wait()
        assert c.server.end is End.RESET


async def test_in_the_background(room: Path) -> None:
    async with command(room, "-d", "--pidfile", "pid") as c:
        assert await c.process.wait() == 0
        pid = int((c.work / "pid").read_text())
        descriptor = os.pidfd_open(pid)
        try:
            async with c.restore() as standin:
                await standin.finish()
                await all_good(standin)
                await trio.lowlevel.wait_readable(descriptor)
                await all_good(standin)
            await c.server.ended.wait()
            assert c.server.end is End.CLOSED
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        assert c.errors == []


def refused(*words: str) -> str:
    """Run the command with words it cannot serve; its one line."""
    ended = subprocess.run(
        [sys.executable, "-m", "criupy.lazy_pages", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    return line


def test_one_line_for_what_cannot_be(room: Path) -> None:
    images = str(write_images(room / "images", SPEC, style="full").directory)
    assert "no such directory" in refused("-D", "/no/such")
    assert "--work-dir" in refused("-D", images, "-W", "/proc")
    (room / "work" / "lazy-pages.socket").write_text("")
    assert "not a socket" in refused("-D", images, "-W", str(room / "work"))
