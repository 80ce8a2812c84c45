"""The RPC clients against real CRIUs: every request, both clients, swrk and service."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio

import criupy
from criupy._descriptor import Descriptor
from criupy._kill_linux import kill_trees
from criupy.rpc import external
from criupy.testing.criu_linux import Criu, free_port
from rpc_clients import Client, Recorder, open_client
from rpc_victims import (
    children,
    container,
    counter,
    disk,
    last_count,
    led,
    sleeper,
    state_of,
    subreaper,
    until,
    until_reaped,
    zombie,
)

pytestmark = [pytest.mark.criu, pytest.mark.spread, pytest.mark.usefixtures("nothing_is_left")]

KINDS = ("blocking", "trio")
WAYS = ("swrk", "service")

DUMPED = ["pre-dump", "query-ext-files", "post-dump"]
RESTORED = ["pre-restore", "post-restore", "pre-resume", "post-resume"]

Open: TypeAlias = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@contextlib.contextmanager
def service(criu: Criu, directory: Path) -> Iterator[Path]:
    """Run `criu service` in a directory."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    path = directory / "criu.socket"
    command: list[str | Path] = [
        criu.path,
        "service",
        "--no-default-config",
        "--address",
        path,
        "--status-fd",
        str(writing),
    ]
    with (directory / "service.out").open("wb") as output:
        process = subprocess.Popen(
            command, pass_fds=[writing], stdout=output, stderr=output, cwd=directory, start_new_session=True
        )
    os.close(writing)
    try:
        with Descriptor(reading):
            assert os.read(reading, 1) == b"\0", (directory / "service.out").read_text()
        yield path
    finally:
        with Descriptor(os.pidfd_open(process.pid)) as pidfd:
            kill_trees([(process.pid, pidfd.fileno())])
        process.wait()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=WAYS)
def open_criu(request: pytest.FixtureRequest, criu: Criu, kind: str, tmp_path: Path) -> Iterator[Open]:
    """Open a client of each kind, on each transport."""
    if request.param == "swrk":
        yield lambda **how: open_client(kind, binary=criu.path, **how)
        return
    with service(criu, tmp_path) as path:
        yield lambda **how: open_client(kind, socket=path, **how)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def dumps_sockets(criu: Criu) -> bool:
    """Tell whether this CRIU can dump sockets that are not Unix sockets on this kernel."""
    kernel = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    return criu.version >= (4, 2) or kernel < (6, 16)


def is_known(images: Path) -> bool:
    return (images / "inventory.img").exists() and (images / "pstree.img").exists()


# ---- questions -----------------------------------------------------------------------------------


async def test_version(open_criu: Open, criu: Criu) -> None:
    async with open_criu() as client:
        version = await client.call("version")
        assert version.numbers == (*criu.version, 0, 0)[:3]
        assert version >= (4, 0)
        assert version >= criu.version
        assert version.at_least(4, 2) == (criu.version >= (4, 2))
        assert version < (99,)
        assert [await client.call("version") for _ in range(20)] == [version] * 20


async def test_features_that_were_asked(open_criu: Open) -> None:
    async with open_criu() as client:
        all_of_them = await client.call("feature_check")
        assert all_of_them.lazy_pages is True
        assert all_of_them.pidfd_store is True
        assert all_of_them.mem_track in {True, False}
        only = await client.call("feature_check", "lazy_pages")
        assert only == criupy.Features(lazy_pages=True)
        assert only.mem_track is None


async def test_check(open_criu: Open, images: Path) -> None:
    async with open_criu() as client:
        await client.call("check")
        await client.call("check", images_dir=images, log_level=4)


async def test_cpuinfo(open_criu: Open, images: Path) -> None:
    async with open_criu() as client:
        await client.call("cpuinfo_dump", images_dir=images)
        assert (images / "cpuinfo.img").stat().st_size > 8
        await client.call("cpuinfo_check", images_dir=images)
        (images / "cpuinfo.img").write_bytes(b"\0" * 16)
        with pytest.raises(criupy.CriuError, match="cpuinfo_check: ") as caught:
            await client.call("cpuinfo_check", images_dir=images)
        assert caught.value.log_errors
        (images / "cpuinfo.img").unlink()
        with pytest.raises(criupy.CriuError, match=r"there is no cpuinfo\.img"):
            await client.call("cpuinfo_check", images_dir=images)


