"""A checkpoint whose controller is gone: CRIU that holds the container still, or what it has left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._kill_linux import kill_trees
from criupy.errors import CriuError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._lazy_linux import open_process, outcome_of
from criupy.rpc._network_linux import is_network_locked, network_of, unlock_network
from criupy.rpc._worker_linux import HeldInterrupt, parent_of, tracer_of
from criupy.runc._program_linux import CRIU
from criupy.runc._words import ContainerState

__all__ = ["LeftCheckpoint", "is_named", "unlock"]


def is_named(pid: int, name: str) -> bool:
    """Tell whether a process is of a program of this name."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    return False


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
        self._stack = contextlib.ExitStack()
        try:
            self._process = open_process(state.pid)
            if self._process is not None:
                self._stack.enter_context(self._process)
            self._criu = self._find_criu()
            self._found = [*self._open(self._criu), *self._open(self._find_runc())]
        except BaseException:
            self.close()
            raise

    def _find_criu(self) -> int:
        """Find what holds it; 0 if only the lock is left."""
        criu = tracer_of(self._pid)
        if not criu and not is_network_locked(network_of(self._pid)):
            raise RuncError("checkpoint", self._container, "no CRIU holds it, so there is nothing to end")
        if criu and not is_named(criu, CRIU):
            raise RuncError("checkpoint", self._container, f"process {criu} traces it, and is no CRIU")
        return criu

    def _find_runc(self) -> int | None:
        """Find the command that has started CRIU for this checkpoint; it may have been killed before."""
        pid = parent_of(self._criu) if self._criu else None
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
            return pid if "checkpoint" in words and words[-1] == self._container else None
        return None

    def _open(self, pid: int | None) -> Iterator[tuple[int, Descriptor]]:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                yield pid, self._stack.enter_context(Descriptor(os.pidfd_open(pid)))

    def kill(self) -> list[int]:
        """Kill them; return pidfds that tell of their ends."""
        with HeldInterrupt():  # which would leave what is stopped already so
            # As long as CRIU traces it, its pid is nobody else's.
            if self._criu and tracer_of(self._pid) == self._criu:
                kill_trees([(pid, pidfd.fileno()) for pid, pidfd in self._found])
        return [pidfd.fileno() for _, pidfd in self._found]

    def outcome(self) -> SourceOutcome:
        """Tell what became of the container."""
        return outcome_of(self._process, succeeded=False)

    def unlock_network(self) -> None:
        """Let the container's network go on."""
        unlock(self._container, self._pid)

    def close(self) -> None:
        """Close what was opened."""
        self._stack.close()
