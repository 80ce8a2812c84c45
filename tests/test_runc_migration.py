"""A web server in a container of runC moves to another host while a client keeps asking it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_hosts import NAME, open_hosts
from criupy.testing.containers_linux import Lab
from criupy.testing.criu_linux import Criu

pytestmark = [pytest.mark.criu, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
PORT = 2727


@contextlib.contextmanager
def started(
    *words: str | Path, env: dict[str, str], pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start a program of one of the hosts; it is gone on leaving."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def succeed(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said


def by_commands(lab: Lab, criu: Criu, images: Path, status: str) -> None:
    """As people do it in a shell, with the status descriptor as a pipe or a fifo."""
    env = {**os.environ, "PATH": lab.path}
    common = ("--image-path", images, "--work-path", images, "--lazy-pages", "--tcp-established")
    if status == "pipe":
        reading, writing = os.pipe()
    else:
        fifo = images.parent / "status"
        os.mkfifo(fifo)
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reading, True)
        writing = os.open(fifo, os.O_WRONLY)
    checkpoint = (
        "checkpoint",
        *common,
        "--page-server",
        f"0.0.0.0:{PORT}",
        "--status-fd",
        str(writing),
        NAME,
    )
    with os.fdopen(reading, "rb") as ready, contextlib.ExitStack() as stack:
        source = stack.enter_context(started(*lab.a.runc(*checkpoint), env=env, pass_fds=(writing,)))
        os.close(writing)
        assert ready.read(1) == b"\0", source.communicate()[0]
        assert (images / "inventory.img").exists()
        daemon_words: list[str | Path] = [
            sys.executable,
            "-m",
            "criupy.lazy_pages",
            "--page-server",
            "-D",
            images,
            "-W",
            images,
        ]
        ready_fd, daemon_fd = os.pipe()
        with os.fdopen(ready_fd, "rb") as daemon_ready:
            daemon = stack.enter_context(
                started(
                    *lab.b.words(*daemon_words, "--address", lab.a.address, "--port", str(PORT)),
                    *("--status-fd", str(daemon_fd)),
                    env=env,
                    pass_fds=(daemon_fd,),
                )
            )
            os.close(daemon_fd)
            assert daemon_ready.read(1) == b"\0", daemon.communicate()[0]
        restore = lab.b.runc("restore", "--detach", "--bundle", lab.b.bundle, *common, NAME)
        subprocess.run(
            restore,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=env,
            check=True,
        )
        lab.switch_to(lab.b)
        assert "complete" in succeed(daemon)
        succeed(source)


def by_library(lab: Lab, criu: Criu, images: Path) -> None:
    """With the example, on either host."""
    program = (sys.executable, ROOT / "examples" / "container_migration.py")
    common = (NAME, "--images", images, "--criu", criu.path)
    address = f"{lab.a.address}:{PORT}"
    env = dict(os.environ)
    with contextlib.ExitStack() as stack:
        send = lab.a.words(*program, "send", *common, "--root", lab.a.root, "--listen", address)
        source = stack.enter_context(started(*send, env=env))
        assert source.stdout is not None
        # The bundle's configuration names the address, which a lazy dump otherwise ignores.
        assert source.stdout.readline() == f"source: serves at {address}\n"
        receive = (*program, "receive", *common, "--root", lab.b.root, "--bundle", lab.b.bundle)
        destination = stack.enter_context(started(*lab.b.words(*receive, "--source", address), env=env))
        assert destination.stdout is not None
        assert destination.stdout.readline().startswith("destination: runs as process ")
        lab.switch_to(lab.b)
        assert succeed(destination).startswith("destination: all memory is here after ")
        assert succeed(source) == "source: it has moved, and is gone here\n"


@pytest.mark.parametrize("way", ["pipe", "fifo", "library"])
def test_web_server_moves(tmp_path: Path, way: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with open_hosts(tmp_path / "hosts") as (lab, criu):
        lab.start_server(lab.a, NAME)
        with lab.client() as client:
            time.sleep(0.5)
            if way == "library":
                by_library(lab, criu, images)
            else:
                by_commands(lab, criu, images, way)
            moved_at = time.time()
            time.sleep(0.5)
            found = client.finish()
        assert (lab.a.status(NAME), lab.b.status(NAME)) == (None, "running")
    for name in ("new", "kept"):
        got = found[name]
        assert (got["wrong"], got["right"] > 50, got["last_at"] > moved_at) == (0, True, True), found
        assert 0 < got["longest_gap"] < 60, found
    # The connection that was open when the server was frozen is the one that is open now.
    assert (found["kept"]["reconnects"], found["kept"]["failed"]) == (1, 0), found
