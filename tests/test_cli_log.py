"""The log: CRIU's shape, CRIU's places, and no harm done when it cannot be written."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criupy._command import log as log_module
from criupy._command.log import CriuFormatter, LogHandler, open_log
from criupy.errors import CommandError

log = logging.getLogger("criupy.lazy_pages")
HERE = "criupy/lazy_pages/_daemon_linux.py"


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    logger = logging.getLogger("criupy")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.handlers, logger.level, logger.propagate = before
    logger.setLevel(before[1])  # drops what the loggers remember


def record(
    level: int, text: str, *args: object, after: float = 0.012345, line: int = 123
) -> logging.LogRecord:
    pathname = str(Path(log_module.__file__).parents[1] / "lazy_pages" / "_daemon_linux.py")
    made = logging.LogRecord("criupy.x", level, pathname, line, text, args, None)
    made.created = after
    return made


@pytest.mark.parametrize(
    ("verbosity", "level", "expected"),
    [
        (2, logging.ERROR, f"Error ({HERE}:123): text 5"),
        (2, logging.CRITICAL, f"Error ({HERE}:123): text 5"),
        (2, logging.WARNING, f"Warn  ({HERE}:123): text 5"),
        (3, logging.ERROR, f"(00.012345) Error ({HERE}:123): text 5"),
        (3, logging.WARNING, f"(00.012345) Warn  ({HERE}:123): text 5"),
        (3, logging.INFO, "(00.012345) text 5"),
        (4, logging.DEBUG, "(00.012345) text 5"),
    ],
)
def test_shape(verbosity: int, level: int, expected: str) -> None:
    assert CriuFormatter(verbosity, 0.0).format(record(level, "text %d", 5)) == expected


@pytest.mark.parametrize(
    ("after", "time"),
    [
        (0.0, "(00.000000)"),
        (9.5, "(09.500000)"),
        (99.999999, "(99.999999)"),
        (100.123456, "(100.12345)"),
        (12345.678901, "(12345.678)"),
        (-3.0, "(00.000000)"),  # the clock was set back
    ],
)
def test_time_is_as_wide_as_criu_has_it(after: float, time: str) -> None:
    assert CriuFormatter(3, 0.0).format(record(logging.INFO, "x", after=after)) == f"{time} x"


def test_other_programs_paths_stay_whole() -> None:
    made = record(logging.ERROR, "x")
    made.pathname = "/elsewhere/tool.py"
    assert CriuFormatter(2, 0.0).format(made) == "Error (/elsewhere/tool.py:123): x"


def test_every_line_of_a_record_has_its_head() -> None:
    made = record(logging.ERROR, "one\ntwo")
    try:
        raise ValueError("three")  # noqa: TRY301
    except ValueError:
        made.exc_info = sys.exc_info()
    lines = CriuFormatter(3, 0.0).format(made).splitlines()
    assert len(lines) > 3
    assert all(line.startswith(f"(00.012345) Error ({HERE}:123): ") for line in lines)
    assert lines[-1].endswith("ValueError: three")


def say_everything() -> None:
    log.error("an error")
    log.warning("a warning")
    log.info("an info")
    log.debug("a debug")


@pytest.mark.parametrize(
    ("verbosity", "words"),
    [
        (0, []),
        (1, ["error"]),
        (2, ["error", "warning"]),
        (3, ["error", "warning", "info"]),
        (4, ["error", "warning", "info", "debug"]),
        (9, ["error", "warning", "info", "debug"]),
    ],
)
def test_levels(verbosity: int, words: list[str], tmp_path: Path) -> None:
    open_log(verbosity, "x.log", tmp_path)
    say_everything()
    text = (tmp_path / "x.log").read_text()
    assert re.findall(r"an? (error|warning|info|debug)\n", text) == words
    assert ("Running on" in text) is (verbosity >= 3)


def test_the_file_is_in_the_work_dir_private_and_emptied(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("old\n")
    file.chmod(0o600)
    open_log(2, "x.log", tmp_path)
    log.error("new %s", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \udcff")
    assert file.read_text().splitlines()[0].endswith("): new caf\N{LATIN SMALL LETTER E WITH ACUTE} \\udcff")
    assert "old" not in file.read_text()
    open_log(2, str(tmp_path / "absolute.log"), "/nonexistent")
    assert (tmp_path / "absolute.log").stat().st_mode & 0o777 == 0o600


def test_lines_of_two_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    open_log(2, "x.log", tmp_path)
    log.error("first")
    with (tmp_path / "x.log").open("a") as other:
        other.write("between\n")
    log.error("second")
    assert [line.rpartition(" ")[2] for line in (tmp_path / "x.log").read_text().splitlines()] == [
        "first",
        "between",
        "second",
    ]


@pytest.mark.parametrize("name", ["no/such/dir.log", "."])
def test_a_log_that_cannot_be_opened_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--log-file") as caught:
        open_log(2, name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("path", "stream"), [(None, "stderr"), ("-", "stdout")])
def test_standard_streams_outlive_their_closing(path: str | None, stream: str) -> None:
    # A daemon puts /dev/null on 0, 1 and 2; CRIU's log goes on to where it went.
    program = (
        "import logging, os; from criupy._command.log import open_log\n"
        f"open_log(2, {path!r}, '.')\n"
        "null = os.open(os.devnull, os.O_RDWR)\n"
        "[os.dup2(null, fd) for fd in range(3)]\n"
        "logging.getLogger('criupy.x').error('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Error (" in getattr(ended, stream)
    assert "still here" in getattr(ended, stream)
    assert ended.stdout == "" or ended.stderr == ""


def test_a_reader_that_went_away_costs_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    handler = LogHandler(writer)
    handler.setFormatter(CriuFormatter(2, 0.0))
    os.close(reader)
    handler.emit(record(logging.ERROR, "lost"))
    handler.emit(record(logging.ERROR, "lost"))
    reader, other = os.pipe()
    os.dup2(other, writer)
    os.close(other)
    handler.emit(record(logging.ERROR, "seen"))
    handler.close()
    with open(reader, encoding="ascii") as file:  # noqa: PTH123 - a descriptor
        lines = file.read().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Warn  (criupy/_command/log.py): 2 records")
    assert lines[1].endswith("seen")


def test_a_wrong_call_is_told_of_and_harms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(2, "x.log", tmp_path)
    log.error("%d pages", None)
    log.error("after")
    assert "%d pages" in capsys.readouterr().err
    assert (tmp_path / "x.log").read_text().endswith("after\n")


def test_lines_can_be_diverted_and_come_back(tmp_path: Path) -> None:
    handler = open_log(2, "x.log", tmp_path)
    seen: list[str] = []
    handler.divert(seen.append)
    log.error("there")
    handler.divert(None)
    log.error("here")
    assert [line.rpartition(" ")[2] for line in seen] == ["there"]
    assert "there" not in (tmp_path / "x.log").read_text()
    assert "here" in (tmp_path / "x.log").read_text()


def test_opening_again_closes_the_old_one(tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        handler = open_log(2, "x.log", tmp_path)
    assert len(set(Path("/proc/self/fd").iterdir()) - before) == 1
    handler.close()
    handler.close()
    assert set(Path("/proc/self/fd").iterdir()) == before
