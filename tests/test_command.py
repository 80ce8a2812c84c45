"""The criupy command itself: its subcommands, exit statuses, and streams that break."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from criupy.commands import check, main
from criupy.errors import CriuError, CriupyError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="`criupy check` is for Linux")

COMMAND = [sys.executable, "-m", "criupy"]


def run(
    *words: str, stdout: int = subprocess.PIPE, unbuffered: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
    )


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(arguments: Namespace) -> int:
        raise error

    monkeypatch.setattr(check, "run", fail)


# ---- what it understands -----------------------------------------------------------


def test_version() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("criupy ")
    assert ended.stdout.count("\n") == 1


def test_the_installed_script_is_the_same() -> None:
    script = Path(sys.executable).with_name("criupy")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == (
        run("--version").stdout
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("check", "images", "lazy-parents", "--version"):
        assert name in shown


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("criupy check", "--criu", "--socket", "--json", "Exit status"):
        assert name in shown


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "check" in told.err


@pytest.mark.parametrize(
    "words", [["dance"], ["--dance"], ["check", "--dance"], ["check", "x"], ["check", "--criu"]]
)
def test_what_it_does_not_understand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage: criupy" in told.err


def test_a_program_and_a_service_are_not_asked_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--criu", "a", "--socket", "b"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_only_the_command_that_is_asked_for_is_imported() -> None:
    program = (
        "import sys\n"
        "from criupy.commands import main\n"
        "assert main(['check', '--help']) == 0\n"
        "loaded = {name for name in sys.modules if name.startswith('criupy.')}\n"
        "assert 'criupy.commands.check' in loaded\n"
        "assert not {'criupy.commands.images', 'criupy.rpc', 'criupy.images'} & loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


# ---- how it fails ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CriupyError("no luck"), "criupy check: no luck\n"),
        (CriupyError("two\nlines"), "criupy check: two lines\n"),
        (CriuError("check", "said no", hint="be kind"), "criupy check: check: said no - be kind\n"),
    ],
)
def test_an_error_is_one_line(
    error: CriupyError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert main(["check"]) == 1
    assert capsys.readouterr() == ("", line)


def test_a_bug_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["check"])


def test_the_status_of_the_command_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run", lambda arguments: 7)
    assert main(["check"]) == 7


def test_other_systems_are_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["check"]) == 1
    assert capsys.readouterr() == ("", "criupy check: this command needs Linux, and this is darwin\n")


# ---- streams -----------------------------------------------------------------------

ANYWHERE = [["--version"], ["--help"], ["check", "--help"]]
NOTHING = ["check", "--criu", "/nonexistent/criu"]
LINES = [*ANYWHERE, pytest.param(NOTHING, marks=linux_only)]


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_reader_that_went_away(words: list[str], unbuffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = run(*words, stdout=writer, unbuffered=unbuffered)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_full_disk(words: list[str], unbuffered: bool) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run(*words, stdout=full.fileno(), unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (1, "criupy: standard output: No space left on device\n")


@pytest.mark.parametrize("words", [*ANYWHERE, NOTHING], ids=" ".join)
def test_a_closed_output(words: list[str]) -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *words]
    ended = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "criupy: standard output is closed\n")


def test_an_error_that_nobody_reads() -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "dance"]
    assert subprocess.run(shell, check=False).returncode == 2


# ---- Ctrl-C ------------------------------------------------------------------------


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # In a process whose standard output may be led nowhere afterwards.
    fail_with(monkeypatch, KeyboardInterrupt())
    monkeypatch.setattr("criupy.commands._lead_nowhere", lambda stream: None)
    assert main(["check"]) == 130
    assert capsys.readouterr() == ("", "")


@linux_only
def test_an_interrupt_while_criu_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    criu = tmp_path / "criu"
    criu.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/started\nexec sleep 600\n")
    criu.chmod(0o700)
    words = [*COMMAND, "check", "--criu", str(criu)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        worker = int((tmp_path / "started").read_text())
        running.send_signal(signal.SIGINT)
        assert running.communicate() == ("", "")
        assert running.returncode == 130
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker was left behind")
