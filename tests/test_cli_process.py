"""Being a daemon: the socket, the background, the descriptors, the limits."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from criupy._command.process_linux import (
    check_descriptor,
    lower_oom_score,
    raise_descriptor_limit,
    run_action_scripts,
    status_ready,
    write_pidfile,
)
from criupy._command.run import run_command
from criupy.errors import CommandError, LazyPagesError
from criupy.lazy_pages._options import LazyPagesOptions, parse
from criupy.lazy_pages._restore_socket_linux import SOCKET_NAME, bind_restore_socket, let_in
from criupy.lazy_pages._sock_diag_linux import find_listener
from criupy.testing.images import write_images
from criupy.testing.spec import WorkloadSpec

NOBODY = 65534


def refusal(error: pytest.ExceptionInfo[Any], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text


def in_child(program: str, *arguments: object) -> str:
    """Run Python in a process of its own, for what cannot be taken back."""
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


# ---- the restore socket ------------------------------------------------------------


@contextlib.contextmanager
def there(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def connect_as_criu_does(work_dir: Path) -> socket.socket:
    """Connect from inside the work dir, by the bare name."""
    with there(work_dir):
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(SOCKET_NAME)
        except BaseException:
            client.close()
            raise
        return client


def test_a_restore_can_connect_and_its_messages_name_their_sender(tmp_path: Path) -> None:
    with bind_restore_socket(tmp_path) as listener, connect_as_criu_does(tmp_path) as client:
        assert not listener.getblocking()
        assert not listener.get_inheritable()
        served, _ = listener.accept()
        with served:
            client.send(struct.pack("=i", 42))
            data, ancillary, flags, _ = served.recvmsg(4, 256)
    try:
        assert data == struct.pack("=i", 42)
        assert not flags & socket.MSG_CTRUNC
        kinds = {kind: value for level, kind, value in ancillary if level == socket.SOL_SOCKET}
        assert struct.unpack("=iII", kinds[socket.SCM_CREDENTIALS])[0] == os.getpid()
        assert (4 in kinds) is (tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 5))
    finally:
        for _, kind, value in ancillary:
            if kind == 4:
                os.close(struct.unpack("=i", value)[0])


def test_a_restore_that_connects_to_a_held_socket_waits_to_be_let_in(tmp_path: Path) -> None:
    with bind_restore_socket(tmp_path, held=True) as listener:
        with socket.socket(socket.AF_UNIX) as hasty, there(tmp_path):
            hasty.setblocking(False)
            with pytest.raises(BlockingIOError):
                hasty.connect(SOCKET_NAME)
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(connect_as_criu_does, tmp_path)
            let_in(listener)
            with connecting.result() as client, listener.accept()[0] as served:
                client.send(b"here")
                assert served.recv(4) == b"here"


def test_a_held_socket_has_no_name_before_its_place_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks for the file and connects at once would be let in instead of waiting."""
    listen = socket.socket.listen
    seen: list[list[str]] = []

    def looked_for(self: socket.socket, backlog: int) -> None:
        listen(self, backlog)
        seen.append([entry.name for entry in tmp_path.iterdir() if entry.name == SOCKET_NAME])

    monkeypatch.setattr(socket.socket, "listen", looked_for)
    with bind_restore_socket(tmp_path, held=True):
        assert seen == [[]]
        assert [entry.name for entry in tmp_path.iterdir()] == [SOCKET_NAME]


def test_second_bind_in_the_same_dir_waits_for_the_first_to_end(tmp_path: Path) -> None:
    with bind_restore_socket(tmp_path) as listener:
        with pytest.raises(LazyPagesError) as caught:
            bind_restore_socket(tmp_path)
        refusal(caught, tmp_path / SOCKET_NAME, f"pid {os.getpid()}", "--work-dir")
        # The question was put without connecting: nobody is in the queue.
        assert not select.select([listener], [], [], 0)[0]
        with connect_as_criu_does(tmp_path):
            listener.accept()[0].close()
    with bind_restore_socket(tmp_path) as listener, connect_as_criu_does(tmp_path):
        listener.accept()[0].close()


def test_a_socket_that_is_bound_but_not_listening_is_stale(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / SOCKET_NAME))
        assert find_listener((tmp_path / SOCKET_NAME).stat()) is None
        with bind_restore_socket(tmp_path), connect_as_criu_does(tmp_path):
            pass


def test_listeners_elsewhere_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with bind_restore_socket(tmp_path / "a"), bind_restore_socket(tmp_path / "b"):
        pass


def test_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    before = Path.cwd()
    with bind_restore_socket(deep) as listener, connect_as_criu_does(deep):
        listener.accept()[0].close()
    assert Path.cwd() == before


