"""The command line of criupy-page-server: CRIU's spellings, ours, and CRIU itself as judge."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_judge import criu_accepts, needs_criu
from criupy._command.getopt import CRIU_OPTIONS, Argument
from criupy._command.line import Answer
from criupy._command.parser import REFUSED, UsageError
from criupy._tls.files import TlsFiles
from criupy.page_server._options import PageServerOptions, parse
from criupy.page_server._parser import OWN_OPTIONS

DEFAULT = PageServerOptions()
HERE = ["--address", "127.0.0.1"]
"""Nothing to warn of."""


def options(*argv: str, **environ: str) -> PageServerOptions:
    found = parse(argv, environ=environ)
    assert isinstance(found, PageServerOptions)
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
    "page-server --no-default-config --log-file page_server.log --images-dir dump --verbosity=4 "
    "--port 12345 --daemon --pidfile ps.pid --status-fd 5 --lazy-pages"
)

# (command line, what differs from the defaults); none of these may warn.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("page-server", {}),
    ("-D /i page-server", {"images_dir": Path("/i"), "work_dir": Path("/i")}),
    ("--images-dir=/i -Ww", {"images_dir": Path("/i"), "work_dir": Path("w")}),
    ("--lazy-pages", {"lazy_pages": True}),
    ("--lazy", {"lazy_pages": True}),
    ("--prev-images-dir ../1", {"prev_images_dir": Path("../1")}),
    ("--auto-dedup", {"auto_dedup": True}),
    ("--auto-dedup --no-auto-dedup", {}),
    ("--address ::", {"address": "::"}),
    ("--ad=10.0.0.1", {"address": "10.0.0.1"}),
    ("--port 2727", {"port": 2727}),
    ("--po=65535", {"port": 65535}),
    ("--port 0", {}),
    ("--port-file p", {"port_file": Path("p")}),
    ("--port-f=p", {"port_file": Path("p")}),
    ("--ps-socket -1", {}),
    ("--allow 10.0.0.0/8", {"allow": (ip_network("10.0.0.0/8"),)}),
    ("--allow fd00::/8 --allow=10.1.2.3", {"allow": (ip_network("fd00::/8"), ip_network("10.1.2.3/32"))}),
    ("--once --lazy-pages", {"once": True, "lazy_pages": True}),
    ("--once --no-once", {}),
    ("--address [::1]", {"address": "::1"}),
    ("--max-connections 1", {"max_connections": 1}),
    ("--max 10000", {"max_connections": 10000}),
    ("--idle-timeout 5m", {"idle_timeout": 300.0}),
    ("--stall-timeout 200ms", {"stall_timeout": 0.2}),
    ("--stop-timeout=1", {"stop_timeout": 1.0}),
    ("--upstream 127.0.0.1:27", {"upstream": ("127.0.0.1", 27)}),
    ("--upstream=[::1]:65535", {"upstream": ("::1", 65535)}),
    ("--upstream h:1 --cache 64M", {"upstream": ("h", 1), "cache": 64 << 20}),
    ("--upstream h:1 --cache 1GiB", {"upstream": ("h", 1), "cache": 1 << 30}),
    ("--upstream h:1 --spool s", {"upstream": ("h", 1), "spool": Path("s")}),
    (
        "--upstream h:1 --spool s --close-when-spooled",
        {"upstream": ("h", 1), "spool": Path("s"), "close_when_spooled": True},
    ),
    ("--upstream h:1 --hold-timeout 5m", {"upstream": ("h", 1), "hold_timeout": 300.0}),
    ("--abort", {"abort": True}),
    ("-o log -v4", {"log_file": "log", "verbosity": 4}),
    ("-vv", {"verbosity": 4}),
    ("-d --pidfile p", {"daemon": True, "pidfile": Path("p")}),
    ("--restore-detached", {"daemon": True}),
    ("--status-fd 7", {"status_fd": 7}),
    ("--action-script /s --act /t", {"action_scripts": ("/s", "/t")}),
    ("--close 5 --close=6", {"close_fds": (5, 6)}),
    ("--display-stats", {"display_stats": True}),
    ("--stats-file s.json", {"stats_file": Path("s.json")}),
    ("--unprivileged", {}),
    ("--no-default-config", {}),
    ("--no-tls", {}),
    ("--no-page-server", {}),
]


@pytest.mark.parametrize(("line", "differs"), ACCEPTED, ids=[line for line, _ in ACCEPTED])
def test_accepted(line: str, differs: dict[str, Any]) -> None:
    assert options(*HERE, *line.split()) == replace(DEFAULT, **differs)


def test_what_criu_s_tests_give() -> None:
    found = options(*ZDTM.split())
    assert found == replace(
        DEFAULT,
        log_file="page_server.log",
        images_dir=Path("dump"),
        work_dir=Path("dump"),
        verbosity=4,
        port=12345,
        daemon=True,
        pidfile=Path("ps.pid"),
        status_fd=5,
        lazy_pages=True,
        warnings=found.warnings,
    )


# Accepted with one warning that names the option.
WARNED = [
    ("--page-server", "--page-server"),
    ("--tree 1", "--tree"),
    ("-j", "--shell-job"),
    ("--track-mem", "--track-mem"),
    ("--tcp-established", "--tcp-established"),
    ("--timeout 5", "--timeout"),
    ("--config c", "--config"),
    ("-dS", "--restore-sibling"),
    ("--pidfile p", "--pidfile"),
    ("--tls-cacert x --tls-cert y --tls-key z", "--tls"),
    ("--tls-no-cn-verify", "--tls"),
    ("--lazy-pages --auto-dedup", "--auto-dedup"),
    ("--lazy-pages --prev-images-dir x", "--prev-images-dir"),
    ("--ps-socket 9", "--address and --port"),
    ("--upstream h:1 --lazy-pages", "--lazy-pages"),
    ("--upstream h:1 --once", "--once"),
    ("--hold-timeout 1", "--hold-timeout"),
    ("--close-when-spooled", "--close-when-spooled"),
]


@pytest.mark.parametrize(("line", "name"), WARNED, ids=[line for line, _ in WARNED])
def test_accepted_with_a_warning(line: str, name: str) -> None:
    (warning,) = options(*HERE, *line.split()).warnings
    assert name in warning
    assert "lazy-pages daemon" not in warning
    assert warning.isprintable()


def test_what_has_no_effect_beside_an_inherited_socket() -> None:
    found = options("--ps-socket", "9", "--allow", "10.0.0.0/8", "--port-file", "p", "--port", "1")
    assert [warning.split()[0] for warning in found.warnings] == ["--address", "--port-file", "--allow"]
    assert options("--ps-socket", "9").warnings == ()


def test_where_it_listens_is_told_when_that_is_not_where_criu_would() -> None:
    (warning,) = options().warnings
    assert "127.0.0.1" in warning
    assert "--address" in warning


def test_a_criu_config_file_in_the_environment_is_told_of() -> None:
    assert "CRIU_CONFIG_FILE" in options(*HERE, CRIU_CONFIG_FILE="/etc/x").warnings[0]


# (command line, words the message must hold)
REJECTED = [
    ("--bogus", "--bogus no such option"),
    ("--port 65536", "--port '65536' 65535"),
    ("--port -1", "--port"),
    ("--allow 10.0.0.1/8", "--allow '10.0.0.1/8' network 10.0.0.0/8"),
    ("--allow example", "--allow 'example' network"),
    ("--allow=", "--allow"),
    ("--max-connections 0", "--max-connections '0'"),
    ("--max-connections many", "--max-connections 'many'"),
    ("--idle-timeout 0", "--idle-timeout '0'"),
    ("--stall-timeout 8d", "--stall-timeout '8d'"),
    ("--st 1", "--status-fd"),
    ("--once=1", "--once takes no argument"),
    ("-d --ps-socket 2", "--ps-socket 2 --daemon"),
    ("-d --status-fd 1", "--status-fd 1 --daemon"),
    ("lazy-pages", "'lazy-pages' page-server"),
    ("page-server x", "'x'"),
    ("--exec-cmd", "--exec-cmd"),
    ("--stream", "--stream"),
    ("-S", "--restore-sibling"),
    ("--address=", "--address empty"),
    ("--upstream host", "--upstream 'host' HOST:PORT"),
    ("--upstream ::1:7000", "--upstream '::1:7000' [ADDRESS]:PORT"),
    ("--upstream host:0", "--upstream '0'"),
    ("--upstream h:1 --cache many", "--cache 'many' 64M"),
    ("--upstream h:1 --cache 1K", "--cache 1M"),
    ("--upstream h:1 --ps-socket 9", "--upstream --ps-socket"),
    ("--upstream h:1 --close-when-spooled", "--close-when-spooled --spool"),
    ("--spool s", "--spool --upstream"),
]


@pytest.mark.parametrize(("line", "words"), REJECTED, ids=[line for line, _ in REJECTED])
def test_rejected(line: str, words: str) -> None:
    message = refusal(*line.split())
    for word in words.split(" "):
        assert word in message


def test_tls() -> None:
    assert options(*HERE).tls is None
    assert options(*HERE, "--tls", "--no-tls").tls is None
    assert options(*HERE, "--tls").tls == TlsFiles()
    line = "--tls --tls-cert x --tls-key y --tls-cacert z --tls-cacrl l --tls-no-cn-verify"
    found = options(*HERE, *line.split())
    assert found.tls == TlsFiles(Path("z"), Path("l"), Path("x"), Path("y"), verify_name=False)
    assert found.warnings == ()


def test_tls_on_an_inherited_socket() -> None:
    with pytest.raises(UsageError, match="needs --address"):
        parse(["--ps-socket", "9", "--tls"])
    found = options("--ps-socket", "9", "--tls", "--address", "a.example")
    assert (found.address, found.warnings) == ("a.example", ())
    assert options("--ps-socket", "9", "--tls", "--tls-no-cn-verify").ps_socket == 9


def test_help_and_version() -> None:
    found = parse(["--help"])
    assert isinstance(found, Answer)
    for option in OWN_OPTIONS:
        assert option.name.startswith("no-") or f"--{option.name}" in found.text
    for name in ("--images-dir", "--lazy-pages", "--ps-socket", "--status-fd", "--auto-dedup", "--tls"):
        assert name in found.text
    assert "--external" not in found.text
    version = parse(["-V"])
    assert isinstance(version, Answer)
    assert version.text.startswith("criupy-page-server ")


def test_own_names_and_criu_names_are_apart() -> None:
    assert not {option.name for option in OWN_OPTIONS} & {option.name for option in CRIU_OPTIONS}


def test_every_criu_option_is_understood_under_its_own_name() -> None:
    for option in CRIU_OPTIONS:
        values = {"port": "1", "status-fd": "5", "ps-socket": "5", "close": "5"}
        argument = f"={values.get(option.name, 'x')}" if option.argument is Argument.REQUIRED else ""
        if option.sets in REFUSED and option.value:
            assert option.sets in refusal(f"--{option.name}{argument}")
        elif option.name == "restore-sibling":
            refusal(f"--{option.name}")
        else:
            parse([f"--{option.name}{argument}"])


_names = st.sampled_from([option.name for option in (*CRIU_OPTIONS, *OWN_OPTIONS)])
_values = st.sampled_from(["", "1", "0", "-1", "a:b", "--", "30s", "10.0.0.0/8", "::/0", "\n", "é\udcff"])
_word = st.one_of(
    st.builds(lambda name, cut: f"--{name[:cut]}", _names, st.integers(1, 30)),
    st.builds(lambda name, value: f"--{name}={value}", _names, _values),
    _values,
    st.text(max_size=12),
)


@given(st.lists(_word, max_size=8))
def test_any_line_gives_options_an_answer_or_one_line(argv: list[str]) -> None:
    try:
        found = parse(argv)
    except UsageError as error:
        assert str(error).isprintable()
    else:
        if isinstance(found, PageServerOptions):
            assert all(warning.isprintable() for warning in found.warnings)


OURS = tuple(f"--{option.name}" for option in OWN_OPTIONS)


@needs_criu
@pytest.mark.parametrize(
    "line",
    [
        line
        for line, _ in ACCEPTED
        # CRIU cannot be asked for port 0, only left without one.
        if line != "--port 0" and not any(w.startswith((*OURS, "--max", "--port-f")) for w in line.split())
    ],
)
def test_criu_accepts_it_too(line: str) -> None:
    words = line.split()
    assert criu_accepts([*([] if "page-server" in words else ["page-server"]), *words])
