"""What happens inside one guest: `python3 scenarios.py NAME CRIU ROOM [KEY=VALUE...]`.

Each scenario is a migration in which every byte is checked, or one side of it; its files are in the
directory ROOM. What it found is the last line of its standard output, as JSON. Runs with the guest's
Python, with criupy and the tests' `migrating` beside it.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from criupy.images import PAGE_SIZE as PAGE
from criupy.images import PageFlags, read_pagemap, read_pstree, read_restore_stats
from criupy.pre_copy import PreCopy
from criupy.runc import AsyncRunc
from criupy.testing.control_linux import CONTROL_MAGIC, Control, Order
from criupy.testing.criu_linux import (
    Criu,
    free_port,
    lazy_dump,
    lazy_pages_daemon,
    our_command,
    parent_options,
    pre_dump,
    relay,
    restore,
)
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import Workload, find_workload, start_workload
from migrating import MIB, migrate

HANG = 120
FAST = 1e12
SPEC = WorkloadSpec(size=8 * MIB)

Found = dict[str, Any]

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""One written byte makes all of a huge page dirty."""


async def plain(criu: Criu, room: Path, **_: str) -> Found:
    """Lazily, with our daemon between, while the process touches its pages."""
    spec = WorkloadSpec(size=8 * MIB, areas=2, tree=2, threads=2)

    def touch(control: Control) -> None:
        for task in range(spec.tree):
            control.worker(task, 1).start_touching(Order.RANDOM, count=300)

    async with migrate(criu, spec, room, before=touch) as m:
        for task in range(spec.tree):
            assert (await m.control.worker(task, 1).wait()).is_good
        await m.ends_well()
        await m.verify_all()
        return {"stats": m.stats, "log": m.log}


async def lost(criu: Criu, room: Path, **_: str) -> Found:
    """The source dies while its tasks run here without all of their memory."""
    spec = WorkloadSpec(size=16 * MIB, children=1)
    async with migrate(criu, spec, room, rate=4 * MIB) as m:
        await m.transferring()
        child = await m.control.worker().fork(m.control.child())
        m.dump.job.kept.kill()
        ended = await m.daemon.wait()
        return {
            "daemon": ended.code,
            "error": m.daemon.errors()[-1],
            "task": (await m.restored.task_ended()).signal,
            "child": m.restored.gone(child),
        }


def pre_copy(criu: Criu, room: Path, rounds: int) -> tuple[Callable[[Workload], Awaitable[None]], list[str]]:
    """Return what makes so many pre-dumps while the process writes, and the options of the dump after."""
    folders = [room / str(number) for number in range(1, rounds + 1)]

    async def prepare(source: Workload) -> None:
        parent = None
        for generation, folder in enumerate(folders, 1):
            await pre_dump(criu, source.pid, folder, parent=parent)
            # ever less, as it should be: a quarter, then an eighth, in pieces that lie apart
            for first in range(0, source.spec.main_pages, 512):
                await source.worker().write(first, 256 >> generation, generation)
            parent = folder

    return prepare, parent_options(room / "images", folders[-1]) if folders else []


async def hybrid(
    criu: Criu,
    room: Path,
    *,
    daemon: str = "ours",
    track: str = "yes",
    huge: str = "never",
    lazy_parents: str = "no",
    megabytes: str = "8",
) -> Found:
    """Two pre-dumps and a lazy dump of the rest, whose pages are counted on their way."""
    prepare, options = pre_copy(criu, room, rounds=2)

    if track == "no":
        options.remove("--track-mem")
    HUGE_PAGES.write_text(huge)
    async with migrate(
        criu,
        WorkloadSpec(size=int(megabytes) * MIB),
        room,
        stock=daemon == "stock",
        rate=FAST,
        prepare=prepare,
        dump_extra=options,
        lazy_parents=lazy_parents == "yes",
    ) as m:
        await m.restored.finished()
        seconds = trio.current_time() - m.asked
        await m.ends_well()
        await m.verify_all()
        assert m.link is not None
        return {
            "levels": [count(room / name, m.source.pid) for name in ("1", "2", "images")],
            "fetched": m.link.down // PAGE,
            "restored": read_restore_stats(room / "work").pages_restored,
            "seconds": seconds,
            "stats": m.stats if daemon == "ours" else {},
        }


def count(images: Path, pid: int) -> dict[str, int]:
    """Count the pages of a pagemap by their flags."""
    pagemap = read_pagemap(images, pid)
    counts: collections.Counter[str] = collections.Counter()
    for nr_pages, flags in zip(pagemap.nr_pages, pagemap.flags, strict=True):
        counts["|".join(flag.name or "" for flag in PageFlags(flags)) or "PRESENT"] += nr_pages
    return dict(counts)


async def source(criu: Criu, room: Path, *, rounds: str = "0", address: str = "", port: str = "0") -> Found:
    """One host of two: a frozen process, and a relay that keeps it while the link is down."""
    HUGE_PAGES.write_text("never")
    images, work = room / "images", room / "relay"
    work.mkdir()
    prepare, options = pre_copy(criu, room, int(rounds))
    async with start_workload(SPEC, room) as workload:
        await prepare(workload)
        async with (
            lazy_dump(criu, workload.pid, images, extra=options) as dump,
            relay(dump, images, work, address=address, port=int(port)) as relaying,
        ):
            say(pid=workload.pid, counts=count(images, workload.pid))
            await dump.job.succeed()
            await relaying.job.succeed()
            return {"killed": (await workload.wait()).signal, "log": relaying.job.log.read_text()}


