"""The options of CRIU's RPC: what each request has, and a table of all."""

from __future__ import annotations

import ast
import re
import typing
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import criupy.rpc
import criupy.rpc._option_encoding  # reads the annotations before they are cut down below
from criupy.rpc import _options
from criupy.rpc._fields import OLDEST, Field

__all__ = ["setup"]

REQUESTS = {
    "dump": _options.DumpOptions,
    "lazy dump": _options.LazyDumpOptions,
    "pre-dump": _options.PreDumpOptions,
    "restore": _options.RestoreOptions,
    "lazy restore": _options.LazyRestoreOptions,
    "page server": _options.PageServerOptions,
    "check": _options.CheckOptions,
    "cpuinfo": _options.CpuinfoOptions,
}

#: Groups of options and requests' options, each after those that it has besides its own.
GROUPS = [group for group in vars(_options).values() if typing.is_typeddict(group)]

#: Of every option, the group that declares it and how it travels.
OPTIONS: dict[str, tuple[type, Field]] = {}
for declaring in GROUPS:
    for option, hint in typing.get_type_hints(declaring, include_extras=True).items():
        OPTIONS.setdefault(option, (declaring, hint.__metadata__[0]))


def show_only_types() -> None:
    """Leave of ``Annotated[TYPE, Field(...)]`` only the type, as it is written."""
    for group in GROUPS:
        for name, reference in group.__annotations__.items():
            tree = ast.parse(reference.__forward_arg__, mode="eval").body
            if isinstance(tree, ast.Subscript) and isinstance(tree.slice, ast.Tuple):
                written = ast.unparse(tree.slice.elts[0])
                group.__annotations__[name] = typing.ForwardRef(written, module=_options.__name__)


def name_groups(_app: Sphinx, what: str, _name: str, obj: object, _options: object, lines: list[str]) -> None:
    """Say in the documentation of a request's options which groups they have, as a TypedDict cannot."""
    if what != "class" or obj not in REQUESTS.values():
        return
    taken = dict.fromkeys(OPTIONS[option][0] for option in obj.__annotations__)
    links = [f":py:class:`~{place_of(group)}`" for group in taken if group is not obj]
    own = any(group is obj for group in taken)
    lines += ["", f"{'Besides these it has' if own else 'It has'} those of {', '.join(links)}."]


def link_aliases(*details: Any) -> tuple[str | None, str | None]:
    """Write the names of types that Sphinx shows as objects of its own."""
    signature, returns = details[-2:]
    if signature is not None:
        signature = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
    return signature, returns


def place_of(group: type) -> str:
    """Return where a group is documented."""
    module = "criupy.rpc" if group.__name__ in criupy.rpc.__all__ else _options.__name__
    return f"{module}.{group.__name__}"


class OptionTable(SphinxDirective):
    """Every option, the requests that heed it, and the first CRIU that reads it."""

    def run(self) -> list[nodes.Node]:
        """Make the table as reStructuredText and let Sphinx read that."""
        lines = [".. list-table::", "   :header-rows: 1", "   :class: options", ""]
        lines += self.row("option", *REQUESTS, "since")
        for name, (group, field) in OPTIONS.items():
            marks = ["✓" if name in taken.__annotations__ else "" for taken in REQUESTS.values()]
            since = "" if field.since == OLDEST else ".".join(map(str, field.since))
            lines += self.row(f":py:attr:`~{place_of(group)}.{name}`", *marks, since)
        return list(self.parse_text_to_nodes("\n".join(lines)))

    def row(self, *cells: str) -> list[str]:
        """Return one row of the table."""
        return [f"   {' ' if number else '*'} - {cell}" for number, cell in enumerate(cells)]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add what is ours."""
    show_only_types()
    app.connect("autodoc-process-docstring", name_groups)
    app.connect("autodoc-process-signature", link_aliases)
    app.add_directive("option-table", OptionTable)
    return {"parallel_read_safe": True}
