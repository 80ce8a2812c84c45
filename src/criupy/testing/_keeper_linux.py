"""Processes that are certain to be gone afterwards, with all their descendants.

A keeper (`workload_keeper.c`) stands between Python and every command: it adopts and
reaps orphans, reports each end with its resource usage, and kills all of it when its standard
input closes. So nothing survives a failed test, nor the death of Python itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from criupy.errors import CriupyError

__all__ = ["Ended", "KeeperError", "Kept", "keep"]

_GRACE = 20.0  # seconds for a keeper to end what it keeps


class KeeperError(CriupyError):
    """A command could not be started or kept."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: `code` or `signal`, and what it and its reaped children used."""

    pid: int
    code: int | None
    signal: int | None
    user_seconds: float
    system_seconds: float
    max_rss: int
    """Peak resident bytes of the largest process among it and its reaped children."""

    def __str__(self) -> str:
        return f"exit status {self.code}" if self.signal is None else f"signal {self.signal}"


class Kept:
    """A running command under a keeper.

    Pids are those the keeper sees: inside its own pid namespace, when it has one.
    """

    def __init__(
        self, process: trio.Process, report: trio.lowlevel.FdStream, output: Path, *, namespace: bool
    ) -> None:
        self._process = process
        self._report = report
        self._lock = trio.Lock()
        self._buffer = b""
        self._pid: int | None = None
        self._open = True
        self.output = output
        self.namespace = namespace
        self.ended: dict[int, Ended] = {}

    @property
    def pid(self) -> int:
        """The command."""
        assert self._pid is not None
        return self._pid

    @property
    def proc(self) -> Path:
        """The /proc in which the keeper's pids are found."""
        if not self.namespace:
            return Path("/proc")
        return Path(f"/proc/{self._namespace_init()}/root/proc")

    def _namespace_init(self) -> int:
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        children = path.read_text().split()
        if not children:
            raise ProcessLookupError("the pid namespace is gone")
        return int(children[0])

    def state(self, pid: int) -> str | None:
        """Return the one-letter state of a process, None when it is gone."""
        try:
            text = (self.proc / str(pid) / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
            return None
        return text[text.rindex(")") + 2]

    def is_alive(self, pid: int) -> bool:
        """Tell whether a process runs, or is frozen; a zombie does not."""
        return pid not in self.ended and self.state(pid) not in (None, "Z", "X")

    def host_pid(self, pid: int) -> int:
        """Translate a pid that the keeper sees into one that Python sees."""
        if not self.namespace:
            return pid
        waiting = [self._namespace_init()]
        while waiting:
            candidate = waiting.pop()
            try:
                status = Path(f"/proc/{candidate}/status").read_text()
                names = next(line for line in status.splitlines() if line.startswith("NSpid:"))
                if int(names.split()[-1]) == pid:
                    return candidate
                for children in Path(f"/proc/{candidate}/task").glob("*/children"):
                    waiting += map(int, children.read_text().split())
            except FileNotFoundError:
                continue
        raise ProcessLookupError(f"no process has pid {pid} in the namespace")

    def signal(self, number: int, pid: int | None = None) -> None:
        """Send a signal to the command or to a process under it; one that is gone already is no error."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.host_pid(self.pid if pid is None else pid))
            try:
                signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def kill(self, pid: int | None = None) -> None:
        """Send SIGKILL."""
        self.signal(signal.SIGKILL, pid)

    def terminate(self) -> None:
        """Send SIGTERM to the command."""
        self.signal(signal.SIGTERM)

    async def _pump(self) -> bool:
        if not self._open:
            return False
        data = await self._report.receive_some()
        if not data:
            self._open = False
            return False
        *lines, self._buffer = (self._buffer + bytes(data)).split(b"\n")
        for line in lines:
            word, pid, *rest = line.decode().split()
            if word == "started":
                self._pid = int(pid)
                continue
            how, number, user, system, rss = rest
            self.ended[int(pid)] = Ended(
                pid=int(pid),
                code=int(number) if how == "exited" else None,
                signal=int(number) if how == "killed" else None,
                user_seconds=int(user) / 1e6,
                system_seconds=int(system) / 1e6,
                max_rss=int(rss) * 1024,
            )
        return True

    async def wait(self, pid: int | None = None) -> Ended:
        """Wait until the command, or another process that the keeper reaps, has ended."""
        while True:
            wanted = self._pid if pid is None else pid
            if wanted is not None and wanted in self.ended:
                return self.ended[wanted]
            async with self._lock:
                if wanted in self.ended:
                    continue
                if not await self._pump():
                    raise KeeperError(f"the keeper of {self.output.name} ended: {self._said()}")

    async def wait_started(self) -> None:
        """Wait until the command has a pid."""
        while self._pid is None:
            if not await self._pump():
                raise KeeperError(f"the keeper of {self.output.name} did not start: {self._said()}")

    def _said(self) -> str:
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    async def aclose(self) -> None:
        """Close the keeper's standard input and see everything end."""
        assert self._process.stdin is not None
        await self._process.stdin.aclose()
        with trio.move_on_after(_GRACE) as waiting:
            while self._open:
                async with self._lock:
                    await self._pump()
            await self._process.wait()
        if waiting.cancelled_caught:
            self._process.kill()
            await self._process.wait()
        await self._report.aclose()
        if waiting.cancelled_caught:
            raise KeeperError(
                f"processes under {self.output.name} did not end within {_GRACE:.0f} s of SIGKILL"
            )


@contextlib.asynccontextmanager
async def keep(
    command: Sequence[str | os.PathLike[str]],
    *,
    keeper: Path,
    output: Path,
    namespace: bool = False,
    binds: Mapping[Path, Path] | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Kept]:
    """Run a command under a keeper and end all of it on leaving.

    `keeper` is the criupy-workload program. Standard output and error go to the file `output`, standard
    input is /dev/null. `binds` (target to source) puts files over others inside the `namespace`.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    report = trio.lowlevel.FdStream(reading)
    words: list[str | os.PathLike[str]] = [keeper, "--keep", "--report", str(writing)]
    if namespace:
        words.append("--namespace")
    for target, source in (binds or {}).items():
        words += ["--bind", source, target]
    try:
        with output.open("ab") as file:
            process = await trio.lowlevel.open_process(
                [*words, "--", *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(writing, *pass_fds),
                # Ctrl-C goes to the terminal's whole group: a keeper ended by it would leave processes behind
                start_new_session=True,
                cwd=cwd,
                env=env,
            )
    except BaseException:
        await trio.aclose_forcefully(report)
        raise
    finally:
        os.close(writing)
    kept = Kept(process, report, output, namespace=namespace)
    try:
        await kept.wait_started()
        yield kept
    finally:
        with trio.CancelScope(shield=True):
            await kept.aclose()
