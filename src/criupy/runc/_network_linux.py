"""CRIU's lock on a network namespace: whether it is there, and how to undo it.

While CRIU dumps a container, everything but its own packets is dropped in the
container's network namespace. It undoes that when the dump itself fails, but not
when it is killed, nor when what fails is the transfer of a lazy dump: then the
container goes on and nobody reaches it. CRIU locks with iptables or, where it
was built so, with nft (criu/net.c, criu/netfilter.c); these undo it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from criupy.errors import RuncError

__all__ = ["is_network_locked", "unlock_network"]

_CHAIN = "CRIU"


def _in_network(pid: int, *words: str) -> subprocess.CompletedProcess[str]:
    words = ("nsenter", f"--net=/proc/{pid}/ns/net", *words)
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(words, 127, "", f"nsenter: {error.strerror}")


def _locks_of(pid: int) -> Iterator[tuple[str, ...]]:
    """Yield the commands that undo CRIU's locks of a process's network namespace."""
    for tool in ("iptables", "ip6tables"):
        listed = _in_network(pid, tool, "-w", "-S")
        rules = listed.stdout.splitlines() if listed.returncode == 0 else []
        if f"-N {_CHAIN}" in rules:
            # A dump that failed before may have left its own.
            yield from (
                (tool, "-w", "-D", *rule.split()[1:]) for rule in rules if rule.endswith(f" -j {_CHAIN}")
            )
            yield (tool, "-w", "-F", _CHAIN)
            yield (tool, "-w", "-X", _CHAIN)
    listed = _in_network(pid, "nft", "list", "tables")
    for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
        words = line.split()
        if words[:2] == ["table", "inet"] and words[2].startswith(f"{_CHAIN}-"):
            yield ("nft", "delete", "table", "inet", words[2])


def _is_ours(pid: int) -> bool:
    """Tell whether a process is in our own network namespace, which CRIU never locks; or is gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").samefile("/proc/self/ns/net")
    except OSError:
        return True


def is_network_locked(pid: int) -> bool:
    """Tell whether CRIU has locked the network namespace of a process."""
    return not _is_ours(pid) and next(_locks_of(pid), None) is not None


def unlock_network(container: str, pid: int) -> None:
    """Undo what CRIU locked in the network namespace of a process; nothing if it locked nothing."""
    for words in [] if _is_ours(pid) else list(_locks_of(pid)):
        done = _in_network(pid, *words)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RuncError(
                "checkpoint",
                container,
                f"the network stays locked: {' '.join(words)}: {said[-1] if said else 'failed'}",
            )
