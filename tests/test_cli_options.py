"""The command line: a table of CRIU's spellings, a fuzz, and CRIU itself as judge."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_judge import CRIU, criu_accepts, needs_criu
from criupy._command.getopt import CRIU_OPTIONS, Argument, GetoptError, Option, normalise
from criupy._command.line import Answer
from criupy._command.parser import REFUSED, UsageError
from criupy._tls.files import TlsFiles
from criupy.lazy_pages._options import LazyPagesOptions, parse
from criupy.lazy_pages._parser import OWN_OPTIONS

DEFAULT = LazyPagesOptions()
REMOTE = ["--page-server", "--address", "a.example", "--port", "1234"]


def options(*argv: str, **environ: str) -> LazyPagesOptions:
    found = parse(argv, environ=environ)
    assert isinstance(found, LazyPagesOptions)
    return found


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    message = str(caught.value)
    assert message
    assert message.isprintable()
    return message


# What CRIU's own test suite gives.
ZDTM = (
    "lazy-pages --no-default-config --log-file lazy-pages.log --images-dir dump --verbosity=4 "
    "--page-server --port 12345 --address 127.0.0.1 --unprivileged --status-fd 5"
)

# (command line, what differs from the defaults); none of these may warn.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("lazy-pages", {}),
    ("lazy-pages -D /i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("-D /i lazy-pages", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("-D/i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("--images-dir /i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("--images-dir=/i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("--images=/i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("--im /i", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("-D a -D b", {"images_dir": Path("b"), "work_dir": Path("b")}),
    ("-D --daemon", {"images_dir": Path("--daemon"), "work_dir": Path("--daemon")}),
    ("-D --", {"images_dir": Path("--"), "work_dir": Path("--")}),
    ("-D a=--", {"images_dir": Path("a=--"), "work_dir": Path("a=--")}),
    ("-o --", {"log_file": "./--"}),
    ("-D=x", {"images_dir": Path("=x"), "work_dir": Path("=x")}),
    ("--images-dir a=b", {"images_dir": Path("a=b"), "work_dir": Path("a=b")}),
    ("--images-dir=a=b", {"images_dir": Path("a=b"), "work_dir": Path("a=b")}),
    ("--images-dir=-d", {"images_dir": Path("-d"), "work_dir": Path("-d")}),
    ("-D i -W w", {"images_dir": Path("i"), "work_dir": Path("w")}),
    ("-Ww", {"work_dir": Path("w")}),
    ("--work-dir=w", {"work_dir": Path("w")}),
    ("--work w", {"work_dir": Path("w")}),
    ("-o lazy.log", {"log_file": "lazy.log"}),
    ("-olazy.log", {"log_file": "lazy.log"}),
    ("-o -", {"log_file": "-"}),
    ("-o-", {"log_file": "-"}),
    ("--log-file lazy.log", {"log_file": "lazy.log"}),
    ("--log-f=lazy.log", {"log_file": "lazy.log"}),
    ("-v", {"verbosity": 3}),
    ("-vv", {"verbosity": 4}),
    ("-vvv", {"verbosity": 5}),
    ("-vvvv", {"verbosity": 6}),
    ("-v -v", {"verbosity": 4}),
    ("-v0", {"verbosity": 0}),
    ("-v1", {"verbosity": 1}),
    ("-v4", {"verbosity": 4}),
    ("-v4 -v", {"verbosity": 5}),
    ("-v -v4", {"verbosity": 4}),
    ("--verbosity", {"verbosity": 3}),
    ("--verbosity=4", {"verbosity": 4}),
    ("--verbosity=vv", {"verbosity": 5}),
    ("--verb=1", {"verbosity": 1}),
    ("-d", {"daemon": True}),
    ("--daemon", {"daemon": True}),
    ("--da", {"daemon": True}),
    ("--restore-detached", {"daemon": True}),
    ("--restore-d", {"daemon": True}),
    ("-d --no-daemon", {}),
    ("-d --no-restore-detached", {}),
    ("--no-daemon -d", {"daemon": True}),
    ("-dv4", {"daemon": True, "verbosity": 4}),
    ("-dv", {"daemon": True, "verbosity": 3}),
    ("-dvvv", {"daemon": True, "verbosity": 5}),
    ("-dD i", {"daemon": True, "images_dir": Path("i"), "work_dir": Path("i")}),
    ("-dDi", {"daemon": True, "images_dir": Path("i"), "work_dir": Path("i")}),
    ("-d --pidfile p", {"daemon": True, "pidfile": Path("p")}),
    ("-d --pid=p", {"daemon": True, "pidfile": Path("p")}),
    ("--status-fd 7", {"status_fd": 7}),
    ("--status-fd=7", {"status_fd": 7}),
    ("--stat 7", {"status_fd": 7}),
    ("--status-fd -1", {}),
    ("--ps-socket=-1", {}),
    ("--page-server --ps-socket 9", {"ps_socket": 9}),
    ("--page-server --ps 9", {"ps_socket": 9}),
    ("--page-server --address h --port 1", {"page_server": ("h", 1)}),
    ("--page-server --address=::1 --port=65535", {"page_server": ("::1", 65535)}),
    ("--pa --ad 10.0.0.1 --po 2727", {"page_server": ("10.0.0.1", 2727)}),
    ("--page-server --no-page-server", {}),
    ("--display-stats", {"display_stats": True}),
    ("--disp", {"display_stats": True}),
    ("--display-stats --no-display-stats", {}),
    ("--no-default-config", {}),
    ("--no-def", {}),
    ("--unprivileged", {"unprivileged": True}),
    ("--unpr", {"unprivileged": True}),
    ("--no-unprivileged", {}),
    ("--action-script /s", {"action_scripts": ("/s",)}),
    ("--action-script /s --act /t", {"action_scripts": ("/s", "/t")}),
    ("--close 5 --close=6", {"close_fds": (5, 6)}),
    ("--no-tls", {}),
    ("--no-stream", {}),
    ("--stream --no-stream", {}),
    ("--no-tcp-established", {}),
    ("--", {}),
    ("-- lazy-pages", {}),
    ("--progress plain", {"progress": "plain"}),
    ("--progress=json", {"progress": "json"}),
    ("--prog none", {"progress": "none"}),
    ("--page-server --address a --port 1 --reconnect 5m", {"page_server": ("a", 1), "reconnect": 300.0}),
    ("--page-server --address a --port 1 --extended", {"page_server": ("a", 1), "extended": True}),
    ("--page-server --address a --port 1 --no-extended", {"page_server": ("a", 1), "extended": False}),
    ("--lanes 1", {"lanes": 1}),
    ("--busy-poll 0", {"busy_poll": 0.0}),
    ("--busy-poll 50", {"busy_poll": 50e-6}),
    ("--stats-file s.json", {"stats_file": Path("s.json")}),
    ("--stats s.json", {"stats_file": Path("s.json")}),
    ("--connect-timeout 2.5", {"connect_timeout": 2.5}),
    ("--link-timeout=200ms", {"link_timeout": 0.2}),
    ("--link-t 5s", {"link_timeout": 5.0}),
    ("--stop-timeout 1.5m", {"stop_timeout": 90.0}),
    ("--frame 24", {"frame_size": 24}),
    ("--frame=32", {"frame_size": 32}),
    ("--frame auto", {}),
    ("--on-failure kill", {"on_failure": "kill"}),
    ("--on kill", {"on_failure": "kill"}),
    (
        ZDTM,
        {
            "log_file": "lazy-pages.log",
            "images_dir": Path("dump"),
            "work_dir": Path("dump"),
            "verbosity": 4,
            "page_server": ("127.0.0.1", 12345),
            "unprivileged": True,
            "status_fd": 5,
        },
    ),
]


@pytest.mark.parametrize(("line", "differs"), ACCEPTED, ids=[line for line, _ in ACCEPTED])
def test_accepted(line: str, differs: dict[str, Any]) -> None:
    assert options(*line.split()) == replace(DEFAULT, **differs)


def test_empty_words_are_words() -> None:
    assert options("--log-file", "a b", "lazy-pages").log_file == "a b"
    assert "empty" in refusal("-D", "")
    assert "empty" in refusal("--images-dir=")


# Accepted with one warning that names the option.
WARNED = [
    ("--tree 1", "--tree"),
    ("-t 1", "--tree"),
    ("-t1", "--tree"),
    ("-s", "--leave-stopped"),
    ("-sRjl", "--leave-stopped"),
    ("--leave-running", "--leave-running"),
    ("-j", "--shell-job"),
    ("--shell-job", "--shell-job"),
    ("-l", "--file-locks"),
    ("-r /", "--root"),
    ("-L/lib", "--libdir"),
    ("-M a:b", "--ext-mount-map"),
    ("--ext-mount-map auto", "--ext-mount-map"),
    ("-J net:/proc/self/ns/net", "--join-ns"),
    ("-x", "--ext-unix-sk"),
    ("-x4", "--ext-unix-sk"),
    ("--ext-unix-sk=4", "--ext-unix-sk"),
    ("-dS", "--restore-sibling"),
    ("--link", "--link-remap"),  # ours begin with it, too, and must not get in its way
    ("--link-", "--link-remap"),
    ("--tcp-established", "--tcp-established"),
    ("--tcp-e", "--tcp-established"),
    ("--skip-in-flight", "--skip-in-flight"),
    ("--cpu-cap", "--cpu-cap"),
    ("--cpu-cap=all", "--cpu-cap"),
    ("--manage-cgroups", "--manage-cgroups"),
    ("--manage-cgroups=soft", "--manage-cgroups"),
    ("--cgroup-props x", "--cgroup-props"),
    ("--cgroup-props-f x", "--cgroup-props-file"),
    ("--external a[b]:c --external d", "--external"),
    ("--track-mem", "--track-mem"),
    ("--auto-dedup", "--auto-dedup"),
    ("--prev-images-dir x", "--prev-images-dir"),
    ("--lazy-pages", "--lazy-pages"),
    ("--lazy", "--lazy-pages"),
    ("--timeout 5", "--timeout"),
    ("--network-lock skip", "--network-lock"),
    ("--allow-uprobes", "--allow-uprobes"),
    ("--ghost-limit 1M", "--ghost-limit"),
    ("--config c", "--config"),
    ("--config=c", "--config"),
    ("--conf c", "--config"),
    ("--log-pid", "--log-pid"),
    ("--pidfile p", "--pidfile"),
    ("--port 1", "--port"),
    ("--address h", "--address"),
    ("--reconnect 5", "--reconnect has no effect without --page-server"),
    ("--extended", "--extended has no effect without --page-server"),
    ("--ps-socket 5", "--ps-socket"),
    ("--tls", "--tls"),
    ("--tls-cacert x --tls-cert y --tls-key z", "--tls"),
    ("--tls-no-cn-verify", "--tls"),
    ("--page-server --address h --port 1 --tls-cert x", "--tls"),
    ("--page-server --ps-socket 9 --port 1", "--port"),
]


@pytest.mark.parametrize(("line", "name"), WARNED, ids=[line for line, _ in WARNED])
def test_accepted_with_a_warning(line: str, name: str) -> None:
    warnings = options(*line.split()).warnings
    assert name in warnings[0]
    assert all(warning.isprintable() for warning in warnings)
    assert len(warnings) == (4 if line == "-sRjl" else 1)


def test_a_criu_config_file_in_the_environment_is_told_of() -> None:
    assert "CRIU_CONFIG_FILE" in options(CRIU_CONFIG_FILE="/etc/x").warnings[0]
    assert options(CRIU_CONFIG_FILE="").warnings == ()


# (command line, words the message must hold)
REJECTED = [
    ("--bogus", "--bogus no such option"),
    ("--progres-bar", "did you mean --progress"),
    ("-q", "-q no such option"),
    ("-dq", "-q -dq"),
    ("-d-", "no such option"),
    ("-:", "no such option"),
    ("--log x", "--log-file --log-pid"),
    ("--tls-c x", "--tls-cacert --tls-cacrl"),
    ("--ver", "--version --verbosity"),
    ("--no-d", "--no-daemon"),
    ("--restore", "--restore-detached"),
    ("--enable-external", "--enable-external-sharing"),
    ("--=x", "write it out"),
    ("--page-server=1", "--page-server takes no argument '1'"),
    ("--daemon=", "--daemon takes no argument"),
    ("-D", "-D needs an argument"),
    ("-dD", "-D needs an argument"),
    ("--images-dir", "--images-dir needs an argument"),
    ("--status-fd", "--status-fd needs an argument"),
    ("--status-fd x", "--status-fd 'x' descriptor"),
    ("--status-fd -2", "--status-fd '-2'"),
    ("--status-fd 99999999999", "--status-fd"),
    ("--ps-socket 1.5", "--ps-socket '1.5'"),
    ("-d --page-server --ps-socket 2", "--ps-socket 2 --daemon"),
    ("--page-server --ps-socket 9 --reconnect 5", "--reconnect needs --address and --port"),
    ("--page-server --ps-socket 9 --extended", "--extended needs --address and --port"),
    ("--lanes 3", "--lanes '3'"),
    ("--busy-poll 1ms", "--busy-poll '1ms' microseconds 10000"),
    ("--busy-poll 10001", "--busy-poll '10001' 10000"),
    ("--busy-poll -1", "--busy-poll"),
    ("-d --status-fd 1", "--status-fd 1 --daemon"),
    ("--close x", "--close 'x'"),
    ("--port 0", "--port '0' 65535"),
    ("--port 65536", "--port '65536'"),
    ("--port -1", "--port"),
    ("--port 12a", "--port '12a'"),
    ("--port 1_0", "--port '1_0'"),
    ("--port \N{ARABIC-INDIC DIGIT ONE}", "--port"),
    ("-vx", "--verbosity 'x'"),
    ("-v4v", "--verbosity '4v'"),
    ("-v-1", "--verbosity"),
    ("--verbosity=", "--verbosity"),
    ("-v 4", "'4' lazy-pages"),
    ("--verbosity 4", "'4' lazy-pages"),
    ("dump", "'dump' lazy-pages"),
    ("lazy-pages x", "'x'"),
    ("lazy-pages lazy-pages", "'lazy-pages'"),
    ("lazy-pages -- -d", "'-d'"),
    ("-", "'-'"),
    ("--exec-cmd", "--exec-cmd"),
    ("--stream", "--stream"),
    ("--mntns-compat-mode", "--mntns-compat-mode"),
    ("--inherit-fd fd[1]:x", "--inherit-fd"),
    ("--ms", "--ms"),
    ("-S", "--restore-sibling"),
    ("--page-server", "--address and --port"),
    ("--page-server --address h", "--port"),
    ("--page-server --port 1", "--address"),
    ("--progress fancy", "--progress 'fancy' json"),
    ("--frame 16", "--frame '16'"),
    ("--on-failure ignore", "--on-failure 'ignore'"),
    ("--link-timeout 0", "--link-timeout '0'"),
    ("--link-timeout -1", "--link-timeout"),
    ("--link-timeout inf", "--link-timeout 'inf'"),
    ("--link-timeout nan", "--link-timeout 'nan'"),
    ("--link-timeout 1e3", "--link-timeout"),
    ("--link-timeout .", "--link-timeout"),
    ("--link-timeout 5h", "--link-timeout '5h'"),
    ("--stop-timeout 8d", "--stop-timeout"),
    ("--stop-timeout 604801", "--stop-timeout 7 days"),
    ("--connect-timeout 0.1ms", "--connect-timeout"),
]


@pytest.mark.parametrize(("line", "words"), REJECTED, ids=[line for line, _ in REJECTED])
def test_rejected(line: str, words: str) -> None:
    message = refusal(*line.split())
    for word in words.split(" "):
        assert word in message


def test_tls() -> None:
    assert options(*REMOTE).tls is None
    assert options(*REMOTE, "--tls", "--no-tls").tls is None
    assert options(*REMOTE, "--tls").tls == TlsFiles()
    line = "--tls --tls-cert x --tls-key y --tls-cacert z --tls-cacrl l --tls-no-cn-verify"
    found = options(*REMOTE, *line.split())
    assert found.tls == TlsFiles(Path("z"), Path("l"), Path("x"), Path("y"), verify_name=False)
    assert found.warnings == ()


def test_tls_on_an_inherited_socket() -> None:
    inherited = ("--page-server", "--ps-socket", "9", "--tls")
    with pytest.raises(UsageError, match="needs --address"):
        parse(inherited)
    found = options(*inherited, "--address", "a.example")
    assert (found.source_name, found.warnings) == ("a.example", ())
    assert options(*inherited, "--tls-no-cn-verify").source_name is None
    assert options(*REMOTE, "--tls").source_name is None


@pytest.mark.parametrize(
    "line",
    ["-h", "--help", "--hel", "-dh", "--bogus -h", "-D -h", "-- -h", "x y -h", "-V -h", "--port 0 --help"],
)
def test_help(line: str) -> None:
    found = parse(line.split())
    assert isinstance(found, Answer)
    for option in OWN_OPTIONS:
        assert (f"--{option.name}" in found.text) is not option.name.startswith("no-")
    for name in ("--images-dir", "--page-server", "--status-fd", "--log-file", "--tls"):
        assert name in found.text
    for name in ("--external", "--exec-cmd", "--no-daemon "):
        assert name not in found.text


@pytest.mark.parametrize(
    "line", ["-V", "--version", "--vers", "lazy-pages -V", "-V --bogus", "-V -D", "-dV", "-V x"]
)
def test_version(line: str) -> None:
    found = parse(line.split())
    assert isinstance(found, Answer)
    assert found.text.startswith("criupy-lazy-pages ")
    assert found.text.count("\n") == 1


def test_what_is_wrong_before_version_counts() -> None:
    refusal("--bogus", "-V")
    refusal("--port", "0", "-V")


def test_own_names_and_criu_names_are_apart() -> None:
    assert not {option.name for option in OWN_OPTIONS} & {option.name for option in CRIU_OPTIONS}
    assert len({option.name for option in CRIU_OPTIONS}) == len(CRIU_OPTIONS)


def test_a_prefix_of_options_that_mean_the_same_is_good() -> None:
    same = [Option("same-one", Argument.NONE, "x"), Option("same-two", Argument.NONE, "x")]
    assert normalise(["--same"], same)[0] == ["--same-one"]
    differing = [Option("same-one", Argument.NONE, "x"), Option("same-two", Argument.NONE, "x", value=False)]
    with pytest.raises(GetoptError, match="--same-one or --same-two"):
        normalise(["--same"], differing)


def test_every_criu_option_is_understood_under_its_own_name() -> None:
    for option in CRIU_OPTIONS:
        values = {"port": "1", "status-fd": "5", "ps-socket": "5", "close": "5"}
        argument = f"={values.get(option.name, 'x')}" if option.argument is Argument.REQUIRED else ""
        if option.sets in REFUSED and option.value:
            assert option.sets in refusal(f"--{option.name}{argument}")
        elif option.name in {"restore-sibling", "page-server"}:
            refusal(f"--{option.name}")
        else:
            parse([f"--{option.name}{argument}"])


# ---- anything at all --------------------------------------------------------------

_names = st.sampled_from([option.name for option in (*CRIU_OPTIONS, *OWN_OPTIONS)])
_values = st.sampled_from(
    ["", "1", "0", "-1", "65536", "a:b", "-", "--", "30s", "json", "vv", "\n", "é\udcff"]
)
_spelled = st.one_of(
    st.builds(lambda name, cut: f"--{name[:cut]}", _names, st.integers(1, 30)),
    st.builds(lambda name, value: f"--{name}={value}", _names, _values),
    st.builds(lambda name, value: f"--{name[:9]}={value}", _names, _values),
    st.text(alphabet="dSsRthDovxVrjJlWLM4-=", max_size=6).map("-".__add__),
)
_word = st.one_of(_spelled, _spelled, _values, st.just("lazy-pages"), st.text(max_size=12))


@given(st.lists(_word, max_size=8))
def test_any_line_gives_options_an_answer_or_one_line(argv: list[str]) -> None:
    try:
        found = parse(argv)
    except UsageError as error:
        message = str(error)
        assert message
        assert message.isprintable()
    else:
        if isinstance(found, LazyPagesOptions):
            assert all(warning.isprintable() for warning in found.warnings)


@given(st.lists(_word, max_size=8))
def test_normalised_words_normalise_to_themselves(argv: list[str]) -> None:
    try:
        words, rest = normalise(argv, OWN_OPTIONS)
    except GetoptError:
        return
    assert normalise([*words, "--", *rest], OWN_OPTIONS) in [(words, rest), (words, [])]


# ---- glibc's own reader -----------------------------------------------------------


class _CStructOption(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("has_arg", ctypes.c_int),
        ("flag", ctypes.c_void_p),
        ("val", ctypes.c_int),
    )


def glibc_reads(argv: list[str]) -> tuple[list[str], list[str]] | None:
    """Read a line with getopt_long(3) itself; None when it finds a fault."""
    libc = ctypes.CDLL(None)
    values: dict[tuple[str, bool], int] = {}
    names: dict[int, str] = {}
    table = (_CStructOption * (len(CRIU_OPTIONS) + 1))()
    for entry, option in zip(table, CRIU_OPTIONS, strict=False):
        entry.name = option.name.encode()
        entry.has_arg = option.argument.value
        entry.val = values.setdefault((option.sets, option.value), 1000 + len(values))
        names.setdefault(entry.val, option.name)
    letters = {"d": "daemon", "S": "restore-sibling", "s": "leave-stopped", "R": "leave-running", "t": "tree"}
    letters |= {"h": "help", "D": "images-dir", "o": "log-file", "v": "verbosity", "x": "ext-unix-sk"}
    letters |= {"V": "version", "r": "root", "j": "shell-job", "J": "join-ns", "l": "file-locks"}
    letters |= {"W": "work-dir", "L": "libdir", "M": "ext-mount-map"}
    words = [b"criu", *map(os.fsencode, argv)]
    c_argv = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    optind, optarg = ctypes.c_int.in_dll(libc, "optind"), ctypes.c_char_p.in_dll(libc, "optarg")
    ctypes.c_int.in_dll(libc, "opterr").value = 0
    optind.value = 0  # begin anew
    read: list[str] = []
    while True:
        index = ctypes.c_int(-1)
        found = libc.getopt_long(
            len(words), c_argv, b"dSsRt:hD:o:v::x::Vr:jJ:lW:L:M:", table, ctypes.byref(index)
        )
        if found == -1:
            return read, [os.fsdecode(word or b"") for word in c_argv[optind.value : len(words)]]
        if found == ord("?"):
            return None
        name = CRIU_OPTIONS[index.value].name if index.value >= 0 else letters[chr(found)]
        read.append(f"--{name}" if optarg.value is None else f"--{name}={os.fsdecode(optarg.value)}")
        if name in {"help", "version"}:
            return read, []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
@settings(max_examples=500)
@given(st.lists(_word.map(lambda word: word.replace("\0", "")), max_size=8))
def test_getopt_long_reads_the_same(argv: list[str]) -> None:
    expected = glibc_reads(argv)
    if expected is None:
        with pytest.raises(GetoptError):
            normalise(argv)
        return
    words, rest = normalise(argv)
    assert words == expected[0]
    if not {"--help", "--version"} & set(words):
        assert rest == expected[1]


# ---- CRIU itself --------------------------------------------------------------------


def is_criu_line(line: str) -> bool:
    """Tell whether a line has only CRIU's options, and nothing that ends the options."""
    words = line.split()
    ours = tuple(f"--{option.name}" for option in OWN_OPTIONS)
    return "--" not in words and not any(
        word.startswith(ours) or word in {"--prog", "--stats"} for word in words
    )


