"""What a kept-open request costs over the bare socket: the same bytes, in turn, in one run.

    python benchmarks/rpc.py [--rounds N] [--requests N] [--criu PATH] [--json FILE]

A VERSION request that is kept open is asked again and again of ``criu swrk``:
over a bare socket, send and receive; by criupy.Criu; and by criupy.AsyncCriu,
which is also compared with trio's own wait between the same send and receive.
Medians of each round, and over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from _report import check_json, positive

import criupy
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.criu_linux import find_criu

PACKET = schema.Request(type=schema.VERSION, keep_open=True).SerializeToString()


@contextmanager
def bare_worker(binary: Path) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command: list[str | Path] = [binary, "--no-default-config", "swrk", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    with process, ours:
        yield ours


def median(request: Callable[[], object], requests: int) -> float:
    took = []
    for _ in range(requests):
        start = time.perf_counter_ns()
        request()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / 1000


async def median_on_trio(request: Callable[[], Awaitable[object]], requests: int) -> float:
    took = []
    for _ in range(requests):
        start = time.perf_counter_ns()
        await request()
        took.append(time.perf_counter_ns() - start)
    return statistics.median(took) / 1000


async def on_trio(binary: Path, bare: socket.socket, requests: int) -> tuple[float, float]:
    async def waited() -> None:
        bare.send(PACKET)
        await trio.lowlevel.wait_readable(bare)
        bare.recv(65536)

    async with criupy.AsyncCriu(binary) as criu:
        await criu.version()
        return await median_on_trio(waited, requests), await median_on_trio(criu.version, requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--requests", type=positive, default=2000, help="per round and way")
    parser.add_argument("--criu", type=Path, help="by default the newest one there is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_json(arguments)
    if arguments.criu is None:
        found, reasons = find_criu()
        if not found:
            raise SystemExit(f"no CRIU: {'; '.join(reasons)}")
        arguments.criu = found[0].path
    rounds: dict[str, list[float]] = {"bare": [], "Criu": [], "bare on trio": [], "AsyncCriu": []}
    with bare_worker(arguments.criu) as bare, criupy.Criu(arguments.criu) as criu:
        version = criu.version()

        def ask() -> None:
            bare.send(PACKET)
            bare.recv(65536)

        for _ in range(arguments.rounds):
            rounds["bare"].append(median(ask, arguments.requests))
            rounds["Criu"].append(median(criu.version, arguments.requests))
            waited, asked = trio.run(on_trio, arguments.criu, bare, arguments.requests)
            rounds["bare on trio"].append(waited)
            rounds["AsyncCriu"].append(asked)
    medians = {way: round(statistics.median(values), 1) for way, values in rounds.items()}
    report = {
        "what": "one kept-open VERSION request, microseconds",
        "criu": str(version),
        "kernel": platform.release().split("-")[0],
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "requests": arguments.requests,
        "medians": medians,
        "over_bare": {way: round(medians[way] - medians["bare"], 1) for way in ("Criu", "AsyncCriu")},
        "rounds": {way: [round(value, 1) for value in values] for way, values in rounds.items()},
    }
    for way, value in medians.items():
        print(f"{way:14} {value:7.1f} us   {value - medians['bare']:+7.1f} us over the bare socket")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
