"""The tutorials do what they say: each block that has a title is run, in a shell, in turn."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_hosts import usable
from criupy.testing.criu_linux import Criu
from tutorials import Block, Shell, blocks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="it is about Linux")]

BIN = Path(sys.executable).parent


def environment(room: Path, *programs: Path) -> dict[str, str]:
    """Put the commands and these programs on the PATH, and mark what is started."""
    folders = [str(BIN), *(str(path.parent) for path in programs), os.environ["PATH"]]
    return {**os.environ, "PATH": ":".join(folders), "TMPDIR": str(room)}


@pytest.mark.usefixtures("workload_program", "nothing_runs_on")
def test_first_migration(tmp_path: Path) -> None:
    told = {}
    with Shell(tmp_path, environment(tmp_path)) as shell:
        for block in blocks("tutorials/first-migration.md"):
            told[block.title] = shell.run(block)
        assert shell.errors == ""
    assert "all are right" in told["The demo"]
    assert "1 process; 1 thread" in told["Make a checkpoint"]
    assert told["Restore"] == "16384 pages, all right\n"
    assert '"state": "complete"' in told["What it took"]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.usefixtures("nothing_runs_on")
def test_with_criu(tmp_path: Path, criu: Criu) -> None:
    told = {}
    with Shell(tmp_path, environment(tmp_path, criu.path)) as shell:
        for block in blocks("tutorials/with-criu.md"):
            told[block.title] = shell.run(block)
    assert re.search(r"it stands still at \d+\n", told["It stands still"])
    assert "This is a lazy dump" in told["It stands still"]
    assert '"state": "complete"' in told["Wait for the memory"]
    assert "criu dump has ended" in told["Wait for the memory"]


#: scp between hosts that are directories beside each other: /srv is bound to it on each.
SCP = """#!/bin/sh
[ "$1" = -qr ] && [ $# = 3 ] || { echo "scp: unexpected: $*" >&2; exit 1; }
host=${3%%:*}
exec cp -r "$2" "$HOSTS/${host#root@}${3#*:/srv}"
"""

NAMES = {"Source": "192.0.2.1", "Destination": "192.0.2.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """What starts a shell on each of two hosts: their networks, processes, names and /srv are their own."""
    if shutil.which("ip") is None:
        pytest.skip("ip(8) is not installed")
    spaces = {name: f"criupy-{os.getpid()}-{name.lower()}" for name in NAMES}
    with contextlib.ExitStack() as stack:
        prefixes = {}
        for name, space in spaces.items():
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
            folder = tmp_path / NAMES[name]
            folder.mkdir()
            # A new machine has used few pids: those of one are not in use on the other.
            first = {"Source": 20000, "Destination": 10000}[name]
            own = f"mount --bind {folder} /srv && mount -t tmpfs run /run"
            begin = f"{own} && hostname {space} && echo {first} >/proc/sys/kernel/ns_last_pid"
            prefixes[name] = [
                *("nsenter", f"--net=/run/netns/{space}"),
                *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", f'{begin} && exec "$@"', "sh"),
            ]
        one, other = spaces.values()
        ip("-n", one, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", other)
        for name, space in spaces.items():
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "address", "add", f"{NAMES[name]}/24", "dev", "wire")
            ip("-n", space, "link", "set", "wire", "up")
        yield prefixes


class Machines:
    """A shell on each of the hosts."""

    def __init__(self, shells: dict[str, Shell]) -> None:
        self.shells = shells
        self.told: dict[str, str] = {}

    def run(self, block: Block) -> None:
        for name in NAMES if block.where == "Both" else [block.where]:
            self.told[block.title] = self.shells[name].run(block)


@pytest.fixture
def machines(
    hosts: dict[str, list[str]], tmp_path: Path, criu: Criu, nothing_runs_on: None
) -> Iterator[Machines]:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scp").write_text(SCP)
    (tools / "scp").chmod(0o755)
    with contextlib.ExitStack() as stack:
        shells = {}
        for name, prefix in hosts.items():
            variables = {**environment(tmp_path, tools / "scp", criu.path), "HOSTS": str(tmp_path)}
            folder = tmp_path / name
            folder.mkdir()
            shells[name] = stack.enter_context(Shell(folder, variables, prefix))
        yield Machines(shells)


#: In place of debootstrap: what the set-up has made with it.
DEBOOTSTRAP = """#!/bin/sh
[ "$1 $2 $3" = "--variant=minbase --include=nginx-light bookworm" ] || { echo "unexpected: $*" >&2; exit 1; }
exec cp -a "$ROOT" "$4"
"""


def test_with_runc(machines: Machines, criu: Criu, tmp_path: Path) -> None:
    criu_of_containers, root = usable()
    if criu != criu_of_containers:
        pytest.skip(f"a server's sockets need {criu_of_containers} on this kernel")
    (tmp_path / "tools" / "debootstrap").write_text(DEBOOTSTRAP.replace("$ROOT", str(root)))
    (tmp_path / "tools" / "debootstrap").chmod(0o755)
    for block in blocks("tutorials/with-runc.md"):
        machines.run(block)
    told = machines.told
    before, after = (
        int(re.findall(r"^ (\d+) \d+ \d+ $", told[title], re.MULTILINE)[-1])
        for title in ("Source: Start it", "Destination: Restore")
    )
    assert after == before + 1
    assert '"state": "complete"' in told["Destination: Wait for the memory"]
    gone, *rest = told["Source: It has left"].splitlines()
    assert gone == "it runs elsewhere"
    assert not any("httpd" in line for line in rest)


def test_two_machines(machines: Machines) -> None:
    for block in blocks("tutorials/two-machines.md"):
        machines.run(block)
    assert '"state": "complete"' in machines.told["Destination: Wait for the memory"]
    assert machines.told["Source: It has left"] == "it runs elsewhere\n"


def run_instead(machines: Machines, page: str, before: dict[str, str]) -> None:
    """Run the tutorial with the blocks of a how-to: in place of those of the same title, or before others."""
    others = {block.title: block for block in blocks(page)}
    for block in blocks("tutorials/two-machines.md"):
        if block.title in before:
            machines.run(others.pop(before[block.title]))
        machines.run(others.pop(block.title, block))
    assert others == {}
    assert '"state": "complete"' in machines.told["Destination: Wait for the memory"]
    assert machines.told["Source: It has left"] == "it runs elsewhere\n"


def test_tls(machines: Machines, certificates: object, tmp_path: Path) -> None:
    run_instead(machines, "how-to/tls.md", {"Source: Dump": "Source: Make certificates"})
    log = (tmp_path / "192.0.2.2" / "demo" / "ckpt" / "lazy-pages.log").read_text()
    assert "TLS" in log


def test_a_relay(machines: Machines, tmp_path: Path) -> None:
    run_instead(machines, "how-to/links-that-break.md", {})
    log = (tmp_path / "192.0.2.2" / "demo" / "ckpt" / "lazy-pages.log").read_text()
    assert "a relay: two lanes, vectored requests" in log
