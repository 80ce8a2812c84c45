"""Notifications: what CRIU tells in the course of a dump or restore, and what it may be told in turn.

CRIU stops at each of these points until it is answered. Their order (CRIU:
criu/cr-dump.c, criu/cr-restore.c; tried with 3.17, 4.1 and 4.2):

dump      pre-dump, [network-lock], query-ext-files (from 3.19 on), post-dump, [status-ready, when lazy]
restore   pre-restore, [setup-namespaces, post-setup-namespaces], [orphan-pts-master], post-restore,
          [network-unlock], pre-resume, post-resume
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from criupy._descriptor import Descriptor
from criupy.errors import CriupyError, OptionError

__all__ = ["AsyncHooks", "Hooks", "Notification", "Refused", "Script"]


class Script(enum.StrEnum):
    """The scripts of CRIU's notifications (CRIU: criu/action-scripts.c)."""

    PRE_DUMP = "pre-dump"
    NETWORK_LOCK = "network-lock"
    QUERY_EXT_FILES = "query-ext-files"
    POST_DUMP = "post-dump"
    STATUS_READY = "status-ready"
    PRE_RESTORE = "pre-restore"
    SETUP_NAMESPACES = "setup-namespaces"
    POST_SETUP_NAMESPACES = "post-setup-namespaces"
    ORPHAN_PTS_MASTER = "orphan-pts-master"
    POST_RESTORE = "post-restore"
    NETWORK_UNLOCK = "network-unlock"
    PRE_RESUME = "pre-resume"
    POST_RESUME = "post-resume"


class Refused(CriupyError):
    """A notification was refused by ``Notification.refuse``, so the request failed."""

    def __init__(self, script: str, reason: str) -> None:
        super().__init__(f"{script} was refused: {reason}")
        self.script = script
        self.reason = reason


@dataclass(slots=True)
class Notification:
    """CRIU has come to ``script`` and waits.

    ``script`` is a Script, or a plain string that this version of criupy does
    not know. ``pid`` is the first restored task as the host sees it
    (setup-namespaces and post-restore), ``descriptor`` the master of a pty
    (orphan-pts-master): detach it to keep it. One that nobody keeps would hang
    up the restored session, so then the notification is refused.
    It is answered when the iteration goes on: accepted, unless ``refuse`` was called.
    """

    script: Script | str
    pid: int | None = None
    descriptor: Descriptor | None = None
    external: Sequence[str] = ()
    """For query-ext-files: external resources to take into account, as in the option ``external``."""
    refusal: BaseException | None = field(default=None, init=False)

    def refuse(self, reason: str) -> None:
        """Let the answer be a refusal: CRIU undoes what it did, and Refused is raised."""
        self.refusal = Refused(self.script, reason)


def parse_script(name: str) -> Script | str:
    """Return the Script of this name, or the name of one that is not known here."""
    try:
        return Script(name)
    except ValueError:
        return name


def check_hooks(hooks: object, kind: type[Hooks | AsyncHooks]) -> None:
    """Refuse the hooks of the other client, and what is none."""
    if hooks is not None and not isinstance(hooks, kind):
        raise OptionError("hooks", f"expected an instance of a subclass of {kind.__name__}, got {hooks!r}")


def invoke(hooks: Hooks | AsyncHooks, notification: Notification) -> Any:
    """Call the hook for a notification; return what it returns, which AsyncHooks want awaited."""
    script = notification.script
    if not isinstance(script, Script):
        return hooks.other(notification)
    hook = getattr(hooks, script.value.replace("-", "_"))
    match script:
        case Script.SETUP_NAMESPACES | Script.POST_RESTORE:
            return hook(notification.pid)
        case Script.ORPHAN_PTS_MASTER:
            return hook(notification.descriptor)
        case _:
            return hook()


