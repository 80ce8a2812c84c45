from __future__ import annotations

import importlib.metadata
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {name: ROOT / "src" / "criupy" / f"_{name.lower()}" for name in ("UFFD", "TLS")}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the native part is for Linux")


def installed_files() -> list[Path]:
    files = importlib.metadata.files("criupy")
    assert files is not None
    return [Path(str(file.locate())) for file in files]


@pytest.mark.parametrize("name", SOURCES)
def test_every_c_file_is_built(name: str) -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(rf"set\({name}_SOURCES(.*?)\)", build, re.DOTALL)
    assert listed is not None
    assert sorted(listed[1].split()) == sorted(
        file.name for file in SOURCES[name].glob("*.c") if not file.name.endswith(".csrc.c")
    )


@linux_only
@pytest.mark.parametrize("room", ["_uffd", "_tls"])
def test_extensions_are_abi3_and_export_their_entry_only(room: str) -> None:
    native = pytest.importorskip(f"criupy.{room}._native", reason="built without OpenSSL")
    path = Path(native.__file__)
    assert path.name == "_native.abi3.so"
    assert path in installed_files()
    assert exported_functions(path) == {"PyInit__native"}


@linux_only
def test_only_the_extension_for_tls_needs_openssl() -> None:
    from criupy._uffd import _native

    assert _native.lib.CRIUPY_PAGE_SIZE == 4096
    assert b"libssl" not in Path(_native.__file__).read_bytes()


@linux_only
def test_workload_is_one_static_program() -> None:
    workload = next(file for file in installed_files() if file.name == "criupy-workload")
    assert os.access(workload, os.X_OK)
    assert 3 not in (kind for kind, *_ in program_headers(workload)), "PT_INTERP: it needs a loader"


def test_installed_package_has_no_c_sources() -> None:
    assert [file for file in installed_files() if file.suffix in {".c", ".h"}] == []


def test_elsewhere_than_on_linux_the_wheel_is_pure(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        names = archive.namelist()
    assert "criupy/py.typed" in names
    built = {".so", ".c", ".h", ""}  # a program has no suffix
    assert [name for name in names if Path(name).suffix in built and ".dist-info/" not in name] == []
    # A wheel is importable as it is: the package root needs neither the native part nor an install.
    script = f"import sys; sys.path.insert(0, {str(pure_wheel)!r}); import criupy; print(criupy.__file__)"
    python = [sys.executable, "-I", "-S", "-c", script]
    answer = subprocess.run(python, check=True, capture_output=True, text=True)
    assert answer.stdout.startswith(str(pure_wheel))


def program_headers(path: Path) -> list[tuple[int, ...]]:
    """The ELF64 program headers (elf(5)): type, flags, offset, vaddr, paddr, filesz, memsz, align."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    return [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]


def exported_functions(path: Path) -> set[str]:
    """The names of the functions that a shared object offers to others: SHT_DYNSYM (elf(5))."""
    data = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    (table,) = (section for section in sections if section[1] == 11)
    names = sections[table[6]][4]
    found = set()
    for at in range(table[4], table[4] + table[5], 24):
        name, info, _, section_index, _, _ = struct.unpack_from("<IBBHQQ", data, at)
        if info & 0xF == 2 and section_index != 0:
            found.add(data[names + name : data.index(b"\0", names + name)].decode())
    return found
