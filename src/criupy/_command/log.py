"""Log lines in CRIU's shape, so that what people grep for in CRIU's logs is found in ours.

    (00.012345) Error (criupy/lazy_pages/_cli.py:80): text

The time since the log was opened is there from verbosity 3 on; errors and
warnings say where they come from, the rest does not (criu/include/log.h,
criu/log.c). The levels are CRIU's: 0 nothing, 1 errors, 2 warnings (the
default), 3 information, 4 debug.

A log must not hurt what it reports on: a full disk or a reader that went away
costs lines, which are counted and told of, and never the transfer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from criupy.errors import CommandError

__all__ = ["CriuFormatter", "LogHandler", "open_log"]

_LEVELS: Final = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_TIMES_FROM: Final = 3  # LOG_TIMESTAMP in criu/log.c
_TIME_WIDTH: Final = 10  # TS_BUF_OFF there: from 100 s on, digits go at the end
_PACKAGES: Final = Path(__file__).parents[2]


class CriuFormatter(logging.Formatter):
    """Format records as CRIU would; every line of one begins alike."""

    def __init__(self, verbosity: int, started: float) -> None:
        super().__init__()
        self._times = verbosity >= _TIMES_FROM
        self._started = started

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, without the last newline."""
        head = ""
        if self._times:
            elapsed = max(0.0, record.created - self._started)
            head = f"({elapsed:09.6f}"[:_TIME_WIDTH] + ") "
        if record.levelno >= logging.WARNING:
            tag = "Error" if record.levelno >= logging.ERROR else "Warn "
            path = Path(record.pathname)
            if path.is_relative_to(_PACKAGES):
                path = path.relative_to(_PACKAGES)
            head += f"{tag} ({path}:{record.lineno}): "
        lines = record.getMessage().splitlines() or [""]
        if record.exc_info and record.exc_info[0] is not None:
            lines += self.formatException(record.exc_info).splitlines()
        return "\n".join(head + line for line in lines)


class LogHandler(logging.Handler):
    """Write records to a descriptor, which it owns, one write each."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost = 0
        self._elsewhere: Callable[[str], None] | None = None

    def divert(self, write: Callable[[str], None] | None) -> None:
        """Give lines to ``write`` instead, until called with None: for a bar on the same terminal."""
        self._elsewhere = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it as lost."""
        try:
            text = self.format(record)
            if self._elsewhere is not None:
                self._elsewhere(text)
                return
            if self._lost:
                self._write(
                    f"Warn  ({Path(__file__).relative_to(_PACKAGES)}): {self._lost} records were lost"
                )
                self._lost = 0
            self._write(text)
        except OSError:
            self._lost += 1
        except Exception:  # noqa: BLE001 - a wrong %d, say: logging tells of it on standard error
            self.handleError(record)

    def _write(self, text: str) -> None:
        data = memoryview(f"{text}\n".encode(errors="backslashreplace"))
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


def open_log(verbosity: int, path: str | None, work_dir: str | os.PathLike[str]) -> LogHandler:
    """Send criupy's log to a file relative to the work dir, standard output ("-") or error (None).

    The file is emptied first. The standard ones are duplicated, so the log
    goes on when a daemon closes its own, as CRIU's does. Raise CommandError
    when it cannot be written.
    """
    try:
        if path is None or path == "-":
            where = Path("standard error" if path is None else "standard output")
            fd = os.dup(2 if path is None else 1)
        else:
            where = Path(work_dir, path)
            fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(
            f"log {where}: {error.strerror}; --log-file FILE has to be a file this process can write"
        ) from error
    handler = LogHandler(fd)
    handler.setFormatter(CriuFormatter(verbosity, time.time()))
    logger = logging.getLogger("criupy")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(_LEVELS[min(max(verbosity, 0), len(_LEVELS) - 1)])
    system = os.uname()
    logger.info("Running on %s %s %s %s", system.nodename, system.sysname, system.release, system.machine)
    return handler
