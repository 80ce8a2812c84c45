"""Log lines in CRIU's shape, so that what people grep for in CRIU's logs is found in ours.

    (00.012345) Error (criupy/lazy_pages/_cli.py:80): text

The time since the start is there from verbosity 4 on; errors and warnings say
where they come from, the rest does not (criu/include/log.h, criu/log.c). The
levels are CRIU's: 1 errors, 2 warnings (the default), 3 information, 4 debug.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Final

from criupy.errors import LazyPagesError

__all__ = ["CriuFormatter", "open_log"]

_LEVELS: Final = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_TIMES_FROM: Final = 4
_TAGS: Final = {logging.ERROR: "Error ", logging.WARNING: "Warn  "}
_PACKAGE: Final = Path(__file__).parents[2]


class CriuFormatter(logging.Formatter):
    """Format records as CRIU would; a message never spans lines."""

    def __init__(self, verbosity: int, started: float) -> None:
        super().__init__()
        self._times = verbosity >= _TIMES_FROM
        self._started = started

    def format(self, record: logging.LogRecord) -> str:
        words = ""
        if self._times:
            words = f"({max(0.0, record.created - self._started):09.6f}) "
        tag = _TAGS.get(record.levelno)
        if tag is not None:
            path = Path(record.pathname)
            if path.is_relative_to(_PACKAGE):
                path = path.relative_to(_PACKAGE)
            words += f"{tag}({path}:{record.lineno}): "
        text = words + " ".join(record.getMessage().splitlines())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def open_log(verbosity: int, path: str | None, work_dir: str | os.PathLike[str]) -> logging.Handler:
    """Send criupy's log to a file relative to the work dir, to standard output ("-"), or to standard error (None).

    The file is emptied first. Raise LazyPagesError when it cannot be written.
    """
    if path == "-":
        handler: logging.Handler = logging.StreamHandler(sys.stdout)
    elif path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        where = Path(work_dir, path)
        try:
            fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LazyPagesError(f"log file {where}: {error.strerror}") from error
        handler = logging.StreamHandler(os.fdopen(fd, "w", encoding="utf-8", buffering=1))
    handler.setFormatter(CriuFormatter(verbosity, time.time()))
    logger = logging.getLogger("criupy")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(_LEVELS[min(max(verbosity, 0), len(_LEVELS) - 1)])
    return handler
