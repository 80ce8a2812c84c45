"""``criupy check``: every probe with lacks that this machine does not have, then this machine itself."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from criupy.commands._findings import Finding, Group, State, all_well, guarded, render, to_json
from criupy.errors import CriuDied, CriuError, CriuUnavailable

if not sys.platform.startswith("linux"):
    pytest.skip("CRIU is for Linux", allow_module_level=True)

from criupy.commands._probes_criu_linux import features, has_nftables, self_check, traps, version
from criupy.commands._probes_linux import (
    PIPE_SIZE,
    Kernel,
    descriptors,
    find_program,
    pids,
    pipes,
    privileges,
    release,
    tools,
    yama,
)
from criupy.commands._probes_uffd_linux import EVENTS, POISON, Attempt, attempt, native_part, userfaultfd
from criupy.commands._rights_linux import (
    Capability,
    FileCapabilities,
    Process,
    executed,
    file_capabilities,
    observe,
    program_capabilities,
    read,
)
from criupy.commands._survey_linux import survey

if TYPE_CHECKING:
    pass

NOBODY = 65534
ALL = (1 << 41) - 1
ROOT = Process(uid=0, effective=ALL, bounding=ALL, nofile=(1024, 1 << 20))
USER = Process(uid=1000, effective=0, bounding=ALL, nofile=(1024, 4096))
NEW, OLD = Kernel("6.18.44-cloud"), Kernel("5.4.0")


def without(*missing: Capability) -> Process:
    return replace(ROOT, effective=ALL & ~sum(1 << capability for capability in missing))


RESOURCE, ADMIN = Capability.CAP_SYS_RESOURCE, Capability.CAP_SYS_ADMIN
PTRACE, CHECKPOINT = Capability.CAP_SYS_PTRACE, Capability.CAP_CHECKPOINT_RESTORE
CONTAINED = replace(ROOT, initial=False)


def one(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def named(findings: Iterable[Finding]) -> dict[str, Finding]:
    found = list(findings)
    names = {finding.name: finding for finding in found}
    assert len(names) == len(found)
    for finding in found:
        sound(finding)
    return names


def sound(finding: Finding) -> None:
    """Hold what is promised of every finding."""
    assert finding.value
    for text in (finding.value, finding.cost, finding.remedy):
        assert text.isprintable()
        assert len(text) < 260
    if finding.state is State.LACK:
        assert finding.cost
        assert finding.remedy
    if finding.state is State.OK:
        assert not finding.cost
        assert not finding.remedy


def lacking(findings: Iterable[Finding]) -> set[str]:
    return {name for name, finding in named(findings).items() if finding.state is State.LACK}


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Make a /proc of a machine that has everything."""
    folder = tmp_path / "proc"
    for name, text in {
        "sys/kernel/ns_last_pid": "4711",
        "sys/fs/pipe-max-size": "8388608",
        "sys/fs/pipe-user-pages-soft": "16384",
        "sys/fs/pipe-user-pages-hard": "0",
        "sys/fs/nr_open": "1048576",
        "sys/vm/unprivileged_userfaultfd": "0",
        "meminfo": "MemTotal:       16777216 kB\nMemFree:        1 kB",
    }.items():
        write(folder, name, text)
    return folder


def write(proc: Path, name: str, text: str) -> None:
    (proc / name).parent.mkdir(parents=True, exist_ok=True)
    (proc / name).write_text(text + "\n")


# ---- findings ------------------------------------------------------------------------

GROUP = Group("things")
OK = GROUP.ok("one", "there")
LACK = GROUP.lack("other", "gone", "no dance", "dance elsewhere")
ESSENTIAL = GROUP.lack("third", "gone", "nothing goes", "buy it", essential=True)
UNKNOWN = GROUP.unknown("fourth", "hidden", essential=True)


def test_essential_things_decide() -> None:
    assert all_well([])
    assert all_well([OK, LACK])
    assert not all_well([OK, ESSENTIAL])
    assert not all_well([OK, UNKNOWN])
    assert all_well([GROUP.unknown("fourth", "hidden")])


