"""What benchmarks/hybrid.py shows of its report: the table and the picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def hybrid(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("hybrid")


def report() -> dict[str, Any]:
    def run(freeze: float, stall: float, **more: float) -> dict[str, Any]:
        common = {"restore_s": 0.3, "restored_pages": 28, "faults": 7, "round_pages": []}
        return {**common, "freeze_s": freeze, "stall_s": stall, **more}

    return {
        "criu": "4.2.1",
        "kernel": "6.1.0",
        "rounds": 3,
        "size_mib": 64,
        "round_trip_ms": 10,
        "ways": {
            "pre-copy": [{**run(1.5, 0), "round_pages": [16000, 500]}],
            "post-copy": [
                run(freeze, freeze, fetched_pages=16000, drain_s=3.2) for freeze in (1.0, 1.2, 1.1)
            ],
            "hybrid": [{**run(1.2, 0.44, fetched_pages=500), "round_pages": [16000, 500]}],
        },
    }


def test_table(hybrid: Any) -> None:
    text = hybrid.table(report())
    assert "64 MiB, one thread that touches random pages" in text
    assert "| pre-copy | 1.50 s | 0.30 s | 0.000 s | 7 | 16,500 | 28 | 0 |" in text
    assert "| post-copy | 1.10 s | 0.30 s | 1.100 s | 7 | 0 | 28 | 16,000 |" in text
    assert "| stall of hybrid / post-copy ≤ 0.5 | 0.40 | reached |" in text
    assert "takes to come ≤ 1 | 1.00 | reached |" in text


def test_missed_aims_are_marked(hybrid: Any) -> None:
    late = report()
    late["ways"]["hybrid"][0] |= {"stall_s": 0.6, "freeze_s": 1.3}
    assert hybrid.table(late).count("**missed**") == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_picture(hybrid: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (dependency group bench)")
    for name in ("a.svg", "b.svg"):
        hybrid.draw(json.loads(json.dumps(report())), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "<svg" in text
