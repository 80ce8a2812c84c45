"""The lazy-pages daemon, in the place of ``criu lazy-pages``, as a library on trio.

``open_lazy_pages`` serves one restore; ``criupy-lazy-pages`` is the same as a
command. Importing this works on any system, using it needs Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from criupy.lazy_pages._config import Config
    from criupy.lazy_pages._daemon_linux import LazyPages, open_lazy_pages
    from criupy.lazy_pages._statistics import Events, State, Statistics

__all__ = ["Config", "Events", "LazyPages", "State", "Statistics", "open_lazy_pages"]


def __getattr__(name: str) -> object:
    # The daemon loads the native part and trio; neither is for those who only import.
    if name in {"Config", "LazyPages", "open_lazy_pages"}:
        from criupy.lazy_pages import _daemon_linux

        return getattr(_daemon_linux, name)
    if name in {"Events", "State", "Statistics"}:
        from criupy.lazy_pages import _statistics

        return getattr(_statistics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
