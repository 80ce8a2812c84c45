"""What type checkers see of the RPC clients from outside; test_rpc_types.py has them look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, assert_type

import criupy
from criupy.rpc import (
    AsyncLazyDump,
    AsyncLazyRestore,
    AsyncOperation,
    AsyncPageServerChild,
    AsyncPreDumpLoop,
    AsyncProcess,
    Descriptor,
    DumpOptions,
    LazyDump,
    LazyRestore,
    Operation,
    PageServer,
    PageServerChild,
    PreDumpLoop,
    Process,
    external,
)


class Mine(criupy.Hooks):
    def query_ext_files(self) -> Sequence[str]:
        return [external.unix(7)]

    def orphan_pts_master(self, descriptor: Descriptor) -> None:
        assert_type(descriptor.detach(), int)

    def other(self, notification: criupy.Notification) -> None:
        assert_type(notification.script, criupy.Script | str)
        assert_type(notification.pid, int | None)


class MineOnTrio(criupy.AsyncHooks):
    async def post_restore(self, pid: int) -> None:
        pass


def blocking(criu: criupy.Criu) -> None:
    assert_type(criu.version(), criupy.Version)
    assert_type(criu.version() >= (4, 0), bool)
    assert_type(criu.version().at_least(4, 2), bool)
    assert_type(criu.feature_check("lazy_pages").lazy_pages, bool | None)
    assert_type(criu.wait_pid(1), int)
    assert_type(criu.self_dump(images_dir="ckpt"), bool)
    assert_type(criu.restore(images_dir=Path("ckpt"), rst_sibling=True), criupy.Restored[Process])
    assert_type(criu.page_server(images_dir=3, page_server=("127.0.0.1", 0)), PageServer)
    assert_type(criu.page_server_child(images_dir="ckpt", page_server=("127.0.0.1", 0)), PageServerChild)
    assert_type(criu.open_restore(images_dir="ckpt").result, int)
    options: DumpOptions = {"leave_running": True, "network_lock": "skip", "external": ["mnt[/a]:a"]}
    criu.dump(1, images_dir="ckpt", hooks=Mine(), request_timeout=5, **options)
    with criu.open_dump(1, images_dir="ckpt") as operation:
        assert_type(operation, Operation[None])
        for notification in operation:
            assert_type(notification, criupy.Notification)
    with criu.pre_dump_loop(1) as loop:
        assert_type(loop, PreDumpLoop)
    with criu.lazy_dump(1, images_dir="ckpt", address="127.0.0.1", port=0) as source:
        assert_type(source, LazyDump)
        assert_type(source.frame_size, Literal[24, 32])
        assert_type((source.address, source.port), tuple[str, int])
        assert_type(source.wait(), criupy.SourceOutcome)
    with criu.lazy_restore(images_dir="ckpt", page_server=("src", 7)) as restored:
        assert_type(restored, LazyRestore)
        assert_type(restored.daemon, Process | None)


async def on_trio(criu: criupy.AsyncCriu) -> None:
    assert_type(await criu.version(), criupy.Version)
    assert_type(await criu.feature_check(), criupy.Features)
    assert_type(await criu.restore(images_dir="ckpt"), criupy.Restored[AsyncProcess])
    server = await criu.page_server_child(images_dir="ckpt", page_server=("127.0.0.1", 0))
    assert_type(server, AsyncPageServerChild)
    assert_type(await server.wait(), int)
    await criu.dump(1, images_dir="ckpt", hooks=MineOnTrio(), tcp_established=True)
    async with criu.open_dump(1, images_dir="ckpt") as operation:
        assert_type(operation, AsyncOperation[None])
        async for notification in operation:
            assert_type(notification, criupy.Notification)
    async with criu.pre_dump_loop(1) as loop:
        assert_type(loop, AsyncPreDumpLoop)
    async with criu.lazy_dump(1, images_dir="ckpt") as source:
        assert_type(source, AsyncLazyDump)
        assert_type(await source.abort(), criupy.SourceOutcome)
    async with criu.lazy_restore(images_dir="ckpt") as restored:
        assert_type(restored, AsyncLazyRestore)


def wrong(criu: criupy.Criu) -> None:
    criu.dump("1", images_dir="ckpt")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    criu.dump(1, images_dir="ckpt", leave_running="yes")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    criu.dump(1, images_dir="ckpt", rst_sibling=True)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    criu.dump(1, images_dir="ckpt", hooks=MineOnTrio())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    criu.restore(images_dir="ckpt", network_lock="no")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    criu.feature_check("lazy")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
