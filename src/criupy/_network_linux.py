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
from pathlib import Path

from criupy.errors import CriuError

__all__ = ["is_network_locked", "lock_note", "network_of", "unlock_network"]

StrPath = str | os.PathLike[str]

_CHAIN = "CRIU"
_TOOLS = ("iptables", "ip6tables", "nft")
# For the lock that iptables themselves hold, in seconds: another program may hang with it.
_WAIT = ("-w", "10")
_NO_PROGRAM = 127  # execvp's, of nsenter as of a shell


def network_of(pid: int) -> Path:
    """Return the path of a process's network namespace."""
    return Path(f"/proc/{pid}/ns/net")


def is_network_locked(netns: StrPath) -> bool:
    """Tell whether CRIU has locked a network namespace; raise CriuError if that cannot be seen."""
    return next(_locks_of(netns), None) is not None


def lock_note(netns: StrPath) -> str | None:
    """Say that a network namespace is still locked, if it is, and what undoes that."""
    where = os.fspath(netns)
    try:
        if not is_network_locked(netns):
            return None
    except CriuError as error:
        return f"its network may still be locked: {error.message}"
    return f"its network is still locked: criupy.rpc.unlock_network({where!r}) undoes that"


def unlock_network(netns: StrPath) -> None:
    """Let a network namespace go on that a failed dump or restore of CRIU has left locked.

    ``netns`` is its path, as ``/run/netns/NAME`` or ``/proc/PID/ns/net``. Only when the tasks run
    nowhere else: two would answer for one. Nothing happens where CRIU has locked nothing. Raise CriuError
    if it stays locked, or that cannot be seen. This starts ``nsenter`` with ``iptables``, ``ip6tables``
    and ``nft``, and needs their rights.
    """
    for words in list(_locks_of(netns)):
        done = _inside(netns, *words)
        if done.returncode:
            raise CriuError("unlock_network", f"the network stays locked: {' '.join(words)}: {_said(done)}")


def _inside(netns: StrPath, *words: str) -> subprocess.CompletedProcess[str]:
    words = ("nsenter", f"--net={os.fspath(netns)}", *words)
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CriuError("unlock_network", f"nsenter cannot be started: {error.strerror}") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"failed with status {done.returncode}"])[-1]


def _list(netns: StrPath, failures: list[str], *words: str) -> list[str]:
    """Return the lines that one of the programs lists; what keeps it from that goes to the failures."""
    done = _inside(netns, *words)
    if done.returncode == 0:
        return done.stdout.splitlines()
    said = _said(done)
    if said.startswith("nsenter: ") and done.returncode != _NO_PROGRAM:
        raise CriuError("unlock_network", f"expected a network namespace, {os.fspath(netns)}: {said}")
    failures.append(said)
    return []


def _locks_of(netns: StrPath) -> Iterator[tuple[str, ...]]:
    """Yield the commands that undo CRIU's locks; none for our own namespace, which CRIU does not lock."""
    try:
        if Path(netns).samefile("/proc/self/ns/net"):
            return
    except OSError as error:
        where = os.fspath(netns)
        raise CriuError(
            "unlock_network", f"expected a network namespace, {where}: {error.strerror}"
        ) from error
    # A kernel may lack the tables of one of them, or the system a program.
    failures: list[str] = []
    for tool in _TOOLS[:2]:
        rules = _list(netns, failures, tool, *_WAIT, "-S")
        if f"-N {_CHAIN}" in rules:
            # What failed before may have left its own.
            yield from (
                (tool, *_WAIT, "-D", *rule.split()[1:]) for rule in rules if rule.endswith(f" -j {_CHAIN}")
            )
            yield (tool, *_WAIT, "-F", _CHAIN)
            yield (tool, *_WAIT, "-X", _CHAIN)
    for line in _list(netns, failures, _TOOLS[2], "list", "tables"):
        words = line.split()
        if words[:2] == ["table", "inet"] and words[2].startswith(f"{_CHAIN}-"):
            yield (_TOOLS[2], "delete", "table", "inet", words[2])
    if len(failures) == len(_TOOLS):
        raise CriuError(
            "unlock_network", f"whether CRIU has locked {os.fspath(netns)} cannot be seen: {failures[0]}"
        )
