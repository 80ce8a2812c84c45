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

__all__ = ["is_network_locked", "network_of", "unlock_network"]

StrPath = str | os.PathLike[str]

_CHAIN = "CRIU"


def network_of(pid: int) -> Path:
    """Return the path of a process's network namespace."""
    return Path(f"/proc/{pid}/ns/net")


def is_network_locked(netns: StrPath) -> bool:
    """Tell whether CRIU has locked a network namespace; not so if it is gone."""
    try:
        return not _is_ours(netns) and next(_locks_of(netns), None) is not None
    except OSError:
        return False


def unlock_network(netns: StrPath) -> None:
    """Let a network namespace go on that a failed dump or restore of CRIU has left locked.

    ``netns`` is its path, as ``/run/netns/NAME`` or ``/proc/PID/ns/net``. Only when the tasks run
    nowhere else: two would answer for one. Nothing happens where CRIU has locked nothing. Raise CriuError
    if it stays locked. This starts ``nsenter`` with ``iptables``, ``ip6tables`` and ``nft``.
    """
    try:
        ours = _is_ours(netns)
    except OSError as error:
        raise CriuError(
            "unlock_network", f"expected a network namespace, {os.fspath(netns)}: {error.strerror}"
        ) from error
    for words in [] if ours else list(_locks_of(netns)):
        done = _inside(netns, *words)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise CriuError(
                "unlock_network",
                f"the network stays locked: {' '.join(words)}: {said[-1] if said else 'failed'}",
            )


def _is_ours(netns: StrPath) -> bool:
    """Tell whether it is our own, which CRIU does not lock."""
    return Path(netns).samefile("/proc/self/ns/net")


def _inside(netns: StrPath, *words: str) -> subprocess.CompletedProcess[str]:
    words = ("nsenter", f"--net={os.fspath(netns)}", *words)
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(words, 127, "", f"nsenter: {error.strerror}")


def _locks_of(netns: StrPath) -> Iterator[tuple[str, ...]]:
    """Yield the commands that undo CRIU's locks."""
    for tool in ("iptables", "ip6tables"):
        listed = _inside(netns, tool, "-w", "-S")
        rules = listed.stdout.splitlines() if listed.returncode == 0 else []
        if f"-N {_CHAIN}" in rules:
            # What failed before may have left its own.
            yield from (
                (tool, "-w", "-D", *rule.split()[1:]) for rule in rules if rule.endswith(f" -j {_CHAIN}")
            )
            yield (tool, "-w", "-F", _CHAIN)
            yield (tool, "-w", "-X", _CHAIN)
    listed = _inside(netns, "nft", "list", "tables")
    for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
        words = line.split()
        if words[:2] == ["table", "inet"] and words[2].startswith(f"{_CHAIN}-"):
            yield ("nft", "delete", "table", "inet", words[2])
