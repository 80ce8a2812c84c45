"""Run criupy-page-server for a benchmark."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def page_server(work: Path, *words: str) -> Iterator[tuple[str, int]]:
    """Run criupy-page-server; yield where it listens."""
    work.mkdir()
    reader, writer = os.pipe()
    full = [sys.executable, "-m", "criupy.page_server", "--address", "127.0.0.1", "-W", str(work)]
    full += ["-o", "log", "--port-file", "port", "--status-fd", str(writer), *words]
    with open(reader, "rb") as status, subprocess.Popen(full, pass_fds=[writer]) as process:  # noqa: PTH123
        os.close(writer)
        try:
            if status.read() != b"\0":
                raise SystemExit(f"criupy-page-server did not start, see {work / 'log'}")
            yield "127.0.0.1", int((work / "port").read_text())
        finally:
            process.kill()
