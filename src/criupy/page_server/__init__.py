"""The page server, in the place of ``criu page-server``, as a library on trio.

``open_page_server`` gives out the lazy pages of a checkpoint's images,
``open_page_receiver`` receives the pages that ``criu dump --page-server`` sends;
``criupy-page-server`` is the same as a command. Importing this works on any
system, using it needs Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from criupy.page_server._receiver_linux import open_page_receiver
    from criupy.page_server._server_linux import Account, Config, Ending, PageServer, open_page_server

__all__ = ["Account", "Config", "Ending", "PageServer", "open_page_receiver", "open_page_server"]


def __getattr__(name: str) -> object:
    # The server loads the native part and trio; neither is for those who only import.
    if name in __all__:
        from criupy.page_server import _receiver_linux, _server_linux

        return getattr(_receiver_linux if name == "open_page_receiver" else _server_linux, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
