"""Ctrl-C at every line of a request, and from a terminal: no process is left, whatever was being done.

A trace function raises the signal; the handler that Python or trio has installed does the rest.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import trio

import criupy
from criupy.testing.criu_linux import Criu

if sys.platform != "linux":
    pytest.skip("CRIU is for Linux", allow_module_level=True)

from criupy.rpc import _async_operation_linux, _operation_linux
from criupy.rpc._worker_linux import Worker
from rpc_victims import children, counter, state_of, subreaper, until

pytestmark = pytest.mark.slow

PID = 1 << 22
MOMENTS = 60
PLACES = (f"{Path(criupy.__file__).parent}/", subprocess.__file__)


class Interrupt:
    """Raises SIGINT at a line, counted from the start of a request's course."""

    def __init__(self, line: int) -> None:
        self._left = line
        self._started = False
        self.place: str | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> object:
        code = frame.f_code
        if not self._started and code.co_name in {"__enter__", "__aenter__"}:
            self._started = code.co_filename.endswith("operation_linux.py")
        caller = frame.f_back
        if code.co_name == "__del__" or (caller is not None and caller.f_code.co_name == "__del__"):
            return None  # Python itself drops what is raised there
        return self._line if self._started and code.co_filename.startswith(PLACES) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and self.place is None:
            self._left -= 1
            if not self._left:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._line


def dump_blocking(binary: Path, images_dir: Path) -> None:
    with criupy.Criu(binary, grace=0.005) as criu:
        criu.dump(PID, images_dir=images_dir, request_timeout=0.005)


def dump_on_trio(binary: Path, images_dir: Path) -> None:
    async def main() -> None:
        async with criupy.AsyncCriu(binary, grace=0.005) as criu:
            await criu.dump(PID, images_dir=images_dir, request_timeout=0.005)

    trio.run(main)


def serve_blocking(binary: Path, images_dir: Path) -> None:
    with criupy.Criu(binary) as criu:
        criu.version()
        criu.page_server_child(images_dir=images_dir)


def serve_on_trio(binary: Path, images_dir: Path) -> None:
    async def main() -> None:
        async with criupy.AsyncCriu(binary) as criu:
            await criu.version()
            await criu.page_server_child(images_dir=images_dir)

    trio.run(main)


# Of descriptors it is not said: one that its owner loses in between is closed by its finalizer, which tells,
# or not at all, where it was about to be closed (the other order could close another's).
@pytest.mark.filterwarnings("ignore:unclosed <Descriptor:ResourceWarning")
def test_a_request_whose_criu_hangs(kind: str, tmp_path: Path) -> None:
    dump = {"blocking": dump_blocking, "trio": dump_on_trio}[kind]
    hanging = tmp_path / "criu"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o700)
    before = children()
    lines = 0
    while True:
        lines += 1
        interrupt = Interrupt(lines)
        traced = sys.gettrace()
        sys.settrace(interrupt)  # type: ignore[arg-type]
        try:
            with pytest.raises((KeyboardInterrupt, criupy.CriuTimeout)) as caught:
                dump(hanging, tmp_path)
        finally:
            sys.settrace(traced)
        assert children() == before, interrupt.place
        if interrupt.place is None:
            assert caught.type is criupy.CriuTimeout
            break
        assert caught.type is KeyboardInterrupt, interrupt.place
    assert lines > 200


@pytest.mark.criu
@pytest.mark.spread
@pytest.mark.filterwarnings("ignore:unclosed <Descriptor:ResourceWarning")
def test_workers_that_are_kept(kind: str, criu: Criu, tmp_path: Path) -> None:
    """At spread moments: nothing goes on for longer than CRIU needs to see that its client is gone."""
    serve = {"blocking": serve_blocking, "trio": serve_on_trio}[kind]
    start = time.monotonic()
    serve(criu.path, tmp_path)
    took = time.monotonic() - start
    hit = 0
    with subreaper():
        for n in range(MOMENTS):
            timer = threading.Timer(took * n / MOMENTS, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                serve(criu.path, tmp_path)
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                hit += 1
            timer.join()
            until(lambda: not any(state_of(pid) != "Z" for pid in children()), "a worker is left")
    assert hit == MOMENTS
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


# ---- two of them, and one from a terminal ------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker.start(["/bin/sleep", "600"], request="test", capture=False)
    yield started
    started.abandon()


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("limit", [10.0, math.inf])
async def test_what_is_waited_for_without_limit_survives(
    kind: str, worker: Worker, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our lazy-pages daemon: tasks may depend on it."""

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(_operation_linux, "wait_for", interrupt)
    monkeypatch.setattr(_async_operation_linux, "wait_ended", interrupt)
    with pytest.raises(KeyboardInterrupt):
        if kind == "blocking":
            _operation_linux.end_worker(worker, limit)
        else:
            await _async_operation_linux.end_worker(worker, limit)
    assert worker.poll() == (None if limit == math.inf else -signal.SIGKILL)


#: Dumps a process, and waits in the first notification.
DUMP = """
import sys, time
import criupy

class Slow(criupy.Hooks):
    def pre_dump(self):
        print("now", flush=True)
        time.sleep(600)

with criupy.Criu(sys.argv[1]) as criu:
    try:
        criu.dump(int(sys.argv[2]), images_dir=sys.argv[3], hooks=Slow())
    except KeyboardInterrupt as interrupted:
        print(*interrupted.__notes__)
"""


@pytest.mark.criu
@pytest.mark.usefixtures("nothing_is_left")
def test_a_terminals_interrupt_does_not_reach_criu(criu: Criu, tmp_path: Path) -> None:
    """It goes to the foreground's whole process group. CRIU has to undo what it did, and not to die of it."""
    with counter(tmp_path) as victim:
        words: list[str | Path] = [sys.executable, "-c", DUMP, criu.path, str(victim.pid), tmp_path]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "now\n"
            os.killpg(program.pid, signal.SIGINT)
            assert program.stdout.read().startswith("CRIU undid it: dump: ")
        victim.assert_running()