async def destination(criu: Criu, room: Path, *, pid: str = "0", address: str = "", port: str = "0") -> Found:
    """The other host, with the same files as the first: restore, touch all pages and look at every byte."""
    images, work = room / "images", room / "work"
    control = Control(room / "workload.control")
    control.worker().start_touching(Order.RANDOM, count=1000)
    async with (
        lazy_pages_daemon(
            our_command(),
            images,
            work,
            source=(address, int(port)),
            extra=["--stats-file", "stats.json", "--link-timeout", "2", "--reconnect", "60"],
        ) as daemon,
        restore(criu, images, work, int(pid)) as restored,
    ):
        control.gone = restored.gone
        await restored.finished()
        say(running=True)
        result = await control.worker().wait()
        assert result.is_good, result
        await daemon.succeed()
        result = await control.worker().verify()
        assert result.is_good, result
        return {"stats": json.loads((work / "stats.json").read_text()), "log": daemon.log.read_text()}


async def container(criu: Criu, room: Path, **_: str) -> Found:
    """A container of runC: rounds of pre-copy, a lazy checkpoint, a lazy restore; and every byte."""
    HUGE_PAGES.write_text("never")
    cgroups = Path("/sys/fs/cgroup")
    if not (cgroups / "cgroup.procs").exists():
        await trio.run_process(["mount", "-t", "cgroup2", "cgroup2", str(cgroups)])
    source, destination = (
        AsyncRunc(root=room / f"state-{name}", criu=criu.path, request_timeout=60) for name in "ab"
    )
    control_dir = room / "control"
    control_dir.mkdir()
    bundles = {name: make_bundle(room, name, control_dir) for name in "ab"}
    words: list[str | Path] = ["runc", "--root", room / "state-a", "run", "--detach"]
    words += ["--bundle", bundles["a"], "work"]
    null = subprocess.DEVNULL
    await trio.run_process(words, stdin=null, stdout=null, stderr=null)
    path = control_dir / "workload.control"
    magic = struct.pack("=I", CONTROL_MAGIC)  # it comes last
    await until(lambda: path.exists() and path.read_bytes()[:4] == magic)
    control = Control(path, gone=lambda _: None)
    await until(lambda: control.get("nr_ready") == 1)
    rounds = PreCopy(room / "ckpt", max_rounds=3)
    for this in rounds:
        await source.pre_dump("work", image_path=this.images_dir, parent_path=this.parent)
        for first in range(0, SPEC.main_pages, 512):
            await control.worker().write(first, 256 >> this.number, this.number)
    port = free_port()
    async with source.lazy_checkpoint(
        "work",
        image_path=rounds.last.images_dir,
        parent_path=rounds.last.parent,
        page_server=("0.0.0.0", port),
    ) as checkpoint:
        async with destination.lazy_restore(
            "work", bundle=bundles["b"], image_path=rounds.last.images_dir, page_server=("127.0.0.1", port)
        ) as restored:
            result = await control.worker().touch(Order.RANDOM, count=1000)
            assert result.is_good, result
            await restored.wait()
        outcome = await checkpoint.wait()
    result = await control.worker().verify()
    assert result.is_good, result
    state = await destination.state("work")
    assert state is not None
    there = await source.state("work")
    await trio.run_process(["runc", "--root", room / "state-b", "delete", "--force", "work"])
    pid = next(task.pid for task in read_pstree(rounds.last.images_dir))
    return {
        "outcome": outcome.value,
        "there": state.status,
        "here": None if there is None else there.status,
        "written": [stats.pages_written for stats in rounds.stats],
        "stopped": rounds.stopped.name if rounds.stopped else None,
        "counts": count(rounds.last.images_dir, pid),
    }


def make_bundle(room: Path, name: str, control_dir: Path) -> Path:
    """Make a bundle whose container is a workload, which needs nothing but itself."""
    bundle = room / f"bundle-{name}"
    (bundle / "rootfs").mkdir(parents=True)
    shutil.copy(find_workload(), bundle / "rootfs" / "workload")
    subprocess.run(["runc", "spec", "--bundle", bundle], check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {
        "terminal": False,
        "args": ["/workload", "--control=/control/workload.control", *SPEC.arguments()],
    }
    config["linux"]["cgroupsPath"] = f"/work-{name}"
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
    config["mounts"].append(
        {"destination": "/control", "type": "bind", "source": str(control_dir), "options": ["bind", "rw"]}
    )
    config["root"]["readonly"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def say(**found: Any) -> None:
    """Tell the host at once."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


SCENARIOS: dict[str, Callable[..., Awaitable[Found]]] = {
    "plain": plain,
    "lost": lost,
    "hybrid": hybrid,
    "container": container,
    "source": source,
    "destination": destination,
}


def criu_at(path: str) -> Criu:
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"^Version: (\d+(?:\.\d+)*)", shown.stdout, re.MULTILINE)
    assert found is not None, shown
    return Criu(Path(path), tuple(map(int, found[1].split("."))))


async def run(name: str, criu: Criu, room: Path, options: dict[str, str]) -> Found:
    (room / "work").mkdir(parents=True, exist_ok=True)
    try:
        with trio.fail_after(HANG):
            return await SCENARIOS[name](criu, room, **options)
    except BaseException:
        for log in sorted(room.rglob("*.log")):
            tail = "\n".join(log.read_text().splitlines()[-25:])
            sys.stdout.write(f"---- {log.relative_to(room)}\n{tail}\n")
        raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("criu", type=criu_at)
    parser.add_argument("room", type=Path)
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    options = dict(word.split("=", 1) for word in chosen.options)
    say(**trio.run(run, chosen.name, chosen.criu, chosen.room, options))


if __name__ == "__main__":
    main()
