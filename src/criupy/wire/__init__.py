"""The two byte protocols of post-copy migration, without any input or output.

``restore_socket`` is what criu restore tells the lazy-pages daemon;
``page_server`` is how pages are asked for and delivered. Both modules take
bytes and give events; sockets are the caller's business.
"""

from __future__ import annotations
