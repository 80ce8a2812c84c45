"""A process that dumps itself, and goes on where it was when it is restored."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import criupy
from criupy.testing.criu_linux import Criu
from rpc_victims import subreaper
from test_rpc_criu import service

pytestmark = [pytest.mark.criu, pytest.mark.spread, pytest.mark.usefixtures("nothing_is_left")]

PROGRAM = Path(__file__).with_name("rpc_self_dump.py")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["blocking", "trio"])
@pytest.mark.parametrize("way", ["binary", "socket"])
@pytest.mark.parametrize("variant", [None, "leave", "unasked"])
def test_self_dump(
    criu: Criu, kind: str, way: str, images: Path, tmp_path: Path, variant: str | None
) -> None:
    """Left running, or with an option for which the version is asked first."""
    leave_running = variant == "leave"
    output = tmp_path / "said"
    errors = tmp_path / "errors"
    with contextlib.ExitStack() as stack:
        path = criu.path if way == "binary" else stack.enter_context(service(criu, tmp_path))
        with output.open("wb") as out, errors.open("wb") as err:
            program = subprocess.Popen(
                [sys.executable, PROGRAM, kind, way, path, images, *([variant] if variant else [])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        status = program.wait(60)
        said = output.read_text()
        if leave_running:
            assert status == 0, errors.read_text()
            assert said.split()[:2] == ["original", str(program.pid)]
            os.truncate(output, 0)  # CRIU insists on the size that it had
        else:
            assert (status, said) == (-9, ""), errors.read_text()

        stack.enter_context(subreaper())
        with criupy.Criu(criu.path) as client:
            restored = client.restore(images_dir=images, rst_sibling=True)
        assert restored.pid == program.pid
        status = os.waitstatus_to_exitcode(os.waitpid(restored.pid, 0)[1])
        assert (status, errors.read_text()) == (0, "")
        words = output.read_text().split()
        assert words[:2] == ["restored", str(program.pid)]
        if leave_running:
            assert words[2] == said.split()[2], "it is another process"


def test_a_dump_of_oneself_is_a_self_dump(criu: Criu, images: Path) -> None:
    with (
        criupy.Criu(criu.path) as client,
        pytest.raises(criupy.OptionError, match=r"pid: .*self_dump\(\)"),
    ):
        client.dump(os.getpid(), images_dir=images)


def test_a_dump_of_an_ancestor(criu: Criu, images: Path, tmp_path: Path) -> None:
    """CRIU would have to dump itself."""
    code = (
        "import criupy, os, sys\n"
        "with criupy.Criu(sys.argv[1]) as criu:\n"
        "    try:\n"
        "        criu.dump(os.getppid(), images_dir=sys.argv[2])\n"
        "    except criupy.CriuError as error:\n"
        "        print(error)\n"
    )
    said = subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, criu.path, images],
        check=True,
        capture_output=True,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    assert "self_dump() can" in said.stdout, said