def test_json_of_findings() -> None:
    report = json.loads(json.dumps(to_json([OK, ESSENTIAL])))
    assert report["ok"] is False
    assert report["findings"][1] == {
        "group": "things",
        "name": "third",
        "state": "lack",
        "value": "gone",
        "cost": "nothing goes",
        "remedy": "buy it",
        "essential": True,
    }
    assert report["findings"][0].keys() == report["findings"][1].keys()


def test_text_of_findings() -> None:
    assert render([OK, LACK, replace(OK, group="more")], 80).splitlines() == [
        "things",
        "  ok       one    there",
        "  lack     other  gone",
        "           no dance",
        "           -> dance elsewhere",
        "",
        "more",
        "  ok       one    there",
        "",
        "Nothing is missing that every dump, restore and lazy migration needs.",
    ]
    last = render([OK, ESSENTIAL, UNKNOWN], 200).splitlines()
    assert last[2] == "! lack     third   gone"
    assert last[5] == "! unknown  fourth  hidden"
    assert last[-1].endswith(": third, fourth.")


def test_text_keeps_to_its_width() -> None:
    long = GROUP.lack("name", "value " * 30, "cost " * 50, "remedy " * 40, essential=True)
    lines = render([long, OK], 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("remedy" in line for line in lines) > 1


def test_a_probe_that_fails_is_a_finding_and_others_go_on() -> None:
    def probe() -> Iterator[Finding]:
        yield OK
        raise KeyError("a\nb")

    first, second = guarded(GROUP, "name", probe, essential=True)
    assert first is OK
    assert (second.state, second.name, second.essential) == (State.UNKNOWN, "name", True)
    assert "KeyError" in second.value
    sound(second)


def test_an_interrupt_is_no_finding() -> None:
    def probe() -> Iterator[Finding]:
        yield OK
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(guarded(GROUP, "name", probe, essential=True))


# ---- kernel --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "version", "is_older"),
    [
        ("6.18.44-fc", (6, 18), False),
        ("4.10.0", (4, 11), True),
        ("10.1", (6, 16), False),
        ("6.6-rc1+", (6, 6), False),
    ],
)
def test_kernel_releases(text: str, version: tuple[int, int], is_older: bool) -> None:
    assert Kernel(text).at_least(*version) is not is_older


def test_an_odd_kernel_release_is_said_to_be_odd() -> None:
    with pytest.raises(ValueError, match="mine"):
        Kernel("mine").at_least(4, 11)


def test_release() -> None:
    assert lacking(release(NEW)) == set()
    assert one(release(Kernel("4.10.17"))).essential


def test_pids(proc: Path) -> None:
    assert one(pids(proc, NEW, ROOT)).value == "clone3 with set_tid"
    assert one(pids(proc, NEW, without(ADMIN))).state is State.OK
    assert one(pids(proc, NEW, without(CHECKPOINT))).state is State.OK
    assert one(pids(proc, OLD, ROOT)).value == "kernel.ns_last_pid"
    refused = one(pids(proc, NEW, without(ADMIN, CHECKPOINT)))
    assert (refused.state, refused.essential) == (State.LACK, True)
    sound(refused)


def test_pids_without_checkpoint_restore_in_the_kernel(proc: Path) -> None:
    (proc / "sys/kernel/ns_last_pid").unlink()
    finding = one(pids(proc, NEW, ROOT))
    assert (finding.state, finding.essential) == (State.LACK, True)
    assert "CONFIG_CHECKPOINT_RESTORE" in finding.remedy
    sound(finding)


def test_pids_with_a_read_only_proc(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert one(pids(proc, OLD, ROOT)).state is State.LACK
    assert one(pids(proc, NEW, ROOT)).state is State.OK


def test_pipes(proc: Path) -> None:
    assert lacking(pipes(proc, ROOT)) == set()
    write(proc, "sys/fs/pipe-max-size", str(PIPE_SIZE))
    assert lacking(pipes(proc, without(RESOURCE))) == set()
    write(proc, "sys/fs/pipe-max-size", "1048576")
    small = one(pipes(proc, without(RESOURCE)))
    assert (small.state, small.essential) == (State.LACK, True)
    assert "sysctl -w fs.pipe-max-size=" in small.remedy
    sound(small)
    assert "CAP_SYS_RESOURCE" in one(pipes(proc, ROOT)).value
    # Of a user namespace, the capability does not count here.
    assert "fs.pipe-max-size" in lacking(pipes(proc, CONTAINED))


def test_pipe_size_is_what_the_kernel_makes_of_it() -> None:
    import fcntl

    if mmap.PAGESIZE == 4096:
        assert PIPE_SIZE == 4 << 20
    if int(Path("/proc/sys/fs/pipe-max-size").read_text()) < PIPE_SIZE:
        pytest.skip("fs.pipe-max-size is too small here")
    reading, writing = os.pipe()
    try:
        asked = 8 * mmap.PAGESIZE // 40 * mmap.PAGESIZE
        assert fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, asked) == PIPE_SIZE
    finally:
        os.close(reading)
        os.close(writing)


