"""criupy-page-server as a process, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from page_server_clients import Destination

HANG = 30.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another process makes true."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    process: subprocess.Popen[str]
    work: Path
    address: str = "127.0.0.1"

    @property
    def log(self) -> str:
        return (self.work / "log").read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if "Error (" in line]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.log.splitlines() if "Warn  (" in line]

    @property
    def port(self) -> int:
        return int((self.work / "port").read_text())

    def connect(self, host: str = "127.0.0.1", *, source: str = "") -> Destination:
        where = (host, self.port)
        bound = (source, 0) if source else None
        return Destination(socket.create_connection(where, source_address=bound))

    def ended(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(HANG)

    def failed(self) -> str:
        """Wait for the end; return the one line that tells of it."""
        assert self.ended() == 1
        (line,) = self.errors
        return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def command(
    images: Path,
    work: Path,
    *words: str,
    lazy_pages: bool = True,
    address: Sequence[str] = ("--address", "127.0.0.1"),
    passed: Sequence[int] = (),
    ready: bytes = b"\0",
) -> Iterator[Running]:
    """The command serving images, or receiving them, started and ready; what is left running is killed."""
    reader, writer = os.pipe()
    full = [
        *(sys.executable, "-m", "criupy.page_server", *(["--lazy-pages"] if lazy_pages else [])),
        *(*address, "-v4", "-o", "log"),
        *("-D", str(images), "-W", str(work), "--status-fd", str(writer), "--port-file", "port"),
        *words,
    ]
    with open(reader, "rb") as status:  # noqa: PTH123 - a descriptor
        try:
            process = subprocess.Popen(
                full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[writer, *passed], text=True
            )
        finally:
            os.close(writer)
        with process:
            try:
                assert status.read() == ready
                yield Running(process, work)
            finally:
                process.kill()
