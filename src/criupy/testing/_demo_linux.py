"""The migrations of the demo: with CRIU at both ends, or with stand-ins for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from criupy.errors import CriupyError
from criupy.testing._demo_report import FAULT_NS, Freeze, Measured
from criupy.testing.control_linux import Control, Order, Touch, Worker
from criupy.testing.criu_linux import (
    Criu,
    CriuJob,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    restore,
    stock_command,
)
from criupy.testing.images import write_images
from criupy.testing.page_server import PageServer
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import Workload, start_standin, start_workload

__all__ = ["OURS", "STOCK", "DemoError", "Story", "migrate", "migrate_standin"]

OURS = "criupy-lazy-pages"
STOCK = "criu lazy-pages"

MIB = 1 << 20
_POLL = 0.002
_LOOK_AROUND = 0.1
# The kernel counts resident pages per processor and adds up late: fewer than so many are not told apart.
_SLACK = 1 * MIB
_TOUCHING = "It touches random pages all the time; what is missing is fetched at once."


class DemoError(CriupyError):
    """The demo cannot go on; the message says why."""


class Story(Protocol):
    """Where the demo tells what happens."""

    @property
    def terminal(self) -> Path | None:
        """A path that opens the terminal, None when the output is none."""

    def say(self, text: str) -> None:
        """Tell one step."""

    def quote(self, program: str, line: str) -> None:
        """Pass on a line of a program."""

    def show(self, text: str) -> None:
        """Show a passing state; only a terminal does."""


def _anonymous_memory(pid: int) -> int:
    """Return how many bytes of its own memory a process has now."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise DemoError(f"the process {pid} ended while its memory was on its way")


def _clock_ahead(pid: int) -> float:
    """Return by how many seconds a process's monotonic clock differs from ours.

    CRIU lets it go on where it was frozen, by a time namespace (man 7 time_namespaces).
    """
    try:
        lines = Path(f"/proc/{pid}/timens_offsets").read_text().splitlines()
    except FileNotFoundError:
        return 0.0  # a kernel without time namespaces
    clocks = {name: int(seconds) + int(ns) / 1e9 for name, seconds, ns in map(str.split, lines)}
    return clocks["monotonic"]