def test_pipes_of_a_user(proc: Path) -> None:
    assert lacking(pipes(proc, USER)) == {"fs.pipe-user-pages-soft"}
    assert "64 MiB" in named(pipes(proc, USER))["fs.pipe-user-pages-soft"].cost
    write(proc, "sys/fs/pipe-user-pages-soft", "0")
    write(proc, "sys/fs/pipe-user-pages-hard", "1")
    assert lacking(pipes(proc, USER)) == {"fs.pipe-user-pages-hard"}


def test_descriptors(proc: Path) -> None:
    assert one(descriptors(proc, ROOT)).value.startswith(
        "1048576, to which CRIU raises it: lazy dumps of up to 2048"
    )
    few = one(descriptors(proc, replace(without(RESOURCE), nofile=(1024, 4096))))
    assert (few.state, few.essential) == (State.LACK, False)
    assert few.value == "1024: lazy dumps of up to 2.0 GiB, on a machine with 16.0 GiB"
    sound(few)
    assert (
        one(descriptors(proc, replace(USER, nofile=(8192, 8192)))).value
        == "8192: lazy dumps of up to 16.0 GiB"
    )
    # CRIU may lower the hard limit to fs.nr_open, which raises the soft one.
    assert "raises" in one(descriptors(proc, replace(USER, nofile=(1024, 1 << 21)))).value
    (proc / "meminfo").unlink()
    assert one(descriptors(proc, USER)).state is State.OK


@pytest.mark.parametrize(
    ("scope", "root", "user"),
    [("0", True, True), ("1", True, False), ("2", True, False), ("3", False, False)],
)
def test_yama(proc: Path, scope: str, root: bool, user: bool) -> None:
    write(proc, "sys/kernel/yama/ptrace_scope", scope)
    for process, well in ((ROOT, root), (USER, user)):
        finding = one(yama(proc, process))
        assert (finding.state is State.OK) is well
        assert finding.essential is not well
        assert finding.value.startswith(scope)
        sound(finding)


def test_no_yama(proc: Path) -> None:
    assert one(yama(proc, USER)).state is State.OK


@pytest.mark.parametrize("probe", [pipes, descriptors])
def test_what_is_hidden_is_no_answer(probe: Any, tmp_path: Path) -> None:
    finding = one(guarded(GROUP, "name", lambda: probe(tmp_path, USER), essential=False))
    assert finding.state is State.UNKNOWN
    assert "is not there" in finding.value


# ---- privileges ----------------------------------------------------------------------


def test_root_has_all() -> None:
    assert lacking(privileges(ROOT, ROOT)) == set()


@pytest.mark.parametrize(
    ("missing", "names", "essential"),
    [
        ((RESOURCE,), {"CAP_SYS_RESOURCE"}, False),
        ((Capability.CAP_NET_ADMIN,), {"CAP_NET_ADMIN"}, False),
        ((PTRACE,), {"CAP_SYS_PTRACE"}, True),
        ((CHECKPOINT,), set(), False),
        ((ADMIN,), {"CAP_SYS_ADMIN"}, False),
        ((ADMIN, CHECKPOINT), {"CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"}, True),
    ],
)
def test_missing_capabilities(missing: tuple[Capability, ...], names: set[str], essential: bool) -> None:
    findings = list(privileges(without(*missing), without(*missing)))
    assert lacking(findings) == names
    assert all_well(findings) is not essential
    for finding in findings:
        if finding.state is State.LACK:
            assert "bounding set" in finding.remedy


