"""What is said elsewhere than on Linux, where CRIU runs.

Modules that need Linux have names that end in ``_linux``, the native part is called
``_native``. Importing one of them elsewhere raises NeedsLinux, by whatever way it is reached.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from criupy.errors import NeedsLinux

__all__ = ["Guard", "from_linux", "need_linux"]


def need_linux(what: str) -> None:
    """Raise NeedsLinux elsewhere."""
    if sys.platform != "linux":
        raise NeedsLinux(what, sys.platform)


def from_linux(package: str, name: str, modules: Mapping[str, str]) -> object:
    """Return what a package has under a name from one of these modules, for the package's ``__getattr__``.

    Raises AttributeError for a name that is not among them, NeedsLinux elsewhere.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    need_linux(f"{package}.{name}")
    return getattr(importlib.import_module(modules[name]), name)


class Guard:
    """A finder for ``sys.meta_path`` that finds nothing, and raises NeedsLinux for what needs it."""

    @staticmethod
    def find_spec(
        name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let everything pass but criupy's modules for Linux."""
        if name.startswith("criupy.") and name.endswith(("_linux", "._native")):
            need_linux(name)
        return None