def test_a_relative_path(tmp_path: Path) -> None:
    with there(tmp_path), bind_restore_socket("."):
        assert stat.S_ISSOCK(Path(SOCKET_NAME).stat().st_mode)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / SOCKET_NAME
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(LazyPagesError) as caught:
        bind_restore_socket(tmp_path)
    refusal(caught, path, "not a socket", "remove")
    assert path.is_symlink() or path.exists()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_work_dir_that_is_none(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "x"
    if kind == "file":
        directory.write_text("")
    with pytest.raises(LazyPagesError) as caught:
        bind_restore_socket(directory)
    refusal(caught, directory, "--work-dir")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_work_dir_that_cannot_be_written(tmp_path: Path) -> None:
    # /proc is one to everybody; as root, only another user meets a permission.
    with as_nobody(), pytest.raises(LazyPagesError) as caught:
        bind_restore_socket("/")
    refusal(caught, "/lazy-pages.socket", "Permission denied", "--work-dir")
    with pytest.raises(LazyPagesError) as caught:
        bind_restore_socket("/proc")
    refusal(caught, "/proc/lazy-pages.socket", "--work-dir")


def test_nothing_is_left_open_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / SOCKET_NAME).write_text("")
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with pytest.raises(LazyPagesError):
            bind_restore_socket(tmp_path)
        with pytest.raises(LazyPagesError):
            bind_restore_socket("/proc")
    assert set(Path("/proc/self/fd").iterdir()) == before


# ---- background, pidfile ------------------------------------------------------------

DAEMON = """
import os, sys
from criupy._command.process_linux import daemonize
from pathlib import Path
report, go = int(sys.argv[1]), int(sys.argv[2])
os.chdir(sys.argv[3])
child = daemonize()
if child:
    print(child, flush=True)
    sys.exit(7)
nulls = all(os.path.samestat(os.fstat(fd), os.stat(os.devnull)) for fd in range(3))
os.write(report, repr((os.getpid(), os.getsid(0), os.getcwd(), nulls)).encode())
os.close(report)
os.read(go, 1)
"""


def test_the_daemon_leads_its_own_session_on_dev_null(tmp_path: Path) -> None:
    report, report_in = os.pipe()
    go_out, go = os.pipe()
    try:
        started = subprocess.Popen(
            [sys.executable, "-c", DAEMON, str(report_in), str(go_out), str(tmp_path)],
            pass_fds=[report_in, go_out],
            stdout=subprocess.PIPE,
            text=True,
        )
        # Its output ends while the daemon lives on: it holds nothing of its caller.
        told, _ = started.communicate()
        assert started.returncode == 7
        os.close(report_in)
        report_in = -1
        with open(report, "rb", closefd=False) as file:
            seen = file.read().decode()
        assert seen == repr((int(told), int(told), str(tmp_path), True))
    finally:
        for fd in (go, go_out, report, report_in):  # without `go`, it ends
            if fd >= 0:
                os.close(fd)


