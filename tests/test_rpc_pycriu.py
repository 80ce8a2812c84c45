"""CRIU's own Python client and ours in one interpreter, over the same protobuf pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import criupy
from criupy.testing.criu_linux import Criu

pytestmark = pytest.mark.criu

_FIRST = {
    "pycriu": "import pycriu\nimport criupy.rpc\n",
    "criupy": "import criupy.rpc\nimport pycriu\n",
}

_PROGRAM = """
import errno, os, sys
binary, images = sys.argv[1:]

theirs = pycriu.criu()
theirs.use_binary(binary)
theirs.opts.images_dir_fd = os.open(images, os.O_DIRECTORY)
theirs.opts.pid = 4194303
try:
    theirs.dump()
except sys.modules["pycriu.criu"].CRIUExceptionExternal as error:  # pycriu.criu is the class
    assert error.errno == errno.ESRCH
else:
    raise AssertionError("it dumped a process that is not there")

with criupy.Criu(binary) as ours:
    ours.check()
    version = ours.version()

# The same message in both classes: the bytes are the same, and so is what they say.
request = pycriu.rpc.criu_req(type=pycriu.rpc.VERSION, keep_open=True)
from criupy.rpc import _schema_pb2 as schema
assert schema.Request.FromString(request.SerializeToString()).keep_open
assert pycriu.images.loads  # what reads images, with schemas of its own
import criupy.images
print(version)
"""


@pytest.mark.parametrize("first", ["pycriu", "criupy"])
def test_both_in_one_interpreter(criu: Criu, first: str, tmp_path: Path) -> None:
    home = criu.path.parent.parent / "python"
    if not (home / "pycriu").is_dir():
        pytest.skip(f"there is no pycriu beside {criu.path} (make fetches one with its own CRIU)")
    done = subprocess.run(
        [sys.executable, "-c", _FIRST[first] + _PROGRAM, criu.path, tmp_path],
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with criupy.Criu(criu.path) as client:
        assert done.stdout.splitlines()[-1] == str(client.version())