def test_a_user_lacks_all() -> None:
    findings = named(privileges(USER, USER))
    assert {name for name, finding in findings.items() if finding.state is State.OK} == {"user namespace"}
    assert "uid 1000" in findings["user"].value
    assert "setcap cap_checkpoint_restore+eip" in findings["CAP_CHECKPOINT_RESTORE"].remedy


def test_a_user_with_a_privileged_criu() -> None:
    criu = replace(USER, effective=1 << PTRACE | 1 << CHECKPOINT)
    assert lacking(privileges(USER, criu)) == {"user", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE"}
    assert not all_well(privileges(USER, criu))


def test_a_service_of_root() -> None:
    assert named(privileges(USER, ROOT))["user"].value == "root (this process: uid 1000)"


def test_confinement() -> None:
    assert lacking(privileges(CONTAINED, CONTAINED)) == {"user namespace"}
    assert not all_well(privileges(CONTAINED, CONTAINED))
    hidden = replace(ROOT, initial=None)
    assert named(privileges(ROOT, hidden))["user namespace"].state is State.UNKNOWN
    filtered = replace(ROOT, filtered=True)
    assert lacking(privileges(filtered, filtered)) == {"seccomp"}
    assert all_well(privileges(filtered, filtered))


STATUS = """Name:\tpython
Uid:\t1000\t1001\t1000\t1000
CapInh:\t0000000000000001
CapPrm:\t0000000000000003
CapEff:\t000001ffffffffff
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2"""
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 unlimited            files
Max locked memory         8388608              8388608              bytes"""


def test_what_proc_tells_of_a_process(tmp_path: Path) -> None:
    write(tmp_path, "7/status", STATUS)
    write(tmp_path, "7/limits", LIMITS)
    assert observe(tmp_path, "7") == Process(
        uid=1001,
        effective=ALL,
        inheritable=1,
        bounding=ALL & ~(1 << RESOURCE),
        no_new_privs=True,
        filtered=True,
        initial=None,
        nofile=(1024, 2**63),
    )
    (tmp_path / "7/ns").mkdir()
    for inode, initial in ((4026531837, True), (4026532288, False)):
        (tmp_path / "7/ns/user").unlink(missing_ok=True)
        (tmp_path / "7/ns/user").symlink_to(f"user:[{inode}]")
        assert observe(tmp_path, "7").initial is initial


def test_what_proc_does_not_tell_of_a_process(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        observe(tmp_path, "7")
    write(tmp_path, "7/status", STATUS.replace("CapBnd", "Other"))
    write(tmp_path, "7/limits", LIMITS)
    with pytest.raises(ValueError, match="CapBnd"):
        observe(tmp_path, "7")
    write(tmp_path, "7/status", STATUS)
    write(tmp_path, "7/limits", "nothing")
    with pytest.raises(ValueError, match="Max open files"):
        observe(tmp_path, "7")


def test_this_process_is_what_it_is() -> None:
    this = observe(Path("/proc"), "self")
    import resource

    assert this.uid == os.geteuid()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert this.nofile == tuple(2**63 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    assert read(Path("/proc"), "sys/kernel/osrelease") == os.uname().release
    assert read(Path("/proc"), "nothing/such") is None


@pytest.mark.parametrize(
    ("process", "program", "expected"),
    [
        (ROOT, None, ALL),
        (replace(ROOT, effective=0, bounding=5, inheritable=8), None, 13),
        (USER, None, 0),
        (replace(USER, ambient=4), None, 4),
        (replace(USER, ambient=4), FileCapabilities(3, 0, effective=True), 3),
        (replace(USER, bounding=1), FileCapabilities(3, 0, effective=True), 1),
        (replace(USER, inheritable=6), FileCapabilities(1, 12, effective=True), 5),
        (USER, FileCapabilities(3, 0, effective=False), 0),
        (replace(USER, no_new_privs=True), FileCapabilities(3, 0, effective=True), 0),
    ],
)
def test_what_a_program_may_that_is_executed(
    process: Process, program: FileCapabilities | None, expected: int
) -> None:
    assert executed(process, program) == expected


def test_file_capabilities_that_are_none() -> None:
    with pytest.raises(ValueError, match="expected 20 bytes, found 3"):
        file_capabilities(b"abc")
    assert program_capabilities(sys.executable) is None


# VFS_CAP_REVISION_2 with the effective flag; CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE.
SETCAP = struct.pack("<5I", 0x02000001, 1 << 19, 0, 1 << (40 - 32), 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="setcap needs root")
def test_the_kernel_gives_what_is_foretold() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = Path(folder, "cat")
        shutil.copy(shutil.which("cat") or "", program)
        words = ["/proc/self/status", "/proc/self/limits"]

        def as_nobody() -> Process:
            command = [str(program), *words]
            told = subprocess.run(
                command, user=NOBODY, extra_groups=[], capture_output=True, text=True, check=True
            ).stdout
            write(Path(folder), "7/status", told)
            write(Path(folder), "7/limits", told)
            return observe(Path(folder), "7")

        before = as_nobody()
        try:
            os.setxattr(program, "security.capability", SETCAP)
        except OSError as error:
            pytest.skip(f"file capabilities cannot be set here: {error}")
        given = program_capabilities(str(program))
        assert given == FileCapabilities(1 << PTRACE | 1 << CHECKPOINT, 0, effective=True)
        assert before.effective == executed(before, None) == 0
        assert as_nobody().effective == executed(before, given) == 1 << PTRACE | 1 << CHECKPOINT


# ---- tools ---------------------------------------------------------------------------


def test_find_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a-tool"
    program.write_text("")
    assert find_program("a-tool", str(tmp_path)) == (None, None)
    program.chmod(0o700)
    assert find_program("a-tool", str(tmp_path)) == (str(program), None)
    monkeypatch.setattr("criupy.commands._probes_linux._SBIN", str(tmp_path))
    assert find_program("a-tool", "/nonexistent") == (None, str(program))


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the only directory with programs, which has all that are wanted."""
    monkeypatch.setattr("criupy.commands._probes_linux._SBIN", "/nonexistent")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("iptables-restore", "ip6tables-restore", "ip", "tar"):
        (folder / name).write_text("")
        (folder / name).chmod(0o700)
    return folder


def never() -> bool | None:
    raise AssertionError("there was no need to ask")


def test_tools(bin_dir: Path) -> None:
    assert lacking(tools(str(bin_dir), never)) == set()
    for name in ("ip", "tar"):
        (bin_dir / name).unlink()
    findings = named(tools(str(bin_dir), never))
    assert {name for name, finding in findings.items() if finding.state is State.LACK} == {"ip", "tar"}
    assert findings["ip"].remedy == "install iproute2"
    assert all_well(findings.values())


@pytest.mark.parametrize("nftables", [True, False, None])
@pytest.mark.parametrize("missing", ["iptables-restore", "ip6tables-restore"])
def test_network_lock(bin_dir: Path, nftables: bool | None, missing: str) -> None:
    (bin_dir / missing).unlink()
    finding = named(tools(str(bin_dir), lambda: nftables))["network lock"]
    assert finding.state is State.LACK
    assert missing in finding.value
    assert ("--network-lock nftables" in finding.remedy) is (nftables is True)
    assert ("could not be found out" in finding.value) is (nftables is None)
    assert "skip" in finding.remedy


def test_tools_off_the_path(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("criupy.commands._probes_linux._SBIN", str(bin_dir))
    findings = named(tools("/nonexistent", lambda: False))
    for name in ("network lock", "ip", "tar"):
        assert f"add {bin_dir} to PATH" in findings[name].remedy


# ---- userfaultfd ---------------------------------------------------------------------

FEATURES = sum(EVENTS.values()) | POISON
GOOD = Attempt(0, FEATURES, 0)


def judged(
    proc: Path, tried: Attempt, this: Process = ROOT, criu: Process | None = None
) -> dict[str, Finding]:
    return named(userfaultfd(proc, tried, this, criu or this))


def test_userfaultfd(proc: Path) -> None:
    findings = judged(proc, GOOD)
    assert {finding.state for finding in findings.values()} == {State.OK}
    assert findings["events"].value == "fork, remap, remove, unmap"


@pytest.mark.parametrize(
    ("code", "process", "word"),
    [
        (errno.ENOSYS, ROOT, "CONFIG_USERFAULTFD"),
        (errno.ENOSYS, replace(ROOT, filtered=True), "seccomp"),
        (errno.EPERM, ROOT, "seccomp"),
        (errno.EPERM, USER, "CAP_SYS_PTRACE"),
        (errno.EPERM, CONTAINED, "initial user namespace"),
        (errno.EMFILE, ROOT, "userfaultfd(2)"),
    ],
)
def test_userfaultfd_refused(proc: Path, code: int, process: Process, word: str) -> None:
    findings = judged(proc, Attempt(code, None, 0), process)
    refused = findings["userfaultfd(2)"]
    assert (refused.state, refused.essential) == (State.LACK, True)
    assert refused.value == os.strerror(code)
    assert word in refused.remedy
    assert "events" not in findings


def test_userfaultfd_for_criu_alone(proc: Path) -> None:
    findings = judged(proc, Attempt(errno.EPERM, FEATURES, 0), USER, ROOT)
    assert findings["userfaultfd(2)"].state is State.UNKNOWN
    assert all_well(findings.values())
    findings = judged(proc, Attempt(0, FEATURES, errno.EPERM), USER, ROOT)
    assert findings["events"].state is State.UNKNOWN
    assert all_well(findings.values())


@pytest.mark.parametrize("event", EVENTS)
def test_a_missing_event(proc: Path, event: str) -> None:
    finding = judged(proc, Attempt(0, FEATURES & ~EVENTS[event], 0))["events"]
    assert (finding.state, finding.essential, finding.value) == (State.LACK, True, f"no {event}")


def test_events_that_are_refused(proc: Path) -> None:
    finding = judged(proc, Attempt(0, FEATURES, errno.EPERM), USER)["events"]
    assert (finding.state, finding.essential) == (State.LACK, True)
    assert "CAP_SYS_PTRACE" in finding.remedy


def test_no_poison(proc: Path) -> None:
    finding = judged(proc, Attempt(0, FEATURES & ~POISON, 0))["poison"]
    assert (finding.state, finding.essential) == (State.LACK, False)
    assert "6.6" in finding.remedy


@pytest.mark.parametrize(("value", "word"), [("1", "for all"), ("0", "no obstacle"), (None, "5.2")])
def test_unprivileged_userfaultfd(proc: Path, value: str | None, word: str) -> None:
    name = "vm.unprivileged_userfaultfd"
    (proc / "sys/vm/unprivileged_userfaultfd").unlink()
    if value is not None:
        write(proc, "sys/vm/unprivileged_userfaultfd", value)
    assert word in judged(proc, GOOD)[name].value
    assert judged(proc, GOOD, USER)[name].state is State.OK


def test_a_pure_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "criupy._uffd._native", None)
    with pytest.raises(ImportError) as caught:
        attempt()
    finding = one(native_part(caught.value))
    assert (finding.state, finding.essential) == (State.LACK, True)
    sound(finding)
    found = named(survey("/nonexistent/criu", None))
    assert found["criupy's native part"].state is State.LACK
    assert "userfaultfd(2)" not in found
    assert "release" in found


def test_userfaultfd_is_really_tried() -> None:
    pytest.importorskip("criupy._uffd._native", reason="the native part is not built")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - the names
    tried = attempt()
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    if observe(Path("/proc"), "self").capable(PTRACE):
        assert (tried.opened, tried.enabled) == (0, 0)
    if tried.features is not None:
        assert tried.features & EVENTS["fork"]
        assert bool(tried.features & POISON) is Kernel(os.uname().release).at_least(6, 6)


# ---- asking CRIU ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Number:
    numbers: tuple[int, int]

    def at_least(self, major: int, minor: int) -> bool:
        return self.numbers >= (major, minor)

    def __str__(self) -> str:
        return ".".join(map(str, self.numbers))


@dataclass(frozen=True, slots=True)
class Told:
    mem_track: bool | None = True
    lazy_pages: bool | None = True
    pidfd_store: bool | None = True


class Client:
    """A CRIU that answers what it is told to, or fails."""

    def __init__(self, error: CriuError | None = None, told: Told | None = None) -> None:
        self.error = error
        self.told = told or Told()
        self.asked: list[object] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Client]:
        if isinstance(self.error, CriuUnavailable):
            raise self.error
        yield self

    def _ask(self, *what: object) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error

    def version(self) -> Number:
        self._ask("version")
        return Number((4, 2))

    def feature_check(self) -> Told:
        self._ask("feature_check")
        return self.told

    def check(self, *, unprivileged: bool | None = None) -> None:
        self._ask("check", unprivileged)


