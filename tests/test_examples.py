"""The programs in examples/ do what they say, with every CRIU that works here."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from criupy.testing.criu_linux import Criu

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

#: What each program prints, as a pattern of all of it.
PRINTS = {
    "dump_and_restore": r"""CRIU VERSION, process (\d+)
post-dump: \d+ KiB of images
dumped at \d+
post-restore: process \1
restored, counts on: \d+
""",
    "notifications": r"""CRIU VERSION, process (\d+)
careful:
  pre-dump
  pre-dump was refused: \d+ MiB are free, \d+ MiB have to remain
  process \1 runs
easy:
  pre-dump
(?:  network-lock
)?  query-ext-files
  post-dump
  dumped
  process \1 runs
""",
    "self_checkpoint": r"""original: self_dump\(\) returned False, the sum is 1999000
copy:     self_dump\(\) returned True, the sum is 1999000
""",
    "restore_as_child": r"""process (\d+) says: 0 BEFORE
process \1 says: 1 AFTER
reaped it, exit status 7
""",
    "page_server": r"""page server: process \d+, port \d+
page server: exit status 0
here: 0 MiB of pages, at the page server: 3\d MiB of pages
dumped at \d+, restored, counts on: \d+
""",
    "restore_many": r"""dumped at \d+
(?:copy [123]: counts on, and all of its memory is here
){3}served \d+ pages to 3 destinations: {'closed': 3}
""",
    "lazy_migration": r"""source: process (\d+) is frozen, its memory at 127\.0\.0\.1:\d+
destination: process \1 runs after [\d.]+ s, was at \d+
destination: counts on: \d+
destination: all memory is here after [\d.]+ s
source: the process here is killed
""",
}
PRINTS["lazy_migration_blocking"] = PRINTS["lazy_migration"]


def test_no_example_is_left_out() -> None:
    # ... but for what needs two hosts: test_runc_migration runs it
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRINTS, "container_migration"}


@pytest.mark.spread
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_example(name: str, criu: Criu, tmp_path: Path, nothing_runs_on: None) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--criu", criu.path],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(PRINTS[name].replace("VERSION", r"[\d.]+"), done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_without_criu_it_says_so(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--criu", tmp_path / "criu"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"Error: \w+: .*/criu: there is no such program - .*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def programs(page: str) -> list[str]:
    """List the programs of a page that dump a process, which is 1234 there, into ckpt."""
    found: list[str] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    return [code.replace("/var/ckpt", "ckpt") for code in found if "1234" in code]


PROGRAMS = {
    f"{page} {number}": code
    for page in ("README.md", "docs/rpc.md")
    for number, code in enumerate(programs(page))
}


def test_programs_are_found() -> None:
    assert list(PROGRAMS) == ["README.md 0", "README.md 1", "docs/rpc.md 0", "docs/rpc.md 1", "docs/rpc.md 2"]


@pytest.mark.spread
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_program_of_a_page(name: str, criu: Criu, tmp_path: Path, nothing_runs_on: None) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "criu").symlink_to(criu.path)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"],
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        reaper = threading.Thread(target=process.wait)  # at once, or it keeps its pid from being restored
        reaper.start()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAMS[name].replace("1234", str(process.pid))],
            cwd=tmp_path,
            env={**environment, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # as it was, or restored
        reaper.join()
    assert (done.returncode, done.stderr) == (0, "")
    if "restore(" in PROGRAMS[name]:
        assert str(process.pid) in done.stdout.split()
