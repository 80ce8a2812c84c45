"""What benchmarks/page_server.py measures with: a client, the servers, and the limits of the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from criupy.lazy_pages import Config, open_lazy_pages
from criupy.testing.certificates import Certificates
from criupy.testing.criu_linux import Criu, free_port
from criupy.testing.images import WrittenImages
from criupy.testing.workload_linux import start_standin

PAGE = 4096
MIB = 1 << 20
IN_FLIGHT_PAGES, IN_FLIGHT_REQUESTS = 1024, 64
_RECORD = 16 << 10
_GET, _ADD_F_PRESENT = 7, 4 << 16 | 6
_HZ = os.sysconf("SC_CLK_TCK")
_FRAMES = {24: struct.Struct("<IIQQ"), 32: struct.Struct("<I4xQQQ")}

Requests = list[tuple[int, int]]
"""(address, pages), each inside one pagemap entry."""


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    process: subprocess.Popen[bytes]
    port: int
    frame_size: int

    def cpu_seconds(self) -> float:
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / _HZ

    def peak(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def server(
    who: str, criu: Criu, images: WrittenImages, room: Path, tls: Certificates | None = None
) -> Iterator[Running]:
    """Start ``criu page-server --lazy-pages`` or ours, and end it on leaving."""
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


class Client:
    """A destination that asks, and looks at the answers' headers only."""

    def __init__(self, running: Running, pid: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", running.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.frame = _FRAMES[running.frame_size]
        self.pid = pid
        self.buffer = memoryview(bytearray(2 * IN_FLIGHT_PAGES * PAGE))

    def take(self, requests: Requests) -> None:
        """Receive the answers to these, which no server shortens, with as few calls as can be."""
        length = sum(self.frame.size + nr_pages * PAGE for _, nr_pages in requests)
        got = 0
        while got < length:
            piece = self.sock.recv_into(self.buffer[got:length], length - got, socket.MSG_WAITALL)
            if not piece:
                raise SystemExit("the server has closed the connection")
            got += piece
        offset = 0
        for address, nr_pages in requests:
            head = self.frame.unpack_from(self.buffer, offset)
            if head != (_ADD_F_PRESENT, nr_pages, address, self.pid):
                raise SystemExit(f"asked for {nr_pages} pages at {address:#x}, got {head}")
            offset += self.frame.size + nr_pages * PAGE

    def ask(self, requests: Requests) -> None:
        self.sock.sendall(b"".join(self.frame.pack(_GET, nr, address, self.pid) for address, nr in requests))

    def fetch(self, requests: Requests, batch: int) -> float:
        """Fetch all, two batches in flight; return the seconds that it took."""
        start = time.perf_counter()
        self.ask(requests[:batch])
        for first in range(0, len(requests), batch):
            self.ask(requests[first + batch : first + 2 * batch])
            self.take(requests[first : first + batch])
        return time.perf_counter() - start


async def drain(running: Running, images: WrittenImages, room: Path, tls: Certificates | None) -> float:
    """Let our daemon fill a process that waits; return the seconds from restore-finished to the last page."""
    config = Config(
        images_dir=images.directory,
        page_server=("127.0.0.1", running.port),
        tls=None if tls is None else tls.files("client"),
    )
    async with (
        open_lazy_pages(config, work_dir=room) as daemon,
        start_standin(images.spec, daemon.socket_path, room) as standin,
    ):
        await standin.finish()
        begin = trio.current_time()
        while not (now := daemon.statistics()).pages_total or now.pages_missing:
            await trio.sleep(0.001)
        took = trio.current_time() - begin
        await daemon.wait()
        return took


# ---- what the machine can do ------------------------------------------------------------


def one_stream(images: WrittenImages) -> float:
    """Bytes/s of one TCP stream: sendfile() to a receiver that takes a MiB at a time and does nothing."""
    pages = images.tasks[0].pages
    length = pages.stat().st_size
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def give() -> None:
            with listener.accept()[0] as sock, pages.open("rb") as file:
                sock.sendfile(file)

        giver = threading.Thread(target=give)
        giver.start()
        with socket.create_connection(listener.getsockname()) as sock:
            buffer = bytearray(MIB)
            start = time.perf_counter()
            while sock.recv_into(buffer, MIB, socket.MSG_WAITALL):
                pass
            took = time.perf_counter() - start
        giver.join()
    return length / took


def sealing(certificates: Certificates, length: int = 256 * MIB) -> float:
    """Bytes/s that one core seals in memory, in records of 16 KiB, with the cipher that our ends agree on."""
    contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in contexts:  # of 1.3, Python does not choose among the ciphers
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AESGCM+AES128")
    contexts[0].check_hostname = False
    contexts[0].load_verify_locations(certificates.cacert)
    contexts[0].load_cert_chain(certificates.cert("client"), certificates.key("client"))
    contexts[1].load_cert_chain(certificates.cert("server"), certificates.key("server"))
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(back, there)
    peer = contexts[1].wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for end in (client, peer):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    record = bytes(_RECORD)
    start = time.perf_counter()
    for _ in range(length // _RECORD):
        peer.write(record)
        back.read()
    return length / (time.perf_counter() - start)
