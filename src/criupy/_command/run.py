"""Running a daemon's command: from its words to its exit status, and what it leaves at the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from criupy._command.line import Answer
from criupy._command.parser import UsageError
from criupy.errors import CommandError, CriupyError

__all__ = ["check_writable", "display", "lead_nowhere", "run_command", "write_stats", "write_whole"]

log = logging.getLogger("criupy.command")

Options = TypeVar("Options")

_SHORTAGES = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise fs.file-max",
    errno.ENOMEM: "raise the limit on memory (ulimit -v, ulimit -l, or the cgroup's)",
    errno.EAGAIN: "raise the limit on processes (ulimit -u, or the cgroup's)",
}


def run_command(
    name: str,
    argv: Sequence[str] | None,
    understand: Callable[[Sequence[str]], Options | Answer],
    run: Callable[[Options], int],
) -> int:
    """Do what a command line says and return the exit status; what goes wrong is one line."""
    try:
        options = understand(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if isinstance(options, Answer):
        print(options.text, end="")
        return 0
    try:
        return run(options)
    except CriupyError as error:
        return _failed(name, str(error))
    except Exception as error:
        if (line := _shortage(error)) is not None:
            return _failed(name, line)
        # In the background nobody sees more than the log.
        if logging.getLogger("criupy").handlers:
            log.exception("%s has failed; please report this", name)
            return 1
        raise


def _failed(name: str, line: str) -> int:
    if logging.getLogger("criupy").handlers:
        log.error("%s", line)
    else:
        print(f"{name}: {line}", file=sys.stderr)
    return 1


def _shortage(error: Exception) -> str | None:
    """Say what a process was refused, by its limits or by the machine; None where it was something else."""
    if isinstance(error, ExceptionGroup):
        lines = [_shortage(each) for each in error.exceptions]
        return None if None in lines else lines[0]
    if not isinstance(error, OSError) or error.errno not in _SHORTAGES or isinstance(error, BlockingIOError):
        return None
    what = str(error) if isinstance(error, CriupyError) else error.strerror
    return f"{what}; {_SHORTAGES[error.errno]}"


def display(text: str, *, in_log: bool) -> None:
    """Print what --display-stats asked for, or log it where there is nobody to read it."""
    if in_log:
        for line in text.splitlines():
            log.info("%s", line)
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lead_nowhere(sys.stdout)
        log.warning("--display-stats: %s", error.strerror)


def lead_nowhere(stream: IO[str]) -> None:
    """Point a stream that cannot be written at /dev/null."""
    # What is left in its buffer fails again when Python flushes it at the end,
    # and would turn the exit status into 120.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, stream.fileno())
        os.close(null)


def check_writable(option: str, path: Path) -> None:
    """Raise CommandError now for a file that ``write_whole`` could not write at the end."""
    if not path.parent.is_dir():
        raise CommandError(f"{option} {path}: {path.parent} is no directory")
    is_special = path.is_symlink() or (path.exists() and not path.is_file())
    if path.is_dir() or not os.access(path if is_special else path.parent, os.W_OK):
        raise CommandError(f"{option} {path}: it cannot be written")


def write_stats(path: Path, statistics: Mapping[str, object]) -> None:
    """Write a --stats-file; raise CommandError when it cannot be written."""
    import json  # only at the end, and not by everyone

    write_whole("--stats-file", path, json.dumps(statistics, indent=1) + "\n")


def write_whole(option: str, path: Path, text: str) -> None:
    """Write a file of which whoever sees it sees all; raise CommandError with the option's name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")  # a fifo, a device: not to be replaced by a file
            return
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CommandError(f"{option} {path}: {error.strerror}") from error
