"""Start criupy-workload: the process that is dumped, or the stand-in restorer."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from criupy.errors import CriupyError
from criupy.testing._keeper_linux import Ended, Kept, keep
from criupy.testing.control_linux import (
    CONTROL_MAGIC,
    Control,
    Gate,
    RestorerState,
    Worker,
    WorkloadError,
)
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until

__all__ = ["Standin", "Workload", "find_workload", "start_standin", "start_workload"]


def find_workload() -> Path:
    """Find the criupy-workload program: CRIUPY_WORKLOAD, or the one beside this module."""
    if not sys.platform.startswith("linux"):
        raise CriupyError("criupy-workload runs on Linux only")
    named = os.environ.get("CRIUPY_WORKLOAD")
    program = Path(named) if named else Path(__file__).with_name("criupy-workload")
    if not os.access(program, os.X_OK):
        origin = (
            "CRIUPY_WORKLOAD names it" if named else "install criupy from its source on Linux to build it"
        )
        raise CriupyError(f"{program}: there is no such program ({origin})")
    return program


class Workload:
    """A running workload with its control file."""

    def __init__(self, spec: WorkloadSpec, kept: Kept, control: Control) -> None:
        self.spec = spec
        self.kept = kept
        self.control = control

    @property
    def pid(self) -> int:
        """The first task."""
        return self.kept.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """All tasks in the order of their numbers."""
        return tuple(self.worker(task).pid for task in range(self.spec.tree))

    def worker(self, task: int = 0, thread: int = 0) -> Worker:
        """Return the worker that is a thread of a task."""
        return self.control.worker(task, thread)

    def child(self, index: int = 0) -> Worker:
        """Return the worker that a forked child becomes."""
        return self.control.child(index)

    async def wait(self) -> Ended:
        """Wait until the first task has ended."""
        return await self.kept.wait()

    async def is_running(self) -> bool:
        """Tell whether every task makes progress, by its heartbeat; a frozen or dead one does not."""
        workers = [self.worker(task) for task in range(self.spec.tree)]
        before = [worker.heartbeat for worker in workers]
        for _ in range(200):
            if all(worker.heartbeat != old for worker, old in zip(workers, before, strict=True)):
                return True
            await trio.sleep(0.005)
        return False

    def gone(self, pid: int) -> str | None:
        """Say why a process cannot answer, None while it can (for Control.gone)."""
        if self.kept.is_alive(pid):
            return None
        ended = self.kept.ended.get(pid)
        return f"process {pid} ended" + (f" with {ended}" if ended else "")

    async def wait_until_ready(self, workers: int) -> None:
        """Wait until this many workers take commands."""
        await self._until(lambda: self.control.get("nr_ready") >= workers)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that a workload which failed to start can never meet."""

        def met_or_failed() -> bool:
            met = condition()
            if not met:
                self._check_start()
            return met

        await until(met_or_failed)

    def _check_start(self) -> None:
        is_alive = self.kept.is_alive(self.pid)  # before the file, where it may say why it ends
        if self.control.get("failed"):
            raise WorkloadError(f"criupy-workload: {self.control.error}")
        if not is_alive:
            output = self.kept.output.read_text(errors="replace").strip()
            raise WorkloadError(f"criupy-workload ended at its start: {output or 'it said nothing'}")


