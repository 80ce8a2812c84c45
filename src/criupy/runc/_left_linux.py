"""A checkpoint whose controller is gone: runC and CRIU that go on with it, or what they have left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._network_linux import HeldNetwork
from criupy._proc_linux import is_named, parent_of, tracer_of
from criupy.errors import CriuError, RuncError
from criupy.rpc import SourceOutcome
from criupy.rpc._lazy_linux import open_process, outcome_of
from criupy.runc._criu_linux import criu_of, kill_checkpoint, was_reached
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
    if criu := criu_of(state.pid):
        raise RuncError(
            "checkpoint",
            container,
            f"CRIU (process {criu}) holds it still",
            hint="abort_checkpoint() ends that, and unlocks its network",
        )
    with HeldNetwork(state.pid) as network:
        unlock(container, network)


#: Options of runC and of its checkpoints that are followed by a value.
_WITH_VALUE = frozenset(
    {
        *("root", "log", "log-format", "criu", "rootless"),
        *("image-path", "work-path", "parent-path", "page-server", "status-fd", "manage-cgroups-mode"),
        "empty-ns",
    }
)
_USUAL_ROOT = "/run/runc"


def _parse(words: list[str]) -> tuple[list[str], str]:
    """Return what runC was told but options, and its state directory."""
    others: list[str] = []
    root = _USUAL_ROOT
    given = iter(words[1:])
    for word in given:
        if not word.startswith("-"):
            others.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        if name in _WITH_VALUE:
            value = value if has_value else next(given, "")
            root = value if name == "root" else root
    return others, os.path.normpath(root)


def _number(entry: Path) -> int:
    return int(entry.name) if entry.name.isdecimal() else 0


class LeftCheckpoint:
    """What a controller has left.

    CRIU traces the container as long as it holds it; the command that starts it may be there before, and
    may have been killed since. ``root`` is runC's state directory if one was named.
    """

    def __init__(self, container: str, state: ContainerState, root: str | None, *, force: bool) -> None:
        self._container = container
        self._pid = state.pid
        self._root = os.path.normpath(root or _USUAL_ROOT)
        self._stack = contextlib.ExitStack()
        try:
            self._process = self._stack.enter_context(self._open_container())
            self._network = self._stack.enter_context(HeldNetwork(self._pid))
            self._criu = self._find_criu()
            self._holders = dict(self._open_criu())
            self._commands = list(self._open_checkpoints())
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

    def _find_criu(self) -> int:
        tracer = tracer_of(self._pid)
        if tracer and not is_named(tracer, CRIU):
            raise self._error(f"process {tracer} traces it, and is no CRIU")
        return criu_of(self._pid)

    def _check(self, state: ContainerState, *, force: bool) -> None:
        if self._criu and not force and was_reached(self._criu):
            raise self._error(
                "a destination has connected, and that alone can know whether the container runs there",
                "end that one first, and if it is gone for good, abort with force=True",
            )
        is_paused = state.status == "paused"
        if self._commands or self._holders or (is_paused and force):
            return
        try:
            if self._network.is_locked:
                return
        except CriuError as error:
            raise self._error(f"no CRIU holds it; {error.message}") from error
        if is_paused:
            raise self._error(
                "it is paused, and nothing tells of a checkpoint",
                "if one has left it so, abort with force=True (or: runc resume)",
            )
        raise self._error("no checkpoint of it is under way, and none has left anything")

    def _open_criu(self) -> Iterator[tuple[int, int]]:
        for found in self._open(self._criu):
            if tracer_of(self._pid) == self._criu:
                yield found

    def _open_checkpoints(self) -> Iterator[tuple[int, int]]:
        """Open the command for this checkpoint."""
        candidates = [parent_of(self._criu)] if self._criu else map(_number, Path("/proc").iterdir())
        for pid in candidates:
            if pid and self._is_checkpoint(pid):
                for found in self._open(pid):
                    if self._is_checkpoint(pid):  # still
                        yield found

    def _open(self, pid: int) -> Iterator[tuple[int, int]]:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                yield pid, self._stack.enter_context(Descriptor(os.pidfd_open(pid))).fileno()

    def _is_checkpoint(self, pid: int) -> bool:
        """Tell whether a process is ``runc checkpoint`` of this container, and not of one of another root."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
        except OSError:
            return False
        if not is_named(pid, "runc"):
            return False
        others, root = _parse(words)
        return others == ["checkpoint", self._container] and (bool(self._criu) or root == self._root)

    def kill(self, *, force: bool) -> bool:
        """Kill them, as kill_checkpoint() does; return whether all are."""
        return kill_checkpoint(self._commands, self._holders, self._stack, self._pid, force=force)

    @property
    def pidfds(self) -> list[int]:
        """What tells of their ends."""
        return [*self._holders.values(), *(pidfd for _, pidfd in self._commands)]

    def outcome(self) -> SourceOutcome:
        """Tell what became of the container."""
        return outcome_of(self._process, succeeded=False)

    def unlock_network(self) -> None:
        """Let the container's network go on, unless another checkpoint has begun meanwhile."""
        if not criu_of(self._pid):
            unlock(self._container, self._network)

    def close(self) -> None:
        """Close what was opened."""
        self._stack.close()
