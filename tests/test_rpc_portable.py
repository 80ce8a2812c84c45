"""Elsewhere than on Linux: the types import and work, and the clients say what they need."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
sys.platform = sys.argv[1]
# What these systems lack, or what the clients alone may need.
for name in ("fcntl", "resource", "trio", "criupy._uffd._native", "criupy.rpc._client_linux"):
    sys.modules[name] = None

import criupy
import criupy.rpc
import criupy.rpc.external
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._option_encoding import encode
from criupy.rpc._session import Session

session = Session()
packet = session.send_request(schema.Request(type=schema.VERSION, keep_open=True))
answer = schema.Response(type=schema.VERSION, success=True)
answer.version.major_number, answer.version.minor_number = 4, 2
version = criupy.Version.from_response(session.receive(answer.SerializeToString()).response)
assert version.at_least(4, 2)
assert encode("dump", {"leave_running": True, "network_lock": "skip"}).message.leave_running
assert criupy.rpc.external.mnt("/data", "data") == "mnt[/data]:data"

class Mine(criupy.Hooks):
    def post_dump(self) -> None:
        pass

assert criupy.Script("post-dump") is criupy.Script.POST_DUMP
for name in ("Criu", "AsyncCriu"):
    try:
        getattr(criupy, name)
    except criupy.NeedsLinux as error:
        assert str(error) == f"criupy.rpc.{name} needs Linux, and this is {sys.platform}", error
    else:
        raise AssertionError(name)
try:
    criupy.nothing_of_the_kind
except AttributeError:
    pass
"""


@pytest.mark.parametrize("platform", ["darwin", "freebsd14", "win32"])
def test_types_work_on(platform: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, platform], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def linux_only(name: str) -> object:
    needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the clients need Linux")
    return pytest.param(name, marks=needs_linux)


@pytest.mark.parametrize(
    "name", [*map(linux_only, ["Criu", "AsyncCriu"]), "Hooks", "Version", "Script", "Notification"]
)
def test_importing_criupy_loads_neither_protobuf_nor_trio(name: str) -> None:
    program = (
        "import sys, criupy\n"
        "assert 'google.protobuf' not in sys.modules and 'trio' not in sys.modules\n"
        f"criupy.{name}\n"
        "assert 'google.protobuf' in sys.modules\n"
        f"assert ('trio' in sys.modules) == ({name!r} == 'AsyncCriu')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
