"""The RPC schema: made anew it is the same, its bytes are CRIU's, and pycriu's copy can live beside it."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from criupy.rpc import _schema_pb2 as schema
from schemas import assert_up_to_date


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    assert_up_to_date("criupy/rpc/_schema.proto", tmp_path)


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
