"""A virtual machine with Debian 12's kernel 6.1, criu 3.17.1, the private CRIUs and criupy in it.

    with start() as machine:
        async with machine.connect() as guest:
            done = await guest.run(["uname", "-r"])

The machine is a plain process, so one may be used by many runs of an event loop, one after the other; what a
connection started ends with it. Everything runs under TCG: what it does is real, how long it takes is not.
Nothing of a machine is kept: both disks are used as snapshots.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from criupy.testing.workload_linux import find_workload
from vm.agent import PORT_NAME
from vm.guest import Done, Guest, GuestError, GuestProcess
from vm.image import make_disks

__all__ = ["Done", "Guest", "GuestError", "GuestProcess", "Machine", "Nic", "start", "start_pair"]

BOOT = 120
"""Seconds in which a machine must have booted; it takes a few when the host is not busy."""


@dataclass(frozen=True, slots=True)
class Nic:
    """An interface, eth0 in the guest, whose frames go from one socket of the host to another."""

    local: Path
    remote: Path
    mac: str

    @property
    def options(self) -> list[str]:
        """Return QEMU's options for it."""
        return [
            "-netdev",
            f"dgram,id=net,local.type=unix,local.path={self.local},remote.type=unix,remote.path={self.remote}",
            "-device",
            f"virtio-net-pci,netdev=net,id=nic,mac={self.mac},romfile=",
        ]


class Machine:
    """A QEMU process and its sockets, in a folder of its own."""

    def __init__(self, report: int, folder: Path) -> None:
        self._report = report
        self._reports = b""  # of the keeper's: a line when QEMU has started, and one when it has ended
        self._folder = folder

    @property
    def console(self) -> str:
        """What the guest's kernel and its first process said."""
        return (self._folder / "console").read_text(errors="replace").replace("\r", "")

    def death(self, what: str) -> GuestError:
        """Make the error that says what is known of its end."""
        said = (self._folder / "qemu.log").read_text(errors="replace").strip()
        tail = "\n".join(self.console.splitlines()[-60:])
        return GuestError(f"the virtual machine: {what}\n{said}\nits console:\n{tail}")

    def set_link(self, *, up: bool) -> None:
        """Plug the cable of its interface in or pull it out."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(BOOT)
            control.connect(str(self._folder / "qmp"))
            with control.makefile("rw") as lines:
                lines.readline()  # its greeting
                for words in (
                    {"execute": "qmp_capabilities"},
                    {"execute": "set_link", "arguments": {"name": "nic", "up": up}},
                ):
                    lines.write(json.dumps(words) + "\n")
                    lines.flush()
                    while "event" in (answer := json.loads(lines.readline())):
                        pass
                    if "error" in answer:
                        raise GuestError(f"QEMU refused {words}: {answer['error']['desc']}")

    @property
    def is_running(self) -> bool:
        """Whether QEMU has not ended."""
        with contextlib.suppress(BlockingIOError):
            self._reports += os.read(self._report, 4096)
        return b"ended" not in self._reports

    def wait_until_listening(self) -> None:
        """Wait until QEMU has made its sockets."""
        deadline = time.monotonic() + BOOT
        while not all((self._folder / name).exists() for name in ("agent", "qmp")):
            if not self.is_running or time.monotonic() > deadline:
                raise self.death("QEMU did not start")
            time.sleep(0.01)

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Guest]:
        """Connect to the agent once the machine has booted; one connection at a time."""
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(str(self._folder / "agent"))
        async with trio.SocketStream(sock) as stream:
            guest = Guest(stream, self.death)
            with trio.move_on_after(BOOT) as booting:
                await guest.meet()
            if booting.cancelled_caught:
                raise self.death(f"it did not boot within {BOOT} s")
            failure = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.listen)
                try:
                    yield guest
                except Exception as error:  # noqa: BLE001 - raised below, outside of the nursery and its group
                    failure = error
                finally:
                    await guest.part()
                    nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure


@contextlib.contextmanager
def start(*, nic: Nic | None = None, memory: int = 1536, cores: int = 2) -> Iterator[Machine]:
    """Start a machine with so many MiB, and end it on leaving; it boots meanwhile."""
    disks = make_disks()
    with tempfile.TemporaryDirectory(prefix="criupy-vm-") as name:
        folder = Path(name)
        (folder / "console").touch()
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            # Emulated, string instructions go byte by byte: a kernel that takes them for fast copies slowly.
            *("-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm", "-smp", str(cores), "-m", str(memory)),
            *("-kernel", str(disks.kernel), "-initrd", str(disks.initrd), "-append"),
            "console=ttyS0 quiet panic=-1 oops=panic mitigations=off random.trust_cpu=on",
            *("-serial", f"file:{folder}/console"),
            *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
            *("-drive", f"if=virtio,file={disks.base},format=raw,snapshot=on"),
            *("-drive", f"if=virtio,file={disks.criupy},format=raw,snapshot=on"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off"),
            *("-device", f"virtserialport,chardev=agent,name={PORT_NAME}"),
            *(nic.options if nic else ()),
        ]
        with kept(command, folder / "qemu.log") as report:
            machine = Machine(report, folder)
            machine.wait_until_listening()
            yield machine


@contextlib.contextmanager
def start_pair(memory: int = 1536) -> Iterator[tuple[Machine, Machine]]:
    """Start two machines whose eth0 are joined; `Guest.join_network` gives them their addresses."""
    with tempfile.TemporaryDirectory(prefix="criupy-net-") as name, contextlib.ExitStack() as stack:
        ends = [Path(name) / "a", Path(name) / "b"]
        nics = (
            Nic(ends[0], ends[1], "52:54:00:00:00:01"),
            Nic(ends[1], ends[0], "52:54:00:00:00:02"),
        )
        first, second = (stack.enter_context(start(nic=nic, memory=memory)) for nic in nics)
        yield first, second


@contextlib.contextmanager
def kept(command: Sequence[str], log: Path) -> Iterator[int]:
    """Run a command that ends with the body, and with us however we end; yield where its keeper reports."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        words: list[str | Path] = [find_workload(), "--keep", "--report", str(writing), "--", *command]
        with log.open("wb") as file:
            keeper = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        try:
            yield reading
        finally:
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait(BOOT)
    finally:
        os.close(reading)