def test_version() -> None:
    asked = version(Client())
    assert asked.version == Number((4, 2))
    assert asked.finding.value == "4.2"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CriuUnavailable("version", "criu: Permission denied"), "Permission --criu"),
        (CriuUnavailable("version", "no such program", hint="buy one"), "buy"),
        (CriuDied("version", "criu ended", output="Error (vdso.c:9): bad vDSO\nmore"), "vDSO 3.17 4.2"),
    ],
)
def test_a_criu_that_does_not_start(error: CriuError, words: str) -> None:
    asked = version(Client(error))
    assert asked.version is None
    assert (asked.finding.state, asked.finding.essential) == (State.LACK, True)
    for word in words.split():
        assert word in f"{asked.finding.value} {asked.finding.remedy}"
    sound(asked.finding)


def test_self_check() -> None:
    client = Client()
    assert lacking(self_check(client, unprivileged=False)) == set()
    assert lacking(self_check(client, unprivileged=True)) == set()
    assert client.asked == [("check", None), ("check", True)]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            CriuError("check", "no kcmp", log_errors=("Error (a.c:1): no kcmp", "Error (b.c:2): so no")),
            "so no",
        ),
        (CriuError("check", "no right", hint="run it as root"), "run it as root"),
        (CriuError("check", "no word"), "criu check"),
    ],
)
def test_self_check_that_fails(error: CriuError, remedy: str) -> None:
    finding = one(self_check(Client(error), unprivileged=False))
    assert (finding.state, finding.essential) == (State.LACK, True)
    assert finding.value == error.message
    assert remedy in finding.remedy
    sound(finding)


