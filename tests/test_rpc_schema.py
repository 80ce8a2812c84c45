"""The RPC schema: made anew it is the same, its bytes are CRIU's, and pycriu's copy can live beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from criupy.rpc import _schema_pb2 as schema

SOURCE = Path(__file__).resolve().parent.parent / "src"
SCHEMA = "criupy/rpc/_schema.proto"

# The command after a change of the schema, in src:
#   python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. criupy/rpc/_schema.proto


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs the pinned generators of the dev group")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{SOURCE}",
            f"--python_out={tmp_path}",
            f"--mypy_out=quiet:{tmp_path}",
            SCHEMA,
        ],
        check=True,
        # protoc finds the plugin for stubs on PATH: protoc's own lack the types of arguments.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    for suffix in ("_pb2.py", "_pb2.pyi"):
        name = SCHEMA.removesuffix(".proto") + suffix
        assert (tmp_path / name).read_text() == (SOURCE / name).read_text(), f"{name}: generate it anew"


def test_a_copy_of_crius_schema_lives_beside_ours() -> None:
    """A second copy with CRIU's names and no package, as pycriu has it, enters the same pool."""
    field = descriptor_pb2.FieldDescriptorProto
    crius = descriptor_pb2.FileDescriptorProto(name="rpc.proto", syntax="proto2")
    request = crius.message_type.add(name="criu_req")
    request.field.add(
        name="type", number=1, type=field.TYPE_ENUM, type_name=".criu_req_type", label=field.LABEL_REQUIRED
    )
    request.field.add(name="keep_open", number=4, type=field.TYPE_BOOL, label=field.LABEL_OPTIONAL)
    kinds = crius.enum_type.add(name="criu_req_type")
    for value in schema.RequestType.DESCRIPTOR.values:
        kinds.value.add(name=value.name, number=value.number)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(crius.SerializeToString())
    theirs = message_factory.GetMessageClass(pool.FindMessageTypeByName("criu_req"))
    parsed = theirs.FromString(schema.Request(type=schema.VERSION, keep_open=True).SerializeToString())
    assert str(parsed).split() == ["type:", "VERSION", "keep_open:", "true"]
