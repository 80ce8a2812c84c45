"""Compare criupy-page-server with criu page-server --lazy-pages: same images, same client, in one run.

    python benchmarks/page_server.py [--rounds N] [--json FILE] [--readme README.md]

first page    of a large image, from the connect to the page's last byte
throughput    all pages, in the order of addresses or in a random one, so many by
              one request; 1024 pages or 64 requests in flight, which the client
              asks for and takes in two halves; CPU of the server
fragmented    the same with every second page only, an entry each
latency       one request at a time, for one page anywhere
drain         a process that waits, filled by our daemon, in clear text and with TLS
peak          resident memory of the server with the large image; stock holds the
              image in pipes besides, which this does not count

The limits of the machine stand beside: one TCP stream, and one core that seals
records. Medians over the rounds; the ratio says how many times better ours is.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import trio
from _page_clients import (
    IN_FLIGHT_PAGES,
    IN_FLIGHT_REQUESTS,
    MIB,
    PAGE,
    Client,
    Requests,
    drain,
    one_stream,
    sealing,
    server,
)
from _report import Report, add_report_options, positive, publish

from criupy.testing.certificates import Certificates, make_certificates
from criupy.testing.criu_linux import Criu, find_criu
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec

MARK = ("<!-- benchmark of the page server: begin -->", "<!-- benchmark of the page server: end -->")
WHO = ("stock", "ours")
NR_SINGLE, NR_LATENCY = 16384, 5000
Measured = Iterator[tuple[str, str, float]]
"""What, its unit, and how much."""


def requests(images: WrittenImages, nr_pages: int, *, scattered: bool) -> Requests:
    found = [
        (run.start + first * PAGE, nr_pages)
        for run in images.tasks[0].runs
        for first in range(0, run.nr_pages - nr_pages + 1, nr_pages)
    ]
    if scattered:
        random.Random(nr_pages).shuffle(found)  # noqa: S311 - an order, no secret
    return found[: NR_SINGLE if nr_pages == 1 else None]


def throughput(who: str, criu: Criu, images: WrittenImages, room: Path, name: str = "") -> Measured:
    for nr_pages in (1,) if name else (1, 16, 256):
        for scattered in (False, True):
            asked = requests(images, nr_pages, scattered=scattered)
            batch = min(IN_FLIGHT_REQUESTS, IN_FLIGHT_PAGES // nr_pages) // 2
            with server(who, criu, images, room) as running:
                client = Client(running, images.tasks[0].pid)
                client.fetch(asked[:1], 1)  # when stock has loaded all
                before = running.cpu_seconds()
                seconds = client.fetch(asked, batch)
                cpu = running.cpu_seconds() - before
            length = len(asked) * nr_pages * PAGE
            case = f"{name}{nr_pages} page{'s'[: nr_pages > 1]} {'scattered' if scattered else 'in order'}"
            yield case, "MB/s", length / seconds / 1e6
            yield f"{case}, CPU", "s/GiB", cpu / length * 1024 * MIB


def first_page(who: str, criu: Criu, images: WrittenImages, room: Path) -> Measured:
    last = requests(images, 16, scattered=False)[-1]
    size = images.tasks[0].pages.stat().st_size >> 20
    with server(who, criu, images, room) as running:
        start = time.perf_counter()
        client = Client(running, images.tasks[0].pid)
        client.fetch([last], 1)
        yield f"first page of {size} MiB", "ms", (time.perf_counter() - start) * 1e3
        yield "peak memory then", "MB", running.peak() / 1e6


def latency(who: str, criu: Criu, images: WrittenImages, room: Path) -> Measured:
    with server(who, criu, images, room) as running:
        client = Client(running, images.tasks[0].pid)
        asked = requests(images, 1, scattered=True)[:NR_LATENCY]
        client.fetch(asked[:1], 1)
        took = [client.fetch([request], 1) for request in asked]
    cuts = statistics.quantiles(took, n=100)
    yield "one page at a time, p50", "us", cuts[49] * 1e6
    yield "one page at a time, p99", "us", cuts[98] * 1e6


def touch(length: int) -> None:
    """Take memory and give it back: the host of a virtual machine may have to find it, which takes longer."""
    with mmap.mmap(-1, length) as memory:
        for offset in range(0, length, PAGE):
            memory[offset] = 1


async def drains(
    who: str, criu: Criu, images: WrittenImages, room: Path, certificates: Certificates
) -> list[tuple[str, str, float]]:
    found = []
    for title, tls in (("in clear text", None), ("with TLS", certificates)):
        touch(2 * images.spec.size)
        with server(who, criu, images, room, tls) as running, tempfile.TemporaryDirectory() as folder:
            seconds = await drain(running, images, Path(folder), tls)
        found.append((f"drain by our daemon {title}", "MB/s", images.spec.size / seconds / 1e6))
    return found


async def compare(criu: Criu, rounds: int, size: int, large_size: int) -> dict[str, Any]:
    count = "new" if criu.frame_size == 32 else "old"
    runs: dict[str, dict[str, Any]] = {}
    limits: dict[str, list[float]] = {"one TCP stream": [], "one core sealing AES-128-GCM": []}
    with tempfile.TemporaryDirectory(prefix="criupy-bench-") as folder:
        room = Path(folder)
        specs = {
            "images": WorkloadSpec(size=size),
            "fragmented": WorkloadSpec(size=size // 4, fragmented=True),
            "large": WorkloadSpec(size=large_size),
        }
        written = {
            name: write_images(room / name, spec, style="full", count=count) for name, spec in specs.items()
        }
        certificates = make_certificates(room / "certificates")

        def note(who: str, measured: Iterable[tuple[str, str, float]]) -> None:
            for case, unit, value in measured:
                runs.setdefault(case, {"unit": unit, "stock": [], "ours": []})[who].append(value)

        for number in range(rounds):
            limits["one TCP stream"].append(one_stream(written["images"]) / 1e6)
            limits["one core sealing AES-128-GCM"].append(sealing(certificates) / 1e6)
            for who in WHO:
                note(who, throughput(who, criu, written["images"], room))
                note(who, throughput(who, criu, written["fragmented"], room, "fragmented: "))
                note(who, latency(who, criu, written["images"], room))
                note(who, await drains(who, criu, written["images"], room, certificates))
                note(who, first_page(who, criu, written["large"], room))
                print(f"{number + 1}/{rounds} {who}", file=sys.stderr)
    for case in runs.values():
        case["median"] = {who: statistics.median(case[who]) for who in WHO}
    return {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "size_mib": size // MIB,
        "limits": {name: {"median": statistics.median(took), "runs": took} for name, took in limits.items()},
        "cases": runs,
    }


def table(report: dict[str, Any]) -> str:
    """Make a Markdown table of medians and ratios."""
    limits = ", ".join(f"{name} {limit['median']:,.0f} MB/s" for name, limit in report["limits"].items())
    lines = [
        (
            f"Full images of {report['size_mib']} MiB in the page cache, criu {report['criu']}, "
            f"Linux {report['kernel']}, {report['cores']} cores, loopback; "
            f"medians of {report['rounds']} rounds, in turn, in one run. Limits of the machine: {limits}."
        ),
        "",
        "| | `criu page-server` | `criupy-page-server` | times better |",
        "|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        stock, ours = (case["median"][who] for who in WHO)
        better = ours / stock if case["unit"] == "MB/s" else stock / ours if ours else 0
        cells = [
            f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {case['unit']}"
            for value in (stock, ours)
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {better:.{1 if better >= 3 else 2}f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare criupy-page-server with criu page-server.")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--size", type=positive, default=512, metavar="MIB", help="of the images, for most cases"
    )
    parser.add_argument(
        "--large", type=positive, default=4096, metavar="MIB", help="of those for the first page"
    )
    add_report_options(parser)
    options = parser.parse_args()

    def measure() -> Report:
        found, reasons = find_criu()
        if not found:
            raise SystemExit(f"no CRIU to compare with: {'; '.join(reasons)}")
        return trio.run(compare, found[0], options.rounds, options.size * MIB, options.large * MIB)

    publish(options, measure, table, MARK)


if __name__ == "__main__":
    main()
