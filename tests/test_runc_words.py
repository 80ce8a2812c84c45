"""What criupy.runc says to runC and reads of it, which needs neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criupy.errors import OptionError, RuncError, RuncTimeout
from criupy.runc import CheckpointOptions, ContainerState, PreDumpOptions, RestoreOptions
from criupy.runc._words import (
    check_container,
    errors_of,
    option_words,
    parse_state,
    path_word,
)


def test_options_are_spelled_as_runc_takes_them() -> None:
    given_options = {"tcp_established": True, "shell_job": False, "manage_cgroups_mode": "ignore"}
    words = ["--tcp-established", "--manage-cgroups-mode", "ignore"]
    for kind in (PreDumpOptions, CheckpointOptions, RestoreOptions):
        assert option_words(kind, given_options) == words


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lazy_pages", True, "is no option here; there are ext_unix_sk, "),
        ("tcp_established", "yes", "expected a bool, got 'yes'"),
        ("tcp_established", 1, "expected a bool, got 1"),
        ("manage_cgroups_mode", "", "expected one of soft, full, strict, ignore; got ''"),
        ("manage_cgroups_mode", "--root", "expected one of"),
        ("manage_cgroups_mode", True, "expected one of"),
        ("lsm_profile", "--x", "expected a word, got '--x'"),
        ("lsm_profile", False, "expected a word, got False"),
    ],
)
def test_wrong_options(name: str, value: object, said: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}: ") as caught:
        option_words(RestoreOptions, {name: value})
    assert said in str(caught.value)
    assert caught.value.option == name


def test_every_option_can_be_spelled() -> None:
    for kind in (PreDumpOptions, CheckpointOptions, RestoreOptions):
        for name in kind.__annotations__:
            value = {"manage_cgroups_mode": "soft"}.get(name, "word" if name.startswith("lsm") else True)
            assert option_words(kind, {name: value})[0] == f"--{name.replace('_', '-')}"


def test_paths_begin_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_word("bundle", "a/../b") == str(tmp_path / "b")
    assert path_word("bundle", Path("/x")) == str(Path("/x").absolute())
    for wrong in ("", 3, b"x"):
        with pytest.raises(OptionError, match="bundle: expected a path"):
            path_word("bundle", wrong)  # type: ignore[arg-type]


def test_names_of_containers() -> None:
    assert check_container("web-1") == "web-1"
    for wrong in ("", "-f", 3):
        with pytest.raises(OptionError, match="container: expected"):
            check_container(wrong)  # type: ignore[arg-type]


def test_errors_of_a_log() -> None:
    log = "\n".join(
        (
            json.dumps({"level": "warning", "msg": "one"}),
            json.dumps({"level": "error", "msg": "two", "time": "x"}),
            json.dumps({"level": "error", "msg": "three", "error": "device or resource busy"}),
            "a library's own words",
            '"a string"',
            json.dumps({"level": "fatal", "msg": "four"}),
            '{"level":"error","ms',
        )
    )
    assert errors_of(log) == ("two", "three: device or resource busy", "four")


@given(st.text())
def test_any_text_is_a_log(text: str) -> None:
    assert all(isinstance(line, str) for line in errors_of(text))


def test_state() -> None:
    text = json.dumps({"id": "web", "status": "running", "pid": 7, "bundle": "/b", "rootfs": "/r"})
    assert parse_state(text) == ContainerState("web", "running", 7, Path("/b"))
    for wrong in ("", "[]", "{}", '{"id": 1}', "null"):
        with pytest.raises(ValueError, match="no state of a container"):
            parse_state(wrong)


def test_errors_say_all_in_one_line() -> None:
    error = RuncError("restore", "web", "no", status=1, log_file="/l/restore.log", hint="try again")
    assert str(error) == "runc restore web: no [log: /l/restore.log] - try again"
    assert isinstance(RuncTimeout("checkpoint", "web", "not done in time"), TimeoutError)
