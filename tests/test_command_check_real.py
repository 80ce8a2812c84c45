"""``criupy check`` on this machine, with CRIU's own command line as judge."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from criupy.commands._findings import Finding, State, all_well

if not sys.platform.startswith("linux"):
    pytest.skip("CRIU is for Linux", allow_module_level=True)

from criupy.commands._probes_criu_linux import connect, has_nftables, version
from criupy.commands._probes_linux import Kernel
from criupy.commands._rights_linux import service_pid
from criupy.commands._survey_linux import survey
from test_command_check import sound

if TYPE_CHECKING:
    from criupy.testing.criu_linux import Criu


def check(*words: object) -> tuple[int, dict[str, dict[str, Any]], bool]:
    """Run the command; return its exit status and what it found."""
    command = [sys.executable, "-m", "criupy", "check", "--json", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert len(found) == len(report["findings"])
    for finding in report["findings"]:
        sound(Finding(**finding | {"state": State(finding["state"])}))
    assert ended.returncode == (0 if report["ok"] else 1)
    return ended.returncode, found, report["ok"]


def says(criu: Criu, feature: str) -> bool:
    """Ask CRIU's own command line for a feature."""
    words = [str(criu.path), "check", "--no-default-config", "--feature", feature]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_without_a_criu() -> None:
    status, found, _ = check("--criu", "/nonexistent/criu")
    assert status == 1
    assert found["program"]["state"] == "lack"
    assert "/nonexistent/criu" in found["program"]["value"]
    assert "criu check" not in found
    assert found["release"]["value"] == os.uname().release
    assert not [finding for finding in found.values() if "report" in finding["remedy"]]


@pytest.mark.parametrize("script", ["exit 1", "echo 'Error (vdso.c:1): bad vDSO' >&2; exit 1", "kill -9 $$"])
def test_a_criu_that_ends_at_once(script: str, tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text(f"#!/bin/sh\n{script}\n")
    criu.chmod(0o700)
    status, found, _ = check("--criu", criu)
    assert status == 1
    assert (found["program"]["state"], found["version"]["state"]) == ("ok", "lack")
    assert ("vDSO" in found["version"]["value"]) is ("vDSO" in script)
    assert "criu check" not in found


def test_a_program_that_is_no_criu(tmp_path: Path) -> None:
    (tmp_path / "criu").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "criu").chmod(0o700)
    status, found, _ = check("--criu", tmp_path / "criu")
    assert status == 1
    assert found["version"]["state"] == "lack"


def test_a_socket_where_nobody_listens(tmp_path: Path) -> None:
    status, found, _ = check("--socket", tmp_path / "none")
    assert status == 1
    assert found["service"]["state"] == "lack"
    assert "No such file" in found["service"]["value"]


def agree(found: dict[str, dict[str, Any]], criu: Criu) -> None:
    """Hold that CRIU's command line says the same of this machine."""
    assert found["version"]["value"] == ".".join(map(str, criu.version))
    assert found["page-server frames"]["value"].startswith(f"{criu.frame_size} bytes")
    assert found["criu check"]["state"] == "ok"
    for name, feature in (
        ("lazy_pages", "uffd-noncoop"),
        ("mem_track", "mem_dirty_track"),
        ("pidfd_store", "pidfd_store"),
    ):
        assert (found[name]["state"] == "ok") is says(criu, feature)
    kernel = Kernel(os.uname().release)
    assert (found["sockets"]["state"] == "ok") is (criu.version >= (4, 2) or not kernel.at_least(6, 16))


def test_a_real_criu(criu: Criu) -> None:
    status, found, _ = check("--criu", criu.path)
    assert status == 0
    assert found["program"]["value"] == str(criu.path)
    agree(found, criu)
    assert found["userfaultfd(2)"]["state"] == found["events"]["state"] == "ok"
    assert has_nftables(str(criu.path)) is says(criu, "network_lock_nftables")
    for finding in found.values():
        assert finding["state"] != "unknown"


def asking_pid(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # not bound, not listening yet
        return service_pid(str(path))
    return None


def test_a_real_service(criu: Criu, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    words = [str(criu.path), "service", "--no-default-config", "--address", str(path), "-o", "-"]
    with subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as service:
        try:
            while asking_pid(path) is None:
                assert service.poll() is None
                time.sleep(0.01)
            assert asking_pid(path) == service.pid
            status, found, _ = check("--socket", path)
        finally:
            service.terminate()
    assert status == 0
    assert found["service"]["value"] == f"{path}, pid {service.pid}"
    assert "program" not in found
    agree(found, criu)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_root_without_capabilities(criu: Criu) -> None:
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "criupy", "check"]
    ended = subprocess.run(
        [*words, "--json", "--criu", str(criu.path)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    report = json.loads(ended.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] is False
    lacks = {name for name, finding in found.items() if finding["state"] == "lack"}
    assert {"criu check", "choice of pids", "CAP_SYS_PTRACE", "CAP_CHECKPOINT_RESTORE"} <= lacks
    assert found["userfaultfd(2)"]["state"] == "lack" or found["events"]["state"] == "lack"
    assert found["version"]["state"] == "ok"
    assert "user" not in lacks


def test_text_of_a_real_criu(criu: Criu) -> None:
    words = [sys.executable, "-m", "criupy", "check", "--criu", str(criu.path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == "CRIU"
    assert lines[-1] == "Nothing is missing that every dump, restore and lazy migration needs."


@pytest.mark.usefixtures("nothing_is_left")
def test_nothing_is_left_of_a_survey(criu: Criu, tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("criupy-*"))
    assert all_well(survey(str(criu.path), None))
    assert set(Path(tempfile.gettempdir()).glob("criupy-*")) == before


def test_a_criu_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("criupy.commands._probes_criu_linux.TIMEOUT", 0.2)
    criu = tmp_path / "criu"
    criu.write_text("#!/bin/sh\nexec sleep 600\n")
    criu.chmod(0o700)
    asked = version(connect(str(criu), None))
    assert asked.version is None
    assert asked.finding.state is State.LACK
