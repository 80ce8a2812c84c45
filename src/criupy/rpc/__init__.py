"""Drive CRIU through its RPC: every request, blocking or on trio.

``Criu`` is the blocking client, ``AsyncCriu`` the same on trio. The rest are
the types that go in and come out. Importing this works on any system; the
clients need Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from criupy._descriptor import Descriptor
from criupy._elsewhere import from_linux
from criupy.rpc import external
from criupy.rpc._notify import AsyncHooks, Hooks, Notification, Refused, Script
from criupy.rpc._option_types import CriuPath, Directory, HasFileno, JoinNs
from criupy.rpc._options import (
    CheckOptions,
    CpuinfoOptions,
    DumpOptions,
    LazyDumpOptions,
    LazyRestoreOptions,
    PageServerOptions,
    PreDumpOptions,
    RestoreOptions,
)
from criupy.rpc._results import FeatureName, Features, PageServer, Restored, SourceOutcome, Version

if TYPE_CHECKING:
    from criupy._network_linux import unlock_network
    from criupy.rpc._async_client_linux import AsyncCriu
    from criupy.rpc._async_held_linux import AsyncPageServerChild, AsyncPreDumpLoop
    from criupy.rpc._async_lazy_client_linux import AsyncLazyDump, AsyncLazyRestore
    from criupy.rpc._async_operation_linux import AsyncOperation, AsyncProcess
    from criupy.rpc._client_linux import Criu
    from criupy.rpc._held_linux import PageServerChild, PreDumpLoop
    from criupy.rpc._lazy_client_linux import LazyDump, LazyRestore
    from criupy.rpc._operation_linux import Operation, Process

__all__ = [
    "AsyncCriu",
    "AsyncHooks",
    "AsyncLazyDump",
    "AsyncLazyRestore",
    "AsyncOperation",
    "AsyncPageServerChild",
    "AsyncPreDumpLoop",
    "AsyncProcess",
    "CheckOptions",
    "CpuinfoOptions",
    "Criu",
    "CriuPath",
    "Descriptor",
    "Directory",
    "DumpOptions",
    "FeatureName",
    "Features",
    "HasFileno",
    "Hooks",
    "JoinNs",
    "LazyDump",
    "LazyDumpOptions",
    "LazyRestore",
    "LazyRestoreOptions",
    "Notification",
    "Operation",
    "PageServer",
    "PageServerChild",
    "PageServerOptions",
    "PreDumpLoop",
    "PreDumpOptions",
    "Process",
    "Refused",
    "RestoreOptions",
    "Restored",
    "Script",
    "SourceOutcome",
    "Version",
    "external",
    "unlock_network",
]

_OF_LINUX = {
    "AsyncCriu": "criupy.rpc._async_client_linux",
    "AsyncLazyDump": "criupy.rpc._async_lazy_client_linux",
    "AsyncLazyRestore": "criupy.rpc._async_lazy_client_linux",
    "AsyncOperation": "criupy.rpc._async_operation_linux",
    "AsyncPageServerChild": "criupy.rpc._async_held_linux",
    "AsyncPreDumpLoop": "criupy.rpc._async_held_linux",
    "AsyncProcess": "criupy.rpc._async_operation_linux",
    "Criu": "criupy.rpc._client_linux",
    "LazyDump": "criupy.rpc._lazy_client_linux",
    "LazyRestore": "criupy.rpc._lazy_client_linux",
    "Operation": "criupy.rpc._operation_linux",
    "PageServerChild": "criupy.rpc._held_linux",
    "PreDumpLoop": "criupy.rpc._held_linux",
    "Process": "criupy.rpc._operation_linux",
    "unlock_network": "criupy._network_linux",
}


def __getattr__(name: str) -> object:
    return from_linux(__name__, name, _OF_LINUX)
