"""What criupy-lazy-pages loads: a restore waits until it is ready, so nothing that can come later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec

# Run the command, print what is loaded when it is ready, then what is when it has been stopped.
PROGRAM = """
import os, signal, sys
from criupy._command import process_linux

def status_ready(fd):
    print(*sys.modules, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

process_linux.status_ready = status_ready
from criupy.lazy_pages._cli import main
main(sys.argv[1:])
print(*sys.modules)
"""

#: Without TLS, outside of a terminal, nobody needs these.
NEVER = frozenset(
    {
        *("asyncio", "matplotlib", "rich", "criupy.rpc", "criupy.commands", "criupy.page_server"),
        *("criupy.testing", "criupy._tls._native", "criupy.images._dump", "criupy.images._pagemap_writer"),
    }
)
#: Loading these would take about as long as everything else does.
NOT_BEFORE_READY = frozenset(
    {
        *("trio", "attrs", "ssl", "subprocess", "hashlib", "criupy._tls.tls_linux"),
        *("criupy.lazy_pages._daemon_linux", "criupy.lazy_pages._statistics"),
    }
)


@pytest.mark.parametrize("remote", [False, True], ids=["local images", "page server"])
def test_what_is_loaded(tmp_path: Path, *, remote: bool) -> None:
    images = write_images(tmp_path / "images", WorkloadSpec(), style="lazy" if remote else "full").directory
    words = ["-D", str(images), "-W", str(tmp_path), "--status-fd", "1"]
    if remote:
        words += ["--page-server", "--address", "127.0.0.1", "--port", "9"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60, check=True
    )
    ready, ended = (frozenset(line.split()) for line in done.stdout.splitlines())
    assert not ready & (NEVER | NOT_BEFORE_READY)
    assert not ended & NEVER
    assert {"trio", "criupy.lazy_pages._daemon_linux"} <= ended  # it did get that far
