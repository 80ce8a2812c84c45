"""A checkpoint whose controller is gone: runC and CRIU that go on with it, or what they have left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._kill_linux import kill_trees
from criupy._network_linux import HeldNetwork
from criupy._proc_linux import is_named, parent_of, tracer_of
from criupy.errors import CriuError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._lazy_linux import is_connected, open_process, outcome_of
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._program_linux import CRIU
from criupy.runc._words import ContainerState

__all__ = ["LeftCheckpoint", "unlock", "unlock_left"]


def unlock(container: str, network: HeldNetwork) -> None:
    """Undo what CRIU locked in the network namespace of a container; nothing if it locked nothing."""
    try:
        network.unlock()
    except CriuError as error:
        raise RuncError("checkpoint", container, error.message) from error


def unlock_left(container: str, state: ContainerState) -> None:
    """Let the network of a container go on that a checkpoint has left."""
    if criu := criu_of(container, state.pid):
        raise RuncError(
            "checkpoint",
            container,
            f"CRIU (process {criu}) holds it still",
            hint="abort_checkpoint() ends that, and unlocks its network",
        )
    with HeldNetwork(state.pid) as network:
        unlock(container, network)


def criu_of(container: str, pid: int) -> int:
    """Return the CRIU that holds a container by its first process; 0 for none, RuncError for a debugger."""
    tracer = tracer_of(pid)
    if tracer and not is_named(tracer, CRIU):
        raise RuncError("checkpoint", container, f"process {tracer} traces it, and is no CRIU")
    return tracer


def _root_of(words: list[str]) -> str | None:
    """Return the state directory that runC was told to use."""
    for word, following in pairwise(words):
        if word == "--root":
            return following
        if word.startswith("--root="):
            return word.removeprefix("--root=")
    return None


class LeftCheckpoint:
    """What a controller has left.

    CRIU traces the container as long as it holds it; the command that starts it may be there before, and
    may have been killed since. ``root`` is runC's state directory if one was named.
    """

    def __init__(self, container: str, state: ContainerState, root: str | None, *, force: bool) -> None:
        self._container = container
        self._pid = state.pid
        self._root = root
        self._killed = False
        self._stack = contextlib.ExitStack()
        try:
            self._process = self._stack.enter_context(self._open_container())
            self._network = self._stack.enter_context(HeldNetwork(self._pid))
            self._criu = criu_of(container, self._pid)
            self._found = [*self._open_criu(), *self._open_checkpoints()]
            self._check(state, force=force)
        except BaseException:
            self.close()
            raise

    def _open_container(self) -> Descriptor:
        process = open_process(self._pid)
        if process is None:
            raise self._error(f"its first process, {self._pid}, is gone")
        return process

    def _error(self, message: str, hint: str | None = None) -> RuncError:
        return RuncError("checkpoint", self._container, message, hint=hint)

    def _check(self, state: ContainerState, *, force: bool) -> None:
        if self._criu and not force and is_connected(self._criu):
            raise self._error(
                "a destination has connected, which alone can know whether the container runs there",
                "end that one first, and if it is gone for good, abort with force=True",
            )
        if self._found or state.status == "paused":
            return
        try:
            if self._network.is_locked:
                return
        except CriuError as error:
            raise self._error(f"no CRIU holds it; {error.message}") from error
        raise self._error("no checkpoint of it is under way, and none has left anything")

    def _open_criu(self) -> Iterator[tuple[int, Descriptor]]:
        for found in self._open(self._criu):
            if tracer_of(self._pid) == self._criu:
                yield found

    def _open_checkpoints(self) -> Iterator[tuple[int, Descriptor]]:
        """Open the commands for this checkpoint, of which there should be one."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and self._is_checkpoint(int(entry.name)):
                for found in self._open(int(entry.name)):
                    if self._is_checkpoint(found[0]):  # still
                        yield found

    def _open(self, pid: int) -> Iterator[tuple[int, Descriptor]]:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                yield pid, self._stack.enter_context(Descriptor(os.pidfd_open(pid)))

    def _is_checkpoint(self, pid: int) -> bool:
        """Tell whether a process is ``runc checkpoint`` of this container, and not of one of another root."""
        words: list[str] = []
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        if "checkpoint" not in words or self._container not in words or not is_named(pid, "runc"):
            return False
        if self._criu and parent_of(self._criu) == pid:
            return True
        return _root_of(words) == self._root

    def kill(self) -> list[int]:
        """Kill them; return pidfds that tell of their ends."""
        with HeldInterrupt():  # which would leave what is stopped already so
            if not self._killed and self._found:
                kill_trees([(pid, pidfd.fileno()) for pid, pidfd in self._found])
                self._killed = True
        return [pidfd.fileno() for _, pidfd in self._found]

    def outcome(self) -> SourceOutcome:
        """Tell what became of the container."""
        return outcome_of(self._process, succeeded=False)

    def unlock_network(self) -> None:
        """Let the container's network go on."""
        unlock(self._container, self._network)

    def close(self) -> None:
        """Close what was opened."""
        self._stack.close()
