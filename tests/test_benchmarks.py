"""The comparison with criu lazy-pages: what is picked, and what its report becomes."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is measured runs on Linux")


@pytest.fixture(name="bench")
def load_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("lazy_pages")


def way(rounds: int, drain: float, p99: float) -> dict[str, Any]:
    figures = {
        "drain_s": drain,
        "faults": 10,
        "p50_us": 50.0,
        "p99_us": p99,
        "stall_s": drain / 2,
        "cpu_s": drain,
    }
    return {
        "rounds": rounds,
        "figures": figures,
        "runs": [figures | {"drain_s": drain * (1 + n)} for n in range(rounds)],
        "latency_us": [50.0, 60.0, p99],
        "resident_s": [0.0, drain / 2, drain],
        "resident_mib": [1.0, 300.0, 511.0],
    }


def report() -> dict[str, Any]:
    link = {"round_trip_ms": 10.4, "mb_s": 1240.0}
    both = {"stock": way(1, 6.0, 500.0), "ours": way(3, 0.4, 2000.0)}
    third = both | {"ours, our page server": way(3, 0.25, 100.0)}
    cases = ("random", "rtt-loopback", "rtt-10ms-1250MB/s", "rtt-50ms-1250MB/s")
    return {
        "criu": "4.2.1",
        "kernel": "6.18.44",
        "cores": 2,
        "rounds": 3,
        "minutes": 0.5,
        "quantiles": [0.0, 0.5, 1.0],
        "links": {"loopback": link} | {f"{ms} ms, 1.25 GB/s": link for ms in (10, 50)},
        "cases": {name: {"ways": both} for name in cases} | {"fragmented": {"ways": third}},
    }


def cells(text: str, start: str) -> list[list[str]]:
    return [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith(f"| {start}")]


def test_the_readme_table_is_short(bench: Any) -> None:
    text = bench.readme_table(report())
    (random,) = cells(text, "512 MiB, random")
    assert random[1:] == [
        "6.00 s → 400 ms (**15.0**)",
        "3.00 s → 200 ms (**15.0**)",
        "50.0 us → 50.0 us (**1.00**)",
        "500 us → 2.00 ms (**0.25**)",
        "6.00 s → 400 ms (**15.0**)",
    ]
    plain, served = cells(text, "every second page")
    assert served[0] == f"{plain[0]}; ours, our page server"
    assert served[1] == "6.00 s → 250 ms (**24.0**)"
    assert "16 MiB" not in text  # points of a picture


def test_the_full_table_has_rounds_and_links(bench: Any) -> None:
    text = bench.full_table(report())
    assert ["6.00 s", "400 ms (400 ms to 1.20 s)", "15.0"] in [
        row[3:] for row in cells(text, "16 MiB, random touches, loopback")
    ]
    assert {row[1] for row in cells(text, "512 MiB, random")} == {"1 / 3"}
    assert cells(text, "50 ms") == [["50 ms, 1.25 GB/s", "10.4 ms", "1,240 MB/s"]]


def test_aims_are_judged(bench: Any) -> None:
    rows = cells(bench.aims(report()), "512 MiB, random")
    assert [row[1:] for row in rows] == [
        ["drain, ours / stock ≤ 0.143", "0.0667", "6.00 s", "400 ms", "reached"],
        ["summed stall, ours / stock ≤ 0.0833", "0.0667", "3.00 s", "200 ms", "reached"],
        ["fault p99, ours / stock ≤ 3", "4", "500 us", "2.00 ms", "**missed**"],
        ["daemon CPU, ours / stock ≤ 0.167", "0.0667", "6.00 s", "400 ms", "reached"],
    ]


def test_an_aim_may_be_a_least_value(bench: Any) -> None:
    (aim,) = bench.CASES["server-random"].aims
    assert aim.is_met({"ours": {"mb_s": 1200.0}})
    assert not aim.is_met({"ours": {"mb_s": 1199.0}})


@pytest.mark.slow
def test_pictures_are_the_same_for_the_same_report(bench: Any, tmp_path: Path) -> None:
    bench.draw(report(), tmp_path / "one")
    bench.draw(report(), tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["latency.svg", "resident.svg", "round-trip.svg"]
    for name in names:
        picture = (tmp_path / "one" / name).read_text()
        assert picture == (tmp_path / "two" / name).read_text()
    assert "stock, 1,250 MB/s" in picture


def test_cases_are_picked_by_name(bench: Any) -> None:
    options = bench.parse(["--case", "idle", "--case", "random", "--rounds", "2"])
    assert [case.name for case in options.cases] == ["random", "idle"]
    assert [case.rounds_of(case.ways[0], options.rounds) for case in options.cases] == [2, 2]
    assert len(bench.parse([]).cases) == len(bench.CASES)


@pytest.mark.parametrize("words", [["--case", "nothing"], ["--case", "idle", "--readme", "README.md"]])
def test_what_cannot_be_picked(bench: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(words)
    assert "error: " in capsys.readouterr().err


def test_a_way_has_as_many_rounds_as_it_says(bench: Any) -> None:
    case = bench.CASES["random"]
    stock, ours = case.ways
    assert [case.rounds_of(stock, most) for most in (1, 5, 9)] == [1, 3, 3]
    assert [case.rounds_of(ours, most) for most in (1, 5, 9)] == [1, 5, 9]


def test_a_summary_is_small_and_keeps_the_ends(bench: Any) -> None:
    runs = [
        bench.Taken({"drain_s": drain}, range(1000), (), [(n * drain, n) for n in range(1001)])
        for drain in (3.0, 1.0, 2.0)
    ]
    found = bench.summary(runs)
    assert (found["rounds"], found["figures"]["drain_s"]) == (3, 2.0)
    assert (found["latency_us"][0], found["latency_us"][-1]) == (0.0, 0.999)
    assert len(found["resident_s"]) <= 202
    assert (found["resident_s"][-1], found["resident_mib"][-1]) == (2000.0, 3.90625)


def test_latencies_are_of_all_rounds_together(bench: Any) -> None:
    """Of 50 faults the longest is the p99; of those of five rounds it is not."""
    runs = [
        bench.Taken(
            {"p99_us": 1000.0}, [1_000_000 if first else 2_000] + [1_000] * 49, [500] * (1 + 99 * first)
        )
        for first in (True, False, False, False, False)
    ]
    figures = bench.summary(runs)["figures"]
    assert (figures["p50_us"], figures["p99_us"]) == (1.0, 2.0)
    assert (figures["alone_p99_us"], figures["p99_over_alone"]) == (0.5, 4.0)


def test_a_case_that_fails_says_where(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_criu: None, case: Any, way: Any, *_: Any) -> Any:
        if way.is_stock:
            return bench.Taken({"drain_s": 1.0}, [])
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("of a nursery", [ValueError("page 7")])

    monkeypatch.setattr(bench, "run", fail)
    with pytest.raises(SystemExit, match=r"^case idle, ours, round 1: ValueError: page 7$"):
        trio.run(bench.compare_case, None, bench.CASES["idle"], 3)


@pytest.mark.criu
@pytest.mark.parametrize("name", ["rtt-1ms-1250MB/s", "fault"])
async def test_a_case_is_measured(bench: Any, criu: Any, name: str) -> None:
    found = await bench.compare_case(criu, bench.CASES[name], 1)
    assert {way: taken["rounds"] for way, taken in found["ways"].items()} == {"stock": 1, "ours": 1}
    for taken in found["ways"].values():
        assert taken["figures"]["cpu_s"] > 0
        assert taken["figures"].get("alone_p50_us" if name == "fault" else "p50_us", 0) > 1


def test_numbers_are_on_one_line(bench: Any) -> None:
    text = importlib.import_module("_report").encode({"a": [1.5, 2], "b": [{"c": []}], "d": ["x", "[1,\n2]"]})
    assert '"a": [ 1.5, 2 ]' in text
    assert json.loads(text) == {"a": [1.5, 2], "b": [{"c": []}], "d": ["x", "[1,\n2]"]}


@pytest.fixture(name="report_module")
def load_report_module(bench: Any) -> Any:
    assert bench  # which finds it
    return importlib.import_module("_report")


def options(**given: Path | None) -> argparse.Namespace:
    return argparse.Namespace(**{"json": None, "readme": None, "from_json": None} | given)


def never() -> dict[str, Any]:
    raise AssertionError("it was measured")


@pytest.mark.parametrize(
    ("name", "why"), [("", "it cannot be written"), ("nothing/report.json", "nothing is no directory")]
)
def test_what_cannot_be_written_is_said_before_measuring(
    report_module: Any, tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(SystemExit, match=f"^--json .*{why}$"):
        report_module.publish(options(json=tmp_path / name), never, str, ("a", "b"))


def test_a_document_without_marks_is_said_before_measuring(report_module: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<b>\n<e>\n<b>\n<e>\n")
    with pytest.raises(SystemExit, match="not there once"):
        report_module.publish(options(readme=tmp_path / "README.md"), never, str, ("<b>", "<e>"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"cases": 3}'])
def test_a_report_of_something_else_is_one_line(
    bench: Any, report_module: Any, tmp_path: Path, text: str
) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SystemExit, match="it is no report of this benchmark"):
        report_module.publish(options(from_json=tmp_path / "r.json"), never, bench.readme_table, ("a", "b"))


@pytest.mark.parametrize("word", ["0", "-1", "x", "", "1.5"])
def test_what_counts_is_above_zero(report_module: Any, word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        report_module.positive(word)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cleans_up(report_module: Any, tmp_path: Path, number: int) -> None:
    async def measure() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                signal.raise_signal(number)
                await trio.sleep_forever()

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with pytest.raises(SystemExit) as caught, report_module.ended_by_signals():
        trio.run(measure)
    assert caught.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]


def test_the_documents_say_what_the_committed_report_says(bench: Any) -> None:
    committed = json.loads((FOLDER / "lazy_pages.json").read_text())
    assert set(committed["cases"]) == set(bench.CASES)
    for document, marks, text in (
        ("README.md", bench.MARK, bench.readme_table(committed)),
        ("docs/comparison.md", bench.FULL_MARK, bench.full_table(committed)),
        ("docs/comparison.md", bench.AIMS_MARK, bench.aims(committed)),
    ):
        assert "\n".join((marks[0], text, marks[1])) in (ROOT / document).read_text()


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("scale", "docs/scale.md"),
        ("hybrid", "docs/how-to/pre-copy.md"),
        ("containers", "docs/tutorials/with-runc.md"),
        ("links", "README.md"),
        ("page_server", "README.md"),
    ],
)
def test_every_table_says_what_its_committed_report_says(bench: Any, name: str, document: str) -> None:
    assert bench  # which finds the others
    module = importlib.import_module(name)
    text = module.table(json.loads((FOLDER / f"{name}.json").read_text()))
    assert "\n".join((module.MARK[0], text, module.MARK[1])) in (ROOT / document).read_text()
