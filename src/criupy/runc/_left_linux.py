"""A checkpoint whose controller is gone: CRIU that holds the container still, or what it has left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._kill_linux import kill_trees
from criupy._network_linux import is_network_locked, network_of, unlock_network
from criupy._proc_linux import is_named, parent_of, tracer_of
from criupy.errors import CriuError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._lazy_linux import open_process, outcome_of
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._program_linux import CRIU
from criupy.runc._words import ContainerState

__all__ = ["LeftCheckpoint", "unlock"]


def unlock(container: str, pid: int) -> None:
    """Undo what CRIU locked in the network namespace of a container; nothing if it locked nothing."""
    try:
        unlock_network(network_of(pid))
    except CriuError as error:
        if network_of(pid).exists():  # a container that has ended needs it no more
            raise RuncError("checkpoint", container, error.message) from error


class LeftCheckpoint:
    """What a controller has left: a CRIU, which traces the container as long as it holds it, or a lock."""

    def __init__(self, container: str, state: ContainerState) -> None:
        self._container = container
        self._pid = state.pid
        self._killed = False
        self._stack = contextlib.ExitStack()
        try:
            self._process = self._stack.enter_context(self._open_container())
            self._criu = self._find_criu(state)
            self._found = [*self._open_criu(), *self._open_runc()]
        except BaseException:
            self.close()
            raise

    def _open_container(self) -> Descriptor:
        process = open_process(self._pid)
        if process is None:
            raise self._error(f"its first process, {self._pid}, is gone")
        return process

    def _error(self, message: str) -> RuncError:
        return RuncError("checkpoint", self._container, message)

    def _find_criu(self, state: ContainerState) -> int:
        """Find what holds it; 0 if it left a frozen cgroup or a lock only."""
        criu = tracer_of(self._pid)
        if criu and not is_named(criu, CRIU):
            raise self._error(f"process {criu} traces it, and is no CRIU")
        if criu or state.status == "paused":
            return criu
        try:
            if is_network_locked(network_of(self._pid)):
                return 0
        except CriuError as error:
            raise self._error(f"no CRIU holds it; {error.message}") from error
        raise self._error("no CRIU holds it, so there is nothing to end")

    def _open_criu(self) -> Iterator[tuple[int, Descriptor]]:
        if self._criu:
            yield from self._open(self._criu)

    def _open_runc(self) -> Iterator[tuple[int, Descriptor]]:
        """Open the command that has started CRIU for this checkpoint; it may have been killed before."""
        runc = parent_of(self._criu) if self._criu else None
        for found in [] if runc is None else self._open(runc):
            # As long as CRIU has it as its parent, its pid is nobody else's.
            if self._is_checkpoint(runc) and parent_of(self._criu) == runc:
                yield found

    def _open(self, pid: int) -> Iterator[tuple[int, Descriptor]]:
        with contextlib.suppress(ProcessLookupError):
            yield pid, self._stack.enter_context(Descriptor(os.pidfd_open(pid)))

    def _is_checkpoint(self, pid: int | None) -> bool:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            return "checkpoint" in words and self._container in words
        return False

    def kill(self) -> list[int]:
        """Kill them; return pidfds that tell of their ends."""
        with HeldInterrupt():  # which would leave what is stopped already so
            # As long as CRIU traces it, its pid is nobody else's.
            if self._criu and tracer_of(self._pid) == self._criu:
                self._killed = True
                kill_trees([(pid, pidfd.fileno()) for pid, pidfd in self._found])
        return [pidfd.fileno() for _, pidfd in self._found]

    def outcome(self) -> SourceOutcome:
        """Tell what became of the container; raise RuncError if it had ended before CRIU was killed."""
        outcome = outcome_of(self._process, succeeded=False)
        if outcome is SourceOutcome.LOST and not self._killed:
            raise self._error("it had ended before it could be aborted: the destination may have it")
        return outcome

    def unlock_network(self) -> None:
        """Let the container's network go on."""
        unlock(self._container, self._pid)

    def close(self) -> None:
        """Close what was opened."""
        self._stack.close()
