"""``python -m criupy.lazy_pages``: the command criupy-lazy-pages."""

from __future__ import annotations

import sys

from criupy.lazy_pages._cli import main

sys.exit(main())
