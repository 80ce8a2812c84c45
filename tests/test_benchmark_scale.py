"""What benchmarks/scale.py shows of its report: the table and the picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scale")


def report(scale: Any) -> dict[str, Any]:
    def run(us: float) -> dict[str, float]:
        return {"p50_us": us, "p99_us": 10 * us, "faults": 9}

    def grown(by: float) -> dict[str, Any]:
        return {
            way: {1: [run(20), run(10), run(30)], 64: [run(20 * by)]} for way in (*scale.OURS, scale.STOCK)
        }

    return {
        "criu": "4.2.1",
        "kernel": "6.18",
        "cores": 2,
        "rounds": 3,
        "ready_s": {"local images": [0.2, 0.1, 0.12], "page server": [0.13]},
        "start": {
            "extents": {1: {"s": [0.1], "bytes": 0}, 1_000_000: {"s": [1.5, 1.2, 1.3], "bytes": 40_000_000}},
            "processes": {1: {"s": [0.1]}, 1000: {"s": [0.6]}},
        },
        "faults": {name: grown(1.05 if name == "extents" else 2) for name in scale.GROWS},
    }


def test_table(scale: Any) -> None:
    # As it is read again: JSON makes words of the sizes.
    text = scale.table(json.loads(json.dumps(report(scale))))
    assert "Ready 120 ms (local images) and 130 ms (page server)" in text
    assert "| fault p50, local images | 1 to 64 extents of 1 GiB | 20.0 us | 21.0 us | 1.05 |" in text
    assert (
        "| fault p50, stock, local images | 1 to 64 threads that fault | 20.0 us | 40.0 us | 2.00 |" in text
    )
    assert "| start-up | 1 to 1,000,000 extents | 0.10 s | 1.30 s | 13.0 |" in text
    assert "| memory when ready | 1,000,000 extents | | 40 MB | 40 bytes each |" in text
    assert "| fault p50 at 64 extents over that at 1, page server ≤ 1.1 | 1.05 | reached |" in text
    assert "| ready after exec, local images ≤ 150 ms | 120 ms | reached |" in text
    assert "| start-up with 1,000,000 extents ≤ 3 s | 1.30 s | reached |" in text
    assert "| memory when ready, an extent ≤ 64 bytes | 40 bytes | reached |" in text


def test_a_missed_aim_is_marked(scale: Any) -> None:
    late = report(scale)
    late["ready_s"]["page server"] = [0.2]
    assert "| ready after exec, page server ≤ 150 ms | 200 ms | **missed** |" in scale.table(
        json.loads(json.dumps(late))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_picture(scale: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (dependency group bench)")
    for name in ("a.svg", "b.svg"):
        scale.draw(json.loads(json.dumps(report(scale))), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "<svg" in text
