"""criupy: CRIU from Python, and post-copy migration.

``Criu`` and ``AsyncCriu`` drive CRIU; ``criupy.lazy_pages`` takes the place of
``criu lazy-pages``, ``criupy.page_server`` that of ``criu page-server``, and
``criupy.images`` reads checkpoints. Importing this package works on any system;
what needs Linux says so when it is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from criupy import _elsewhere
from criupy._tls.files import TlsFiles
from criupy.errors import (
    CriuDied,
    CriuError,
    CriupyError,
    CriuTimeout,
    CriuUnavailable,
    ImageError,
    LazyPagesError,
    LocalProtocolError,
    NeedsLinux,
    OptionError,
    PageServerError,
    ProtocolError,
    RemoteProtocolError,
    TlsError,
    UffdError,
    UffdUnavailable,
)

if TYPE_CHECKING:
    from criupy.rpc import (
        AsyncCriu,
        AsyncHooks,
        Criu,
        CriuPath,
        Features,
        Hooks,
        JoinNs,
        Notification,
        Refused,
        Restored,
        Script,
        SourceOutcome,
        Version,
    )

__all__ = [
    "AsyncCriu",
    "AsyncHooks",
    "Criu",
    "CriuDied",
    "CriuError",
    "CriuPath",
    "CriuTimeout",
    "CriuUnavailable",
    "CriupyError",
    "Features",
    "Hooks",
    "ImageError",
    "JoinNs",
    "LazyPagesError",
    "LocalProtocolError",
    "NeedsLinux",
    "Notification",
    "OptionError",
    "PageServerError",
    "ProtocolError",
    "Refused",
    "RemoteProtocolError",
    "Restored",
    "Script",
    "SourceOutcome",
    "TlsError",
    "TlsFiles",
    "UffdError",
    "UffdUnavailable",
    "Version",
]

_OF_RPC = frozenset(
    {
        "AsyncCriu",
        "AsyncHooks",
        "Criu",
        "CriuPath",
        "Features",
        "Hooks",
        "JoinNs",
        "Notification",
        "Refused",
        "Restored",
        "Script",
        "SourceOutcome",
        "Version",
    }
)


if sys.platform != "linux":
    sys.meta_path.insert(0, _elsewhere.Guard)


def __getattr__(name: str) -> object:
    # protobuf takes a while to load, and not everyone needs it.
    if name in _OF_RPC:
        from criupy import rpc

        return getattr(rpc, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
