"""Drive a post-copy migration of a runC container: both sides, blocking or on trio.

``Runc`` is the blocking client, ``AsyncRunc`` the same on trio. They start the
program ``runc`` and nothing else stays behind: all state is runC's own. The
rest are the types that go in and come out. Importing this works on any system;
the clients need Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from criupy._elsewhere import from_linux
from criupy.errors import RuncError, RuncTimeout
from criupy.runc._words import CheckpointOptions, ContainerState, PreDumpOptions, RestoreOptions

if TYPE_CHECKING:
    from criupy.runc._async_checkpoint_linux import AsyncContainerCheckpoint
    from criupy.runc._async_restore_linux import AsyncContainerRestore
    from criupy.runc._async_runc_linux import AsyncRunc
    from criupy.runc._checkpoint_linux import ContainerCheckpoint
    from criupy.runc._restore_linux import ContainerRestore
    from criupy.runc._runc_linux import Runc

__all__ = [
    "AsyncContainerCheckpoint",
    "AsyncContainerRestore",
    "AsyncRunc",
    "CheckpointOptions",
    "ContainerCheckpoint",
    "ContainerRestore",
    "ContainerState",
    "PreDumpOptions",
    "RestoreOptions",
    "Runc",
    "RuncError",
    "RuncTimeout",
]

_OF_LINUX = {
    "AsyncContainerCheckpoint": "criupy.runc._async_checkpoint_linux",
    "AsyncContainerRestore": "criupy.runc._async_restore_linux",
    "AsyncRunc": "criupy.runc._async_runc_linux",
    "ContainerCheckpoint": "criupy.runc._checkpoint_linux",
    "ContainerRestore": "criupy.runc._restore_linux",
    "Runc": "criupy.runc._runc_linux",
}


def __getattr__(name: str) -> object:
    return from_linux(__name__, name, _OF_LINUX)
