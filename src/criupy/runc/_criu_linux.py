"""The CRIU that holds a container, and how to end it without harm to that.

From when it has seized the tasks until it serves their memory, or lets go of them, CRIU
has them run code of its own: a system call, with int3 behind it, in the place of theirs
(compel/src/lib/infect.c). Killed in that time it leaves them with it, and they die by SIGTRAP.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Sequence
from pathlib import Path

from criupy._descriptor import Descriptor
from criupy._kill_linux import descendants, kill_trees, stop
from criupy._proc_linux import is_ending, is_named, parent_of, tracer_of
from criupy.rpc._lazy_linux import listeners
from criupy.rpc._worker_linux import HeldInterrupt
from criupy.runc._program_linux import CRIU

__all__ = ["criu_of", "kill_checkpoint", "was_reached"]

#: CRIU says so before it listens (criu/cr-dump.c), in the log that runC has it write in its work directory;
_SERVES = b"Starting lazy pages server"
#: and so before it ceases to listen (criu/util.c, run_tcp_server).
_ACCEPTED = b"Accepted connection from"


def criu_of(pid: int) -> int:
    """Return the CRIU that holds a container by its first process; 0 for none, or one that is at its end."""
    tracer = tracer_of(pid)
    return tracer if tracer and is_named(tracer, CRIU) and not is_ending(tracer) else 0


def _has_said(criu: int, words: bytes) -> bool:
    return words in Path(f"/proc/{criu}/cwd/dump.log").read_bytes()


def was_reached(criu: int) -> bool:
    """Tell whether a destination has come to a CRIU; also if it cannot be told.

    It listens until the first one comes, and goes on for a while after that one has closed.
    One that is at its end has decided everything, or was killed.
    """
    if listeners(criu) or is_ending(criu):
        return False
    try:
        return _has_said(criu, _ACCEPTED)
    except OSError:
        return True


def _is_harmless(criu: int, container: int) -> bool:
    """Tell whether a CRIU can be killed now without harm to a container, known by its first process."""
    if tracer_of(container) != criu or listeners(criu):  # the first to be seized, and to be let go of
        return True
    try:
        return _has_said(criu, _SERVES)
    except OSError:
        return is_ending(criu)


def _stop_harmless(criu: int, pidfd: int, container: int) -> bool:
    """Stop a CRIU that can be killed now, so that this stays so."""
    if not _is_harmless(criu, container):
        return False
    stop(criu, pidfd)
    if _is_harmless(criu, container):
        return True
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    return False


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill_checkpoint(
    commands: Sequence[tuple[int, int]],
    holders: dict[int, int],
    stack: contextlib.ExitStack,
    container: int,
    *,
    force: bool,
) -> bool:
    """Kill what checkpoints a container, but no CRIU while that does harm, unless by ``force``.

    ``commands`` are runC's, as (pid, pidfd), ``holders`` are pidfds of their CRIUs, by pid. Those that are
    found are added there, and to the stack: once runC is killed they are nobody's children. No other's
    CRIU is touched. Return whether all are killed.
    """
    with HeldInterrupt():  # or what is stopped would stay so
        commands = [(pid, pidfd) for pid, pidfd in commands if not _has_ended(pidfd)]
        for pid, pidfd in commands:
            stop(pid, pidfd)  # it starts no CRIU any more
            for child in descendants(pid) - holders.keys():
                # CRIU has forked some of that name, too.
                if is_named(child, CRIU) and not is_named(parent_of(child) or 0, CRIU):
                    with contextlib.suppress(ProcessLookupError):
                        holders[child] = stack.enter_context(Descriptor(os.pidfd_open(child))).fileno()
        found = {pid: pidfd for pid, pidfd in holders.items() if not _has_ended(pidfd)}
        busy = {
            pid for pid, pidfd in found.items() if not force and not _stop_harmless(pid, pidfd, container)
        }
        if not busy:
            kill_trees([*commands, *found.items()])
            return True
        kill_trees([(pid, pidfd) for pid, pidfd in found.items() if pid not in busy])
        for _, pidfd in commands:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return False
