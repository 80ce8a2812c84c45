"""Our page server beside ``criu page-server --lazy-pages``: same images, same client, in turn, in one run.

    python benchmarks/page_server.py [--rounds N] [--size MIB] [--large MIB] [--criu PATH] [--json FILE]

* first page: of large images, from the connect to the first page's last byte;
* throughput: all pages asked for in address order, or in random order, so many
  at once, 512 pages or 64 requests in flight; with the server's CPU time;
* TLS: the same with 256 pages in order; the client is Python's ssl;
* latency: one request at a time for one page anywhere;
* memory: the server's peak of resident pages. What stock holds in pipes is not
  in it: that is all of the image.

The client receives the answers to one batch while the next is asked for, and
looks at every header.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criupy.testing.certificates import Certificates, make_certificates
from criupy.testing.criu_linux import Criu, find_criu, free_port
from criupy.testing.images import WrittenImages, write_images
from criupy.testing.spec import WorkloadSpec

PAGE = 4096
MIB = 1 << 20
GET, ADD_F_PRESENT = 7, 4 << 16 | 6
HZ = os.sysconf("SC_CLK_TCK")
FRAMES = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4xQQQ")}
IN_FLIGHT_PAGES, IN_FLIGHT_REQUESTS = 512, 64


@dataclass(frozen=True)
class Work:
    """Requests: (address, pages), all inside one pagemap entry each."""

    order: str
    nr_pages: int
    requests: list[tuple[int, int]]


class Client:
    """A destination that asks, and looks at the answers' headers only."""

    def __init__(self, port: int, frame_size: int, pid: int, tls: ssl.SSLContext | None = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wait_all = socket.MSG_WAITALL
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock)
            self.wait_all = 0
        self.frame = FRAMES[frame_size]
        self.pid = pid
        self.buffer = memoryview(bytearray(2 * IN_FLIGHT_PAGES * PAGE))

    def take(self, requests: list[tuple[int, int]]) -> None:
        """Receive the answers to these, which no server shortens, with as few calls as can be."""
        length = sum(self.frame.size + nr_pages * PAGE for _, nr_pages in requests)
        got = 0
        while got < length:
            piece = self.sock.recv_into(self.buffer[got:length], length - got, self.wait_all)
            if not piece:
                raise SystemExit("the server has closed the connection")
            got += piece
        offset = 0
        for address, nr_pages in requests:
            head = self.frame.unpack_from(self.buffer, offset)
            if head != (ADD_F_PRESENT, nr_pages, address, self.pid):
                raise SystemExit(f"asked for {nr_pages} pages at {address:#x}, got {head}")
            offset += self.frame.size + nr_pages * PAGE

    def ask(self, requests: list[tuple[int, int]]) -> None:
        self.sock.sendall(b"".join(self.frame.pack(GET, nr, address, self.pid) for address, nr in requests))

    def fetch(self, requests: list[tuple[int, int]], batch: int) -> float:
        """Fetch all, two batches in flight; return the seconds that it took."""
        start = time.perf_counter()
        self.ask(requests[:batch])
        for first in range(0, len(requests), batch):
            self.ask(requests[first + batch : first + 2 * batch])
            self.take(requests[first : first + batch])
        return time.perf_counter() - start


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    process: subprocess.Popen[bytes]
    port: int
    frame_size: int

    def cpu_seconds(self) -> float:
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / HZ

    def peak(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def server(
    who: str, criu: Criu, images: WrittenImages, room: Path, tls: Certificates | None = None
) -> Iterator[Running]:
    port = free_port()
    command: list[str | Path] = (
        [criu.path] if who == "stock" else [sys.executable, "-m", "criupy.page_server"]
    )
    command += ["page-server", "--lazy-pages", "--no-default-config", "-D", images.directory, "-W", room]
    reading, writing = os.pipe()
    command += ["--address", "127.0.0.1", "--port", str(port), "-o", "page-server.log"]
    command += ["--status-fd", str(writing)]
    if tls is not None:
        command += ["--tls", "--tls-cacert", tls.cacert, "--tls-cacrl", tls.cacrl]
        command += ["--tls-cert", tls.cert("server"), "--tls-key", tls.key("server")]
    process = subprocess.Popen(command, pass_fds=[writing])
    os.close(writing)
    try:
        if os.read(reading, 1) != b"\0":
            raise SystemExit(f"{who} does not start: see {room}/page-server.log")
        yield Running(process, port, criu.frame_size)
    finally:
        os.close(reading)
        process.kill()
        process.wait()


def works(images: WrittenImages, most: int) -> list[Work]:
    found = []
    for nr_pages in (1, 16, 256):
        requests = [
            (run.start + first * PAGE, nr_pages)
            for run in images.tasks[0].runs
            for first in range(0, run.nr_pages, nr_pages)
        ]
        scattered = requests[:]
        random.Random(nr_pages).shuffle(scattered)  # noqa: S311 - an order, no secret
        nr = min(len(requests), most if nr_pages == 1 else 1 << 30)
        found += [Work("in order", nr_pages, requests[:nr]), Work("scattered", nr_pages, scattered[:nr])]
    return found


def first_page(who: str, criu: Criu, images: WrittenImages, room: Path) -> tuple[float, int]:
    run = images.tasks[0].runs[-1]
    with server(who, criu, images, room) as running:
        start = time.perf_counter()
        client = Client(running.port, running.frame_size, images.tasks[0].pid)
        client.fetch([(run.start, 1)], 1)
        return time.perf_counter() - start, running.peak()


def throughput(
    who: str, criu: Criu, images: WrittenImages, room: Path, work: Work, tls: Certificates | None = None
) -> tuple[float, float]:
    """Return (bytes/s, CPU seconds per GiB)."""
    with server(who, criu, images, room, tls) as running:
        context = None if tls is None else client_context(tls)
        client = Client(running.port, running.frame_size, images.tasks[0].pid, context)
        client.fetch(work.requests[:1], 1)  # when stock has loaded all
        before = running.cpu_seconds()
        seconds = client.fetch(work.requests, min(IN_FLIGHT_REQUESTS, IN_FLIGHT_PAGES // work.nr_pages) // 2)
        length = len(work.requests) * work.nr_pages * PAGE
        return length / seconds, (running.cpu_seconds() - before) / length * 1024 * MIB


def client_context(tls: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(tls.cacert)
    context.load_cert_chain(tls.cert("client"), tls.key("client"))
    return context


def latency(who: str, criu: Criu, images: WrittenImages, room: Path, nr: int) -> tuple[float, float]:
    (work,) = (work for work in works(images, nr) if (work.order, work.nr_pages) == ("scattered", 1))
    with server(who, criu, images, room) as running:
        client = Client(running.port, running.frame_size, images.tasks[0].pid)
        client.fetch(work.requests[:1], 1)
        took = [client.fetch([request], 1) for request in work.requests]
    cuts = statistics.quantiles(took, n=100)
    return cuts[49], cuts[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="images for most cases")
    parser.add_argument("--large", type=int, default=4096, metavar="MIB", help="images for the first page")
    parser.add_argument("--single", type=int, default=16384, help="how many one-page requests a round makes")
    parser.add_argument("--criu", type=Path, help="by default the newest one there is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found, reasons = find_criu()
    criu = next((one for one in found if arguments.criu in {None, one.path}), None)
    if criu is None:
        raise SystemExit(f"no CRIU: {'; '.join(reasons)}")
    results: dict[str, dict[str, list[float]]] = {}

    def note(case: str, who: str, value: float) -> None:
        results.setdefault(case, {}).setdefault(who, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        count = "new" if criu.frame_size == 32 else "old"
        large = write_images(
            room / "large", WorkloadSpec(size=arguments.large * MIB), style="full", count=count
        )
        images = write_images(
            room / "images", WorkloadSpec(size=arguments.size * MIB), style="full", count=count
        )
        certificates = make_certificates(room / "certificates")
        (bulk,) = (w for w in works(images, 1) if (w.order, w.nr_pages) == ("in order", 256))
        for _ in range(arguments.rounds):
            for who in ("stock", "ours"):
                seconds, peak = first_page(who, criu, large, room)
                note(f"first page of {arguments.large} MiB, ms", who, seconds * 1e3)
                note("peak resident memory then, MB", who, peak / 1e6)
                for work in works(images, arguments.single):
                    speed, cpu = throughput(who, criu, images, room, work)
                    pages = f"{work.nr_pages} page{'' if work.nr_pages == 1 else 's'}"
                    note(f"{pages} {work.order}, MB/s", who, speed / 1e6)
                    note(f"{pages} {work.order}, CPU s/GiB", who, cpu)
                speed, cpu = throughput(who, criu, images, room, bulk, certificates)
                note("256 pages in order, TLS, MB/s", who, speed / 1e6)
                note("256 pages in order, TLS, CPU s/GiB", who, cpu)
                p50, p99 = latency(who, criu, images, room, 5000)
                note("one page, p50 us", who, p50 * 1e6)
                note("one page, p99 us", who, p99 * 1e6)
    print(f"{'':36}{'stock':>10}{'ours':>10}{'ratio':>8}")
    medians = {}
    for case, by in results.items():
        stock, ours = (statistics.median(by[who]) for who in ("stock", "ours"))
        medians[case] = {"stock": round(stock, 3), "ours": round(ours, 3), "ratio": round(ours / stock, 3)}
        print(f"{case:36}{stock:10.2f}{ours:10.2f}{ours / stock:8.2f}")
    if arguments.json is not None:
        report = {
            "what": "page servers giving out full images over loopback",
            "criu": str(criu),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "rounds": arguments.rounds,
            "size_mib": arguments.size,
            "medians": medians,
            "all": results,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
