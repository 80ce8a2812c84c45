"""``python -m criupy``: the command criupy."""

from __future__ import annotations

import sys

from criupy.commands import main

if __name__ == "__main__":
    sys.exit(main())
