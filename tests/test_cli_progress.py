"""Progress: who sees what, and that a stream that breaks breaks nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from criupy.lazy_pages._progress import Kind, make_progress, summary
from criupy.lazy_pages._statistics import Events, State, Statistics

LATENCY = tuple(1 if bucket == 200 else 0 for bucket in range(640))


def at(elapsed: float, missing: int = 0, **values: Any) -> Statistics:
    settled: dict[str, Any] = {
        "state": State.TRANSFERRING,
        "elapsed": elapsed,
        "restored": 0.5,
        "tasks": 1,
        "pages_total": 1000,
        "pages_missing": missing,
        "pages_received": 1000 - missing,
    }
    return Statistics(**(settled | values))


DONE = at(2.5, state=State.COMPLETE, drain=2.0, faults=7, latency=LATENCY)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    stream = io.StringIO()
    progress = make_progress("plain", stream, background=False)
    assert progress.interval == 1
    assert progress.print_above is None
    progress.update(at(0.1, state=State.WAITING))
    progress.update(at(0.3, state=State.RESTORING))
    assert stream.getvalue() == ""
    progress.update(at(1.0, 750))
    progress.update(at(2.0, 250, faults=12, latency=LATENCY))
    progress.close(DONE)
    first, second, last = stream.getvalue().splitlines()
    assert "1.0 s  transferring: 250 of 1,000 pages, 1 MB/s, 0 faults/s" in first
    assert "750 of 1,000 pages, 2 MB/s, 12 faults/s, p50 " in second
    assert "complete: 1,000 of 1,000 pages, 2 MB/s" in last


def test_json_lines() -> None:
    stream = io.StringIO()
    progress = make_progress("json", stream, background=False)
    progress.update(Statistics())
    progress.update(at(1.0, 750))
    progress.close(DONE)
    read = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["state"] for line in read] == ["waiting", "transferring", "complete"]
    assert read[1]["pages_missing"] == 750


@pytest.mark.parametrize(("kind", "background"), [("none", False), ("none", True), ("auto", True)])
def test_silence(kind: Kind, background: bool) -> None:
    stream = Terminal()
    progress = make_progress(kind, stream, background=background)
    progress.update(at(1.0))
    progress.close(DONE)
    assert stream.getvalue() == ""
    assert progress.interval == float("inf")


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_what_is_asked_for_is_shown_in_the_background_too(kind: Kind) -> None:
    stream = io.StringIO()
    make_progress(kind, stream, background=True).close(DONE)
    assert "complete" in stream.getvalue()


def test_auto_elsewhere_than_on_a_terminal_is_lines() -> None:
    stream = io.StringIO()
    make_progress("auto", stream, background=False).close(DONE)
    assert stream.getvalue().count("\n") == 1


def test_auto_without_rich_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    stream = Terminal()
    make_progress("auto", stream, background=False).close(DONE)
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_auto_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = make_progress("auto", stream, background=False)
    assert 0 < progress.interval < 1
    for step in range(20):
        progress.update(at(1 + step / 4, 1000 - 50 * step, faults=step))
    write = progress.print_above
    assert write is not None
    write("Warn  (x.py:1): [bold] :smile: a line of the log")
    progress.close(DONE)
    assert progress.print_above is None
    shown = stream.getvalue()
    assert "500 pages" in shown
    assert "[bold] :smile: a line of the log\n" in shown
    assert "complete" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_a_bar_has_rates_of_about_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = make_progress("auto", stream, background=False)
    for step in range(41):  # 10 s: 1000 faults in the first half, then none
        progress.update(at(step / 4, 500, faults=min(50 * step, 1000)))
        if step == 20:
            assert "200 faults/s" in stream.getvalue().rsplit("pages", 1)[1]
    assert " 0 faults/s" in stream.getvalue().rsplit("pages", 1)[1]
    progress.close(DONE)


@pytest.mark.parametrize("kind", ["plain", "json", "auto"])
def test_a_stream_that_breaks_silences_progress_and_nothing_else(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Terminal):
        broken = False

        def write(self, text: str) -> int:
            if self.broken:
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm")
    stream = Breaking()
    progress = make_progress(kind, stream, background=False)
    progress.update(at(1.0, 900))
    stream.broken = True
    progress.update(at(2.0, 800))
    assert progress.interval == float("inf")
    assert progress.print_above is None
    progress.update(at(3.0, 700))
    progress.close(DONE)


def test_a_reader_that_went_away() -> None:
    program = (
        "import sys\n"
        "from criupy.lazy_pages._progress import make_progress\n"
        "from criupy.lazy_pages._statistics import State, Statistics\n"
        "progress = make_progress('plain', sys.stderr, background=False)\n"
        "for second in range(5):\n"
        "    progress.update(Statistics(state=State.TRANSFERRING, elapsed=float(second)))\n"
        "progress.close(Statistics(state=State.COMPLETE))\n"
        "print('the transfer went on')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = [sys.executable, "-c", program]
        ended = subprocess.run(words, stdout=subprocess.PIPE, stderr=writer, text=True, check=True)
    finally:
        os.close(writer)
    assert ended.stdout == "the transfer went on\n"


def test_rich_is_imported_only_where_it_is_used() -> None:
    program = (
        "import sys, criupy.lazy_pages._progress as p\n"
        "p.make_progress('plain', sys.stderr, background=False)\n"
        "assert 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_summary_of_a_success() -> None:
    text = summary(
        at(
            2.75,
            state=State.COMPLETE,
            drain=2.0,
            forks=2,
            faults=1,
            requests=40,
            pages_demand=300,
            pages_background=700,
            pages_dropped=12,
            pages_zero=3,
            latency=LATENCY,
            latency_sum_ns=1_500_000_000,
            latency_max_ns=25_000_000,
            events=Events(fork=2, unmap=1),
        )
    )
    lines = dict(line.split(":", 1) for line in text.splitlines())
    found = {name: value.strip() for name, value in lines.items()}
    assert found["Outcome"] == "complete after 2.750 s"
    assert found["Tasks"] == "1, 2 forked since"
    assert found["Lazy memory"] == "1,000 pages, 4.1 MB"
    assert found["Tasks ran"] == "0.500 s after the start"
    assert found["Last page"] == "2.000 s after that, 2.0 MB/s"
    assert found["Installed"] == "300 pages on demand, 700 ahead of it"
    assert found["Fetched"] == "1,000 pages in 40 requests"
    assert found["Faults"] == "1, waited 1.500 s in all; 3 were for zero pages"
    assert found["Fault latency"].endswith(" us, max 25 ms")
    assert found["Not wanted"].startswith("12 pages")
    assert found["Memory events"] == "2 fork, 1 munmap"
    assert "Missing" not in found
    assert "Poisoned" not in found


def test_summary_of_failures() -> None:
    failed = summary(at(3.0, 400, state=State.FAILED))
    assert "Missing:       400 pages" in failed
    poisoned = summary(at(3.0, 400, state=State.FAILED, pages_poisoned=400))
    assert "Poisoned:      400 pages" in poisoned
    assert "Missing" not in poisoned
    aborted = summary(Statistics(state=State.ABORTED, elapsed=1.0))
    assert "Tasks ran" not in aborted
    assert "Fault latency" not in aborted
