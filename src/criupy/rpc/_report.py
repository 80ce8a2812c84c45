"""What went wrong, in words: CRIU's message, its log's errors, and what to do about the known cases."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from criupy.errors import CriuError
from criupy.rpc import _schema_pb2 as schema

__all__ = [
    "MAX_LINES",
    "NEVER_ATTACHED",
    "NO_DIRTY_TRACKING",
    "LogWatch",
    "best_of",
    "errors_in",
    "failure",
    "hint_for",
]

_MAX_TAIL: Final = 256 * 1024
MAX_LINES: Final = 5
_ERROR: Final = re.compile(r"^(?:\([0-9.]+\)\s*)?(?:pie: \d+: |\s*\d+: )?(Error \([^)]*\): .*)$")
_PREFIX: Final = re.compile(r"^Error \([^)]*\): ")
#: Logged first, without CAP_SYS_RESOURCE or /dev/net/tun, and CRIU reports its first error as the message.
_HARMLESS: Final = re.compile("Can't setup RLIMIT_NOFILE|tun: Unable to create tun")
# Answers have Linux's numbers, whatever this system calls so.
_ESRCH: Final = 3
_EEXIST: Final = 17
_EBADRQC: Final = 56
#: Says only that something was said before.
_EMPTY_WORDS: Final = ("Dumping FAILED", "Restoring FAILED", "Pre-dumping FAILED")


def errors_in(text: str) -> tuple[str, ...]:
    """Return the error lines of a log that mean something, oldest first."""
    found = (match[1] for line in text.splitlines() if (match := _ERROR.match(line)))
    return tuple(line for line in found if not _HARMLESS.search(line))


@dataclass(frozen=True, slots=True)
class LogWatch:
    """CRIU's log of one request: ``path`` as we reach it, ``before`` what was there at the start."""

    path: Path
    before: tuple[int, int, int] | None

    @classmethod
    def of(cls, directory: Path, name: str) -> LogWatch:
        """Watch a log that CRIU will write in a directory."""
        path = directory / name
        return cls(path, _identity(path))

    def errors(self) -> tuple[str, ...]:
        """Return the error lines that this request wrote last."""
        return errors_in(self.text())

    def text(self) -> str:
        """Return the end of what this request wrote; CRIU truncates its log at the start."""
        if not self.is_written:
            return ""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _MAX_TAIL))
                return file.read(_MAX_TAIL).decode(errors="replace")
        except OSError:
            return ""  # another user's, or gone: the message has to do

    @property
    def is_written(self) -> bool:
        """Whether this request has written it."""
        now = _identity(self.path)
        return now is not None and now != self.before

    @property
    def name(self) -> str:
        """Where it is, for a person."""
        with contextlib.suppress(OSError):
            return str(self.path.resolve())
        return str(self.path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


NO_DIRTY_TRACKING: Final = (
    "this kernel has no dirty tracking (CONFIG_MEM_SOFT_DIRTY), which pre-dumps and track_mem need"
)

# What CRIU says, as a pattern, and what to do about it. The first that fits is given.
_HINTS: Final[tuple[tuple[str, str], ...]] = (
    (
        r"CAP_SYS_ADMIN|CAP_CHECKPOINT_RESTORE|needs? to (be )?run(ning)? as root",
        "run it as root, or give it CAP_CHECKPOINT_RESTORE and the option unprivileged=True (CRIU 3.18)",
    ),
    (
        r"Can't get 1:(16|34) opt",  # SO_PASSCRED, SO_PASSSEC of SOL_SOCKET
        "on kernels from 6.16 on this CRIU can dump Unix sockets only: use CRIU 4.2 or newer",
    ),
    (
        r"Can't get rlimit|Can't (set|get|dump).{0,12}rlimit|prlimit",
        "limits of a task that changed its user can be read only with CAP_SYS_RESOURCE",
    ),
    (
        # CRIU does not notice that a pipe stayed small, and asks more of it than is in it.
        r"page-pipe: tee: \d+:|page-pipe: splice: -?\d+: Bad file descriptor",
        (
            "CRIU's pipes could not grow: sysctl -w fs.pipe-max-size=8388608, and without CAP_SYS_RESOURCE "
            "and CAP_SYS_ADMIN fs.pipe-user-pages-soft=0 as well (criupy check)"
        ),
    ),
    (
        r"make pipe for page-pipe: Too many open files(?! in system)",
        (
            "every pipe with memory takes two descriptors: raise RLIMIT_NOFILE, and let pipes be larger: "
            "sysctl -w fs.pipe-max-size=8388608 (criupy check)"
        ),
    ),
    (
        r"[Tt]racking memory is not available|dirty track|BUG at criu/mem\.c",
        NO_DIRTY_TRACKING,
    ),
    (
        r"criu itself is within dumped tree",
        "CRIU cannot dump its own ancestors: self_dump() can, and so can a service (socket=)",
    ),
    (r"empty-image|Can't open inventory", "are the images of a dump in there? criupy images DIR tells"),
    (r"No space left on device", "the disk that holds the images or the log is full"),
    (r"Read-only file system", "images_dir or work_dir is on a file system that cannot be written"),
    (
        r"session leader of .* is outside of its pid namespace",
        "CRIU cannot restore such a session, not with shell_job either: start it there with setsid",
    ),
    (r"shell[ -]job", "the tasks have a session or terminal of somebody else's: give shell_job=True"),
    (r"link-remap option", "an open file was unlinked but has other names: give link_remap=True"),
    (
        r"In-flight connection",
        "a connection waits to be accepted: give tcp_skip_in_flight=True to leave it out, or try again",
    ),
    (r"Connected TCP socket", "give tcp_established=True, or tcp_close=True to do without the connections"),
    (
        r"[Uu]nix (socket|connection).*(external|unlinked|peer)|[Ee]xternal socket",
        "the other end of a socket is outside of the tree: name it with external=[...]",
    ),
    (r"[Ff]ile locks are h", "give file_locks=True, if nobody outside of the tree uses these locks"),
    (
        r"lazy-pages\.socket|connect.*lazy",
        "a lazy-pages daemon has to listen in the work directory before: lazy_restore() starts one",
    ),
    (
        r"ip6?tables-restore|nft.*failed",
        'CRIU locks the network with iptables or nft: install it, or give network_lock="skip" (CRIU 3.19)',
    ),
    (
        r"cpu: .*(mismatch|not supported|missing)",
        "the images need a CPU with more features than this one has",
    ),
    (
        r"Failed sending restore finished",
        "the lazy-pages daemon had given up: lazy-pages.log in the work directory says why",
    ),
    (r"[Uu]ffd|userfaultfd", "see what userfaultfd can do here: criupy check"),
)
_PID_TAKEN: Final = r"Can't (fork for|setsid|setpgid)[^\n]*File exists"
#: The file that logged a line says nothing of what is in the line.
_PLACE: Final = re.compile(r"\([a-z][\w./-]*\.[ch]:\d+\)")
_NO_PROCESS: Final = "there is no such process, or it has ended"
#: A consequence, and the first error that CRIU logs where it keeps quiet about the cause.
NEVER_ATTACHED: Final = "Unable to detach from"
_PORT_TAKEN: Final = r"[Aa]ddress already in use"
_PORT_IN_USE: Final = (
    "somebody listens there already, perhaps the source of an earlier migration: take another port"
)
_PID_IN_USE: Final = (
    "the pid, or the number of its session or group, is in use here (a zombie's, too): "
    "reap or end that process, or restore in a new pid namespace"
)


def hint_for(request: str, code: int | None, text: str, message: str = "") -> str | None:
    """Return what to do about a known failure; ``text`` is all that CRIU said, ``message`` the best of it."""
    if request.endswith("restore") and (code == _EEXIST or re.search(_PID_TAKEN, text)):
        return _PID_IN_USE
    text = _PLACE.sub("", text)
    if request.endswith("dump") and re.search(_PORT_TAKEN, text):
        return _PORT_IN_USE
    if request == "cpuinfo_check" and re.search("empty-image|No cpuinfo image", text):
        return "there is no cpuinfo.img: cpuinfo_dump() writes it"
    for pattern, hint in _HINTS:
        if re.search(pattern, text):
            return hint
    if code == _ESRCH:
        return _NO_PROCESS
    if code == _EBADRQC:
        return "CRIU refused the options: do they need another CRIU, kernel or privilege? (criupy check)"
    if message.startswith(NEVER_ATTACHED):
        return f"{_NO_PROCESS}; or a page server was given and cannot be reached"
    return None


def failure(request: str, response: schema.Response, *, log: LogWatch | None, output: str) -> CriuError:
    """Make the error for an answer without success."""
    code = response.cr_errno or None
    told = response.cr_errmsg.decode(errors="replace")
    lines = log.errors() if log is not None else ()
    printed = errors_in(output)
    message = best_of((told, *lines, *printed)) or (
        "CRIU failed without a word" if not output else output.splitlines()[0]
    )
    said = "\n".join((told, *lines, output))
    return CriuError(
        request,
        message,
        errno=code,
        log_errors=(lines or printed)[-MAX_LINES:],
        log_file=log.name if log is not None and log.is_written else None,
        output=output,
        hint=hint_for(request, code, said, message),
    )


def best_of(candidates: tuple[str, ...]) -> str | None:
    """Choose the first sentence that says something, and take the place in CRIU's source off it."""
    useful = [line.strip() for line in candidates if line.strip() and not _HARMLESS.search(line)]
    for line in useful:
        if not any(words in line for words in _EMPTY_WORDS):
            return _PREFIX.sub("", line)
    return _PREFIX.sub("", useful[0]) if useful else None
