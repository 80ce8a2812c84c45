"""Who may import whom, held by reading every module's imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SOURCE / "criupy"

#: What Linux tells of other processes and their networks, and what is done to these.
OF_PROCESSES = ("_kill_linux", "_proc_linux", "_network_linux")

#: The rooms each room may import, besides itself. No entry may be missing here.
MAY_IMPORT = {
    "errors": frozenset[str](),
    "_descriptor": frozenset[str](),
    "_elsewhere": frozenset({"errors"}),
    "_kill_linux": frozenset[str](),
    "_proc_linux": frozenset[str](),
    "_network_linux": frozenset({"errors", "_descriptor"}),
    "_command": frozenset({"errors", "_tls"}),
    "": frozenset(
        {"errors", "rpc", "_tls", "_elsewhere"}
    ),  # criupy/__init__.py; of _tls the files, which are only named
    "wire": frozenset({"errors"}),
    "images": frozenset({"errors"}),
    "_uffd": frozenset({"errors"}),
    "_tls": frozenset({"errors"}),
    "rpc": frozenset({"errors", "images", "_descriptor", "_elsewhere", *OF_PROCESSES}),
    "runc": frozenset({"errors", "rpc", "_descriptor", "_elsewhere", *OF_PROCESSES}),
    "pre_copy": frozenset({"errors", "images"}),
    "policy": frozenset({"errors", "images", "wire"}),
    "trace": frozenset({"errors", "images", "wire", "_uffd"}),
    "lazy_pages": frozenset(
        {
            *("errors", "images", "wire", "_uffd", "_tls", "policy", "trace"),
            *("_command", "_descriptor", "_elsewhere", "_kill_linux"),
        }
    ),
    "page_server": frozenset(
        {"errors", "images", "wire", "_uffd", "_tls", "policy", "trace", "_command", "_elsewhere"}
    ),
    "commands": frozenset({"errors", "images", "rpc", "_uffd", "_elsewhere"}),
    "__main__": frozenset({"commands"}),
    # Stand-ins and harnesses may use everything; nobody uses them.
    "testing": frozenset(
        {
            "errors",
            "images",
            "wire",
            "_elsewhere",
            "_uffd",
            "_tls",
            "rpc",
            "runc",
            "pre_copy",
            "policy",
            "trace",
            "lazy_pages",
            "page_server",
            "commands",
        }
    ),
}

#: Rooms without input and output beyond reading files.
PURE = frozenset({"wire", "images", "policy", "pre_copy"})
IO_MODULES = frozenset(
    {"trio", "socket", "_socket", "socketserver", "ssl", "select", "selectors", "asyncio", "anyio", "cffi"}
)

#: Rooms that promise to work on any system.
PORTABLE = frozenset({"", "errors", "_descriptor", "_elsewhere", "wire", "images", "policy", "pre_copy"})

#: Standard modules that not every system has.
UNIX_ONLY = frozenset(
    {
        "fcntl",
        "grp",
        "posix",
        "pty",
        "pwd",
        "resource",
        "spwd",
        "syslog",
        "termios",
        "tty",
        "_posixsubprocess",
    }
)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def room_of_import(name: str) -> str | None:
    """Tell which room of criupy a dotted name lies in; None when it is not ours."""
    parts = name.split(".")
    if parts[0] != "criupy":
        return None
    return parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import anywhere below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                # Of a package of ours, the name may be a module.
                joined = f"{base}.{alias.name}"
                path = SOURCE / Path(*joined.split("."))
                is_module = path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyi"))
                yield (joined if is_module else base), node.lineno


def top_level(tree: ast.Module) -> ast.Module:
    """Keep what runs when the module is imported, on any platform."""

    class Pruner(ast.NodeTransformer):
        def drop(self, node: ast.AST) -> None:
            return None

        visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = drop  # noqa: N815

        def visit_If(self, node: ast.If) -> ast.AST | None:
            test = ast.unparse(node.test)
            if "TYPE_CHECKING" in test or "sys.platform" in test:
                return None
            return self.generic_visit(node)

    return ast.Module([kept for node in tree.body if (kept := Pruner().visit(node))], [])


def needs_linux(name: str) -> bool:
    """Tell whether a module of ours cannot be imported elsewhere."""
    return room_of_import(name) is not None and name.endswith(("_linux", "._native"))


def native_layouts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield layouts of struct and array that are not the same on every machine."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = ast.unparse(node.func)
        layout = ast.unparse(node.args[0]).removeprefix("f").strip("'")
        # "=" is this machine's order, which is right between processes of one machine.
        of_struct = function.split(".")[0] == "struct" and not layout.startswith(("<", ">", "!", "="))
        if of_struct or (function == "array" and layout in {"l", "L", "u"}):
            yield layout, node.lineno


def broken_rules(path: Path, source: str) -> list[str]:
    """List the rules that a module at ``path`` with this source breaks."""
    tree = ast.parse(source)
    room = room_of(path)
    package = ".".join(path.relative_to(SOURCE).parent.parts)
    broken = []
    if room not in MAY_IMPORT:
        return [f"{path.name}: room {room!r} is unknown here: add it to MAY_IMPORT"]
    for name, line in imports(tree, package):
        where = f"{path.relative_to(SOURCE)}:{line}: {name}"
        target = room_of_import(name)
        if target is not None and target not in MAY_IMPORT[room] | {room, ""}:
            broken.append(f"{where}: {room or 'criupy'} may not know {target}")
        if target == "" and room != "":
            broken.append(f"{where}: import the room that has it, not the package root")
        if room in PURE and (name.split(".")[0] in IO_MODULES or target == "_uffd"):
            broken.append(f"{where}: {room} does no IO")
        if room in PORTABLE and (name.endswith("_linux") or name.split(".")[0] in UNIX_ONLY):
            broken.append(f"{where}: {room or 'criupy'} works on any system")
    if not path.stem.endswith("_linux"):
        broken += [
            f"{path.relative_to(SOURCE)}:{line}: {name}: only a module ending in _linux may need it"
            for name, line in imports(top_level(ast.parse(source)), package)
            if name.split(".")[0] in UNIX_ONLY or needs_linux(name)
        ]
        broken += [
            f"{path.relative_to(SOURCE)}:{line}: {layout!r}: of another size, or order, on another machine"
            for layout, line in native_layouts(tree)
        ]
    return broken


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_keeps_to_its_room(path: Path) -> None:
    assert broken_rules(path, path.read_text(encoding="utf-8")) == []


def test_every_package_folder_is_seen() -> None:
    assert PACKAGE / "errors.py" in modules()
    assert PACKAGE / "images" / "__init__.py" in modules()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wire/a.py", "import trio"),
        ("wire/a.py", "import socket"),
        ("wire/a.py", "def f():\n    from socket import AF_UNIX"),
        ("images/a.py", "from criupy.wire import page_server"),
        ("images/a.py", "from criupy import wire"),
        ("images/a.py", "from ..wire import page_server"),
        ("images/a.py", "from .. import wire"),
        ("images/a.py", "import criupy._uffd"),
        ("images/a.py", "from criupy import ImageError"),
        ("images/a.py", "import fcntl"),
        ("policy/a.py", "from criupy._uffd import space"),
        ("policy/a.py", "from criupy.images._thing_linux import x"),
        ("_uffd/a.py", "import criupy.lazy_pages"),
        ("_command/a.py", "import criupy.lazy_pages"),
        ("_command/a.py", "from criupy._uffd import space"),
        ("_uffd/a.py", "import resource"),
        ("lazy_pages/a.py", "import criupy.testing"),
        ("lazy_pages/a.py", "from criupy.lazy_pages._daemon_linux import LazyPages"),
        ("lazy_pages/a.py", "from criupy.lazy_pages import _daemon_linux"),
        ("page_server/a.py", "from criupy._uffd import _native"),
        ("page_server/a.py", "from criupy._uffd._native import lib"),
        ("wire/a.py", "import struct\nstruct.pack('IQ', 1, 2)"),
        ("wire/a.py", "import struct\nSTATUS = struct.Struct('@i')"),
        ("images/a.py", "from array import array\narray('L', ())"),
        ("lazy_pages/a.py", "try:\n    import fcntl\nexcept ImportError:\n    raise"),
        ("rpc/a.py", "import criupy.lazy_pages"),
        ("commands/a.py", "from criupy.lazy_pages import Config"),
        ("commands/a.py", "import criupy.testing"),
        ("commands/a.py", "from criupy import Criu"),
        ("__main__.py", "import criupy.images"),
        ("errors.py", "import criupy.images"),
        ("__init__.py", "import criupy.lazy_pages"),
        ("attic/a.py", ""),
    ],
)
def test_rules_refuse(module: str, source: str) -> None:
    assert broken_rules(PACKAGE / module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wire/a.py", "import struct\nfrom criupy.errors import ProtocolError\nfrom criupy.wire import b"),
        ("images/a.py", "from . import _framing\nfrom .. import errors\nfrom ..errors import ImageError"),
        ("commands/a.py", "from criupy.rpc import Criu\nfrom criupy.images import _tasks"),
        ("commands/a_linux.py", "import fcntl\nfrom criupy._uffd import pager_linux"),
        ("__main__.py", "from criupy.commands import main"),
        ("lazy_pages/a_linux.py", "import fcntl, trio\nfrom criupy._uffd import space"),
        ("lazy_pages/a.py", "import sys\nif sys.platform == 'linux':\n    import fcntl"),
        ("lazy_pages/a.py", "def f():\n    import fcntl"),
        ("lazy_pages/a.py", "def f():\n    from criupy.lazy_pages import _daemon_linux"),
        ("lazy_pages/a.py", "if TYPE_CHECKING:\n    from criupy._uffd._native import Stats"),
        ("lazy_pages/a_linux.py", "import struct\nstruct.pack('ii', 1, 0)"),
        ("images/a.py", "import struct\nstruct.pack(f'<{n}I', *head)\narray('Q')"),
        ("page_server/a.py", "from criupy._command.parser import Group"),
        ("__init__.py", "from criupy.errors import ImageError"),
    ],
)
def test_rules_allow(module: str, source: str) -> None:
    assert broken_rules(PACKAGE / module, source) == []
