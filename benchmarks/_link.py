"""Measure the link that stands between source and destination, by nothing but bytes through it."""

from __future__ import annotations

import socket
import statistics
import threading
import time

import trio

from criupy.testing.link_linux import Conditions, open_link

ECHOES = 21
SECONDS = 0.5
CHUNK = 1 << 20


def _serve(listener: socket.socket) -> None:
    """Answer one connection: echo its bytes, until an ``s`` asks for a stream without end."""
    with listener:
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while byte := connection.recv(1):
                if byte == b"s":
                    chunk = bytes(CHUNK)
                    while True:
                        connection.sendall(chunk)
                connection.sendall(byte)
        except OSError:
            return  # who measures has seen enough


def _measure(address: tuple[str, int]) -> dict[str, float]:
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ECHOES):
            begin = time.perf_counter()
            connection.sendall(b"e")
            connection.recv(1)
            trips.append(time.perf_counter() - begin)
        connection.sendall(b"s")
        buffer = bytearray(CHUNK)
        connection.recv_into(buffer)
        begin, received = time.perf_counter(), 0
        while time.perf_counter() < begin + SECONDS:
            received += connection.recv_into(buffer)
        took = time.perf_counter() - begin
    return {"round_trip_ms": statistics.median(trips) * 1e3, "mb_s": received / took / 1e6}


async def measure_link(conditions: Conditions | None) -> dict[str, float]:
    """Return the round trip of one byte and what one stream carries; without conditions, of loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    thread = threading.Thread(target=_serve, args=[listener], daemon=True)
    thread.start()
    if conditions is None:
        return await trio.to_thread.run_sync(_measure, address)
    async with open_link(address, conditions) as link:
        return await trio.to_thread.run_sync(_measure, (link.address, link.port))
