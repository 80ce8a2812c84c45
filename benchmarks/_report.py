"""What becomes of a benchmark's report: printed as a table, written as JSON, put into the README."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from criupy._command.run import check_writable
from criupy.errors import CommandError

Report = dict[str, Any]


def positive(word: str) -> int:
    """Read a number of an option that counts something."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no number above 0")
    return int(word)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``publish`` reads."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between its marks there")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, take this report")


def publish(
    options: argparse.Namespace,
    measure: Callable[[], Report],
    table: Callable[[Report], str],
    marks: tuple[str, str],
) -> Report:
    """Measure, or take an earlier report, do with it what the options say, and return it.

    Exit in one line where the options cannot be followed, before anything is measured.
    """
    check_json(options)
    if options.readme:
        put(options.readme, marks, None)
    if options.from_json:
        report, text = taken(options.from_json, table)
    else:
        with ended_by_signals():
            report = measure()
        text = table(report)
    print(text)
    if options.json:
        options.json.write_text(encode(report))
    if options.readme:
        put(options.readme, marks, text)
    return report


def check_json(options: argparse.Namespace) -> None:
    """Exit now for a --json that could not be written when all is measured."""
    try:
        if options.json:
            check_writable("--json", options.json)
    except CommandError as error:
        raise SystemExit(str(error)) from error


def taken(path: Path, table: Callable[[Report], str]) -> tuple[Report, str]:
    """Read an earlier report, and make its table."""
    try:
        report: Report = json.loads(path.read_text())
        return report, table(report)
    except OSError as error:
        raise SystemExit(f"--from-json {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SystemExit(f"--from-json {path}: it is no report of this benchmark") from error


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Clean up and exit in one line also when somebody else ends it."""

    def interrupt(number: int, _frame: object) -> None:
        ended.append(number)
        # Trio knows when this one may be raised.
        signal.raise_signal(signal.SIGINT)

    ended: list[int] = []
    # Which a shell in the background makes ignored.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, interrupt)
    try:
        yield
    except (KeyboardInterrupt, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt) is None:
            raise
        number = ended[0] if ended else signal.SIGINT
        print(f"ended by {signal.Signals(number).name}; nothing is left", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def encode(report: Report) -> str:
    """Write a report as JSON, with each list of plain numbers on one line."""
    text = json.dumps(report, indent=1) + "\n"
    return re.sub(r"\[[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)


def put(document: Path, marks: tuple[str, str], text: str | None) -> None:
    """Replace what is between two marks of a document, or with None see that it can be done."""
    begin, end = map(re.escape, marks)
    try:
        old = document.read_text()
    except OSError as error:
        raise SystemExit(f"{document}: {error.strerror}") from error
    new, times = re.subn(
        f"{begin}.*?{end}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old, flags=re.DOTALL
    )
    if times != 1:
        raise SystemExit(f"{document}: the marks {marks[0]} and {marks[1]} are not there once")
    if text is not None:
        document.write_text(new)