def external_of(returned: Any, notification: Notification) -> Sequence[str]:
    """Check what a hook returned: resources for query-ext-files, and nothing for all others."""
    if returned is None:
        return ()
    if notification.script != Script.QUERY_EXT_FILES:
        raise TypeError(
            f"{notification.script}: expected None from the hook, got {returned!r} (raise to refuse)"
        )
    if isinstance(returned, str) or not (
        isinstance(returned, Sequence) and all(isinstance(item, str) for item in returned)
    ):
        raise TypeError(f"query_ext_files: expected a sequence of strings, got {returned!r}")
    return tuple(returned)


class Hooks:
    """What a program wants to do when CRIU comes to a script: subclass it, override some.

    An exception is sent to CRIU as a refusal and raised again when CRIU has
    undone what it did. By default all is accepted and nothing done.
    """

    def pre_dump(self) -> None:
        """Act before the tasks are frozen."""

    def network_lock(self) -> None:
        """Lock the network namespace of tasks that have one of their own; CRIU's own lock follows."""

    def query_ext_files(self) -> Sequence[str]:
        """Return more external resources, as in the option ``external``; the tasks are frozen (CRIU 3.19)."""
        return ()

    def post_dump(self) -> None:
        """Act when all images are written, but for lazy pages; after a refusal the tasks go on."""

    def status_ready(self) -> None:
        """Act when the page server of a lazy dump listens: a destination may start (CRIU 3.15)."""

    def pre_restore(self) -> None:
        """Act before the first task is made."""

    def setup_namespaces(self, pid: int) -> None:
        """Act when the first task, ``pid`` to the host, has its namespaces and nothing else."""

    def post_setup_namespaces(self) -> None:
        """Act when the namespaces are set up."""

    def orphan_pts_master(self, descriptor: Descriptor) -> None:
        """Take the master of a pty that the tasks had open, by detaching it; else the restore is refused."""

    def post_restore(self, pid: int) -> None:
        """Act when all tasks are restored and do not run yet; ``pid`` is the first to the host."""

    def network_unlock(self) -> None:
        """Unlock the network namespace of tasks that have one of their own; CRIU's own unlock follows."""

    def pre_resume(self) -> None:
        """Act when the tasks are about to run; CRIU undoes nothing from here on, whatever the hook says."""

    def post_resume(self) -> None:
        """Act when the tasks run; that is not undone any more."""

    def other(self, notification: Notification) -> None:
        """Take a script that this version of criupy does not know."""


class AsyncHooks:
    """The same as Hooks for AsyncCriu."""

    async def pre_dump(self) -> None:
        """Act before the tasks are frozen."""

    async def network_lock(self) -> None:
        """Lock the network namespace of tasks that have one of their own; CRIU's own lock follows."""

    async def query_ext_files(self) -> Sequence[str]:
        """Return more external resources, as in the option ``external``; the tasks are frozen (CRIU 3.19)."""
        return ()

    async def post_dump(self) -> None:
        """Act when all images are written, but for lazy pages; after a refusal the tasks go on."""

    async def status_ready(self) -> None:
        """Act when the page server of a lazy dump listens: a destination may start (CRIU 3.15)."""

    async def pre_restore(self) -> None:
        """Act before the first task is made."""

    async def setup_namespaces(self, pid: int) -> None:
        """Act when the first task, ``pid`` to the host, has its namespaces and nothing else."""

    async def post_setup_namespaces(self) -> None:
        """Act when the namespaces are set up."""

    async def orphan_pts_master(self, descriptor: Descriptor) -> None:
        """Take the master of a pty that the tasks had open, by detaching it; else the restore is refused."""

    async def post_restore(self, pid: int) -> None:
        """Act when all tasks are restored and do not run yet; ``pid`` is the first to the host."""

    async def network_unlock(self) -> None:
        """Unlock the network namespace of tasks that have one of their own; CRIU's own unlock follows."""

    async def pre_resume(self) -> None:
        """Act when the tasks are about to run; CRIU undoes nothing from here on, whatever the hook says."""

    async def post_resume(self) -> None:
        """Act when the tasks run; that is not undone any more."""

    async def other(self, notification: Notification) -> None:
        """Take a script that this version of criupy does not know."""
