"""CRIU itself, asked whether it reads a command line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def _criu() -> str | None:
    """Find a CRIU that has this table (4.2 or later) and starts here."""
    named = [name for name in os.environ.get("CRIUPY_CRIU", "").split(":") if name]
    cached = sorted(map(str, Path("/var/cache/criupy").glob("criu-*/bin/criu")), reverse=True)
    for name in [*named, *cached, shutil.which("criu")]:
        if name is None or not os.access(name, os.X_OK):
            continue
        told = subprocess.run([name, "-V"], capture_output=True, text=True, check=False).stdout
        version = told.removeprefix("Version: ").split()[:1]
        if version and tuple(map(int, version[0].split(".")[:2])) >= (4, 2):
            return name
    return None


CRIU = _criu()
# With these, CRIU has read and accepted the whole line when it misses this directory.
MISSING = "/nonexistent/criupy-images"
needs_criu = pytest.mark.skipif(
    CRIU is None or os.geteuid() != 0, reason="needs root and a CRIU 4.2 or later that starts here"
)


def criu_accepts(argv: Sequence[str]) -> bool:
    assert CRIU is not None
    ended = subprocess.run(
        [CRIU, *argv, "--no-default-config", "-v2", "-D", MISSING],  # at -v0 it would say nothing
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "CRIU_CONFIG_FILE"},
    )
    assert ended.returncode == 1
    return f"Can't open dir {MISSING}" in ended.stderr
