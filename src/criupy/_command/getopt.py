"""Read a command line as CRIU does, and rewrite it in words that mean one thing.

CRIU reads its line with glibc's getopt_long(3). argparse is no substitute: it
has no optional argument that must be attached (``-v4``, but not ``-v 4``),
splits clusters differently, and its prefixes know nothing of flags that mean
the same. So argv is normalised here first, and argparse sees only ``--name``
and ``--name=value`` with full names.

The rules, as glibc has them:

* a long name that is written out wins over every longer one;
* a prefix is good when all options it fits take the same kind of argument and
  set the same thing (CRIU's table has such pairs), else it is ambiguous;
* a required argument is what follows ``=``, or the next word whatever it looks
  like; an optional one must be attached;
* words that are no options may stand anywhere; ``--`` ends the options.

CRIU's names are resolved as if ours did not exist, so that a prefix that works
with CRIU goes on working. POSIXLY_CORRECT is not honoured: CRIU's own command
line does not work with it either.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["CRIU_OPTIONS", "Argument", "GetoptError", "Option", "normalise", "show"]


class GetoptError(ValueError):
    """The command line is not one that CRIU (or ours) would read; one line says why."""


class Argument(enum.Enum):
    """Whether an option takes an argument."""

    NONE = 0
    REQUIRED = 1
    OPTIONAL = 2


@dataclass(frozen=True, slots=True)
class Option:
    """A long option.

    ``sets`` and ``value`` say what it does: two options with the same pair and
    the same ``argument`` are one option to a prefix.
    """

    name: str
    argument: Argument
    sets: str
    value: bool = True


def _plain(*names: str) -> list[Option]:
    return [Option(name, Argument.NONE, name) for name in names]


def _required(*names: str) -> list[Option]:
    return [Option(name, Argument.REQUIRED, name) for name in names]


def _optional(*names: str) -> list[Option]:
    return [Option(name, Argument.OPTIONAL, name) for name in names]


def _switch(name: str, sets: str | None = None) -> list[Option]:
    sets = sets or name
    return [Option(name, Argument.NONE, sets), Option(f"no-{name}", Argument.NONE, sets, value=False)]


# Names and kinds: the table of long options in criu/config.c of 4.2; 4.1.1 lacks only allow-uprobes.
CRIU_OPTIONS: tuple[Option, ...] = (
    *_plain("leave-stopped", "leave-running", "help", "version", "ms", "exec-cmd", "lazy-pages", "all"),
    *_plain("enable-external-sharing", "enable-external-masters", "no-default-config", "tls-no-cn-verify"),
    *_switch("restore-detached", "daemon"),  # one variable in CRIU, and -d sets it
    *_switch("daemon"),
    *_switch("restore-sibling"),
    *_switch("tcp-established"),
    *_switch("skip-in-flight"),
    *_switch("tcp-close"),
    *_switch("log-pid"),
    *_switch("evasive-devices"),
    *_switch("link-remap"),
    *_switch("shell-job"),
    *_switch("file-locks"),
    *_switch("page-server"),
    *_switch("track-mem"),
    *_switch("auto-dedup"),
    *_switch("force-irmap"),
    *_switch("extra"),
    *_switch("experimental"),
    *_switch("deprecated"),
    *_switch("display-stats"),
    *_switch("weak-sysctls"),
    *_switch("stream"),
    *_switch("tls"),
    *_switch("skip-file-rwx-check"),
    *_switch("mntns-compat-mode"),
    *_switch("unprivileged"),
    *_switch("ghost-fiemap"),
    *_switch("allow-uprobes"),
    *_required("tree", "images-dir", "work-dir", "log-file", "join-ns", "root", "close", "pidfile"),
    *_required("veth-pair", "action-script", "address", "port", "prev-images-dir", "libdir"),
    *_required("ext-mount-map", "cgroup-root", "inherit-fd", "feature", "skip-mnt", "enable-fs"),
    *_required("freeze-cgroup", "ghost-limit", "timeout", "irmap-scan-path", "lsm-profile", "external"),
    *_required("empty-ns", "cgroup-props", "cgroup-props-file", "cgroup-dump-controller", "status-fd"),
    *_required("ps-socket", "config", "tls-cacert", "tls-cacrl", "tls-cert", "tls-key", "cgroup-yard"),
    *_required("pre-dump-mode", "file-validation", "lsm-mount-context", "network-lock"),
    *_optional("ext-unix-sk", "cpu-cap", "manage-cgroups", "verbosity"),
)

# The same table's letters, each with the long option of the same meaning.
_LETTERS = {
    "d": "daemon",
    "S": "restore-sibling",
    "s": "leave-stopped",
    "R": "leave-running",
    "t": "tree",
    "h": "help",
    "D": "images-dir",
    "o": "log-file",
    "v": "verbosity",
    "x": "ext-unix-sk",
    "V": "version",
    "r": "root",
    "j": "shell-job",
    "J": "join-ns",
    "l": "file-locks",
    "W": "work-dir",
    "L": "libdir",
    "M": "ext-mount-map",
}

# These end the reading, as they do in CRIU: what follows is not looked at.
_ENDING = frozenset({"help", "version"})

_SHOWN = 80


def show(word: str) -> str:
    """Return a word of the command line in a form that fits into one printed line."""
    clipped = word if len(word) <= _SHOWN else word[:_SHOWN] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clipped)


def normalise(argv: Sequence[str], own: Iterable[Option] = ()) -> tuple[list[str], list[str]]:
    """Split argv (without the program's name) into canonical option words and the rest.

    ``own`` are options that CRIU does not have. Returns the options as
    ``--name`` or ``--name=value`` in their order, up to the first that asks for
    help or the version, and the words that are no options. Raises GetoptError
    at the first word that getopt_long(3) would complain of.
    """
    names = _Names(tuple(own))
    options: list[str] = []
    rest: list[str] = []
    words = list(argv)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            rest += words[at:]
            break
        if not word.startswith("-") or word == "-":
            rest.append(word)
            continue
        following = words[at] if at < len(words) else None
        read = names.long(word, following) if word.startswith("--") else names.cluster(word, following)
        at += read.took_following
        options += read.words
        if read.ends:
            break
    return options, rest


@dataclass(slots=True)
class _Read:
    """What one word, with the one after it where that is its argument, said."""

    words: list[str]
    took_following: bool = False
    ends: bool = False


class _Names:
    def __init__(self, own: tuple[Option, ...]) -> None:
        self._criu = CRIU_OPTIONS
        self._own = own
        self._exact = {option.name: option for option in (*CRIU_OPTIONS, *own)}

    def long(self, word: str, following: str | None) -> _Read:
        typed, equals, attached = word[2:].partition("=")
        option = self._exact.get(typed) or self._by_prefix(typed)
        return self._finish(option, f"--{show(typed)}", attached if equals else None, following)

    def _by_prefix(self, typed: str) -> Option:
        found = [o for o in self._criu if o.name.startswith(typed)]
        found = found or [o for o in self._own if o.name.startswith(typed)]
        if not found:
            raise GetoptError(f"--{show(typed)}: no such option{self._suggestion(typed)}; see --help")
        first = found[0]
        if any((o.argument, o.sets, o.value) != (first.argument, first.sets, first.value) for o in found):
            listed = [f"--{o.name}" for o in found]
            listed = [*listed[:6], f"{len(listed) - 6} more"] if len(listed) > 7 else listed
            choice = f"{', '.join(listed[:-1])} or {listed[-1]}"
            raise GetoptError(f"--{show(typed)}: could be {choice}; write it out")
        return first

    def _suggestion(self, typed: str) -> str:
        close = difflib.get_close_matches(typed[:_SHOWN], self._exact, 1, 0.7)
        return f" (did you mean --{close[0]}?)" if close else ""

    def cluster(self, word: str, following: str | None) -> _Read:
        read = _Read([])
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter not in _LETTERS:
                raise GetoptError(f"-{show(letter)} in {show(word)}: no such option; see --help")
            option = self._exact[_LETTERS[letter]]
            attached = None
            if option.argument is not Argument.NONE and letters:
                attached, letters = letters, ""
            one = self._finish(option, f"-{letter}", attached, following)
            read.words += one.words
            read.took_following = one.took_following
            if one.ends:
                read.ends = True
                break
        return read

    def _finish(self, option: Option, typed: str, attached: str | None, following: str | None) -> _Read:
        canonical = f"--{option.name}"
        ends = option.name in _ENDING
        if attached is not None:
            if option.argument is Argument.NONE:
                raise GetoptError(f"{typed}: takes no argument, but has '{show(attached)}'")
            return _Read([f"{canonical}={attached}"])
        if option.argument is not Argument.REQUIRED:
            return _Read([canonical], ends=ends)
        if following is None:
            raise GetoptError(f"{typed}: needs an argument")
        return _Read([f"{canonical}={following}"], took_following=True)
