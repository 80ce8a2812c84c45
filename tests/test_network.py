"""CRIU's lock on a network namespace, with a program in nsenter's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import criupy
from criupy._network_linux import HeldNetwork, is_network_locked, lock_note
from criupy.rpc import unlock_network

NSENTER = """#!/bin/sh
# nsenter --net=PATH PROGRAM ...
shift
echo "$*" >>{directory}/calls
. {directory}/answers
"""

NO_LOCK = "exit 0"
BY_IPTABLES = """
case $* in
"iptables -w 10 -S") echo "-P INPUT ACCEPT
-N CRIU
-A INPUT -j CRIU
-A INPUT -j CRIU
-A OUTPUT -j CRIU
-A CRIU -j DROP" ;;
esac
"""
BY_NFT = """
case $* in
iptables*|ip6tables*) echo "nsenter: failed to execute $1: No such file or directory" >&2; exit 127 ;;
"nft list tables") echo "table inet CRIU-42
table inet filter" ;;
esac
"""
NOT_ALLOWED = (
    "echo \"nsenter: reassociate to namespace 'ns/net' failed: Operation not permitted\" >&2; exit 1"
)
NO_PROGRAMS = 'echo "nsenter: failed to execute $1: No such file or directory" >&2; exit 127'
STAYS = """
case $* in
"iptables -w 10 -S") echo "-N CRIU" ;;
"iptables -w 10 -F CRIU") echo "iptables: Resource temporarily unavailable." >&2; exit 4 ;;
esac
"""


@pytest.fixture
def netns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A namespace that is none, which only our program looks into."""
    program = tmp_path / "nsenter"
    program.write_text(NSENTER.format(directory=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "netns").touch()
    return tmp_path / "netns"


def answer(netns: Path, script: str) -> None:
    netns.with_name("answers").write_text(script)


def calls(netns: Path) -> list[str]:
    return netns.with_name("calls").read_text().splitlines()


def test_nothing_is_locked(netns: Path) -> None:
    answer(netns, NO_LOCK)
    assert not is_network_locked(netns)
    assert lock_note(netns) is None
    unlock_network(netns)
    assert set(calls(netns)) == {"iptables -w 10 -S", "ip6tables -w 10 -S", "nft list tables"}


@pytest.mark.parametrize(
    ("script", "undone"),
    [
        (
            BY_IPTABLES,
            [
                *["iptables -w 10 -D INPUT -j CRIU"] * 2,
                "iptables -w 10 -D OUTPUT -j CRIU",
                "iptables -w 10 -F CRIU",
                "iptables -w 10 -X CRIU",
            ],
        ),
        (BY_NFT, ["nft delete table inet CRIU-42"]),
    ],
)
def test_a_lock_is_undone(netns: Path, script: str, undone: list[str]) -> None:
    answer(netns, script)
    assert is_network_locked(netns)
    assert lock_note(netns) == (
        f"its network is still locked: criupy.rpc.unlock_network('{netns}') undoes that"
    )
    netns.with_name("calls").unlink()
    unlock_network(str(netns))
    assert [call for call in calls(netns) if "-S" not in call and "list" not in call] == undone


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (NOT_ALLOWED, "expected a network namespace, {netns}: nsenter: .* Operation not permitted"),
        (NO_PROGRAMS, "whether CRIU has locked {netns} cannot be seen: nsenter: failed to execute iptables"),
    ],
)
def test_what_cannot_be_seen_is_no_answer(netns: Path, script: str, said: str) -> None:
    answer(netns, script)
    for ask in (is_network_locked, unlock_network):
        with pytest.raises(criupy.CriuError, match=f"^unlock_network: {said.format(netns=netns)}"):
            ask(netns)
    assert (lock_note(netns) or "").startswith("its network may still be locked: ")


def test_one_that_is_busy_is_no_answer(netns: Path) -> None:
    """Another one may have iptables' lock, and nft nothing to tell."""
    answer(
        netns, 'case $* in ip*) echo "Another app is currently holding the xtables lock." >&2; exit 4 ;; esac'
    )
    with pytest.raises(criupy.CriuError, match="cannot be seen: Another app is currently holding"):
        unlock_network(netns)


def test_what_could_not_be_held() -> None:
    with HeldNetwork((1 << 22) - 1) as network:
        for ask in (lambda: network.is_locked, network.unlock):
            with pytest.raises(criupy.CriuError, match=r"cannot be seen: No such file"):
                ask()
        assert (network.note() or "").startswith("its network may still be locked: ")


def test_without_nsenter(netns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(criupy.CriuError, match="nsenter cannot be started: No such file"):
        unlock_network(netns)


def test_a_lock_that_stays(netns: Path) -> None:
    answer(netns, STAYS)
    with pytest.raises(
        criupy.CriuError, match=r"the network stays locked: iptables -w 10 -F CRIU: .*unavail"
    ):
        unlock_network(netns)


def test_what_is_no_namespace() -> None:
    with pytest.raises(criupy.CriuError, match=r"expected a network namespace, /no/such: .*: No such"):
        unlock_network("/no/such")


def test_our_own_is_left_alone(netns: Path) -> None:
    """CRIU does not lock the one that it is in: what is named CRIU there is somebody's own, unless asked."""
    answer(netns, BY_IPTABLES)
    with HeldNetwork(os.getpid()) as network:
        assert not network.is_locked
        assert network.note() is None
        network.unlock()
    assert not netns.with_name("calls").exists()
    unlock_network("/proc/self/ns/net")
    assert "iptables -w 10 -X CRIU" in calls(netns)


def test_another_was_quicker(netns: Path) -> None:
    answer(
        netns,
        f'case $* in *-D*) touch "{netns}-done"; exit 1;; esac\n[ ! -e "{netns}-done" ] || exit 0\n'
        + BY_IPTABLES,
    )
    unlock_network(netns)


@pytest.mark.criu
def test_what_is_no_network(tmp_path: Path) -> None:
    """A file that can be opened, for the real nsenter."""
    (tmp_path / "file").touch()
    with pytest.raises(criupy.CriuError, match=r"expected a network namespace, .*/file: nsenter: "):
        unlock_network(tmp_path / "file")


@pytest.mark.criu
def test_as_a_user(tmp_path: Path) -> None:
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as other:
        try:
            netns = Path(f"/proc/{other.pid}/ns/net")
            ours = Path("/proc/self/ns/net").stat().st_ino
            while netns.stat().st_ino == ours:
                pass
            words = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", sys.executable, "-c"]
            program = f"from criupy.rpc import unlock_network; unlock_network({str(netns)!r})"
            done = subprocess.run(
                [*words, program], capture_output=True, text=True, check=False, cwd=tmp_path
            )
        finally:
            other.kill()
    assert done.returncode == 1
    assert "unlock_network: expected a network namespace" in done.stderr.splitlines()[-1]
