"""criupy-page-server as a process: readiness, ports, signals, exit statuses, one line a failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("criupy._uffd._native", reason="needs criupy's native part")

from criupy.testing.images import (
    PAGEMAP_MAGIC,
    PE_LAZY,
    PE_PRESENT,
    WrittenImages,
    image,
    number,
    pagemap_entry,
    write_images,
)
from criupy.testing.spec import WorkloadSpec
from page_server_clients import GET, PAGE, Destination, Dumper, frame, loopback, task
from page_server_command import HANG, Running, command, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]

A = 0x10_0000_0000
SPEC = WorkloadSpec(size=64 * PAGE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> WrittenImages:
    return write_images(tmp_path_factory.mktemp("images"), SPEC, style="full")


def page(index: int) -> bytes:
    return SPEC.page(0, index)


def test_destinations_are_served_until_it_is_asked_to_stop(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--stats-file", "stats.json", "--display-stats") as c:
        for _ in range(2):
            destination = c.connect()
            assert destination.get(100, A, 3) == page(0) + page(1) + page(2)
            assert destination.close() == 0
        until(lambda: c.log.count("has ended") == 2)
        c.stop()
        assert c.ended() == 0
        assert c.process.stdout is not None
        shown = c.process.stdout.read()
    assert c.errors == c.warnings == []
    assert f"listening on 127.0.0.1:{c.port}\n" in c.log
    assert shown == (
        "Connections:   2 (2 closed), 0 refused\nLazy memory:   6 pages (0.0 MiB) for 4 requests\n"
    )
    told = json.loads((tmp_path / "stats.json").read_text())
    assert (told["ended"], told["refused"], told["pages"], told["bytes"]) == (2, 0, 6, 6 * PAGE)
    assert told["endings"] == {"closed": 2}
    assert [one["pages"] for one in told["connections"]] == [3, 3]
    assert 0 < told["connections"][0]["seconds_to_first_page"] <= told["connections"][0]["seconds"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_any_wish_to_stop(number: signal.Signals, images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path) as c:
        c.stop(number)
        assert c.ended() == 0


def test_other_signals_do_not_end_it(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path) as c:
        for number in (signal.SIGUSR1, signal.SIGQUIT, signal.SIGALRM):
            c.stop(number)
        assert c.connect().close() == 0
        c.stop()
        assert c.ended() == 0


# ---- where it listens ----------------------------------------------------------------


def test_a_given_port(images: WrittenImages, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with command(images.directory, tmp_path, "--port", str(port)) as c:
        assert c.port == port
        with socket.create_connection(("127.0.0.1", port)):
            pass
        c.stop()
        assert c.ended() == 0


def test_ipv6(images: WrittenImages, tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with command(images.directory, tmp_path, address=("--address", "::1")) as c:
        assert f"listening on [::1]:{c.port}\n" in c.log
        assert c.connect("::1").close() == 0
        c.stop()
        assert c.ended() == 0


def test_loopback_where_nothing_else_is_said(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, address=()) as c:
        (line,) = c.warnings
        assert "--address" in line
        assert c.connect().close() == 0
        c.stop()
        assert c.ended() == 0


@pytest.mark.parametrize("allow", [[], ["--allow", "127.0.0.0/8"]])
def test_the_network_is_warned_of(allow: Sequence[str], images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, *allow, address=("--address", "0.0.0.0")) as c:
        assert c.connect().close() == 0
        c.stop()
        assert c.ended() == 0
    assert sum("clear text" in line and "--allow" in line for line in c.warnings) == (not allow)


# ---- whom it serves --------------------------------------------------------------------


def test_only_who_is_allowed(images: WrittenImages, tmp_path: Path) -> None:
    words = ["--allow", "10.0.0.0/8", "--allow", "127.0.0.2", "--stats-file", "stats.json"]
    with command(images.directory, tmp_path, *words) as c:
        with c.connect() as stranger:
            assert stranger.is_over()
        assert c.connect(source="127.0.0.2").close() == 0
        c.stop()
        assert c.ended() == 0
    (line,) = c.warnings
    assert "in no network that is allowed" in line
    assert json.loads((tmp_path / "stats.json").read_text())["refused"] == 1


def test_only_so_many(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--max-connections", "1") as c:
        first = c.connect()
        assert first.get(100, A) == page(0)
        with c.connect() as second:
            assert second.is_over()
        assert first.close() == 0
        c.stop()
        assert c.ended() == 0


def test_idle_and_standing_still(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--idle-timeout", "100ms", "--stall-timeout", "5") as c:
        with c.connect() as idle:
            idle.get(100, A)
            assert idle.is_over()
        c.stop()
        assert c.ended() == 0
    (line,) = c.warnings
    assert "--idle-timeout" in line
    (tmp_path / "again").mkdir()
    with command(images.directory, tmp_path / "again", "--stall-timeout", "100ms") as c:
        with c.connect() as stalled:
            stalled.sock.sendall(b"\x07")
            assert stalled.is_over()
        c.stop()
        assert c.ended() == 0
    assert len(c.warnings) == 1


@pytest.mark.parametrize("where", ["nowhere/stats.json", "directory"])
def test_statistics_that_could_not_be_written_are_told_at_the_start(
    where: str, images: WrittenImages, tmp_path: Path
) -> None:
    (tmp_path / "directory").mkdir()
    with command(images.directory, tmp_path, "--stats-file", where, ready=b"") as c:
        assert f"--stats-file {tmp_path / where}: " in c.failed()


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """512 MiB and 100,000 extents, one destination that takes all, and one that reads nothing."""
    large, nr_small = 1 << 17, 100_000
    directory = write_images(tmp_path / "images", SPEC, style="full").directory
    entries = [pagemap_entry(A + 2 * n * PAGE, 1, PE_LAZY | PE_PRESENT, count="new") for n in range(nr_small)]
    entries.append(pagemap_entry(2 * A, large, PE_LAZY | PE_PRESENT, count="new"))
    (directory / "pagemap-100.img").write_bytes(image(PAGEMAP_MAGIC, [number(1, 1), *entries]))
    os.truncate(directory / "pages-1.img", (large + nr_small) * PAGE)
    with command(directory, tmp_path) as c, c.connect() as silent, c.connect() as destination:
        silent.sock.sendall(1000 * frame(32, GET, 1024, 2 * A, 100))
        requests = [(A + 2 * n * PAGE, 1) for n in range(0, nr_small, 100)]
        requests += [(2 * A + n * PAGE, 1024) for n in range(0, large, 1024)]
        for first in range(0, len(requests), 16):
            some = requests[first : first + 16]
            destination.sock.sendall(b"".join(frame(32, GET, nr, start, 100) for start, nr in some))
            for start, nr in some:
                got, where, _, _ = destination.answer()
                assert (got, where) == (nr, start)
        status = Path(f"/proc/{c.process.pid}/status").read_text()
        (peak,) = (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        assert peak < 60_000_000 + 64 * len(entries)
        c.process.kill()


def test_wishes_to_stop_that_come_late_change_nothing(images: WrittenImages, tmp_path: Path) -> None:
    for n in range(0, 10, 2):
        work = tmp_path / str(n)
        work.mkdir()
        with command(images.directory, work) as c:
            while c.process.poll() is None:
                c.stop()
                time.sleep(0.001 * n)
            assert c.ended() == 0


def test_who_asked_for_nothing_lacks_nothing(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--stop-timeout", "100ms") as c, c.connect() as silent:
        c.stop()
        assert silent.is_over()
        assert c.ended() == 0


# ---- one connection ----------------------------------------------------------------------


def refuses(c: Running) -> bool:
    # The first one may be served before the door is shut behind it.
    try:
        c.connect().sock.close()
    except ConnectionRefusedError:
        return True
    return False


def test_once(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--once") as c:
        destination = c.connect()
        assert destination.get(100, A) == page(0)
        until(lambda: refuses(c))
        assert destination.close() == 0
        assert c.ended() == 0
        assert c.errors == c.warnings == []


@pytest.mark.parametrize("how", ["leaves", "resets", "asks for what is not there", "sends garbage"])
def test_once_and_a_session_that_is_not_closed(how: str, images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--once", "--stats-file", "stats.json") as c:
        with c.connect() as destination:
            destination.get(100, A)
            if how == "resets":
                destination.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            elif how == "asks for what is not there":
                destination.send(GET, 1, A + 64 * PAGE, 100)
                assert destination.is_over()
            elif how == "sends garbage":
                destination.sock.sendall(b"\xff" * 64)
                assert destination.is_over()
        assert "before the destination had closed its session" in c.failed()
    assert json.loads((tmp_path / "stats.json").read_text())["pages"] == 1


def test_once_waits_for_someone_who_is_allowed(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--once", "--allow", "127.0.0.2") as c:
        with c.connect() as stranger:
            assert stranger.is_over()
        assert c.connect(source="127.0.0.2").close() == 0
        assert c.ended() == 0


def test_once_and_nobody_came(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--once") as c:
        c.stop()
        assert "no destination was served" in c.failed()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_an_inherited_connection(kind: str, images: WrittenImages, tmp_path: Path) -> None:
    ours, theirs = loopback() if kind == "tcp" else socket.socketpair()
    fd = theirs.fileno()
    with (
        ours,
        theirs,
        command(images.directory, tmp_path, "--ps-socket", str(fd), address=(), passed=[fd]) as c,
    ):
        theirs.close()
        destination = Destination(ours)
        assert destination.get(100, A, 64) == b"".join(map(page, range(64)))
        assert destination.close() == 0
        assert c.ended() == 0
    assert c.errors == []
    assert not (tmp_path / "port").exists()
    assert "listening on" not in c.log


def test_an_inherited_connection_that_is_lost(images: WrittenImages, tmp_path: Path) -> None:
    ours, theirs = loopback()
    with theirs:
        words = ["--ps-socket", str(theirs.fileno())]
        with command(images.directory, tmp_path, *words, address=(), passed=[theirs.fileno()]) as c:
            theirs.close()
            ours.close()
            assert "before the destination had closed" in c.failed()


# ---- stopping ------------------------------------------------------------------------------


def test_the_first_wish_waits_for_who_is_connected(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path) as c:
        destination = c.connect()
        destination.get(100, A)
        c.stop()
        until(lambda: "asked to stop: 1 are connected" in c.log)
        assert destination.get(100, A + PAGE) == page(1)
        assert destination.close() == 0
        assert c.ended() == 0


def test_the_second_cuts(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path) as c, c.connect() as destination:
        destination.get(100, A)
        c.stop()
        until(lambda: "asked to stop" in c.log)
        c.stop()
        assert "1 of those connected were cut" in c.failed()
        assert destination.is_over()


def test_patience_ends(images: WrittenImages, tmp_path: Path) -> None:
    words = ["--stop-timeout", "100ms", "--stats-file", "stats.json"]
    with command(images.directory, tmp_path, *words) as c, c.connect() as destination:
        destination.get(100, A)
        c.stop()
        assert "were cut" in c.failed()
        assert destination.is_over()
    assert json.loads((tmp_path / "stats.json").read_text())["endings"] == {"cut": 1}


# ---- in the background -------------------------------------------------------------------


def test_in_the_background(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "-d", "--pidfile", "pid", "--once", "--display-stats") as c:
        assert c.ended() == 0
        pid = int((tmp_path / "pid").read_text())
        descriptor = os.pidfd_open(pid)
        try:
            destination = c.connect()
            assert destination.get(100, A) == page(0)
            assert destination.close() == 0
            until(lambda: "Lazy memory:   1 page " in c.log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
    assert c.errors == []


def test_the_port_is_told_before_the_parent_returns(images: WrittenImages, tmp_path: Path) -> None:
    # No descriptor to wait on: what a shell script does.
    words = ["-D", str(images.directory), "-W", str(tmp_path), "--lazy-pages", "--address", "127.0.0.1"]
    words += ["--port", "0", "-d", "--pidfile", "pid", "--port-file", "port"]
    subprocess.run([sys.executable, "-m", "criupy.page_server", *words], check=True)
    try:
        with socket.create_connection(("127.0.0.1", int((tmp_path / "port").read_text()))) as sock:
            assert Destination(sock).get(100, A) == page(0)
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_action_scripts(images: WrittenImages, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\necho "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR" >{tmp_path}/out\n')
    script.chmod(0o700)
    with command(images.directory, tmp_path, "--action-script", str(script)) as c:
        assert (tmp_path / "out").read_text() == f"status-ready {images.directory}\n"
        c.stop()
        assert c.ended() == 0


def test_an_action_script_that_refuses(images: WrittenImages, tmp_path: Path) -> None:
    with command(images.directory, tmp_path, "--action-script", "/bin/false", ready=b"") as c:
        assert "refused status-ready" in c.failed()


def test_nobody_reads_the_status(images: WrittenImages, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with command(images.directory, tmp_path, "--status-fd", str(writer), passed=[writer], ready=b"") as c:
            assert "--status-fd" in c.failed()
    finally:
        os.close(writer)


# ---- one line for what cannot be --------------------------------------------------------


def refused(*words: str, passed: Sequence[int] = ()) -> str:
    """Run the command with words it cannot follow; its one line."""
    ended = subprocess.run(
        [sys.executable, "-m", "criupy.page_server", *words],
        capture_output=True,
        text=True,
        check=False,
        pass_fds=passed,
        timeout=HANG,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    return line


def test_one_line_for_what_cannot_be(images: WrittenImages, tmp_path: Path) -> None:
    full = ["--lazy-pages", "--address", "127.0.0.1", "-D", str(images.directory)]
    assert "/no/such: no such directory" in refused("--lazy-pages", "-D", "/no/such")
    assert "--work-dir /no/such" in refused(*full, "-W", "/no/such")
    assert "--allow: '10.0.0.1/8'" in refused(*full, "--allow", "10.0.0.1/8")
    assert "/no/such: " in refused(*full, "--tls", "--tls-cert", "/no/such")
    assert "--log-file" in refused(*full, "-o", "no/such/log")
    assert "--port-file" in refused(*full, "--port-file", "no/such/port")
    assert "pidfile" in refused(*full, "-d", "-W", str(tmp_path), "--pidfile", "no/such/pid")
    assert "no such address" in refused(*full, "--address", "a..b")
    assert "--address" in refused(*full, "--address", "192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(*full, "--port", str(taken.getsockname()[1]))
        assert "Address already in use" in line
        assert "--port" in line
        fd = taken.fileno()
        words = ["--lazy-pages", "-D", str(images.directory), "--ps-socket", str(fd)]
        assert "has to be a connected socket" in refused(*words, passed=[fd])
    with (tmp_path / "file").open("w") as file:
        words[-1] = str(file.fileno())
        assert "has to be a connected socket" in refused(*words, passed=[file.fileno()])
    assert "has to be passed on open" in refused(*words)


def test_images_that_cannot_be_served(tmp_path: Path) -> None:
    lazy = write_images(tmp_path / "lazy", SPEC)
    words = ["--lazy-pages", "--address", "127.0.0.1", "-D"]
    assert "this is a lazy dump" in refused(*words, str(lazy.directory))
    (tmp_path / "empty").mkdir()
    assert "inventory.img" in refused(*words, str(tmp_path / "empty"))
    # Told before the background, to whoever starts it.
    assert "this is a lazy dump" in refused(*words, str(lazy.directory), "-d")


# ---- receiving ---------------------------------------------------------------------------------------


def test_receiving_one_dump(tmp_path: Path) -> None:
    """It ends when the dump has, as CRIU's does: whoever dumps waits for the images."""
    folder = tmp_path / "images"
    folder.mkdir()
    with command(folder, tmp_path, "--display-stats", lazy_pages=False) as running:
        with running.connect() as sock:
            dumper = Dumper(sock.sock, 32)
            assert not dumper.open(task(7))
            dumper.add(task(7), 0x10000, b"x" * 2 * PAGE)
            assert dumper.close() == 0
        assert running.ended() == 0
        assert running.process.stdout is not None
        assert "Received:      2 pages (0.0 MiB)" in running.process.stdout.read()
        assert running.errors == running.warnings == []
    assert [path.name for path in sorted(folder.iterdir())] == ["pagemap-7.img", "pages-65537.img"]


def test_receiving_half_a_dump(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with command(folder, tmp_path, lazy_pages=False) as running:
        with running.connect() as sock:
            dumper = Dumper(sock.sock, 32)
            assert not dumper.open(task(7))
        assert (
            "the dump did not come to its end, see the warning: no images of it are here" in running.failed()
        )
        (warning,) = running.warnings
        assert "the peer closed without CLOSE" in warning
    assert list(folder.iterdir()) == []


def test_a_dump_that_ends_without_an_image(tmp_path: Path) -> None:
    """As one that has failed early: CRIU closes its session in good order also then."""
    with command(tmp_path, tmp_path, lazy_pages=False) as running:
        with running.connect() as sock:
            assert Dumper(sock.sock, 32).close() == 0
        assert "the dump has ended, and no images came: it must have failed" in running.failed()


def test_receiving_nothing(tmp_path: Path) -> None:
    with command(tmp_path, tmp_path, lazy_pages=False) as running:
        running.stop()
        assert "no dump has come" in running.failed()
