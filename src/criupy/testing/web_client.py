"""A client that keeps asking a web server and judges every answer; run as a program in its own network.

It prints what it got as one JSON object when its standard input ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import json
import random
import socket
import sys
import threading
import time

__all__ = ["PAGES", "Answers", "page"]

#: How many pages the server of the tests has, and the bytes of each.
PAGES = 8192
SIZE = 2048


def page(number: int) -> str:
    """Return what the server must answer for a page: text that nobody guesses or mixes up."""
    return hashlib.sha256(str(number).encode()).hexdigest() * (SIZE // 64)


@dataclasses.dataclass
class Answers:
    """What a client got: times in seconds, ``at`` since the epoch."""

    right: int = 0
    wrong: int = 0
    failed: int = 0
    """Attempts that got no answer: refused, reset, or none in time."""
    longest_gap: float = 0.0
    """Between two right answers that followed one another."""
    slowest_after: float = 0.0
    """The slowest right answer that was asked for after that gap."""
    last_at: float = 0.0
    reconnects: int = 0
    """How often the connection that is kept had to be made anew."""


def ask(connection: http.client.HTTPConnection, number: int) -> bool:
    """Ask for a page; tell whether the answer was right."""
    connection.request("GET", f"/{number}")
    answer = connection.getresponse()
    return answer.read() == page(number).encode() and answer.status == 200


def keep_asking(
    address: str, port: int, stop: threading.Event, *, pause: float, timeout: float, keep: bool
) -> Answers:
    """Ask for random pages until stopped: over one connection, or a new one for each."""
    found = Answers()
    rng = random.Random(port)
    connection: http.client.HTTPConnection | None = None
    before = time.monotonic()
    while not stop.wait(pause):
        asked = time.monotonic()
        try:
            if connection is None:
                connection = http.client.HTTPConnection(address, port, timeout=timeout)
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found.reconnects += 1
            is_right = ask(connection, rng.randrange(PAGES))
        except (OSError, http.client.HTTPException):
            found.failed += 1
            connection = None
            continue
        now = time.monotonic()
        found.right += is_right
        found.wrong += not is_right
        if now - before > found.longest_gap:
            found.longest_gap, found.slowest_after = now - before, 0.0
        else:
            found.slowest_after = max(found.slowest_after, now - asked)
        found.last_at, before = time.time(), now
        if not keep:
            connection.close()
            connection = None
    with contextlib.suppress(AttributeError):
        connection.close()  # type: ignore[union-attr]
    return found


def main() -> None:
    """Ask until standard input ends, over new connections and over one that is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    stop = threading.Event()
    results: dict[str, Answers] = {}

    def run(name: str, *, keep: bool) -> None:
        results[name] = keep_asking(
            arguments.address,
            arguments.port,
            stop,
            pause=0.005,
            # A connection that is kept waits as long as TCP does.
            timeout=60 if keep else 0.25,
            keep=keep,
        )

    threads = [
        threading.Thread(target=run, args=(name,), kwargs={"keep": keep})
        for name, keep in (("new", False), ("kept", True))
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({name: dataclasses.asdict(found) for name, found in results.items()}))


if __name__ == "__main__":
    main()
