"""The demo, run as a user runs it: what it says, its exit status, and that it leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criupy.testing._demo_report import Freeze, Measured, summary
from criupy.testing.criu_linux import Criu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("workload_program")]

SIZE = "16"
HANG = 300
"""Seconds after which the demo counts as hung; a guard, not a limit on speed."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the demo puts its files, so also a mark of all its processes; none may be left."""
    found = tmp_path / "demo"
    found.mkdir()
    yield found
    assert processes(found) == []


def processes(place: Path) -> list[str]:
    mine = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(place) in words:
            mine.append(words)
    return mine


def environment(place: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(place), "PYTHONUNBUFFERED": "1", **more}


def demo(place: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "criupy.testing.demo", *options],
        env=environment(place, **env),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def wrapper(place: Path, criu: Criu, case: str) -> str:
    """A CRIU that behaves differently in one case of the shell's."""
    path = place.parent / "criu"
    path.write_text(f'#!/bin/sh\ncase " $* " in\n{case}\nesac\nexec {criu.path} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_with_stand_ins(place: Path) -> None:
    run = demo(place, "--size", SIZE, "--no-criu")
    assert run.returncode == 0, run.stderr
    assert "CRIU is not used: --no-criu was given." in run.stdout
    assert re.search(r"^  criupy-lazy-pages: .*complete: 4,?096 of 4,?096 pages", run.stdout, re.MULTILINE)
    assert f"every byte of its {SIZE} MiB: all are right" in run.stdout
    assert re.search(r"^Drain time +[\d.]+ s$", run.stdout, re.MULTILINE)
    assert "Freeze time" not in run.stdout
    assert "\x1b" not in run.stdout
    assert run.stderr == ""
    assert list(place.iterdir()) == []


def test_with_criu(criu: Criu, place: Path) -> None:
    run = demo(place, "--size", SIZE, CRIUPY_CRIU=str(criu.path))
    assert run.returncode == 0, run.stderr
    assert f"({criu.path})" in run.stdout
    assert run.stdout.count(f"every byte of its {SIZE} MiB: all are right") == 2
    assert re.search(r"^ +criupy-lazy-pages +criu lazy-pages$", run.stdout, re.MULTILINE)
    for label in ("Freeze time", "Drain time", "  speed", "Faults", "  summed stall"):
        assert re.search(rf"^{label} +[\d.,]+( \S+)? +[\d.,]+", run.stdout, re.MULTILINE), label
    assert run.stdout.count("every byte right") == 2
    assert run.stderr == ""
    assert list(place.iterdir()) == []


def test_a_criu_that_does_not_work_here(criu: Criu, place: Path) -> None:
    broken = wrapper(place, criu, '*" check "*) echo "Error (a.c:1): no such luck" >&2; exit 1 ;;')
    # the only one that starts, so that no other takes its place
    run = demo(place, "--size", SIZE, CRIUPY_CRIU=broken, PATH="/bin", XDG_CACHE_HOME=str(place.parent))
    if "CRIU is not used" in run.stdout:
        assert "no such luck" in run.stdout
    else:
        assert f"({broken})" not in run.stdout  # another CRIU of this machine was taken
    assert run.returncode == 0, run.stderr
    assert list(place.iterdir()) == []


def test_a_failure_is_one_line_and_keeps_the_logs(criu: Criu, place: Path) -> None:
    failing = wrapper(place, criu, '*" restore "*) echo "Error (a.c:1): out of order" >&2; exit 1 ;;')
    run = demo(place, "--size", SIZE, CRIUPY_CRIU=failing)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("demo: restore ended with exit status 1, not 0: ")
    assert "out of order" in line
    (room,) = place.iterdir()
    assert line.endswith(f"logs are kept in {room}")
    kept = [path for path in room.rglob("*") if path.is_file()]
    assert {"dump.log", "restore.out", "lazy-pages.log"} <= {path.name for path in kept}
    assert {path.suffix for path in kept} == {".log", ".out"}


@pytest.mark.spread
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_cleans_up(criu: Criu, place: Path, number: signal.Signals) -> None:
    stuck = wrapper(place, criu, f'*" restore "*) exec sleep {HANG} ;;')
    with subprocess.Popen(
        [sys.executable, "-m", "criupy.testing.demo", "--size", SIZE],
        env=environment(place, CRIUPY_CRIU=stuck),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("Destination: criu restore"):
                break
        assert processes(place)
        os.killpg(run.pid, number)  # as a terminal does with Ctrl-C
        _, said = run.communicate(timeout=HANG)
    assert run.returncode == 128 + number
    assert said == f"demo: stopped by {number.name}; everything was cleaned up\n"
    assert list(place.iterdir()) == []


def test_on_a_terminal(place: Path) -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "criupy.testing.demo", "--size", SIZE, "--no-criu"],
        env=environment(place, TERM="xterm", COLUMNS="100"),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as run:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 65536):
                said += data
        except OSError:
            pass  # that is how a terminal says that nobody has it open any more
        finally:
            os.close(ours)
        assert run.wait(HANG) == 0
    text = said.decode()
    assert "complete" in text  # the bar's, of the daemon itself
    assert "  criupy-lazy-pages: " not in text  # it speaks for itself
    assert "Drain time" in text
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")  # the cursor is there again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "ten"], "'ten' is not a whole number of MiB"),
        (["--size", "0"], "choose between"),
        (["--size", "1000000"], "--size 1000000: two copies of the process need"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_options(place: Path, options: list[str], says: str) -> None:
    run = demo(place, "--no-criu", *options)
    assert run.returncode in {1, 2}
    assert says in run.stderr.splitlines()[-1]
    assert list(place.iterdir()) == []


def test_help(place: Path) -> None:
    run = demo(place, "--help")
    assert run.returncode == 0
    for word in ("--size MIB", "--no-criu", "--help"):
        assert word in run.stdout


def measured(program: str, drain: float, waits: list[int]) -> Measured:
    return Measured(program, 1_000_000_000, Freeze(0.1, 0.2, 0.3), drain, tuple(sorted(waits)))


def test_figures() -> None:
    one = measured("one", 2.0, [n * 10_000 for n in range(1, 101)])
    assert one.rate == 500
    assert one.stall == pytest.approx(0.0505)
    assert one.wait_us(50) == 510
    assert one.wait_us(99) == 1000
    assert one.freeze is not None
    assert one.freeze.total == pytest.approx(0.6)
    assert measured("none", 1.0, []).wait_us(50) is None


def test_summary_compares() -> None:
    ours, stock = measured("ours", 2.0, [1_000_000]), measured("stock", 5.0, [100_000] * 50)
    table, sentences = summary([ours, stock])
    lines = {line[:28].strip(): line.split()[-2:] for line in table}
    assert lines["Drain time"] == ["2.5x", "better"]
    assert lines["speed"] == ["2.5x", "better"]
    assert lines["Freeze time"] == ["the", "same"]
    assert lines["Faults"] == ["50.0x", "better"]
    assert lines["latency, half (p50)"] == ["10.0x", "worse"]
    assert "2.5 times sooner" in sentences[-1]
    assert "A single wait was longer" in sentences[-1]
    assert max(map(len, table)) <= 80
    table, sentences = summary([stock, ours])
    assert "2.5 times later" in sentences[-1]
