"""The lazy-pages daemon, in the place of ``criu lazy-pages``, as a library on trio.

``open_lazy_pages`` serves one restore; ``criupy-lazy-pages`` is the same as a
command. Importing this works on any system, using it needs Linux.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from criupy._elsewhere import from_linux

if TYPE_CHECKING:
    from criupy.lazy_pages._config import Config
    from criupy.lazy_pages._daemon_linux import LazyPages, open_lazy_pages
    from criupy.lazy_pages._statistics import Events, Rates, State, Statistics

__all__ = ["Config", "Events", "LazyPages", "Rates", "State", "Statistics", "open_lazy_pages"]

_PORTABLE = {
    "Config": "criupy.lazy_pages._config",
    "Events": "criupy.lazy_pages._statistics",
    "Rates": "criupy.lazy_pages._statistics",
    "State": "criupy.lazy_pages._statistics",
    "Statistics": "criupy.lazy_pages._statistics",
}
_OF_LINUX = {
    "LazyPages": "criupy.lazy_pages._daemon_linux",
    "open_lazy_pages": "criupy.lazy_pages._daemon_linux",
}


def __getattr__(name: str) -> object:
    # The daemon loads the native part and trio; neither is for those who only import.
    if name in _PORTABLE:
        return getattr(importlib.import_module(_PORTABLE[name]), name)
    return from_linux(__name__, name, _OF_LINUX)


def __dir__() -> list[str]:
    return __all__
