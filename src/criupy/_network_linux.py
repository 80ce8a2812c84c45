"""CRIU's lock on a network namespace: whether it is there, and how to undo it.

While CRIU dumps or restores tasks that have a network namespace of their own, everything
but its own packets is dropped there. It undoes that when a dump itself fails, but not when it
is killed, nor when what fails is a restore or the transfer of a lazy dump: then the tasks go on
and nobody reaches them. CRIU locks with iptables or, where it was built so, with nft
(criu/net.c, criu/netfilter.c); these undo it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from criupy._descriptor import Descriptor
from criupy.errors import CriuError

__all__ = ["HeldNetwork", "is_network_locked", "lock_note", "unlock_network"]

StrPath = str | os.PathLike[str]

_CHAIN = "CRIU"
_TOOLS = ("iptables", "ip6tables", "nft")
# For the lock that iptables themselves hold, in seconds: another program may hang with it.
_WAIT = ("-w", "10")
_TRIES = 5  # another one may be at it, too, and have undone what we were about to
_NO_RESOURCE = 4  # iptables' own, when somebody else has its lock, or without the rights
_NO_PROGRAM = 127  # execvp's, of nsenter as of a shell


def is_network_locked(netns: StrPath) -> bool:
    """Tell whether CRIU has locked a network namespace; raise CriuError if that cannot be seen."""
    return _Network(os.fspath(netns)).is_locked


def lock_note(netns: StrPath) -> str | None:
    """Say that a network namespace is still locked, if it is, and what undoes that."""
    return _Network(os.fspath(netns)).note()


def unlock_network(netns: StrPath) -> None:
    """Let a network namespace go on that a failed dump or restore of CRIU has left locked.

    ``netns`` is its path, as ``/run/netns/NAME`` or ``/proc/PID/ns/net``. Only when the tasks run
    nowhere else: two would answer for one. Nothing happens where CRIU has locked nothing. Raise CriuError
    if it stays locked, or that cannot be seen. This starts ``nsenter`` with ``iptables``, ``ip6tables``
    and ``nft``, and needs their rights.
    """
    _Network(os.fspath(netns)).unlock()


@dataclass(frozen=True, slots=True)
class _Network:
    """A network namespace: ``path`` is where it can be opened, ``name`` what it is called if not that."""

    path: str
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.path

    @property
    def is_locked(self) -> bool:
        return next(self._locks(), None) is not None

    def note(self) -> str | None:
        try:
            if not self.is_locked:
                return None
        except CriuError as error:
            return f"its network may still be locked: {error.message}"
        return f"its network is still locked: criupy.rpc.unlock_network({str(self)!r}) undoes that"

    def unlock(self) -> None:
        for _ in range(_TRIES):
            done = [self._run(*words) for words in list(self._locks())]
            failed = [each for each in done if each.returncode]
            if not failed:
                return
        if self.is_locked:
            words = " ".join(failed[-1].args[2:])  # without nsenter's own
            raise CriuError("unlock_network", f"the network stays locked: {words}: {_said(failed[-1])}")

    def _locks(self) -> Iterator[tuple[str, ...]]:
        """Yield the commands that undo CRIU's locks."""
        # A kernel may lack the tables of one of them, or the system a program.
        failures: list[str] = []
        for tool in _TOOLS[:2]:
            rules = self._list(failures, tool, *_WAIT, "-S")
            if f"-N {_CHAIN}" in rules:
                # What failed before may have left its own.
                yield from (
                    (tool, *_WAIT, "-D", *rule.split()[1:])
                    for rule in rules
                    if rule.endswith(f" -j {_CHAIN}")
                )
                yield (tool, *_WAIT, "-F", _CHAIN)
                yield (tool, *_WAIT, "-X", _CHAIN)
        for line in self._list(failures, _TOOLS[2], "list", "tables"):
            words = line.split()
            if words[:2] == ["table", "inet"] and words[2].startswith(f"{_CHAIN}-"):
                yield (_TOOLS[2], "delete", "table", "inet", words[2])
        if len(failures) == len(_TOOLS):
            raise CriuError("unlock_network", f"whether CRIU has locked {self} cannot be seen: {failures[0]}")

    def _list(self, failures: list[str], *words: str) -> list[str]:
        """Return the lines that one of the programs lists; what keeps it from that goes to the failures."""
        done = self._run(*words)
        if done.returncode == 0:
            return done.stdout.splitlines()
        said = _said(done)
        if said.startswith("nsenter: ") and done.returncode != _NO_PROGRAM:
            raise CriuError("unlock_network", f"expected a network namespace, {self}: {said}")
        if done.returncode == _NO_RESOURCE:
            raise CriuError("unlock_network", f"whether CRIU has locked {self} cannot be seen: {said}")
        failures.append(said)
        return []

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        words = ("nsenter", f"--net={self.path}", *words)
        # Where Debian has them, and not everybody's PATH.
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        try:
            return subprocess.run(
                words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
            )
        except OSError as error:
            raise CriuError("unlock_network", f"nsenter cannot be started: {error.strerror}") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"failed with status {done.returncode}"])[-1]


class HeldNetwork:
    """The network namespace of a process, held as long as this is open: the process may end before."""

    def __init__(self, pid: int) -> None:
        self._path = f"/proc/{pid}/ns/net"
        self._reason = ""
        self._held: Descriptor | None = None
        try:
            self._held = Descriptor(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self._reason = error.strerror or ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.close()
            self._held, self._reason = None, "it was let go of"

    def _other(self) -> _Network | None:
        """Return it; None for our own, which CRIU does not lock."""
        if self._held is None:
            raise CriuError(
                "unlock_network", f"whether CRIU has locked {self._path} cannot be seen: {self._reason}"
            )
        ours, held = Path("/proc/self/ns/net").stat(), os.fstat(self._held.fileno())
        if (held.st_dev, held.st_ino) == (ours.st_dev, ours.st_ino):
            return None
        return _Network(f"/proc/{os.getpid()}/fd/{self._held.fileno()}", self._path)

    @property
    def is_locked(self) -> bool:
        """Whether CRIU has locked it; raise CriuError if that cannot be seen."""
        other = self._other()
        return other is not None and other.is_locked

    def note(self) -> str | None:
        """Say that it is still locked, if it is, and what undoes that."""
        try:
            other = self._other()
        except CriuError as error:
            return f"its network may still be locked: {error.message}"
        return None if other is None else other.note()

    def unlock(self) -> None:
        """Undo CRIU's lock; raise CriuError if it stays."""
        other = self._other()
        if other is not None:
            other.unlock()