class Standin(Workload):
    """A stand-in for criu restore."""

    async def wait_registered(self) -> None:
        """Wait until every task has handed over its descriptor and registered its memory."""
        await self._until(lambda: self.control.restorer_state >= RestorerState.REGISTERED)

    async def wait_announced(self, tasks: int) -> None:
        """Wait until this many tasks have sent their descriptors."""
        await self._until(lambda: self.control.get("nr_announced") >= tasks)

    async def finish(self) -> None:
        """Send restore-finished and let the tasks run.

        Raises WorkloadError when the daemon vetoed the restore.
        """
        await self.wait_registered()
        self.control.gate = Gate.FINISH
        await until(
            lambda: (
                self.control.restorer_state != RestorerState.REGISTERED or not self.kept.is_alive(self.pid)
            )
        )
        if (state := self.control.restorer_state) != RestorerState.FINISHED:
            raise WorkloadError(f"the restore did not finish: {state.name.lower()}")
        await self.wait_until_ready(self.spec.tree * self.spec.threads)

    async def abandon(self) -> Ended:
        """End all tasks without restore-finished, as a failing restore does."""
        self.control.gate = Gate.ABANDON
        return await self.wait()

    @property
    def early_result_is_good(self) -> bool:
        """Whether the pages touched before restore-finished held what they should."""
        return all(self.worker(task).result.is_good for task in range(self.spec.tree))

    @property
    def sees_forks(self) -> bool:
        """Whether the kernel granted EVENT_FORK (userfaultfd.h: bit 1)."""
        return bool(self.control.get("uffd_features") & 2)

    @property
    def is_user_mode_only(self) -> bool:
        """Whether faults inside system calls give EFAULT instead of waiting for pages."""
        return bool(self.control.get("user_mode_only"))


async def _open_control(path: Path, kept: Kept) -> Control:
    """Wait until the program has made its control file; its magic comes last."""
    while True:
        is_alive = kept.is_alive(kept.pid)  # before the file, where it may say why it ends
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.read(4) == struct.pack("=I", CONTROL_MAGIC):
                return Control(path)
        if not is_alive:
            output = kept.output.read_text(errors="replace").strip()
            raise WorkloadError(f"criupy-workload ended at its start: {output or 'it said nothing'}")
        await trio.sleep(0.001)


@contextlib.asynccontextmanager
async def start_workload(
    spec: WorkloadSpec, directory: Path, *, program: Path | None = None
) -> AsyncIterator[Workload]:
    """Start a workload, wait until its memory is filled, and end it on leaving.

    Its control file and output are made in `directory`.
    """
    program = program or find_workload()
    path = directory / "workload.control"
    command = [str(program), f"--control={path}", *spec.arguments()]
    async with keep(command, keeper=program, output=directory / "workload.out") as kept:
        control = await _open_control(path, kept)
        with contextlib.closing(control):
            workload = Workload(spec, kept, control)
            control.gone = workload.gone
            await workload.wait_until_ready(spec.tree * spec.threads)
            yield workload


@contextlib.asynccontextmanager
async def start_standin(
    spec: WorkloadSpec,
    socket: Path,
    directory: Path,
    *,
    pid_base: int = 100,
    announce: int | None = None,
    register_delay_us: int = 1000,
    early: int = 0,
    user_mode_only: bool = False,
    no_fork_event: bool = False,
    withheld: int = 0,
    withheld_pause_us: int = 0,
    program: Path | None = None,
) -> AsyncIterator[Standin]:
    """Start a stand-in restore of images written for `spec`, connected to `socket`.

    Task k announces itself as pid `pid_base` + k, and a zombie as the pid after the last task's; only the
    first `announce` tasks do. Memory is registered `register_delay_us` after the descriptor was sent; then
    `early` pages of each task are touched. Nothing runs before `finish`.

    With `withheld` each thread of the first task touches so many pages once all memory is registered and
    before `finish`, at random and with pauses of `withheld_pause_us`; what that took is in the samples of its
    workers (`wait_registered` waits for the last one).
    """
    program = program or find_workload()
    path = directory / "standin.control"
    command = [
        str(program),
        f"--control={path}",
        *spec.arguments(),
        f"--restorer={socket}",
        f"--pid-base={pid_base}",
        f"--register-delay-us={register_delay_us}",
        f"--early={early}",
    ]
    if announce is not None:
        command.append(f"--announce={announce}")
    if user_mode_only:
        command.append("--user-mode-only")
    if no_fork_event:
        command.append("--no-fork-event")
    if withheld:
        command += [f"--withheld={withheld}", f"--withheld-pause-us={withheld_pause_us}"]
    async with keep(command, keeper=program, output=directory / "standin.out") as kept:
        control = await _open_control(path, kept)
        with contextlib.closing(control):
            standin = Standin(spec, kept, control)
            control.gone = standin.gone
            yield standin