SAME = [line for line, _ in (*ACCEPTED, *WARNED) if is_criu_line(line)]
SAME = [line for line in SAME if line.split(maxsplit=1)[:1] not in (["--link-t"], ["--on"])]

# Here CRIU is content with what can only be a mistake, or notices it later.
STRICTER = (
    "--status-fd -2",
    "--status-fd 99999999999",
    "--ps-socket 1.5",
    "-d --page-server --ps-socket 2",
    "-d --status-fd 1",
    "--close x",
    "--port -1",
    "--port 12a",
    "--port 1_0",
    "-vx",
    "-v4v",
    "-v-1",
    "--verbosity=",
    "--mntns-compat-mode",
    "--inherit-fd fd[1]:x",
    "-S",
    "--page-server",
    "--page-server --address h",
    "--page-server --port 1",
)


@needs_criu
@pytest.mark.parametrize("line", SAME)
def test_criu_accepts_it_too(line: str) -> None:
    words = line.split()
    command = [] if "lazy-pages" in words else ["lazy-pages"]
    assert criu_accepts([*command, *words])


@needs_criu
@pytest.mark.parametrize("line", [line for line, _ in REJECTED if is_criu_line(line) and line != "dump"])
def test_criu_rejects_it_too(line: str) -> None:
    words = line.split()
    command = [] if {"lazy-pages", "dump"} & set(words) else ["lazy-pages"]
    # What misses an argument must stay last.
    dangling = "needs an argument" in dict(REJECTED)[line]
    if dangling:
        assert CRIU is not None
        ended = subprocess.run([CRIU, *command, *words], capture_output=True, text=True, check=False)
        assert "requires an argument" in ended.stderr
    else:
        assert criu_accepts([*command, *words]) is (line in STRICTER)
