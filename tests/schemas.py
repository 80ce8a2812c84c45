"""Making protobuf code anew from a schema of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"


def assert_up_to_date(schema: str, directory: Path) -> None:
    """Insist that the committed code of a schema (its path in ``src``) is what the pinned generators make.

    The command after a change of the schema, in ``src``:
    ``python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. SCHEMA``
    """
    pytest.importorskip("grpc_tools", reason="needs the pinned generators of the dev group")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{SOURCE}",
            f"--python_out={directory}",
            f"--mypy_out=quiet:{directory}",
            schema,
        ],
        check=True,
        # protoc finds the plugin for stubs on PATH: protoc's own lack the types of arguments.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    for suffix in ("_pb2.py", "_pb2.pyi"):
        name = schema.removesuffix(".proto") + suffix
        assert (directory / name).read_text() == (SOURCE / name).read_text(), f"{name}: generate it anew"
