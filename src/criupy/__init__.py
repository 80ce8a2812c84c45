"""criupy: post-copy migration with CRIU, from Python.

Importing this package works on any system; what needs Linux says so when it
is used.
"""

from __future__ import annotations

from criupy.errors import (
    CriupyError,
    ImageError,
    LazyPagesError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    UffdError,
    UffdUnavailable,
)

__all__ = [
    "CriupyError",
    "ImageError",
    "LazyPagesError",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "UffdError",
    "UffdUnavailable",
]
