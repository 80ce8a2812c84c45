"""What the protocols page draws from the code: tables of states, and of numbers on the wire.

``.. state-table:: MODULE`` reads the module's ``State`` and ``TRANSITIONS``.
``.. number-table:: MODULE.ENUM`` has a line of content for each member, ``NAME: text``, and
further columns behind ``|``; its option ``:columns:`` names them. A member without a line is
an error, and so is a line without a member.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec

__all__ = ["setup", "state_rows"]


def name_of(state: enum.Enum) -> str:
    """Return how a state is written: as the code has it."""
    return f"``{state.name}``"


def state_rows(transitions: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]]) -> list[tuple[str, str, str]]:
    """Return a row for each step that a state allows; one that allows none has one if it can be reached."""
    reached = {after for steps in transitions.values() for after in steps.values()}
    rows = []
    for state, steps in transitions.items():
        rows += [
            (name_of(state) if number == 0 else "", str(step.value), name_of(after))
            for number, (step, after) in enumerate(steps.items())
        ]
        if not steps and state in reached:
            rows.append((name_of(state), "nothing more", ""))
    return rows


class Drawing(SphinxDirective):
    """A table that is drawn from the code."""

    required_arguments = 1

    def draw(self, *rows: tuple[str, ...]) -> list[nodes.Node]:
        """Make a table as reStructuredText, its header first, and let Sphinx read that."""
        lines = [".. list-table::", "   :header-rows: 1", ""]
        for row in rows:
            lines += [f"   {' ' if number else '*'} - {cell}" for number, cell in enumerate(row)]
        return list(self.parse_text_to_nodes("\n".join(lines)))

    def load(self, name: str) -> Any:
        """Import a module, and let a change of its source rebuild the page."""
        module = importlib.import_module(name)
        self.env.note_dependency(str(Path(inspect.getfile(module))))
        return module


class StateTable(Drawing):
    """The states of a protocol, what each allows, and where that leads."""

    def run(self) -> list[nodes.Node]:
        """Draw it."""
        module = self.load(self.arguments[0])
        if missing := set(module.State) - set(module.TRANSITIONS):
            raise self.error(f"TRANSITIONS has no {', '.join(state.name for state in missing)}")
        return self.draw(("state", "what is sent or received", "then"), *state_rows(module.TRANSITIONS))


class NumberTable(Drawing):
    """The numbers of an enumeration, and what they mean."""

    has_content = True
    option_spec: ClassVar[OptionSpec | None] = {"columns": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Draw it."""
        module, _, name = self.arguments[0].rpartition(".")
        members = {member.name: member for member in getattr(self.load(module), name)}
        texts = {}
        for line in filter(None, self.content):
            member, _, text = line.partition(":")
            texts[member] = [cell.strip() for cell in text.split("|")]
        if different := set(texts) ^ set(members):
            raise self.error(f"{name} and this table differ in {', '.join(sorted(different))}")
        columns = [cell.strip() for cell in self.options.get("columns", "meaning").split("|")]
        rows = [(f"``{number_of(member)}``", f"``{key}``", *texts[key]) for key, member in members.items()]
        return self.draw(("number", "name", *columns), *rows)


def number_of(member: enum.IntEnum) -> str:
    """Return a number as CRIU's source has it: large ones in hexadecimal."""
    return str(member.value) if member < 256 else f"{member.value:#x}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("state-table", StateTable)
    app.add_directive("number-table", NumberTable)
    return {"parallel_read_safe": True}