class _Heartbeat:
    """When a process last did anything."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.last = time.monotonic()

    async def watch(self) -> None:
        seen = self.worker.heartbeat
        while True:
            await trio.sleep(_POLL / 4)
            if (beat := self.worker.heartbeat) != seen:
                seen, self.last = beat, time.monotonic()


class _Transfer:
    """Watch the memory of a process arrive, from its first instruction on.

    `host_pid` tells its pid, once it runs; `check` raises when it will never run, or not any more.
    """

    def __init__(
        self,
        story: Story,
        spec: WorkloadSpec,
        daemon: CriuJob,
        worker: Worker,
        host_pid: Callable[[], int],
        check: Callable[[], None],
        *,
        ours: bool,
    ) -> None:
        self._story = story
        self._size = spec.size
        self._daemon = daemon
        self._worker = worker
        self._host_pid = host_pid
        self._check = check
        self._ours = ours
        self._quoted = 0
        self._pid = 0

    def _pass_on(self) -> None:
        """Show what our daemon says of its progress, unless it does so on the terminal itself."""
        if not self._ours or self._story.terminal:
            return
        text = self._daemon.kept.output.read_text(errors="replace")
        whole = text.rfind("\n") + 1
        for line in text[self._quoted : whole].splitlines():
            self._story.quote(OURS, line)
        self._quoted = max(self._quoted, whole)

    async def first_instruction(self) -> float:
        """Wait until the process runs; return the moment, which it took itself, by our monotonic clock."""
        looked = time.monotonic()
        while not (started := self._worker.result.started_ns):
            await trio.sleep(_POLL / 4)
            if time.monotonic() - looked > _LOOK_AROUND:
                looked = time.monotonic()
                self._check()
                if not self._daemon.is_running:
                    await self._daemon.succeed()
        self._pid = await self._find()
        return started / 1e9 - _clock_ahead(self._pid)

    async def _find(self) -> int:
        """Return the pid of the process, which has run."""
        while True:
            try:
                return self._host_pid()
            except ProcessLookupError:
                # it can be missed at the moment when criu ends and it gets another parent
                self._check()
            await trio.sleep(_POLL)

    def arrived(self) -> int:
        """Return how many bytes are there."""
        return min(_anonymous_memory(self._pid), self._size)

    async def complete(self) -> float:
        """Wait until all memory is there, and the daemon has ended well; return when it was."""
        looked = shown = time.monotonic()
        while (there := _anonymous_memory(self._pid)) < self._size - _SLACK:
            await trio.sleep(_POLL)
            now = time.monotonic()
            if now - looked > _LOOK_AROUND:
                looked = now
                self._check()
                self._pass_on()
                if not self._daemon.is_running:
                    break
            if not self._ours and now - shown > _LOOK_AROUND:
                shown = now
                self._story.show(f"{STOCK}: {there // MIB} of {self._size // MIB} MiB are there")
        end = time.monotonic()
        await self._daemon.succeed()
        self._pass_on()
        return end


def _command(story: Story, command: tuple[str, ...], *, ours: bool) -> tuple[str, ...]:
    """Let our daemon draw its progress on the terminal; the standard error of all others is a file."""
    if not ours or story.terminal is None:
        return command
    return ("/bin/sh", "-c", 'exec "$@" 2>"$0"', str(story.terminal), *command)


def _touch_all_the_time(worker: Worker) -> None:
    # In each round every page comes once, so latencies of the first round are those of all faults.
    worker.start_touching(Order.RANDOM, seed=7, flags=Touch.UNTIL_STOPPED)


async def _verify(story: Story, spec: WorkloadSpec, worker: Worker) -> tuple[int, ...]:
    """Look at every byte; return the sorted waits for pages."""
    worker.stop()
    touched = await worker.wait()
    waits = tuple(sorted(ns for ns in worker.samples if ns > FAULT_NS))
    found = await worker.verify()
    if not (touched.is_good and found.is_good and found.checked == spec.main_pages):
        raise DemoError(f"the process has memory that is not what it was: touched {touched}, then {found}")
    story.say(f"Destination: the process looked at every byte of its {spec.size // MIB} MiB: all are right.")
    return waits


async def migrate(criu: Criu, story: Story, size: int, room: Path, *, ours: bool) -> Measured:
    """Migrate a process of `size` bytes with CRIU at both ends; files and logs are made in `room`."""
    images, work = room / "images", room / "work"
    work.mkdir(parents=True)
    spec = WorkloadSpec(size=size, samples=size // 4096)
    program = OURS if ours else STOCK
    command = _command(story, our_command() if ours else stock_command(criu), ours=ours)
    # the nursery inside: what fails first ends its tasks before the processes they watch
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        source: Workload = await stack.enter_async_context(start_workload(spec, room))
        story.say(f"Source: process {source.pid} runs; its {size // MIB} MiB of memory are filled.")
        heart = _Heartbeat(source.worker())
        nursery.start_soon(heart.watch)
        pages = await stack.enter_async_context(lazy_dump(criu, source.pid, images, extra=["-v2"]))
        dumped = time.monotonic()
        story.say(
            f"Source: criu dump has frozen it and saved all but its memory; it hands that out on request, at "
            f"{pages.address}, port {pages.port}."
        )
        control: Control = source.control.copy(room / "restored.control")
        stack.callback(control.close)
        worker = control.worker()
        _touch_all_the_time(worker)
        story.say(f"Destination: {program} starts; it will fetch the memory.")
        starting = time.monotonic()
        daemon = await stack.enter_async_context(
            lazy_pages_daemon(command, images, work, source=(pages.address, pages.port), extra=["-v2"])
        )
        ready = time.monotonic()
        story.say(
            "Destination: criu restore rebuilds the process, with empty memory, in a pid namespace (process "
            "numbers of its own: here the original still has its number)."
        )
        restored = await stack.enter_async_context(
            restore(criu, images, work, source.pid, binds={source.control.path: control.path}, extra=["-v2"])
        )
        control.gone = restored.gone

        def check() -> None:
            job = restored.job
            ended = job.kept.ended.get(job.kept.pid)
            if ended and ended.code != 0:
                raise job.failure(ended, "0")
            if (reason := restored.gone(source.pid)) is not None:
                raise DemoError(reason)

        nursery.start_soon(restored.job.wait)  # so that its end is noticed
        transfer = _Transfer(
            story, spec, daemon, worker, lambda: restored.job.kept.host_pid(source.pid), check, ours=ours
        )
        begin = await transfer.first_instruction()
        there = transfer.arrived() / MIB
        story.say(
            f"Destination: the process runs, {begin - heart.last:.3f} s after it was frozen, with "
            f"{there:.0f} of {size // MIB} MiB there. {_TOUCHING}"
        )
        end = await transfer.complete()
        await restored.finished()
        story.say(f"Destination: all memory is there, {end - begin:.3f} s after the process began to run.")
        await pages.job.succeed()
        if (ended := await source.wait()).signal != 9:
            raise DemoError(f"the original should have been killed by criu dump, but ended with {ended}")
        story.say("Source: criu dump has ended the frozen original, so there is one process again.")
        waits = await _verify(story, spec, worker)
        freeze = Freeze(dumped - heart.last, ready - starting, begin - ready)
        nursery.cancel_scope.cancel()
    return Measured(program, size, freeze, end - begin, waits)


async def migrate_standin(story: Story, size: int, room: Path) -> Measured:
    """Bring the memory of a process that was never dumped to a stand-in for a restored one."""
    work = room / "work"
    work.mkdir(parents=True)
    spec = WorkloadSpec(size=size, samples=size // 4096)
    story.say(
        f"Source: {size // MIB} MiB are written as the memory of a process, with images as by criu dump."
    )
    images = await trio.to_thread.run_sync(partial(write_images, room / "images", spec))
    server = PageServer(images)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await nursery.start(server.run)
        story.say(
            f"Source: a page server hands that out on request, at {server.address}, port {server.port}."
        )
        story.say(f"Destination: {OURS} starts; it will fetch the memory.")
        daemon = await stack.enter_async_context(
            lazy_pages_daemon(
                _command(story, our_command(), ours=True),
                images.directory,
                work,
                source=(server.address, server.port),
                extra=["-v2"],
            )
        )
        standin = await stack.enter_async_context(start_standin(spec, work / "lazy-pages.socket", work))
        await standin.wait_registered()
        worker = standin.worker()
        _touch_all_the_time(worker)

        def check() -> None:
            if (reason := standin.gone(standin.pid)) is not None:
                raise DemoError(reason)

        transfer = _Transfer(story, spec, daemon, worker, lambda: standin.pid, check, ours=True)
        await standin.finish()
        begin = await transfer.first_instruction()
        story.say(
            f"Destination: process {standin.pid} runs, with {transfer.arrived() / MIB:.0f} of {size // MIB} "
            f"MiB there. {_TOUCHING}"
        )
        end = await transfer.complete()
        story.say(f"Destination: all memory is there, {end - begin:.3f} s after the process began to run.")
        await server.ended.wait()
        waits = await _verify(story, spec, worker)
    return Measured(OURS, size, None, end - begin, waits)
