"""Options: each covers its field, becomes the right message, and is refused in words that help."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from criupy.errors import OptionError
from criupy.rpc import _options
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._option_encoding import REQUESTS, encode
from criupy.rpc._option_types import CriuPath, JoinNs

# What the client itself sets.
CLIENTS = {"images_dir_fd", "images_dir", "pid", "notify_scripts", "lazy_pages"}
WIRE = {"page_server": "ps", "ps_socket": "ps", "work_dir": "work_dir_fd", "extra": ""}

DUMPS = {"dump", "lazy_dump"}
RESTORES = {"restore", "lazy_restore"}
STOPPING = {*DUMPS, "pre_dump"}
BOTH = DUMPS | RESTORES
TRANSFER = {*STOPPING, "page_server"}
TLS = {*TRANSFER, "lazy_restore"}
ALL = {*BOTH, *TRANSFER, "check", "cpuinfo"}

#: Option -> a value, the message it becomes, the requests that take it, the first CRIU that heeds it.
TABLE: dict[str, tuple[Any, dict[str, Any], set[str], tuple[int, int]]] = {
    "log_file": ("dump.log", {"log_file": "dump.log"}, ALL, (3, 0)),
    "log_level": (4, {"log_level": 4}, ALL, (3, 0)),
    "log_to_stderr": (True, {"log_to_stderr": True}, ALL, (3, 19)),
    "unprivileged": (True, {"unprivileged": True}, ALL, (3, 18)),
    "auto_dedup": (True, {"auto_dedup": True}, {*TRANSFER, *RESTORES}, (3, 0)),
    "image_io_mode": ("direct", {"image_io_mode": 1}, {*TRANSFER, *RESTORES}, (4, 3)),
    "display_stats": (True, {"display_stats": True}, {*STOPPING, *RESTORES}, (3, 19)),
    "parent_img": (Path("../1"), {"parent_img": "../1"}, TRANSFER, (3, 0)),
    "tls": (True, {"tls": True}, TLS, (3, 13)),
    "tls_no_cn_verify": (True, {"tls_no_cn_verify": True}, TLS, (3, 13)),
    "page_server": (
        ("10.0.0.1", 2020),
        {"ps": {"address": "10.0.0.1", "port": 2020}},
        {"dump", "pre_dump", "page_server"},
        (3, 0),
    ),
    "track_mem": (True, {"track_mem": True}, STOPPING, (3, 0)),
    "timeout": (30, {"timeout": 30}, STOPPING, (3, 0)),
    "freeze_cgroup": ("/sys/fs/cgroup/x", {"freeze_cgroup": "/sys/fs/cgroup/x"}, STOPPING, (3, 0)),
    "force_irmap": (True, {"force_irmap": True}, STOPPING, (3, 0)),
    "irmap_scan_paths": (["/srv", Path("/opt")], {"irmap_scan_paths": ["/srv", "/opt"]}, STOPPING, (3, 0)),
    "cpu_cap": ({"fpu", "cpu"}, {"cpu_cap": 3}, {*BOTH, "cpuinfo"}, (3, 0)),
    "root": ("/rootfs", {"root": "/rootfs"}, BOTH, (3, 0)),
    "shell_job": (True, {"shell_job": True}, BOTH, (3, 0)),
    "tcp_established": (False, {"tcp_established": False}, BOTH, (3, 0)),
    "tcp_close": (True, {"tcp_close": True}, BOTH, (3, 12)),
    "file_locks": (True, {"file_locks": True}, BOTH, (3, 0)),
    "ext_unix_sk": (True, {"ext_unix_sk": True}, BOTH, (3, 0)),
    "ext_mnt": ({"/mnt": "data"}, {"ext_mnt": [{"key": "/mnt", "val": "data"}]}, BOTH, (3, 0)),
    "auto_ext_mnt": (True, {"auto_ext_mnt": True}, BOTH, (3, 0)),
    "external": (["unix[1]", "mnt[]:m"], {"external": ["unix[1]", "mnt[]:m"]}, BOTH, (3, 0)),
    "empty_ns": ("net", {"empty_ns": 0x40000000}, BOTH, (3, 0)),
    "manage_cgroups": (False, {"manage_cgroups": False}, BOTH, (3, 0)),
    "manage_cgroups_mode": ("strict", {"manage_cgroups_mode": 5}, BOTH, (3, 0)),
    "cg_root": (
        {"": "/all", "cpu,cpuacct": "/cpu"},
        {"cg_root": [{"path": "/all"}, {"ctrl": "cpu,cpuacct", "path": "/cpu"}]},
        BOTH,
        (3, 0),
    ),
    "cgroup_yard": ("/yard", {"cgroup_yard": "/yard"}, BOTH, (3, 14)),
    "orphan_pts_master": (True, {"orphan_pts_master": True}, BOTH, (3, 0)),
    "leave_stopped": (True, {"leave_stopped": True}, {"dump", *RESTORES}, (3, 19)),
    "leave_running": (True, {"leave_running": True}, {"dump"}, (3, 0)),
    "evasive_devices": (True, {"evasive_devices": True}, DUMPS, (3, 0)),
    "link_remap": (True, {"link_remap": True}, DUMPS, (3, 0)),
    "ghost_limit": (4294967295, {"ghost_limit": 4294967295}, DUMPS, (3, 0)),
    "tcp_skip_in_flight": (True, {"tcp_skip_in_flight": True}, DUMPS, (3, 0)),
    "network_lock": ("nftables", {"network_lock": 2}, DUMPS, (3, 16)),
    "skip_mnt": (["/a"], {"skip_mnt": ["/a"]}, DUMPS, (3, 0)),
    "enable_fs": (("nfs", "ceph"), {"enable_fs": ["nfs", "ceph"]}, DUMPS, (3, 0)),
    "ext_sharing": (True, {"ext_sharing": True}, DUMPS, (3, 0)),
    "ext_masters": (True, {"ext_masters": True}, DUMPS, (3, 0)),
    "unix_sk_ino": (
        [7, 8],
        {"unix_sk_ino": [{"inode": 7}, {"inode": 8}], "ext_unix_sk": False},
        DUMPS,
        (3, 0),
    ),
    "cgroup_props": ('"c":\n', {"cgroup_props": '"c":\n'}, DUMPS, (3, 0)),
    "cgroup_props_file": ("/props", {"cgroup_props_file": "/props"}, DUMPS, (3, 0)),
    "cgroup_dump_controller": (["cpu"], {"cgroup_dump_controller": ["cpu"]}, DUMPS, (3, 0)),
    "pre_dump_mode": ("read", {"pre_dump_mode": 2}, {"pre_dump"}, (3, 14)),
    "rst_sibling": (True, {"rst_sibling": True}, RESTORES, (3, 0)),
    "exec_cmd": (["sh", "-c", ""], {"exec_cmd": ["sh", "-c", ""]}, RESTORES, (3, 0)),
    "join_ns": (
        [JoinNs("net", "12"), JoinNs("user", Path("/u"), "1,2")],
        {"join_ns": [{"ns": "net", "ns_file": "12"}, {"ns": "user", "ns_file": "/u", "extra_opt": "1,2"}]},
        RESTORES,
        (3, 0),
    ),
    "veths": (
        {"eth0": "veth7@br0", "eth1": "veth8"},
        {"veths": [{"if_in": "eth0", "if_out": "veth7@br0"}, {"if_in": "eth1", "if_out": "veth8"}]},
        RESTORES,
        (3, 0),
    ),
    "weak_sysctls": (True, {"weak_sysctls": True}, RESTORES, (3, 0)),
    "lsm_profile": ("apparmor:p", {"lsm_profile": "apparmor:p"}, RESTORES, (3, 12)),
    "lsm_mount_context": ("system_u:x", {"lsm_mount_context": "system_u:x"}, RESTORES, (3, 16)),
    "mntns_compat_mode": (True, {"mntns_compat_mode": True}, RESTORES, (3, 17)),
    "skip_file_rwx_check": (True, {"skip_file_rwx_check": True}, RESTORES, (3, 18)),
    "extra": ({}, {}, ALL, (3, 0)),
}

# Those of files and descriptors, made where they are tested.
OPENED = {
    "work_dir": ALL,
    "config_file": ALL,
    "tls_cacert": TLS,
    "tls_cacrl": TLS,
    "tls_cert": TLS,
    "tls_key": TLS,
    "ps_socket": {"dump", "pre_dump", "page_server"},
    "status_fd": {"lazy_dump", "page_server"},
    "pidfd_store_sk": STOPPING,
    "inherit_fd": RESTORES,
}

# What an option is refused without.
COMPANIONS: dict[str, dict[str, object]] = {
    "parent_img": {"track_mem": True},
    "tls_no_cn_verify": {"tls": True},
    "ext_sharing": {"auto_ext_mnt": True},
    "ext_masters": {"auto_ext_mnt": True},
}


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair()
    with first, second:
        yield first, second


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def refusal(request_: str, options: Mapping[str, object]) -> str:
    with pytest.raises(OptionError) as caught:
        encode(request_, options)
    return str(caught.value)


# Coverage.


def test_every_field_is_covered_by_one_option() -> None:
    wires: dict[str, set[str]] = {}
    for fields in REQUESTS.values():
        for name, field in fields.items():
            wires.setdefault(name if field.wire is None else field.wire, set()).add(name)
    known = {field.name for field in schema.Options.DESCRIPTOR.fields}
    assert set(wires) - {""} == known - CLIENTS
    assert {wire: names for wire, names in wires.items() if names != {wire}} == {
        "": {"extra"},
        "ps": {"page_server", "ps_socket"},
        "work_dir_fd": {"work_dir"},
    }


def test_an_option_is_declared_once_and_documented() -> None:
    tree = ast.parse(inspect.getsource(_options))
    declared = []
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for declaration, after in itertools.pairwise([*group.body, ast.Pass()]):
            if isinstance(declaration, ast.AnnAssign):
                assert isinstance(declaration.target, ast.Name)
                declared.append(declaration.target.id)
                assert isinstance(after, ast.Expr), f"{declared[-1]} has no docstring"
    assert sorted(declared) == sorted({name for fields in REQUESTS.values() for name in fields})


def test_the_tables_name_every_option_and_its_requests() -> None:
    takers = {name: requests for name, (_, _, requests, _) in TABLE.items()} | OPENED
    assert takers == {
        name: {request_ for request_, fields in REQUESTS.items() if name in fields}
        for name in {name for fields in REQUESTS.values() for name in fields}
    }


@pytest.mark.parametrize("option", TABLE)
def test_wire(option: str) -> None:
    value, message, requests, since = TABLE[option]
    for request_ in sorted(requests):
        companions = {
            name: value for name, value in COMPANIONS.get(option, {}).items() if name in REQUESTS[request_]
        }
        encoded = encode(request_, {option: value, **companions})
        expected = schema.Options(**message, **companions)  # type: ignore[arg-type]
        assert encoded.message.SerializeToString() == expected.SerializeToString()
        assert encoded.since.get(option, (3, 0)) == since
        assert encoded.inherit == ()
        assert encoded.swrk_only == (("rst_sibling",) if option == "rst_sibling" else ())


def test_bytes_of_some() -> None:
    assert encode("dump", {"leave_running": True}).message.SerializeToString() == b"\x18\x01"
    assert (
        encode("restore", {"exec_cmd": ["a", "b"]}).message.SerializeToString()
        == b"\xb2\x01\x01a\xb2\x01\x01b"
    )
    server = {"page_server": ("::1", 65535)}
    assert encode("dump", server).message.SerializeToString() == b"\x5a\x09\x0a\x03::1\x10\xff\xff\x03"


def test_nothing_given() -> None:
    encoded = encode("dump", {"leave_running": None, "external": None, "page_server": None})
    assert encoded.message == schema.Options()
    assert (encoded.inherit, dict(encoded.since), encoded.swrk_only) == ((), {}, ())
    assert (encoded.work_dir, encoded.log_file) == (None, "criu.log")


def test_log_file() -> None:
    assert encode("dump", {"log_file": "a.log"}).log_file == "a.log"
    assert encode("dump", {"log_to_stderr": True}).log_file is None
    assert encode("dump", {"log_to_stderr": False, "log_file": "a.log"}).log_file == "a.log"


def test_since_depends_on_the_value() -> None:
    assert encode("dump", {"network_lock": "skip"}).since == {"network_lock": (3, 19)}
    assert encode("restore", {"join_ns": [JoinNs("time", "1")]}).since == {"join_ns": (3, 14)}
    assert encode("dump", {"external": ["net[1]:a"]}).since == {"external": (3, 11)}
    assert encode("dump", {"external": ["pid[1]:a", "net[1]:a"]}).since == {"external": (3, 15)}
    assert encode("dump", {"tls": False, "leave_stopped": False}).since == {}


# Files and descriptors.


def test_files_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("x")
    names = {"tls_cacert", "tls_cacrl", "tls_cert", "tls_key"}
    message = encode("dump", {**dict.fromkeys(names, "a"), "tls": True}).message
    assert {getattr(message, name) for name in names} == {str(tmp_path / "a")}
    assert encode("check", {"config_file": Path("a")}).message.config_file == str(tmp_path / "a")
    assert encode("dump", {"cgroup_props_file": "b"}).message.cgroup_props_file == str(tmp_path / "b")
    assert encode("dump", {"freeze_cgroup": "c"}).message.freeze_cgroup == str(tmp_path / "c")
    assert encode("restore", {"join_ns": [JoinNs("net", "b")]}).message.join_ns[0].ns_file == str(
        tmp_path / "b"
    )
    assert encode("restore", {"root": "b"}).message.root == "b"


def test_missing_files(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert refusal("dump", {"tls_key": gone, "tls": True}) == (
        f"tls_key: expected a file, got {gone}: No such file or directory"
    )
    assert refusal("dump", {"config_file": "/"}) == "config_file: expected a regular file, got '/'"
    (tmp_path / "file").write_text("")
    for option in ("freeze_cgroup", "cgroup_yard", "work_dir"):
        assert "expected a directory, got" in refusal("dump", {option: tmp_path / "file"})
    assert refusal("dump", {"work_dir": gone}) == (
        f"work_dir: expected a directory, got {gone}: No such file or directory"
    )


def test_work_dir(tmp_path: Path, pipe: tuple[int, int]) -> None:
    assert encode("dump", {"work_dir": tmp_path}).work_dir == str(tmp_path)
    assert not encode("dump", {"work_dir": tmp_path}).message.HasField("work_dir_fd")
    number = os.open(tmp_path, os.O_RDONLY)
    try:
        assert encode("dump", {"work_dir": number}).work_dir == number
    finally:
        os.close(number)
    assert refusal("dump", {"work_dir": number}) == (
        f"work_dir: expected a directory: a path, an open descriptor or a CriuPath, got {number}: "
        "Bad file descriptor"
    )
    assert "expected a descriptor of a directory" in refusal("dump", {"work_dir": pipe[0]})
    assert "expected a path or a descriptor" in refusal("dump", {"work_dir": CriuPath("/w")})


def test_descriptors(sockets: tuple[socket.socket, socket.socket], pipe: tuple[int, int]) -> None:
    sock, other = sockets
    encoded = encode("dump", {"ps_socket": sock})
    assert encoded.message == schema.Options(ps=schema.PageServerInfo(fd=sock.fileno()))
    assert (encoded.inherit, encoded.swrk_only) == ((sock.fileno(),), ("ps_socket",))

    encoded = encode("restore", {"inherit_fd": {"pipe:[1]": pipe[0], "socket:[2]": other}})
    assert [(entry.key, entry.fd) for entry in encoded.message.inherit_fd] == [
        ("pipe:[1]", pipe[0]),
        ("socket:[2]", other.fileno()),
    ]
    assert (encoded.inherit, encoded.swrk_only) == ((pipe[0], other.fileno()), ("inherit_fd",))

    assert encode("lazy_dump", {"status_fd": pipe[1]}).message == schema.Options(status_fd=pipe[1])
    encoded = encode("dump", {"pidfd_store_sk": sock})
    assert encoded.message == schema.Options(pidfd_store_sk=sock.fileno())
    assert (encoded.inherit, encoded.since) == ((), {"pidfd_store_sk": (3, 16)})


def test_refused_descriptors(sockets: tuple[socket.socket, socket.socket], pipe: tuple[int, int]) -> None:
    closed = socket.socket()
    closed.close()
    with open(os.devnull) as ended:  # noqa: PTH123
        pass
    sock = sockets[0]
    assert refusal("lazy_dump", {"status_fd": sock}).startswith(
        "status_fd: expected a pipe, a file or a terminal"
    )
    assert "expected an open descriptor, got" in refusal("lazy_dump", {"status_fd": closed})
    assert refusal("lazy_dump", {"status_fd": ended}) == (
        "status_fd: expected an open descriptor, got a closed TextIOWrapper"
    )
    assert refusal("lazy_dump", {"status_fd": -1}) == "status_fd: expected an open descriptor, got -1"
    assert refusal("lazy_dump", {"status_fd": True}) == (
        "status_fd: expected an open descriptor (a number, or an object with fileno()), got True"
    )
    assert refusal("dump", {"ps_socket": pipe[0]}) == f"ps_socket: expected a socket, got {pipe[0]}"
    assert refusal("dump", {"pidfd_store_sk": pipe[0]}) == (
        f"pidfd_store_sk: expected a Unix datagram socket, got {pipe[0]}"
    )
    assert refusal("restore", {"inherit_fd": {"a": 0}}) == (
        "inherit_fd: expected a descriptor above 2 (0 to 2 are the worker's own), got 0"
    )
    assert refusal("restore", {"inherit_fd": {"a": pipe[0], "b": pipe[0]}}) == (
        "inherit_fd: expected a descriptor for each resource alone (os.dup); "
        f"{pipe[0]} is there twice, got 'b'"
    )
    assert refusal("restore", {"inherit_fd": [pipe[0]]}).startswith(
        "inherit_fd: expected a mapping of resource keys to descriptors"
    )


# Refusals.


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        ("dump", {"leave_running": 1}, "leave_running: expected True or False, got 1"),
        ("dump", {"timeout": True}, "timeout: expected seconds from 0 to 4294967, got True"),
        ("dump", {"timeout": -1}, "timeout: expected seconds from 0 to 4294967, got -1"),
        ("dump", {"timeout": 1.5}, "timeout: expected seconds from 0 to 4294967, got 1.5"),
        (
            "dump",
            {"ghost_limit": 1 << 32},
            "ghost_limit: expected bytes from 0 to 4294967295, got 4294967296",
        ),
        ("dump", {"log_level": 5}, "log_level: expected a number from 0 to 4, got 5"),
        ("dump", {"log_file": "a/b"}, "log_file: expected a file name without directories"),
        ("dump", {"log_file": ".."}, "log_file: expected a file name without directories"),
        ("dump", {"log_file": "."}, "log_file: expected a file name without directories"),
        ("dump", {"log_file": "-"}, "log_file: expected a file name (CRIU takes - for its standard output)"),
        ("dump", {"log_file": ""}, "log_file: expected text that is not empty, got ''"),
        ("dump", {"log_file": "x" * 256}, "log_file: expected a file name of at most 255 bytes"),
        ("dump", {"log_file": b"x"}, "log_file: expected a str, got b'x'"),
        ("dump", {"root": b"/"}, "root: expected a path (str or os.PathLike of str), got b'/'"),
        ("dump", {"root": ""}, "root: expected a path that is not empty, got ''"),
        ("dump", {"root": "/a\0b"}, "root: expected a path (str or os.PathLike of str) without NUL bytes"),
        ("dump", {"root": "/\udcff"}, "root: expected a path (str or os.PathLike of str) in valid Unicode"),
        ("dump", {"root": "/" * 4096}, "root: expected a path of fewer than 4096 bytes, got '///////////"),
        ("dump", {"external": "unix[1]"}, "external: expected a sequence (a list, say), got 'unix[1]'"),
        ("dump", {"external": {"unix[1]"}}, "external: expected a sequence (a list, say), got {'unix[1]'}"),
        (
            "dump",
            {"external": ["unix[1]", "unix 2"]},
            "external: item 1: expected TYPE[ID] or TYPE[ID]:VALUE",
        ),
        (
            "dump",
            {"external": ["mnt[]:ms"]},
            'external: item 0: expected after "mnt[]" nothing, ":m" or ":s"',
        ),
        ("dump", {"enable_fs": ["nfs", ""]}, "enable_fs: item 1: expected text that is not empty, got ''"),
        ("dump", {"irmap_scan_paths": ["a"]}, "irmap_scan_paths: item 0: expected an absolute path, got 'a'"),
        ("dump", {"page_server": "10.0.0.1:80"}, "page_server: expected a pair of address and port"),
        (
            "dump",
            {"page_server": ("h", 0)},
            "page_server: expected a port to connect to from 1 to 65535, got 0",
        ),
        ("dump", {"page_server": ("h", 65536)}, "page_server: expected a port to connect to from 1 to 65535"),
        ("dump", {"page_server": ("", 1)}, "page_server: expected text that is not empty, got ''"),
        (
            "page_server",
            {"page_server": ("h", 0)},
            "page_server: expected an IPv4 or IPv6 address to listen on",
        ),
        (
            "page_server",
            {"page_server": ("fe80::1%eth0", 0)},
            "page_server: expected an address without a zone",
        ),
        ("page_server", {"page_server": ("::1", -1)}, "page_server: expected a port from 0 to 65535, got -1"),
        (
            "dump",
            {"network_lock": "none"},
            'network_lock: expected "iptables", "nftables" or "skip", got \'none\'',
        ),
        ("dump", {"network_lock": 1}, 'network_lock: expected "iptables", "nftables" or "skip", got 1'),
        ("dump", {"empty_ns": "pid"}, "empty_ns: expected \"net\", got 'pid'"),
        ("dump", {"cpu_cap": "fpu"}, "cpu_cap: expected a collection of"),
        ("dump", {"cpu_cap": []}, "cpu_cap: expected a collection of"),
        ("dump", {"cpu_cap": ["none", "fpu"]}, 'cpu_cap: expected "none" alone'),
        ("dump", {"cpu_cap": ["fpU"]}, 'cpu_cap: expected "none", "fpu", "cpu", "ins" or "all", got \'fpU\''),
        ("dump", {"unix_sk_ino": [0]}, "unix_sk_ino: item 0: expected an inode from 1 to 4294967295, got 0"),
        ("dump", {"ext_mnt": ["a"]}, "ext_mnt: expected a mapping of names to names, got ['a']"),
        ("dump", {"cg_root": {"": "a"}}, "cg_root: expected an absolute path, got 'a'"),
        ("restore", {"veths": {"eth0": "x" * 16}}, "veths: expected an interface's name (at most 15 bytes"),
        ("restore", {"veths": {"eth0": "a@"}}, "veths: expected text that is not empty, got ''"),
        ("restore", {"exec_cmd": []}, "exec_cmd: expected a program and its arguments, got []"),
        ("restore", {"exec_cmd": [""]}, "exec_cmd: expected a program and its arguments, got ['']"),
        ("restore", {"exec_cmd": "sh"}, "exec_cmd: expected a sequence (a list, say), got 'sh'"),
        (
            "restore",
            {"lsm_profile": "p"},
            'lsm_profile: expected "apparmor:PROFILE", "selinux:LABEL" or "none:"',
        ),
        ("restore", {"join_ns": [("net", "1")]}, "join_ns: item 0: expected a JoinNs, got ('net', '1')"),
        ("restore", {"join_ns": [JoinNs("net", "0")]}, "join_ns: item 0: expected a pid from 1 to 65535"),
        (
            "restore",
            {"join_ns": [JoinNs("net", "70000")]},
            "join_ns: item 0: expected a pid from 1 to 65535 (for others /proc/PID/ns/net), got '70000'",
        ),
        (
            "restore",
            {"join_ns": [JoinNs("net", "1", "0")]},
            "join_ns: item 0: expected extra_opt with a user namespace only",
        ),
        ("restore", {"join_ns": [JoinNs("user", "1", "0,x")]}, "join_ns: item 0: expected extra_opt to be"),
        ("restore", {"join_ns": [JoinNs("user", "1", "65536")]}, "join_ns: item 0: expected ids up to 65535"),
    ],
)
def test_refused_values(request_: str, options: dict[str, object], message: str) -> None:
    assert refusal(request_, options).startswith(message)


def test_a_namespace_that_cannot_be_joined() -> None:
    odd: Any = "pid"
    assert refusal("restore", {"join_ns": [JoinNs(odd, "1")]}) == (
        'join_ns: item 0: expected a namespace "ipc", "mnt", "net", "time", "user" or "uts", got \'pid\''
    )


def test_long_values_are_shortened() -> None:
    message = refusal("dump", {"timeout": "x" * 1000})
    assert message.endswith("xxx ...")
    assert len(message) < 120


@pytest.mark.parametrize(
    ("request_", "option", "message"),
    [
        ("dump", "leave_runing", "leave_runing: expected an option of dump; did you mean leave_running?"),
        (
            "restore",
            "leave_runing",
            "leave_runing: expected an option of restore; did you mean leave_running?",
        ),
        ("dump", "weather", "weather: expected an option of dump, there is none of this name"),
        ("dump", "exec_cmd", "exec_cmd: expected with restore or lazy_restore, not with dump"),
        ("restore", "leave_running", "leave_running: expected with dump, not with restore"),
        (
            "lazy_dump",
            "leave_stopped",
            "leave_stopped: expected with dump or restore or lazy_restore, not with",
        ),
        ("dump", "lazy_pages", "lazy_pages: expected lazy_dump() or lazy_restore()"),
        ("restore", "notify_scripts", "notify_scripts: expected hooks="),
        ("restore", "images_dir", "images_dir: expected an argument of the call, not an option of CRIU"),
        ("dump", "pid", "pid: expected an argument of the call, not an option of CRIU"),
        ("dump", "ps", "ps: expected page_server= or ps_socket="),
        ("dump", "work_dir_fd", "work_dir_fd: expected work_dir=, which takes a descriptor too"),
        ("lazy_dump", "page_server", "page_server: expected address= and port= with lazy_dump"),
    ],
)
def test_refused_names(request_: str, option: str, message: str) -> None:
    assert refusal(request_, {option: True}).startswith(message)


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (
            "dump",
            {"leave_running": True, "leave_stopped": True},
            "leave_running: expected without leave_stopped",
        ),
        ("check", {"log_file": "a", "log_to_stderr": True}, "log_to_stderr: expected without log_file"),
        ("dump", {"tls_no_cn_verify": True}, "tls_no_cn_verify: expected together with tls=True"),
        ("pre_dump", {"track_mem": False}, "track_mem: expected True"),
        ("dump", {"parent_img": "../1"}, "parent_img: expected together with track_mem=True"),
        ("lazy_dump", {"parent_img": "../1"}, "parent_img: expected together with track_mem=True"),
        (
            "restore",
            {"manage_cgroups": True, "manage_cgroups_mode": "ignore"},
            'manage_cgroups: expected to agree with manage_cgroups_mode="ignore"',
        ),
        (
            "restore",
            {"manage_cgroups": False, "manage_cgroups_mode": "soft"},
            'manage_cgroups: expected to agree with manage_cgroups_mode="soft"',
        ),
        ("dump", {"ext_masters": True}, "ext_masters: expected together with auto_ext_mnt=True"),
        ("dump", {"ext_sharing": True}, "ext_sharing: expected together with auto_ext_mnt=True"),
        (
            "restore",
            {"empty_ns": "net", "join_ns": [JoinNs("net", "1")]},
            "empty_ns: expected without a network namespace in join_ns",
        ),
    ],
)
def test_contradictions(request_: str, options: dict[str, object], message: str) -> None:
    assert refusal(request_, options).startswith(message)


def test_contradictions_of_a_socket(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sock = sockets[0]
    assert refusal("dump", {"ps_socket": sock, "page_server": ("a", 1)}).startswith(
        "ps_socket: expected without page_server"
    )
    assert refusal("pre_dump", {"ps_socket": sock, "tls": True}).startswith("ps_socket: expected without tls")
    assert encode("page_server", {"ps_socket": sock, "tls": True}).message.tls


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        ("dump", {"leave_running": False, "leave_stopped": True}),
        ("dump", {"log_file": "a", "log_to_stderr": False}),
        ("dump", {"tls_no_cn_verify": False}),
        ("dump", {"parent_img": "../1", "track_mem": False}),
        ("dump", {"parent_img": "../1", "auto_dedup": True}),
        ("pre_dump", {"parent_img": "../1"}),
        ("page_server", {"parent_img": "../1"}),
        ("restore", {"manage_cgroups": True, "manage_cgroups_mode": "full"}),
        ("restore", {"manage_cgroups": False, "manage_cgroups_mode": "ignore"}),
        ("dump", {"ext_masters": True, "external": ["mnt[]"]}),
        ("dump", {"tcp_close": True, "tcp_established": True}),
        ("restore", {"empty_ns": "net", "join_ns": [JoinNs("ipc", "1")]}),
    ],
)
def test_what_goes_together(request_: str, options: dict[str, object]) -> None:
    encode(request_, options)


def test_inodes_leave_a_given_ext_unix_sk_alone() -> None:
    for options in ({"unix_sk_ino": [7], "ext_unix_sk": True}, {"ext_unix_sk": True, "unix_sk_ino": [7]}):
        assert encode("dump", options).message.ext_unix_sk is True


# Fields that are not known.


def sibling() -> type[Message]:
    """Make a message with fields of every type under numbers that criu_opts does not use."""
    file = descriptor_pb2.FileDescriptorProto(name="sibling.proto", package="sibling", syntax="proto2")
    message = file.message_type.add(name="Message")
    types = descriptor_pb2.FieldDescriptorProto
    for number, (name, kind, label) in enumerate(
        [
            ("flag", types.TYPE_BOOL, types.LABEL_OPTIONAL),
            ("signed", types.TYPE_INT64, types.LABEL_OPTIONAL),
            ("unsigned", types.TYPE_UINT64, types.LABEL_OPTIONAL),
            ("text", types.TYPE_STRING, types.LABEL_OPTIONAL),
            ("data", types.TYPE_BYTES, types.LABEL_OPTIONAL),
            ("numbers", types.TYPE_INT32, types.LABEL_REPEATED),
            ("texts", types.TYPE_STRING, types.LABEL_REPEATED),
        ],
        start=1000,
    ):
        message.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sibling.Message"))


SIBLING = sibling()
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "flag": st.booleans(),
            "signed": st.integers(-(1 << 63), (1 << 63) - 1),
            "unsigned": st.integers(0, (1 << 64) - 1),
            "text": words,
            "data": st.binary(),
            "numbers": st.lists(st.integers(-(1 << 31), (1 << 31) - 1)),
            "texts": st.lists(words),
        },
    )
)
def test_extra_is_encoded_like_a_known_field(values: dict[str, Any]) -> None:
    numbers = {field.name: field.number for field in SIBLING.DESCRIPTOR.fields}
    extra = {number: values[name] for name, number in numbers.items() if name in values}
    message = encode("dump", {"extra": extra}).message
    wire = message.SerializeToString()
    assert wire == SIBLING(**values).SerializeToString()
    # Nor do they disturb what is known.
    schema_message = schema.Options(leave_running=True)
    schema_message.MergeFromString(wire)
    assert schema_message.leave_running


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({3: True}, "extra: expected a field that is not known: 3 is leave_running, got 3"),
        ({0: 1}, "extra: expected a field number from 1 to 536870911 outside 19000 to 19999, got 0"),
        ({19000: 1}, "extra: expected a field number from 1 to 536870911 outside 19000 to 19999, got 19000"),
        ({19999: 1}, "extra: expected a field number from 1 to 536870911 outside 19000 to 19999, got 19999"),
        ({1 << 29: 1}, "extra: expected a field number from 1 to 536870911 outside"),
        ({"99": 1}, "extra: expected field numbers for keys, got '99'"),
        ({True: 1}, "extra: expected field numbers for keys, got True"),
        ({99: 1.5}, "extra: expected bool, int, str, bytes, or a sequence of one of them, got 1.5"),
        ({99: None}, "extra: expected bool, int, str, bytes, or a sequence of one of them, got None"),
        ({99: [[1]]}, "extra: item 0: expected bool, int, str, bytes, or a sequence of one of them, got [1]"),
        ({99: 1 << 64}, "extra: expected a number of at most 64 bits"),
        ({99: "\ud800"}, "extra: expected a str in valid Unicode"),
        ([99], "extra: expected a mapping of field numbers to values, got [99]"),
    ],
)
def test_refused_extra(value: object, message: str) -> None:
    assert refusal("dump", {"extra": value}).startswith(message)


def test_the_highest_field_number() -> None:
    assert (
        encode("dump", {"extra": {(1 << 29) - 1: True}}).message.SerializeToString()
        == b"\xf8\xff\xff\xff\x0f\x01"
    )
