"""Killing a tree: nothing of it is left, also where it forks all the time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("pidfds are Linux's", allow_module_level=True)

from criupy import _kill_linux
from criupy._kill_linux import kill_trees
from rpc_victims import subreaper

# Forks children that stop themselves, as CRIU's do when it tries the kernel out, and reaps them. The memory
# makes a fork take a while.
FORKS = """
import os, signal, sys
memory = bytearray(64 << 20)
print(flush=True)
while True:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def left(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[3]) == session and words[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_what_forks_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    children = _kill_linux._children

    def slow(pid: int) -> set[int]:
        found = children(pid)
        time.sleep(0.005)
        return found

    monkeypatch.setattr(_kill_linux, "_children", slow)
    with subreaper():
        for n in range(20):
            with subprocess.Popen(
                [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, start_new_session=True
            ) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(n * 0.0001)
                pidfd = os.pidfd_open(process.pid)
                try:
                    kill_trees([(process.pid, pidfd)])
                finally:
                    os.close(pidfd)
                assert process.wait() == -signal.SIGKILL
            deadline = time.monotonic() + 2  # what was killed needs a moment
            while (alive := left(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.005)
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            assert alive == []
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
