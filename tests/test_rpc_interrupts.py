"""Ctrl-C at every line of a request whose CRIU hangs: the process is ended, whatever was being done.

A trace function raises the signal; the handler that Python or trio has installed does the rest.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import trio

import criupy

if sys.platform != "linux":
    pytest.skip("CRIU is for Linux", allow_module_level=True)

pytestmark = pytest.mark.slow

PID = 1 << 22
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
        if code.co_name == "__del__":  # Python itself drops what is raised there
            return None
        return self._line if self._started and code.co_filename.startswith(PLACES) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> object:
        if event == "line" and self.place is None:
            self._left -= 1
            if not self._left:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._line


def dump_blocking(binary: Path, images_dir: Path) -> None:
    with criupy.Criu(binary, grace=0.01) as criu:
        criu.dump(PID, images_dir=images_dir, request_timeout=0.01)


def dump_on_trio(binary: Path, images_dir: Path) -> None:
    async def main() -> None:
        async with criupy.AsyncCriu(binary, grace=0.01) as criu:
            await criu.dump(PID, images_dir=images_dir, request_timeout=0.01)

    trio.run(main)


def children() -> str:
    return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


# A descriptor whose owner lost it in between is closed by its finalizer, which says so.
@pytest.mark.filterwarnings("ignore:unclosed <Descriptor:ResourceWarning")
def test_an_interrupt_at_every_line(kind: str, tmp_path: Path) -> None:
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
