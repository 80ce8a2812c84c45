"""What an error says: the telling sentence of CRIU, its log's errors, and what to do about known cases."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._report import LogWatch, errors_in, failure, hint_for

RLIMIT = "Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted"
LOG = f"""\
(00.000211) Version: 4.2.1 (gitid 0)
{RLIMIT}
(00.003512) Warn  (criu/kerndat.c:1103): no nftables
(00.004001) Error (criu/tty.c:231): tty: Found dangling tty with sid 5 pgid 5
pie: 77: Error (criu/pie/restorer.c:99): Can't restore
    12: Error (criu/files.c:3): of a task
(00.004102) Error (criu/cr-dump.c:1975): Dumping FAILED.
An Error (in words) in the middle of a line
"""


def test_error_lines_of_a_log() -> None:
    assert errors_in(LOG) == (
        "Error (criu/tty.c:231): tty: Found dangling tty with sid 5 pgid 5",
        "Error (criu/pie/restorer.c:99): Can't restore",
        "Error (criu/files.c:3): of a task",
        "Error (criu/cr-dump.c:1975): Dumping FAILED.",
    )


# Sentences of CRIU, as 3.17.1, 4.1.1 and 4.2.1 have them, and a word of what is said to do.
SENTENCES = [
    (
        "dump",
        0,
        "CRIU needs to have the CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE capability",
        "unprivileged",
    ),
    (
        "dump",
        0,
        "Error (criu/sockets.c:614): sockets: Can't get 1:16 opt: Operation not supported",
        "CRIU 4.2",
    ),
    (
        "dump",
        0,
        "Error (criu/page-pipe.c:424): page-pipe: splice: -1: Bad file descriptor",
        "fs.pipe-max-size=8388608",
    ),
    (
        "lazy_dump",
        0,
        "Error (criu/page-pipe.c:418): page-pipe: tee: 65536: Operation not permitted",
        "fs.pipe-user-pages-soft=0",
    ),
    (
        "lazy_dump",
        0,
        "Error (criu/page-pipe.c:118): page-pipe: Can't make pipe for page-pipe: Too many open files",
        "RLIMIT_NOFILE",
    ),
    (
        "lazy_restore",
        0,
        "Error (criu/uffd.c:1306): uffd: Failed sending restore finished indication: Broken pipe",
        "lazy-pages.log",
    ),
    ("pre_dump", 0, "Tracking memory is not available. Consider omitting --track-mem option.", "SOFT_DIRTY"),
    ("dump", 0, "Error (criu/mem.c:46): BUG at criu/mem.c:46", "SOFT_DIRTY"),
    (
        "dump",
        0,
        "Error (criu/cr-dump.c:1528): A session leader of 5(5) is outside of its pid namespace",
        "setsid",
    ),
    ("dump", 0, "A session leader of zombie process 5(5) is outside of its pid namespace", "setsid"),
    (
        "dump",
        0,
        "The root process 9 is not a session leader. Consider using --shell-job option",
        "shell_job",
    ),
    ("dump", 0, "inet: Connected TCP socket, consider using --tcp-established option.", "tcp_established"),
    ("dump", 0, "unix: External socket is used. Consider using --ext-unix-sk option.", "external="),
    ("dump", 0, "The criu itself is within dumped tree.", "self_dump()"),
    ("dump", errno.ESRCH, "Unable to detach from 9: No such process", "no such process"),
    ("dump", 56, "", "refused the options"),  # EBADRQC of Linux
    ("restore", errno.EEXIST, "", "is in use here"),
    ("restore", 0, "Error (criu/cr-restore.c:1237): Can't fork for 31: File exists", "is in use here"),
    ("restore", 0, "Unexpected EOF on (empty-image)", "criupy images"),
    ("cpuinfo_check", 0, "Unexpected EOF on (empty-image)", "cpuinfo_dump()"),
    ("restore", 0, "uffd: connect() to lazy-pages.socket: Connection refused", "lazy_restore()"),
]


@pytest.mark.parametrize(("request_", "code", "text", "hint"), SENTENCES)
def test_hints(request_: str, code: int, text: str, hint: str) -> None:
    assert hint in (hint_for(request_, code, text) or "")


@pytest.mark.parametrize("text", ["", "Error (criu/tty.c:1): something new", RLIMIT])
def test_no_hint_where_nothing_is_known(text: str) -> None:
    assert hint_for("dump", None, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Error (criu/files-reg.c:1): Can't link a -> b: File exists",
        "Error (criu/cgroup.c:1): cg: mkdir failed: File exists",
        "Error (criu/uffd.c:9): nothing of the kind",
    ],
)
def test_no_hint_of_a_restore_where_nothing_is_known(text: str) -> None:
    assert hint_for("restore", None, text) is None


def answer(message: bytes = b"", code: int = 0) -> schema.Response:
    found = schema.Response(type=schema.DUMP, success=False, cr_errno=code)
    if message:
        found.cr_errmsg = message
    return found


def test_the_harmless_first_error_is_not_the_message(tmp_path: Path) -> None:
    log = LogWatch.of(tmp_path, "criu.log")
    (tmp_path / "criu.log").write_text(LOG)
    error = failure("dump", answer(RLIMIT.encode(), 3), log=log, output="")
    assert error.message == "tty: Found dangling tty with sid 5 pgid 5"
    assert error.errno == 3
    assert len(error.log_errors) == 4
    assert error.log_file == str(tmp_path / "criu.log")
    assert str(error) == (
        "dump: tty: Found dangling tty with sid 5 pgid 5 (No such process, errno 3) "
        f"[log: {tmp_path}/criu.log] - there is no such process, or it has ended"
    )


def test_an_older_log_is_not_this_requests(tmp_path: Path) -> None:
    (tmp_path / "criu.log").write_text(LOG)
    log = LogWatch.of(tmp_path, "criu.log")
    error = failure("dump", answer(), log=log, output="")
    assert error.log_errors == ()
    assert error.log_file is None
    assert error.message == "CRIU failed without a word"


def test_what_was_only_printed() -> None:
    error = failure("dump", answer(), log=None, output="criu: cannot do that\nsee the manual")
    assert error.message == "criu: cannot do that"
    error = failure(
        "dump", answer(), log=None, output=f"{RLIMIT}\nError (criu/image.c:721): Can't open dir /no"
    )
    assert error.message == "Can't open dir /no"
    assert error.log_errors == ("Error (criu/image.c:721): Can't open dir /no",)


def test_a_log_that_is_long_and_not_text(tmp_path: Path) -> None:
    log = LogWatch.of(tmp_path, "criu.log")
    lines = b"\xff\xfe noise\n" * 50_000
    (tmp_path / "criu.log").write_bytes(lines + b"Error (criu/a.c:1): the last \xff one\n")
    assert log.errors() == ("Error (criu/a.c:1): the last \ufffd one",)
