"""A program that takes longer over a notification than the request has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

import criupy
from criupy.rpc import _schema_pb2 as schema
from criupy.testing.rpc_peer_linux import Exit, Expect, Notify, Peer, Reply, Sleep, Step, scripted_criu

pytestmark = pytest.mark.slow

DONE = Reply(schema.Response(type=schema.DUMP, success=True, dump=schema.DumpAnswer(restored=False)))
FAILED = Reply(schema.Response(type=schema.DUMP, success=False))


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    """CRIU, as it waits for the last notification of a dump."""
    script = [Expect(schema.DUMP), Notify("post-dump", refused=[FAILED, Exit()]), DONE, Exit()]
    with scripted_criu(tmp_path, [script]) as peer:
        yield peer


@pytest.fixture
def slow_peer(tmp_path: Path) -> Iterator[Peer]:
    """CRIU, as it takes long after that notification."""
    script: Sequence[Step] = [Expect(schema.DUMP), Notify("post-dump"), Sleep(0.75), DONE, Exit()]
    with scripted_criu(tmp_path, [script]) as peer:
        yield peer


class Slow(criupy.Hooks):
    def post_dump(self) -> None:
        time.sleep(0.75)


def test_a_late_hook_is_a_refusal(peer: Peer, tmp_path: Path) -> None:
    with (
        criupy.Criu(peer.path) as criu,
        pytest.raises(criupy.CriuTimeout, match="the hook for post-dump") as error,
    ):
        criu.dump(1234, images_dir=tmp_path, hooks=Slow(), request_timeout=0.5)
    assert [answer.notify_success for answer in peer.answers] == [False]
    assert error.value.__notes__[0].startswith("CRIU undid it")


def test_a_late_body_is_a_refusal(peer: Peer, tmp_path: Path) -> None:
    with (
        criupy.Criu(peer.path) as criu,
        pytest.raises(criupy.CriuTimeout, match="the hook for post-dump"),
        criu.open_dump(1234, images_dir=tmp_path, request_timeout=0.5) as operation,
    ):
        for _ in operation:
            time.sleep(0.75)
    assert [answer.notify_success for answer in peer.answers] == [False]


async def test_a_late_async_body_is_a_refusal(peer: Peer, tmp_path: Path) -> None:
    with pytest.raises(criupy.CriuTimeout, match="the hook for post-dump"):
        async with (
            criupy.AsyncCriu(peer.path) as criu,
            criu.open_dump(1234, images_dir=tmp_path, request_timeout=0.5) as operation,
        ):
            async for _ in operation:
                await trio.sleep(0.75)
    assert [answer.notify_success for answer in peer.answers] == [False]


def test_what_completed_late_is_done(slow_peer: Peer, tmp_path: Path) -> None:
    with criupy.Criu(slow_peer.path) as criu:
        criu.dump(1234, images_dir=tmp_path, hooks=criupy.Hooks(), request_timeout=0.5)
    assert [answer.notify_success for answer in slow_peer.answers] == [True]


async def test_what_completed_late_is_done_by_the_async_client(slow_peer: Peer, tmp_path: Path) -> None:
    async with criupy.AsyncCriu(slow_peer.path) as criu:
        await criu.dump(1234, images_dir=tmp_path, request_timeout=0.5)
    assert [answer.notify_success for answer in slow_peer.answers] == [True]