@pytest.mark.parametrize("name", ["mem_track", "lazy_pages", "pidfd_store"])
@pytest.mark.parametrize(("has", "state"), [(True, State.OK), (False, State.LACK), (None, State.UNKNOWN)])
def test_features(name: str, has: bool | None, state: State) -> None:
    found = named(features(Client(told=replace(Told(), **{name: has})), 0))
    assert found.keys() == {"lazy_pages", "mem_track", "pidfd_store"}
    assert found[name].state is state
    assert all_well(found.values()) is (state is State.OK or name != "lazy_pages")


def test_features_that_cannot_be_asked() -> None:
    client = Client(CriuError("feature_check", "tun: no"))
    found = named(features(client, 0))
    assert {finding.state for finding in found.values()} == {State.UNKNOWN}
    assert "tun: no" in found["lazy_pages"].remedy
    assert not all_well(found.values())
    found = named(features(client, 1000))
    assert lacking(found.values()) == {"lazy_pages"}
    assert not all_well(found.values())


def test_traps() -> None:
    assert lacking(traps(Number((4, 1)), NEW)) == {"sockets", "address of a lazy dump"}
    assert lacking(traps(Number((4, 1)), Kernel("6.15.9"))) == {"address of a lazy dump"}
    assert lacking(traps(Number((4, 2)), NEW)) == {"address of a lazy dump"}
    assert lacking(traps(Number((4, 3)), NEW)) == set()
    assert named(traps(Number((4, 1)), NEW))["page-server frames"].value.startswith("24 bytes")
    assert named(traps(Number((4, 2)), NEW))["page-server frames"].value.startswith("32 bytes")
    assert all_well(traps(Number((3, 17)), NEW))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo network_lock_nftables is supported", True),
        ("echo 'Warn: Nftables based locking requires libnftables' >&2; exit 1", False),
        ("echo 'CRIU needs to have the CAP_SYS_ADMIN'; exit 1", None),
    ],
)
def test_nftables(script: str, expected: bool | None, tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    assert has_nftables(str(program)) is expected
    assert has_nftables(None) is None
    assert has_nftables("/nonexistent") is None
