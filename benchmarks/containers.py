"""What a client sees of a web server whose container moves to another host: no answer, and then slow ones.

    python benchmarks/containers.py [--rounds N] [--json FILE] [--readme FILE]

nginx holds its pages in memory, in the master, which has read them, and in the worker, and answers from it.
runC checkpoints it lazily on one host and restores it on the other; both are network namespaces on this
machine, joined by a link of 400 Mbit/s. Two clients ask for random pages all the while and compare each
answer: one over a connection that is kept, which moves along, one over a new connection each time.

stock   criu lazy-pages
ours    criupy-lazy-pages

The gap is the longest time between two right answers over the connection that is kept. The directory of the
images is shared, so there is no copying in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import add_report_options, positive, publish

from criupy.images import PAGE_SIZE, read_pagemap, read_pstree
from criupy.runc import Runc
from criupy.testing.containers_linux import Host, Lab, find_root, open_lab
from criupy.testing.criu_linux import Criu, find_criu

RATE = "400mbit"
PORT = 7000
NAME = "web"
MARK = ("<!-- containers: begin -->", "<!-- containers: end -->")
WAYS = ("stock", "ours")
SETTLE = 1.0  # seconds for which the clients are watched before the move and after it


def runc_of(host: Host, criu: Criu) -> Runc:
    """Make the client of a host, whose runC works in the host's network."""
    runc = Runc(host.runc_program(), root=host.root, criu=criu.path)
    runc.features()
    return runc


def daemon_words(lab: Lab, criu: Criu, way: str) -> list[str]:
    """Return the command of a daemon on the destination."""
    if way == "stock":
        return lab.b.words(criu.path, "lazy-pages")
    return lab.b.words(sys.executable, "-m", "criupy.lazy_pages")


def move(lab: Lab, criu: Criu, images: Path, way: str) -> dict[str, Any]:
    """Move the server once, asked all the while."""
    source, destination = runc_of(lab.a, criu), runc_of(lab.b, criu)
    lab.start_server(lab.a, NAME)
    at = (lab.a.address, PORT)
    with lab.client() as client:
        time.sleep(SETTLE)
        begin = time.monotonic()
        with (
            source.lazy_checkpoint(NAME, image_path=images, page_server=at, tcp_established=True),
            destination.lazy_restore(
                NAME,
                bundle=lab.b.bundle,
                image_path=images,
                page_server=at,
                daemon=daemon_words(lab, criu, way),
                tcp_established=True,
            ),
        ):
            lab.switch_to(lab.b)
            restored = time.monotonic() - begin
        complete = time.monotonic() - begin
        time.sleep(SETTLE)
        found = client.finish()
    if any(found[name]["wrong"] for name in found) or found["kept"]["reconnects"] != 1:
        raise SystemExit(f"{way}: wrong answers, or a connection was lost: {found}")
    return {
        "restored_s": restored,
        "complete_s": complete,
        "gap_s": found["kept"]["longest_gap"],
        "slowest_s": max(found[name]["slowest_after"] for name in found),
        "answers": sum(found[name]["right"] for name in found),
        "memory_mb": memory(images) / 1e6,
    }


def memory(images: Path) -> int:
    """Return the bytes of private memory that a checkpoint knows of."""
    return sum(sum(read_pagemap(images, task.pid).nr_pages) for task in read_pstree(images)) * PAGE_SIZE


def measure(rounds: int) -> dict[str, Any]:
    """Move it by each way in turn."""
    found, reasons = find_criu()
    root = find_root()
    if not found or root is None or shutil.which("runc") is None:
        raise SystemExit(f"needs a CRIU, runc and a root file system (tools/setup): {'; '.join(reasons)}")
    criu = found[0]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(prefix="criupy-bench-") as room:
                images = Path(room, "images")
                with open_lab(Path(room, "lab"), root, criu.path, rate=RATE) as lab:
                    runs[way].append(move(lab, criu, images, way))
            print(f"{way} {number + 1}: {runs[way][-1]}", file=sys.stderr)
    return {
        "criu": ".".join(map(str, criu.version)),
        "kernel": platform.release().split("-")[0],
        "cores": os.cpu_count(),
        "rounds": rounds,
        "rate": RATE,
        "ways": runs,
    }


def table(report: dict[str, Any]) -> str:
    """Make the table."""
    lines = [
        (
            f"nginx with {report['ways']['ours'][0]['memory_mb']:.0f} MB in a container of runC, criu "
            f"{report['criu']}, Linux {report['kernel']}, {report['cores']} cores, a link of 400 Mbit/s; "
            f"medians of {report['rounds']} rounds, in turn, in one run."
        ),
        "",
        "| daemon | no answer for | slowest answer after that | all memory is there after |",
        "|---|---|---|---|",
    ]
    for way, runs in report["ways"].items():
        gap, slowest, complete = (
            statistics.median(run[name] for run in runs) for name in ("gap_s", "slowest_s", "complete_s")
        )
        lines.append(f"| {way} | {gap:.2f} s | {slowest * 1000:,.0f} ms | {complete:.1f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a client sees of a server that moves.")
    parser.add_argument("--rounds", type=positive, default=5)
    add_report_options(parser)
    options = parser.parse_args()
    publish(options, lambda: measure(options.rounds), table, MARK)


if __name__ == "__main__":
    main()
