"""One migration inside a virtual machine, for hybrid.py: `python3 _hybrid_guest.py WAY CRIU ROOM SIZE_MIB`.

A process touches random pages of all its memory with pauses, and another thread of it writes to the same
small part of it again and again. It is frozen and runs again, in a pid namespace of its own; the link,
here the loopback device, has a round trip. What was measured is the last line of the output, as JSON.

An emulated processor takes thirty times as long for an interpreter to start as a real one, while all that is
C is slowed down far less. So the daemon's is started before the process is frozen, and waits for the images.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import trio

from criupy import AsyncCriu
from criupy.images import read_restore_stats, write_lazy_parents
from criupy.pre_copy import PreCopy
from criupy.testing.control_linux import Order, Touch
from criupy.testing.criu_linux import Criu, free_port, lazy_pages_daemon, restore
from criupy.testing.spec import WorkloadSpec
from criupy.testing.workload_linux import Workload, start_workload

MIB = 1 << 20
PAGE = 4096
HOT_PAGES = 512
UNLIMITED = 1 << 40
PAUSE_NS = 500_000
REWRITE = 0.05
POLL = 0.002


#: The daemon, with all it needs imported. It says so in the file that is its first argument, and starts
#: when that is gone.
DAEMON = """
import json, os, sys, time
import trio, criupy.lazy_pages._cli as cli, criupy.lazy_pages._daemon_linux
from criupy.images import lazy_parents
waiting = sys.argv.pop(1)
open(waiting, "w").close()
while os.path.exists(waiting):
    time.sleep(0.002)
sys.exit(cli.main(sys.argv[1:]))
"""


class Heart:
    """Looks at the heartbeat of a process: when it last beat, and how long it stood still at most."""

    def __init__(self, workload: Workload) -> None:
        self._worker = workload.worker()
        self.longest = 0.0

    async def watch(self) -> None:
        beat, since = self._worker.heartbeat, trio.current_time()
        while True:
            await trio.sleep(POLL)
            now = trio.current_time()
            if (new := self._worker.heartbeat) != beat:
                self.longest = max(self.longest, now - since)
                beat, since = new, now


class Writer:
    """Writes to the hot part again and again, also while the process moves: then the next one waits."""

    def __init__(self, workload: Workload) -> None:
        self._worker = workload.worker(0, 1)
        self._stopping = False
        self._stopped = trio.Event()

    async def keep_writing(self) -> None:
        generation = 0
        while not self._stopping:
            generation += 1
            await self._worker.write(0, HOT_PAGES, generation)
            await trio.sleep(REWRITE)
        self._stopped.set()

    async def stop(self) -> None:
        self._stopping = True
        await self._stopped.wait()


class Started:
    """A daemon whose interpreter runs already."""

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.ended = trio.Event()

    async def run(
        self,
        command: list[str],
        images: Path,
        work: Path,
        source: tuple[str, int],
        extra: list[str],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        task_status.started()
        async with lazy_pages_daemon(command, images, work, source=source, extra=extra) as job:
            self.ready.set()
            await job.succeed()
            self.ended.set()


async def move(way: str, criu: Criu, room: Path, size: int) -> dict[str, object]:
    spec = WorkloadSpec(size=size, threads=2, samples=1 << 17)
    flags = Touch.UNTIL_STOPPED | Touch.SAMPLE_FAULTS
    async with start_workload(spec, room) as workload, trio.open_nursery() as nursery:
        toucher = workload.worker()
        toucher.start_touching(Order.RANDOM, count=UNLIMITED, pause_ns=PAUSE_NS, flags=flags)
        writer = Writer(workload)
        nursery.start_soon(writer.keep_writing)
        await trio.sleep(1)
        rounds = PreCopy(room / "ckpt")
        async with AsyncCriu(criu.path, request_timeout=100) as client:
            if way != "post-copy":
                for this in rounds:
                    await client.pre_dump(workload.pid, images_dir=this.images_dir, **this.options)
            images, options = room / "ckpt" / "only", {}
            if way != "post-copy":
                images, options = rounds.last.images_dir, rounds.last.options
            images.mkdir(parents=True, exist_ok=True)
            workload.control.gone = lambda _: None  # it ends here and goes on there
            heart = Heart(workload)
            nursery.start_soon(heart.watch)
            before = len(toucher.samples)
            work = room / "work"
            work.mkdir()
            pid = workload.pid
            found: dict[str, object] = {}
            if way == "pre-copy":
                await client.dump(pid, images_dir=images, **options)
                async with restore(criu, images, work, pid, lazy=False) as restored:
                    workload.control.gone = restored.gone
                    await restored.finished()
                    await settle(workload, writer, before, found)
            else:
                port, waiting = free_port(), room / "waiting"
                # What the parents hold is lazy, too, and comes from their images.
                restored_from = images if way == "post-copy" else room / "ckpt" / "lazily"
                daemon: Started = Started()
                command = [sys.executable, "-c", DAEMON, str(waiting)]
                extra = ["--stats-file", "stats.json"]
                await nursery.start(daemon.run, command, restored_from, work, ("127.0.0.1", port), extra)
                while not waiting.exists():
                    await trio.sleep(POLL)
                async with client.lazy_dump(pid, images_dir=images, port=port, **options):
                    if way == "hybrid":
                        write_lazy_parents(images, restored_from)
                    waiting.unlink()
                    await daemon.ready.wait()
                    async with restore(criu, restored_from, work, pid) as restored:
                        workload.control.gone = restored.gone
                        await restored.finished()
                        await daemon.ended.wait()
                        await settle(workload, writer, before, found)
                stats = json.loads((work / "stats.json").read_text())
                fetched = (
                    stats["pages_total"] - stats["local_total"] if way == "hybrid" else stats["pages_total"]
                )
                found |= {"fetched_pages": fetched, "drain_s": stats["drain"]}
        nursery.cancel_scope.cancel()
    stats = read_restore_stats(room / "work")
    return {
        "restore_s": stats.restore_us / 1e6,
        "restored_pages": stats.pages_restored,
        "freeze_s": heart.longest,
        "round_pages": [stats.pages_written for stats in rounds.stats],
        "stopped": None if rounds.stopped is None else rounds.stopped.name.lower(),
        **found,
    }


async def settle(workload: Workload, writer: Writer, before: int, found: dict[str, object]) -> None:
    """Take what the faults since the freeze cost, and look at every byte."""
    await writer.stop()
    toucher = workload.worker()
    toucher.stop()
    result = await toucher.wait()
    if not result.is_good:
        raise SystemExit(f"wrong pages: {result}")
    waits = toucher.samples[before:]
    found |= {"stall_s": sum(waits) / 1e9, "faults": len(waits)}
    checked = await toucher.verify()
    if not checked.is_good:
        raise SystemExit(f"wrong pages: {checked}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["pre-copy", "post-copy", "hybrid"])
    parser.add_argument("criu", type=Path)
    parser.add_argument("room", type=Path)
    parser.add_argument("size", type=int, metavar="MIB")
    options = parser.parse_args()
    shown = subprocess.run([options.criu, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"^Version: ([0-9.]+)", shown, re.MULTILINE)
    if version is None:
        raise SystemExit(f"{options.criu}: no version in {shown!r}")
    criu = Criu(options.criu, tuple(map(int, version[1].split("."))))
    options.room.mkdir(parents=True)
    found = trio.run(move, options.way, criu, options.room, options.size * MIB)
    sys.stdout.write(json.dumps({"criu": version[1], **found}) + "\n")


if __name__ == "__main__":
    main()