def test_pidfile(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    write_pidfile(path, 12345)
    assert path.read_bytes() == b"12345"
    assert path.stat().st_mode & 0o777 == 0o600 & ~_umask()
    with pytest.raises(CommandError) as caught:
        write_pidfile(path, 1)
    refusal(caught, path, "exists", "remove")
    assert path.read_bytes() == b"12345"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_pidfile_in_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        write_pidfile(tmp_path / "no" / "pid", 1)
    refusal(caught, tmp_path / "no" / "pid", "No such file")


# ---- inherited descriptors ----------------------------------------------------------


def test_status_is_one_zero_byte_and_then_the_end() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as file:  # noqa: PTH123 - a descriptor
        status_ready(writer)
        assert file.read() == b"\0"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(writer)


@pytest.mark.parametrize("fd", [1, 2])
def test_status_on_a_standard_descriptor(fd: int) -> None:
    # The number must stay taken: what opens next would become standard output.
    program = (
        "import os, sys\n"
        "from criupy._command.process_linux import status_ready\n"
        "status_ready(int(sys.argv[1]))\n"
        "assert os.open('/', os.O_RDONLY) > 2\n"
        "print('swallowed', file=sys.stdout if sys.argv[1] == '1' else sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(fd)], capture_output=True, check=True)
    assert (ended.stdout if fd == 1 else ended.stderr) == b"\0"


def test_status_without_a_reader_is_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(CommandError) as caught:
            status_ready(writer)
        refusal(caught, f"--status-fd {writer}", "Broken pipe")
    finally:
        os.close(writer)


def test_descriptors_that_nobody_passed_on_are_told_of() -> None:
    reader, writer = os.pipe()
    check_descriptor("--status-fd", writer)
    os.close(reader)
    os.close(writer)
    with pytest.raises(CommandError) as caught:
        check_descriptor("--status-fd", writer)
    refusal(caught, f"--status-fd {writer}", "Bad file descriptor", "passed on")
    with pytest.raises(CommandError) as caught:
        status_ready(writer)
    refusal(caught, f"--status-fd {writer}", "Bad file descriptor")


def test_daemon_and_a_standard_status_descriptor_do_not_go_together() -> None:
    with pytest.raises(CommandError, match="above 2"):
        parse(["-d", "--status-fd", "2"])
    assert isinstance(parse(["--status-fd", "2"]), LazyPagesOptions)


# ---- scripts -----------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_action_scripts_run_in_order_and_know_what_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = script(tmp_path / "first", f'echo "1 $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR" >>{out}')
    second = script(tmp_path / "second", f"echo 2 >>{out}")
    with there(tmp_path):
        run_action_scripts([first, second], "status-ready", ".")
    assert out.read_text() == f"1 status-ready {tmp_path}\n2\n"


def test_a_script_may_refuse(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        run_action_scripts([script(tmp_path / "no", "exit 3")], "status-ready", tmp_path)
    refusal(caught, tmp_path / "no", "status 3")
    with pytest.raises(CommandError) as caught:
        run_action_scripts([str(tmp_path / "missing")], "status-ready", tmp_path)
    refusal(caught, tmp_path / "missing", "No such file")


# ---- limits ------------------------------------------------------------------------

OOM = """
from pathlib import Path
from criupy._command.process_linux import lower_oom_score
file = Path("/proc/self/oom_score_adj")
file.write_text("777")
score = lower_oom_score()
assert score == int(file.read_text()), (score, file.read_text())
assert lower_oom_score() == score
try:
    file.write_text(str(score - 1))
except OSError:
    print("lowest")  # EACCES, or EINVAL below -1000
"""


def test_oom_score_becomes_the_lowest_allowed() -> None:
    assert in_child(OOM) == "lowest\n"


def test_oom_score_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    assert lower_oom_score() == 0


NOFILE = """
import resource
from criupy._command.process_linux import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
limit = raise_descriptor_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, limit)
most = int(open("/proc/sys/fs/nr_open").read())
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
except ValueError:
    assert limit == 128, limit
else:
    assert limit == most, limit
print("highest")
"""


def test_descriptor_limit_becomes_the_highest_allowed() -> None:
    assert in_child(NOFILE) == "highest\n"


def test_descriptor_limit_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64, 128)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, to: limits.append(to))

    def missing(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    assert raise_descriptor_limit() == 128
    assert limits[-1] == (128, 128)


def test_signals_reach_a_daemon_by_its_pidfile(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from criupy._command.process_linux import daemonize, write_pidfile\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "child = daemonize()\n"
        "if child:\n"
        "    write_pidfile(sys.argv[1], child)\n"
        "else:\n"
        "    got = signal.sigwait([signal.SIGTERM])\n"
        "    os.write(int(sys.argv[2]), str(got.value).encode())\n"
    )
    reader, writer = os.pipe()
    with open(reader, "rb") as file:  # noqa: PTH123 - a descriptor
        try:
            words = [sys.executable, "-c", program, str(tmp_path / "pid"), str(writer)]
            subprocess.run(words, pass_fds=[writer], check=True)
        finally:
            os.close(writer)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert file.read() == str(signal.SIGTERM.value).encode()


@pytest.mark.parametrize("limit", [6, 8, 12])
def test_too_few_descriptors_are_one_line(tmp_path: Path, limit: int) -> None:
    """Wherever it is that they run out: at the socket, in trio, in the pager."""
    images = write_images(tmp_path / "images", WorkloadSpec(size=1 << 20), style="full").directory

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    command = [sys.executable, "-m", "criupy.lazy_pages", "-D", str(images), "--progress", "none"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=few, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.endswith("Too many open files; raise the limit on open files (ulimit -n)\n")


def test_a_shortage_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several failures at once one that is ours is told whole."""
    monkeypatch.setattr(logging.getLogger("criupy"), "handlers", [])
    scarce, ours = OSError(errno.EMFILE, "Too many open files"), ValueError("page 7")

    def run(error: Exception) -> int:
        def fail(_: object) -> int:
            raise error

        return run_command("criupy-test", [], lambda _: object(), fail)

    assert run(ExceptionGroup("of a nursery", [scarce, ExceptionGroup("inside", [scarce])])) == 1
    with pytest.raises(ExceptionGroup, match="of a nursery"):
        run(ExceptionGroup("of a nursery", [scarce, ours]))
