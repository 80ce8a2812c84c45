"""The committed protobuf code is what the pinned generator makes of the schema."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool

from criupy.images import _schema_pb2
from schemas import assert_up_to_date


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    assert_up_to_date("criupy/images/_schema.proto", tmp_path)


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
