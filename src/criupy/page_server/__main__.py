"""``python -m criupy.page_server``: the command criupy-page-server."""

from __future__ import annotations

import sys

from criupy.page_server._cli import main

sys.exit(main())
