"""The page server, in the place of ``criu page-server``, as a library on trio.

``open_page_server`` gives out the lazy pages of a checkpoint's images,
``open_page_receiver`` receives the pages that ``criu dump --page-server`` sends,
``open_relay`` stands between a live ``criu dump --lazy-pages`` and its destination;
``criupy-page-server`` is the same as a command. Importing this works on any
system, using it needs Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from criupy._elsewhere import from_linux
from criupy.page_server._config import Config
from criupy.page_server._relay_config import RelayConfig
from criupy.page_server._statistics import Statistics

if TYPE_CHECKING:
    from criupy._uffd.server_linux import Account, Ending
    from criupy._uffd.upstream_linux import UpstreamState
    from criupy.page_server._receiver_linux import open_page_receiver
    from criupy.page_server._relay_linux import Fate, Relay
    from criupy.page_server._relaying_linux import open_relay
    from criupy.page_server._server_linux import PageServer
    from criupy.page_server._serving_linux import open_page_server

__all__ = [
    "Account",
    "Config",
    "Ending",
    "Fate",
    "PageServer",
    "Relay",
    "RelayConfig",
    "Statistics",
    "UpstreamState",
    "open_page_receiver",
    "open_page_server",
    "open_relay",
]


_OF_LINUX = {
    "Account": "criupy._uffd.server_linux",
    "Ending": "criupy._uffd.server_linux",
    "Fate": "criupy.page_server._relay_linux",
    "PageServer": "criupy.page_server._server_linux",
    "Relay": "criupy.page_server._relay_linux",
    "UpstreamState": "criupy._uffd.upstream_linux",
    "open_page_receiver": "criupy.page_server._receiver_linux",
    "open_page_server": "criupy.page_server._serving_linux",
    "open_relay": "criupy.page_server._relaying_linux",
}


def __getattr__(name: str) -> object:
    # The server loads the native part and trio; neither is for those who only import.
    return from_linux(__name__, name, _OF_LINUX)


def __dir__() -> list[str]:
    return __all__
