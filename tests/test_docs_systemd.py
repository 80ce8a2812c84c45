"""The systemd units of the docs: systemd has nothing to object, what they start works with their rights."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy.testing.images import write_images
from criupy.testing.page_server import PageServer
from criupy.testing.spec import WorkloadSpec
from criupy.testing.wait import until
from criupy.testing.workload_linux import start_standin
from serving import MIB, all_good

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
SPEC = WorkloadSpec(size=4 * MIB)

needs_setpriv = pytest.mark.skipif(
    shutil.which("setpriv") is None or os.geteuid() != 0, reason="taking rights away needs root and setpriv"
)


def settings(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text().replace("\\\n", " "))
    return parser["Service"]


class Started:
    """What a unit has started, as systemd would start and stop it."""

    def __init__(self, name: str, images: Path, room: Path, options: str, *, upstream: str = "") -> None:
        service = settings(next(unit for unit in UNITS if unit.stem == f"{name}@"))
        known = {"%f": str(images), "%t": str(room / "run"), "%i": "ckpt"}
        known |= {"${UPSTREAM}": upstream, "$OPTIONS": options}
        text, pidfile = service["ExecStart"], service["PIDFile"]
        for word, meaning in known.items():
            text, pidfile = text.replace(word, meaning), pidfile.replace(word, meaning)
        (room / "run" / service["RuntimeDirectory"].replace("%i", "ckpt")).mkdir(parents=True)
        program, *words = shlex.split(text)
        kept = ",".join(
            f"+{word.removeprefix('CAP_').lower()}" for word in service["CapabilityBoundingSet"].split()
        )
        rights = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"]
        script = Path(sys.executable).with_name(Path(program).name)
        done = subprocess.run(
            [*rights, script, *words], cwd="/", capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        self.pid = int(Path(pidfile).read_text())
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def rights(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    async def ended(self) -> None:
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(self.pidfd)


@pytest.fixture
def started() -> Iterator[list[Started]]:
    """What has to be gone after a test."""
    found: list[Started] = []
    yield found
    for each in found:
        try:
            each.kill(signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_it(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text().replace("/usr/local/bin/", f"{Path(sys.executable).parent}/")
    instance = tmp_path / unit.name.replace("@", "@srv-ckpt")
    instance.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", instance],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    instance.write_text(text.replace("Type=forking", "Typ=forking"))  # it does look
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", instance],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Typ" in done.stderr


@needs_setpriv
@pytest.mark.usefixtures("workload_program")
async def test_a_restore_with_the_rights_of_the_units(room: Path, started: list[Started]) -> None:
    images = write_images(room / "images", SPEC, style="full")
    server = Started("criupy-page-server", images.directory, room, "--address 127.0.0.1")
    started.append(server)
    port = (room / "run" / "criupy-page-server" / "ckpt" / "port").read_text().strip()
    daemon = Started(
        "criupy-lazy-pages", images.directory, room, f"--page-server --address 127.0.0.1 --port {port}"
    )
    started.append(daemon)
    # bits of CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL and CAP_SYS_RESOURCE; the last may not be ours
    assert daemon.rights & ~(1 << 24) == 1 << 1 | 1 << 5
    assert server.rights & ~(1 << 24) == 1 << 2
    async with start_standin(SPEC, images.directory / "lazy-pages.socket", room / "work") as standin:
        await standin.wait_registered()
        await standin.finish()
        await all_good(standin)
    await daemon.ended()
    assert (images.directory / "lazy-pages.json").exists()
    server.kill()
    await server.ended()


@needs_setpriv
async def test_a_relay_with_the_rights_of_the_unit(room: Path, started: list[Started]) -> None:
    images = write_images(room / "images", SPEC)
    source = PageServer(images)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run)
        relay = Started(
            "criupy-relay",
            images.directory,
            room,
            "--address 127.0.0.1",
            upstream=f"{source.address}:{source.port}",
        )
        started.append(relay)
        assert (images.directory / "criupy-relay.json").exists()
        relay.kill()  # no destination has come: the source goes on
        await relay.ended()
        await until(lambda: source.end is not None)
        assert source.end is not None
        assert source.end.source_goes_on


def test_what_must_not_be_killed_is_not() -> None:
    relay = settings(next(unit for unit in UNITS if unit.stem == "criupy-relay@"))
    assert (relay["KillMode"], relay["SendSIGKILL"], relay["TimeoutStopSec"]) == ("process", "no", "infinity")
    for unit in UNITS:
        assert settings(unit)["Type"] == "forking"
