"""Long use of the clients: neither memory nor objects nor descriptors nor processes pile up."""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from criupy import AsyncCriu, Criu
from criupy.testing.criu_linux import Criu as RealCriu
from criupy.testing.rpc_peer_linux import scripted_criu, scripted_service
from rpc_peers import descriptors
from rpc_victims import children

pytestmark = [pytest.mark.usefixtures("nothing_is_left"), pytest.mark.slow]

WARM_UP = 500
REQUESTS = 10_000
CLIENTS = 200
MEMORY = 1 << 20
"""Bytes that may come and go: 100 for each request would be more."""

OBJECTS = 100


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def held() -> tuple[int, int]:
    gc.collect()
    return resident(), len(gc.get_objects())


@contextlib.contextmanager
def nothing_piles_up() -> Iterator[None]:
    before, memory, objects = (descriptors(), children()), *held()
    yield
    now_memory, now_objects = held()
    assert now_objects - objects < OBJECTS
    assert now_memory - memory < MEMORY
    assert (descriptors(), children()) == before


def ask_blocking(how: dict[str, Any]) -> None:
    with Criu(**how) as criu:
        for _ in range(WARM_UP):
            criu.version()
        with nothing_piles_up():
            for _ in range(REQUESTS):
                criu.version()


async def ask_on_trio(how: dict[str, Any]) -> None:
    async with AsyncCriu(**how) as criu:
        for _ in range(WARM_UP):
            await criu.version()
        with nothing_piles_up():
            for _ in range(REQUESTS):
                await criu.version()


def ask(kind: str, how: dict[str, Any]) -> None:
    if kind == "blocking":
        ask_blocking(how)
    else:
        trio.run(ask_on_trio, how)


def test_many_requests(kind: str, tmp_path: Path) -> None:
    with scripted_criu(tmp_path, []) as peer:
        ask(kind, {"binary": peer.path})
        (connection,) = peer.connections
        assert connection.versions == WARM_UP + REQUESTS


def test_many_requests_of_a_service(kind: str, tmp_path: Path) -> None:
    with scripted_service(tmp_path, []) as peer:
        ask(kind, {"socket": peer.path})
        assert len(peer.connections) == 1


@pytest.mark.spread
def test_many_requests_of_criu(criu: RealCriu, kind: str) -> None:
    ask(kind, {"binary": criu.path})


def open_blocking(how: dict[str, Any], times: int) -> None:
    for _ in range(times):
        with Criu(**how) as criu:
            criu.version()


async def open_on_trio(how: dict[str, Any], times: int) -> None:
    for _ in range(times):
        async with AsyncCriu(**how) as criu:
            await criu.version()


def open_clients(kind: str, how: dict[str, Any]) -> None:
    def some(times: int) -> None:
        if kind == "blocking":
            open_blocking(how, times)
        else:
            trio.run(open_on_trio, how, times)

    some(10)
    grown: list[int] = []
    # A leak grows each time; what the allocator keeps of so large a process as the suite's grows once.
    while len(grown) < 3 and (not grown or grown[-1] >= MEMORY):
        before, memory, objects = (descriptors(), children()), *held()
        some(CLIENTS)
        now_memory, now_objects = held()
        assert now_objects - objects < OBJECTS
        assert (descriptors(), children()) == before
        grown.append(now_memory - memory)
    assert grown[-1] < MEMORY, grown


def test_many_clients(kind: str, tmp_path: Path) -> None:
    with scripted_criu(tmp_path, []) as peer:
        open_clients(kind, {"binary": peer.path})
        assert peer.running == []


def test_many_clients_of_a_service(kind: str, tmp_path: Path) -> None:
    with scripted_service(tmp_path, []) as peer:
        open_clients(kind, {"socket": peer.path})


@pytest.mark.spread
def test_many_clients_of_criu(criu: RealCriu, kind: str) -> None:
    open_clients(kind, {"binary": criu.path})