# ---- dump and restore ---------------------------------------------------------------------------------


async def test_dump_and_restore(open_criu: Open, images: Path, tmp_path: Path) -> None:
    dumped, restored = Recorder(), Recorder()
    async with open_criu() as client:
        with counter(tmp_path) as victim:
            await client.call("dump", victim.pid, images_dir=images, hooks=dumped)
            victim.assert_killed()
            before = victim.count()
            result = await client.call("restore", images_dir=images, hooks=restored)
            assert result == criupy.Restored(victim.pid, None)
            until(lambda: victim.count() > before, "it does not count again")
            os.kill(result.pid, signal.SIGKILL)
            until(lambda: state_of(result.pid) in {None, "Z"}, "it does not die")
    assert dumped.scripts == DUMPED
    assert restored.scripts == RESTORED
    assert restored.pids == {"post-restore": victim.pid}


async def test_work_dir_and_descriptors(open_criu: Open, images: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    async with open_criu() as client:
        with counter(tmp_path) as victim, Descriptor(os.open(images, os.O_RDONLY)) as fd:
            await client.call(
                "dump",
                victim.pid,
                images_dir=fd,
                work_dir=work,
                log_file="my.log",
                log_level=4,
                leave_running=True,
            )
            victim.assert_running()
    assert is_known(images)
    assert "Dumping finished successfully" in (work / "my.log").read_text()
    assert (work / "stats-dump").exists()


async def test_leave_running_and_iteration(open_criu: Open, images: Path, tmp_path: Path) -> None:
    async with open_criu() as client:
        with counter(tmp_path) as victim:
            seen = []
            async with client.block(
                "open_dump", victim.pid, images_dir=images, leave_running=True
            ) as operation:
                async for notification in client.notifications(operation):
                    seen.append(notification.script)
                    frozen = victim.count()
                    await trio.sleep(0.05)
                    if notification.script != "pre-dump":
                        assert victim.count() == frozen
            assert seen == DUMPED
            victim.assert_running()
    assert is_known(images)


async def test_every_notification_of_a_container(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    """Namespaces of its own, and a terminal whose master is outside."""
    common: dict[str, Any] = {"orphan_pts_master": True, "manage_cgroups_mode": "ignore"}
    mounts = external.mnt_auto(masters=True, sharing=True)
    dumped, restored = Recorder(), Recorder()
    async with open_client(kind, binary=criu.path) as client:
        with container() as victim:
            count = last_count(victim.master)
            await client.call("dump", victim.pid, images_dir=images, hooks=dumped, external=mounts, **common)
            assert state_of(victim.pid) in {None, "Z"}  # its parent reaps it when it gets to it
        assert dumped.scripts == ["pre-dump", "network-lock", "query-ext-files", "post-dump"]
        result = await client.call(
            "restore", images_dir=images, hooks=restored, external=["mnt[]"], root="/", **common
        )
        try:
            assert restored.scripts == [
                "pre-restore",
                "setup-namespaces",
                "post-setup-namespaces",
                "orphan-pts-master",
                "post-restore",
                "network-unlock",
                "pre-resume",
                "post-resume",
            ]
            assert restored.pids == {"setup-namespaces": result.pid, "post-restore": result.pid}
            assert restored.master is not None
            with restored.master:
                assert last_count(restored.master) > count
        finally:
            os.kill(result.pid, signal.SIGKILL)
            until(lambda: state_of(result.pid) in {None, "Z"}, "it does not die")


async def test_master_that_nobody_takes(criu: Criu, kind: str, images: Path) -> None:
    """It would hang up the session as soon as it runs."""
    async with open_client(kind, binary=criu.path) as client:
        with container() as victim:
            await client.call(
                "dump",
                victim.pid,
                images_dir=images,
                external=external.mnt_auto(masters=True, sharing=True),
                orphan_pts_master=True,
                manage_cgroups_mode="ignore",
            )
        with pytest.raises(criupy.rpc.Refused, match="nobody took the terminal's master"):
            await client.call(
                "restore",
                images_dir=images,
                external=["mnt[]"],
                root="/",
                orphan_pts_master=True,
                manage_cgroups_mode="ignore",
            )


async def test_pidfd_store(open_criu: Open, images: Path, tmp_path: Path) -> None:
    """CRIU takes the socket from us, and keeps the pidfds of the tasks in it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as store, counter(tmp_path) as victim:
        async with open_criu() as client:
            await client.call("dump", victim.pid, images_dir=images, leave_running=True, pidfd_store_sk=store)
        assert store.getsockname().startswith(b"\0/criu-pidfd-store-")


async def test_external_files_are_asked_for(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    """A hook names external resources while the tasks are frozen."""
    recorder = Recorder(external=["net[4026530000]:elsewhere"])
    async with open_client(kind, binary=criu.path) as client:
        with counter(tmp_path) as victim:
            await client.call(
                "dump", victim.pid, images_dir=images, leave_running=True, hooks=recorder, log_level=4
            )
            assert recorder.scripts == DUMPED
            assert "Adding external object: net[4026530000]:elsewhere" in (images / "criu.log").read_text()
            victim.assert_running()


async def test_external_socket_is_named_by_a_hook(
    criu: Criu, kind: str, images: Path, tmp_path: Path
) -> None:
    """The other end of a socket pair."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    with ours, theirs:
        recorder = Recorder(external=[external.unix(os.fstat(theirs.fileno()).st_ino)])
        async with open_client(kind, binary=criu.path) as client:
            with counter(tmp_path, stdout=theirs.fileno()) as victim:
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", victim.pid, images_dir=images, leave_running=True)
                victim.assert_running()
                assert "external=" in (caught.value.hint or ""), caught.value
                await client.call("dump", victim.pid, images_dir=images, leave_running=True, hooks=recorder)
                assert recorder.scripts == DUMPED
                victim.assert_running()


async def test_refusal_leaves_the_process_running(open_criu: Open, images: Path, tmp_path: Path) -> None:
    class NoSpaceError(Exception):
        pass

    def refuse() -> None:
        raise NoSpaceError("the disk is full")

    async with open_criu() as client:
        with counter(tmp_path) as victim:
            for script in DUMPED:
                recorder = Recorder({script: refuse})
                with pytest.raises(NoSpaceError, match="the disk is full") as caught:
                    await client.call("dump", victim.pid, images_dir=images, hooks=recorder)
                assert any(note.startswith("CRIU undid it: dump: ") for note in caught.value.__notes__)
                assert recorder.scripts == DUMPED[: DUMPED.index(script) + 1]
                victim.assert_running()
            with pytest.raises(criupy.rpc.Refused, match="post-dump was refused: too late"):
                async with client.block("open_dump", victim.pid, images_dir=images) as operation:
                    async for notification in client.notifications(operation):
                        if notification.script == criupy.Script.POST_DUMP:
                            notification.refuse("too late")
            victim.assert_running()


async def test_refused_restore_leaves_nothing(open_criu: Open, images: Path, tmp_path: Path) -> None:
    def refuse() -> None:
        raise LookupError("not here")

    async with open_criu() as client:
        # A zombie that is a session's leader keeps its pid from being restored again.
        with counter(tmp_path) as victim, subreaper():
            await client.call("dump", victim.pid, images_dir=images)
            victim.assert_killed()
            for script in ("pre-restore", "post-restore"):
                with pytest.raises(LookupError, match="not here"):
                    await client.call("restore", images_dir=images, hooks=Recorder({script: refuse}))
                until_reaped(victim.pid)
            result = await client.call("restore", images_dir=images)
            os.kill(result.pid, signal.SIGKILL)
            until(lambda: state_of(result.pid) in {None, "Z"}, "it does not die")


async def test_own_child_with_an_inherited_pipe(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    say = "import os, threading, time\ndef say():\n"
    say += "    while True: os.write(1, b'here'); time.sleep(0.01)\nthreading.Thread(target=say).start()\n"
    reading, writing = map(Descriptor, os.pipe2(os.O_CLOEXEC))
    async with open_client(kind, binary=criu.path) as client:
        with reading, writing, counter(tmp_path, stdout=writing.fileno(), prefix=say) as victim:
            key = external.key_of(writing)
            await client.call("dump", victim.pid, images_dir=images)
            victim.assert_killed()
            new_reading, new_writing = map(Descriptor, os.pipe2(os.O_CLOEXEC))
            with new_reading, new_writing:
                result = await client.call(
                    "restore", images_dir=images, rst_sibling=True, inherit_fd={key: new_writing}
                )
                assert result.pid == victim.pid
                assert result.pid in children()
                new_writing.close()
                assert os.read(new_reading.fileno(), 4) == b"here"
                victim.assert_running()
                victim.reap_restored(result.pid)


async def test_restored_under_a_command(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    """The worker becomes the program, which is the restored process's parent and ours to wait for."""
    async with open_client(kind, binary=criu.path) as client:
        with counter(tmp_path) as victim:
            await client.call("dump", victim.pid, images_dir=images)
            victim.assert_killed()
            result = await client.call(
                "restore", images_dir=images, exec_cmd=["/bin/sh", "-c", f"kill -KILL {victim.pid}; exit 7"]
            )
            assert result.command.pid in children()
            assert await client.run(result.command.wait) == 7
            assert result.command.poll() == 7
            until(lambda: state_of(victim.pid) in {None, "Z"}, "it does not die")


# ---- what fails ---------------------------------------------------------------------------------------


async def test_errors_help(open_criu: Open, criu: Criu, images: Path, tmp_path: Path) -> None:
    async with open_criu() as client:
        ended = await trio.run_process(["/bin/sh", "-c", "echo $$"], capture_stdout=True)
        with pytest.raises(criupy.CriuError) as caught:
            await client.call("dump", int(ended.stdout), images_dir=images)
        assert caught.value.errno == errno.ESRCH
        assert caught.value.request == "dump"
        assert caught.value.log_file == str(images / "criu.log")
        assert "no such process" in str(caught.value)
        assert any("No such process" in line for line in caught.value.log_errors)

        with counter(tmp_path) as victim:
            await client.call("dump", victim.pid, images_dir=images, leave_running=True)
            with pytest.raises(criupy.CriuError) as caught:
                await client.call("restore", images_dir=images)
            assert "is in use here" in (caught.value.hint or ""), caught.value
            victim.assert_running()

            # CRIU says nothing of it but in its log, and there only from level 3 on.
            with pytest.raises(criupy.CriuError, match=r"could the page server at 127\.0\.0\.1:"):
                await client.call(
                    "dump", victim.pid, images_dir=images, page_server=("127.0.0.1", free_port())
                )
            # It frees a list that it has not got.
            with pytest.raises(criupy.CriuDied, match=r"resolve hostname: no-such\.invalid"):
                await client.call("dump", victim.pid, images_dir=images, page_server=("no-such.invalid", 1))
            victim.assert_running()

        with pytest.raises(criupy.CriuError) as caught:
            await client.call("restore", images_dir=tmp_path)
        assert "are the images of a dump in there?" in str(caught.value)

        with led(["/bin/sh", "-c", "sleep 1000 & wait"]) as job, pytest.raises(criupy.CriuError) as caught:
            await client.call("dump", job, images_dir=images)
        assert "shell_job=True" in (caught.value.hint or ""), caught.value
        with (
            led(["unshare", "--pid", "--fork", "sleep", "1000"]) as job,
            pytest.raises(criupy.CriuError) as caught,
        ):
            await client.call("dump", job, images_dir=images)
        assert "setsid" in (caught.value.hint or ""), caught.value

        first, second = str(tmp_path / "a"), str(tmp_path / "b")
        unlink = f"kept = open({first!r}, 'w'); os.link({first!r}, {second!r}); os.unlink({first!r})\n"
        with counter(tmp_path, prefix="import os\n" + unlink) as victim:
            with pytest.raises(criupy.CriuError) as caught:
                await client.call("dump", victim.pid, images_dir=images)
            assert "link_remap=True" in (caught.value.hint or ""), caught.value


async def test_parents_that_criu_would_not_take(open_criu: Open, images: Path, tmp_path: Path) -> None:
    """CRIU 4 gives no reason for a missing one; a link from before wins over what it is told."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    how: dict[str, Any] = {"images_dir": images, "leave_running": True, "track_mem": True}
    with counter(tmp_path) as victim:
        async with open_criu() as client:
            with pytest.raises(criupy.OptionError, match=r"parent_img: .*; \.\./3: No such file"):
                await client.call("dump", victim.pid, parent_img="../3", **how)
            (images / "parent").symlink_to("../2")
            with pytest.raises(criupy.OptionError, match=r"parent_img: expected \.\./2: .* named parent"):
                await client.call("dump", victim.pid, parent_img="../1", **how)
            (images / "parent").unlink()
            (images / "parent").symlink_to(first)
            if (await client.call("feature_check")).mem_track:
                await client.call("dump", victim.pid, parent_img="../1", **how)
                return
        assert list(images.iterdir()) == [images / "parent"]
        victim.assert_running()


async def test_a_disk_that_cannot_be_written(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    """CRIU only prints the reason, perhaps after its answer."""
    with disk(images, "ro,size=1m"), counter(tmp_path) as victim:
        async with open_client(kind, binary=criu.path) as client:
            for _ in range(10):
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", victim.pid, images_dir=images)
                assert "Read-only file system" in str(caught.value)
                assert "cannot be written" in (caught.value.hint or "")
        victim.assert_running()


async def test_a_full_disk(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    fill = "memory = bytearray(b'x' * (8 << 20))\n"
    with disk(images, "size=1m"), counter(tmp_path, prefix=fill) as victim:
        async with open_client(kind, binary=criu.path) as client:
            with pytest.raises(criupy.CriuError) as caught:
                await client.call("dump", victim.pid, images_dir=images)
            assert "is full" in (caught.value.hint or ""), caught.value
        victim.assert_running()


async def test_a_process_that_another_criu_holds(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with counter(tmp_path) as victim:
        async with open_client(kind, binary=criu.path) as client:
            async with client.block("lazy_dump", victim.pid, images_dir=other) as source:
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", victim.pid, images_dir=images)
                assert f"process {victim.pid} is traced by process" in (caught.value.hint or "")
                await client.run(source.abort)
            with zombie() as pid:
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", pid, images_dir=images)
                assert f"process {pid} is a kernel thread, or has ended" in (caught.value.hint or "")
            with pytest.raises(criupy.OptionError, match="images_dir: expected a directory, got None"):
                await client.call("dump", victim.pid, images_dir=None)
        victim.assert_running()


async def test_process_of_another_user(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    with sleeper(uid=65534) as victim:
        async with open_client(kind, binary=criu.path) as client:
            if effective >> 24 & 1:  # CAP_SYS_RESOURCE
                await client.call("dump", victim.pid, images_dir=images, leave_running=True)
            else:
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", victim.pid, images_dir=images)
                assert "CAP_SYS_RESOURCE" in (caught.value.hint or ""), caught.value
        until(lambda: state_of(victim.pid) == "S", "it does not go on to sleep")


async def test_sockets_on_new_kernels(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    open_socket = "import socket\nkept = socket.socket()\n"
    with counter(tmp_path, prefix=open_socket) as victim:
        async with open_client(kind, binary=criu.path) as client:
            if not dumps_sockets(criu):
                with pytest.raises(criupy.CriuError) as caught:
                    await client.call("dump", victim.pid, images_dir=images)
                assert "CRIU 4.2" in (caught.value.hint or ""), caught.value
            else:
                await client.call("dump", victim.pid, images_dir=images, leave_running=True)
        victim.assert_running()


async def test_pre_dump_where_the_kernel_can(open_criu: Open, images: Path, tmp_path: Path) -> None:
    """Without dirty tracking CRIU would run into a BUG of its own inside the task; it is not let."""
    first, second = images / "1", images / "2"
    first.mkdir()
    second.mkdir()
    with counter(tmp_path) as victim:
        async with open_criu() as client:
            if (await client.call("feature_check")).mem_track:
                await client.call("pre_dump", victim.pid, images_dir=first)
                victim.assert_running()
                async with client.block("pre_dump_loop", victim.pid) as loop:
                    await client.run(lambda: loop.pre_dump(images_dir=first))
                    await client.run(lambda: loop.pre_dump(images_dir=second, parent_img="../1"))
                    victim.assert_running()
                    await client.run(lambda: loop.dump(images_dir=images, parent_img="2", track_mem=True))
                victim.assert_killed()
                return
            with pytest.raises(criupy.CriuError, match="CONFIG_MEM_SOFT_DIRTY"):
                await client.call("pre_dump", victim.pid, images_dir=first)
            with pytest.raises(criupy.CriuError, match="CONFIG_MEM_SOFT_DIRTY"):
                async with client.block("pre_dump_loop", victim.pid) as loop:
                    await client.run(lambda: loop.pre_dump(images_dir=first))
        victim.assert_running()


async def test_loop_without_pre_dump_is_a_dump(open_criu: Open, images: Path, tmp_path: Path) -> None:
    with counter(tmp_path) as victim:
        async with open_criu() as client, client.block("pre_dump_loop", victim.pid) as loop:
            await client.run(lambda: loop.dump(images_dir=images))
        victim.assert_killed()


# ---- page server ------------------------------------------------------------------------------------------


async def test_dump_through_a_page_server(open_criu: Open, images: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    async with open_criu() as client:
        server = await client.call("page_server_child", images_dir=pages, page_server=("127.0.0.1", 0))
        assert server.pid > 0
        with counter(tmp_path) as victim:
            await client.call("dump", victim.pid, images_dir=images, page_server=("127.0.0.1", server.port))
            victim.assert_killed()
        assert await client.call("wait_pid", server.pid) == 0
        assert list(pages.glob("pages-*.img"))
        assert not list(images.glob("pages-*.img"))
        with pytest.raises(criupy.LocalProtocolError, match="waited for or closed"):
            await client.run(server.wait)
        with pytest.raises(criupy.OptionError, match="page_server_child"):
            await client.call("wait_pid", server.pid)


async def test_page_server_in_the_background(open_criu: Open, images: Path) -> None:
    async with open_criu() as client:
        port = free_port()
        server = await client.call("page_server", images_dir=images, page_server=("127.0.0.1", port))
        assert server.port == port
        # It ends with its first connection.
        socket.create_connection(("127.0.0.1", port)).close()
        until(lambda: not _listens(port), "the page server goes on")


async def test_page_server_child_that_nobody_wants(open_criu: Open, images: Path) -> None:
    async with open_criu() as client:
        server = await client.call("page_server_child", images_dir=images, page_server=("127.0.0.1", 0))
        await client.run(server.close)
        until(lambda: not _listens(server.port), "the page server goes on")
        again = await client.call("page_server_child", images_dir=images, page_server=("127.0.0.1", 0))
    until(lambda: not _listens(again.port), "the page server outlives the client")


async def test_page_server_child_whose_wait_fails(open_criu: Open, images: Path) -> None:
    async with open_criu(grace=1) as client:
        late = await client.call("page_server_child", images_dir=images, page_server=("127.0.0.1", 0))
        with pytest.raises(criupy.CriuTimeout):
            await client.run(lambda: late.wait(request_timeout=0.2))
        until(lambda: not _listens(late.port), "the page server outlives the wait")

        refused = await client.call("page_server_child", images_dir=images, page_server=("127.0.0.1", 0))
        with pytest.raises(criupy.OptionError, match="request_timeout"):
            await client.run(lambda: refused.wait(request_timeout=-1))
        assert _listens(refused.port)
        await client.run(refused.close)
        until(lambda: not _listens(refused.port), "the page server goes on")

        if client.is_async:
            cancelled = await client.call(
                "page_server_child", images_dir=images, page_server=("127.0.0.1", 0)
            )
            with trio.CancelScope() as scope:
                scope.cancel()
                await cancelled.wait()
            assert scope.cancelled_caught
            await cancelled.close()
            until(lambda: not _listens(cancelled.port), "the page server goes on")


def _listens(port: int) -> bool:
    wanted = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(line.split()[1].endswith(wanted) and line.split()[3] == "0A" for line in lines[1:])


async def test_page_server_port_in_use(open_criu: Open, images: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with open_criu() as client:
            with pytest.raises(criupy.CriuError, match=r"page_server_child: .*Address already in use"):
                await client.call("page_server_child", images_dir=images, page_server=("127.0.0.1", port))


# ---- giving up ------------------------------------------------------------------------------------------


async def test_cancelled_dumps_harm_nobody(criu: Criu, images: Path, tmp_path: Path) -> None:
    """At any moment: before, while CRIU's code is put into the task, while its memory is read."""
    fill = "memory = bytearray(b'x' * (48 << 20))\n"
    with counter(tmp_path, prefix=fill) as victim:
        async with criupy.AsyncCriu(criu.path) as client:
            await client.version()
            before = children()
            cancelled = 0
            for step in range(16):
                with trio.move_on_after(0.004 + step * 0.004) as scope:
                    await client.dump(victim.pid, images_dir=images, leave_running=True)
                cancelled += scope.cancelled_caught
                assert children() == before, "only the worker for questions stays"
                victim.assert_running()
            assert cancelled


async def test_timeout_of_a_real_dump(open_criu: Open, images: Path, tmp_path: Path) -> None:
    with counter(tmp_path, prefix="memory = bytearray(b'x' * (48 << 20))\n") as victim:
        async with open_criu() as client:
            await client.call("version")
            with pytest.raises(criupy.CriuTimeout, match=r"took longer than 0\.01 s") as caught:
                await client.call("dump", victim.pid, images_dir=images, request_timeout=0.01)
            assert isinstance(caught.value, TimeoutError)
            victim.assert_running()


async def test_hook_that_never_returns(criu: Criu, images: Path, tmp_path: Path) -> None:
    class Endless(criupy.AsyncHooks):
        async def post_dump(self) -> None:
            await trio.sleep_forever()

    with counter(tmp_path) as victim:
        async with criupy.AsyncCriu(criu.path) as client:
            with pytest.raises(criupy.CriuTimeout, match="the hook for post-dump took longer than 1 s"):
                await client.dump(victim.pid, images_dir=images, hooks=Endless(), request_timeout=1)
            victim.assert_running()
            with trio.move_on_after(0.5) as scope:
                await client.dump(victim.pid, images_dir=images, hooks=Endless())
            assert scope.cancelled_caught
            victim.assert_running()


async def test_restore_that_is_cancelled(criu: Criu, images: Path, tmp_path: Path) -> None:
    class Endless(criupy.AsyncHooks):
        async def post_restore(self, pid: int) -> None:
            await trio.sleep_forever()

    with counter(tmp_path) as victim:
        async with criupy.AsyncCriu(criu.path) as client:
            await client.dump(victim.pid, images_dir=images)
            victim.assert_killed()
            with trio.move_on_after(0.5):
                await client.restore(images_dir=images, hooks=Endless(), rst_sibling=True)
            assert state_of(victim.pid) in {None, "Z"}


# ---- given descriptor ------------------------------------------------------------------------------


async def test_a_given_descriptor(criu: Criu, kind: str, images: Path, tmp_path: Path) -> None:
    with service(criu, tmp_path) as path, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(path))
        async with open_client(kind, fd=sock.fileno()) as client:
            version = await client.call("version")
            assert version.numbers[:2] == criu.version[:2]
            assert (await client.call("feature_check", "lazy_pages")).lazy_pages
            with counter(tmp_path) as victim:
                await client.call("dump", victim.pid, images_dir=images, leave_running=True)
                victim.assert_running()
                with pytest.raises(criupy.LocalProtocolError, match="CRIU has ended it"):
                    await client.call("dump", victim.pid, images_dir=images)
                with pytest.raises(criupy.LocalProtocolError, match="CRIU has ended it"):
                    await client.call("version")
        assert sock.fileno() >= 0
        assert sock.getpeername() is not None
        assert select.select([sock], [], [], 5)[0], "CRIU does not close it"
