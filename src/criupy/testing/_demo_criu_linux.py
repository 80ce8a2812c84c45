"""Whether the demo can use a CRIU, and which."""

from __future__ import annotations

import fcntl
import os
import subprocess

from criupy.testing.criu_linux import Criu, find_criu

__all__ = ["choose_criu"]

_PIPE_SIZE = 8 << 20
_PATIENCE = 30.0


def _why_not(criu: Criu) -> str | None:
    """Say why this CRIU cannot migrate here, None if it can."""
    for words in (["check"], ["check", "--feature", "uffd-noncoop"]):
        try:
            run = subprocess.run(
                [criu.path, *words], capture_output=True, text=True, check=False, timeout=_PATIENCE
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{criu.path} {' '.join(words)}: {error}"
        if run.returncode:
            said = (run.stderr + run.stdout).strip().splitlines()
            errors = [line for line in said if "Error" in line] or said[-1:] or ["it does not say why"]
            return f"`{criu.path} {' '.join(words)}` fails: {errors[0].strip()}"
    return None


def choose_criu() -> tuple[Criu | None, str]:
    """Return the CRIU to use, one named in CRIUPY_CRIU or else the newest; or None and why there is none."""
    found, reasons = find_criu()
    if not found:
        return None, "; ".join(reasons)
    reading, writing = os.pipe()
    try:
        # criu keeps the memory of a frozen process in pipes, and fails later when it may not have large ones
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    except OSError:
        return None, f"it needs larger pipes than are allowed here (sysctl -w fs.pipe-max-size={_PIPE_SIZE})"
    finally:
        os.close(reading)
        os.close(writing)
    named = os.environ.get("CRIUPY_CRIU", "").split(":")
    refusals = []
    for criu in sorted(found, key=lambda criu: str(criu.path) not in named):
        reason = _why_not(criu)
        if reason is None:
            return criu, ""
        refusals.append(reason)
    return None, "; ".join(refusals)
