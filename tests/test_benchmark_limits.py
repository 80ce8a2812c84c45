"""benchmarks/limits.py: its tables, and the C that it measures with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

REPORT: dict[str, Any] = {
    "criu": "4.2.1",
    "kernel": "6.18.44",
    "cores": 1,
    "rounds": 3,
    "measured": {
        "lookup 1000000": {"unit": "ns", "runs": [500.0, 900.0, 612.3]},
        "bare fault": {"unit": "ns", "runs": [2000.0, 2222.2, 2500.0]},
        "copy 65536": {"unit": "GB/s", "runs": [3.0, 3.456, 9.0]},
        "wake-up, one core": {"unit": "us", "runs": [2.7, 2.6, 30.0]},
        "stream 1048576": {"unit": "GB/s", "runs": [6.5]},
        "stream CPU 1048576": {"unit": "s/GiB", "runs": [0.1]},
    },
    "sources": {"64/256": {"stock": [1800.0, 2000.0, 2100.0], "ours": [4000.0, 4100.0, 90.0]}},
    "links": {"10 ms": {"round_trip_ms": [11.4, 10.1, 10.2], "mb_s": [125.0, 124.96, 120.0]}},
}


def test_the_tables_have_the_medians_beside_their_limits(tmp_path: Path) -> None:
    page, report = tmp_path / "page.md", tmp_path / "report.json"
    page.write_text("before\n<!-- limits: begin -->\nold\n<!-- limits: end -->\nafter\n")
    report.write_text(json.dumps(REPORT))
    command: list[str | Path] = [
        sys.executable,
        BENCHMARKS / "limits.py",
        "--from-json",
        report,
        "--readme",
        page,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = page.read_text().splitlines()
    assert "old" not in lines
    assert (lines[0], lines[-1]) == ("before", "after")
    for line in (
        "| look-up, 1,000,000 extents | 612 ns | a page fault | 2,222 ns |",
        "| 64 KiB | 3.46 GB/s | - |",  # there is no second core
        "| a thread woken by an eventfd | - | 2.70 us | - | - |",
        "| 1 MiB a read | 6.50 GB/s | 0.10 s/GiB |",
        "| 64 / 256 | 2,000 MB/s | 4,000 MB/s |",
        "| 10 ms | 10.2 ms | 125 MB/s |",
    ):
        assert line in lines
    # Each table is one: as many columns in every row.
    for previous, line in pairwise(lines):
        if previous.startswith("|") and line.startswith("|"):
            assert previous.count("|") == line.count("|"), line


def test_the_page_has_what_was_measured_last() -> None:
    command: list[str | Path] = [sys.executable, BENCHMARKS / "limits.py"]
    command += ["--from-json", BENCHMARKS / "limits.json"]
    tables = subprocess.check_output(command, text=True)
    assert tables in (BENCHMARKS.parent / "docs/benchmarks.md").read_text()
    # Two figures cannot be: copying uncached by two, and waking who does not sleep.
    assert tables.count(" - |") == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="there is no C compiler")
def test_the_program_compiles_and_its_ends_of_a_link_agree(tmp_path: Path) -> None:
    code = """if True:
        import json, sys
        from pathlib import Path
        from _limits_program import build, run, serving

        program = build(Path(sys.argv[1]))
        with serving(program) as port:
            print(json.dumps(run(program, "round-trip", port, 3) | run(program, "stream", port, 5 << 20)))
    """
    printed = subprocess.check_output([sys.executable, "-c", code, tmp_path / "limits"], cwd=BENCHMARKS)
    measured = json.loads(printed)
    assert {key: unit for key, (unit, _) in measured.items()} == {"round trip": "ms", "stream": "MB/s"}
    assert all(value > 0 for _, value in measured.values())
