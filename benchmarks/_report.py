"""What becomes of a benchmark's report: printed as a table, written as JSON, put into the README."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]


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
    """Measure, or take an earlier report, do with it what the options say, and return it."""
    report: Report = json.loads(options.from_json.read_text()) if options.from_json else measure()
    text = table(report)
    print(text)
    if options.json:
        options.json.write_text(encode(report))
    if options.readme:
        put(options.readme, marks, text)
    return report


def encode(report: Report) -> str:
    """Write a report as JSON, with each list of plain numbers on one line."""
    text = json.dumps(report, indent=1) + "\n"
    return re.sub(r"\[[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)


def put(document: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what is between two marks of a document."""
    begin, end = map(re.escape, marks)
    old = document.read_text()
    new, times = re.subn(
        f"{begin}.*?{end}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old, flags=re.DOTALL
    )
    if times != 1:
        raise SystemExit(f"{document}: the marks {marks[0]} and {marks[1]} are not there once")
    document.write_text(new)
