"""The committed protobuf code is what the pinned generator makes of the schema."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from criupy.images import _schema_pb2

SOURCE = Path(__file__).resolve().parent.parent / "src"
SCHEMA = "criupy/images/_schema.proto"

# The command after a change of the schema, in src:
#   python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. criupy/images/_schema.proto


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


def test_schema_lives_beside_crius_own() -> None:
    """CRIU's schemas have no package; ours must leave their names free in the pool."""
    pool = descriptor_pool.Default()
    assert {m.full_name for m in _schema_pb2.DESCRIPTOR.message_types_by_name.values()} == {
        f"criupy.images.{name}" for name in _schema_pb2.DESCRIPTOR.message_types_by_name
    }
    crius = descriptor_pb2.FileDescriptorProto(name="pagemap.proto", syntax="proto2")
    crius.message_type.add(name="pagemap_entry").field.add(
        name="vaddr",
        number=1,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_UINT64,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
    )
    pool.AddSerializedFile(crius.SerializeToString())
    assert pool.FindMessageTypeByName("pagemap_entry").full_name == "pagemap_entry"
