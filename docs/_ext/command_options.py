"""What the commands' own parsers say of their options: the man pages, and the same in HTML.

``.. command-synopsis:: criupy-lazy-pages`` is the usage line, ``.. command-options::`` all
options by group. A subcommand is named behind its command: ``criupy check``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import criupy.commands
from criupy.lazy_pages import _parser as lazy_pages
from criupy.page_server import _parser as page_server

__all__ = ["PARSERS", "find_parser", "setup", "shown_options", "subparsers"]

#: Each command, and who makes its parser.
PARSERS: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "criupy": criupy.commands.build_parser,
    "criupy-lazy-pages": lazy_pages.build_parser,
    "criupy-page-server": page_server.build_parser,
}

_OPTION: Final = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
_SPECIAL: Final = re.compile(r"([\\*`|_])")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def find_parser(words: str) -> argparse.ArgumentParser:
    """Return the parser of a command, or of a subcommand: ``criupy check``."""
    command, *rest = words.split()
    parser = PARSERS[command]()
    for word in rest:
        parser = subparsers(parser)[word]
    return parser


def shown_options(parser: argparse.ArgumentParser) -> Iterator[tuple[str | None, list[argparse.Action]]]:
    """Yield the groups of a parser with what its help shows of them."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
        ]
        if actions:
            yield group.title, actions


def metavar_of(action: argparse.Action) -> str:
    """Return what the help shows for the argument of an option; nothing where there is none."""
    if action.nargs == 0:
        return ""
    return str(action.metavar or action.dest.upper())


def signatures(action: argparse.Action) -> list[str]:
    """Return an option in each of its spellings, as one writes it."""
    metavar = metavar_of(action)
    if not action.option_strings:
        return [metavar]
    if not metavar:
        return list(action.option_strings)
    if action.nargs == "?":  # has to be attached
        return [f"{name}[{'=' if name.startswith('--') else ''}{metavar}]" for name in action.option_strings]
    return [f"{name} {metavar}" for name in action.option_strings]


def as_rst(text: str) -> str:
    """Make reStructuredText of a help, with the options that it names as literals."""
    pieces = []
    end = 0
    for quoted in re.finditer(rf"`([^`]+)`|{_OPTION.pattern}", text):
        pieces.append(_SPECIAL.sub(r"\\\1", text[end : quoted.start()]))
        pieces.append(f"``{quoted.group(1) or quoted.group()}``\\ ")
        end = quoted.end()
    pieces.append(_SPECIAL.sub(r"\\\1", text[end:]))
    return "".join(pieces)


class CommandDirective(SphinxDirective):
    """Looks up the parser that its argument names, and lets a change of its source rebuild the page."""

    required_arguments = 1
    final_argument_whitespace = True

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser."""
        for module in (criupy.commands, lazy_pages, page_server):
            self.env.note_dependency(str(Path(str(module.__file__))))
        try:
            return find_parser(self.arguments[0])
        except KeyError as error:
            raise self.error(f"there is no command {self.arguments[0]!r}: {error}") from None


class CommandSynopsis(CommandDirective):
    """The usage line."""

    def run(self) -> list[nodes.Node]:
        """Make a literal block of it."""
        usage = " ".join(self.parser().format_usage().split()).removeprefix("usage: ")
        block = nodes.literal_block(usage, usage, language="none")
        block["classes"].append("synopsis")
        return [block]


class CommandOptions(CommandDirective):
    """Every option that the help shows, by its groups."""

    def run(self) -> list[nodes.Node]:
        """Make option descriptions as reStructuredText and let Sphinx read that, group by group."""
        groups = list(shown_options(self.parser()))
        found: list[nodes.Node] = []
        for title, actions in groups:
            lines = [f".. program:: {self.arguments[0]}", ""]
            for action in actions:
                lines += self.describe(action)
            options = self.parse_text_to_nodes("\n".join(lines))
            if title and len(groups) > 2:  # a subcommand has only its arguments and its options
                heading = nodes.title("", "", *self.parse_inline(as_rst(title))[0])
                name = nodes.make_id(f"{self.arguments[0]} {title}")
                found.append(nodes.section("", heading, *options, ids=[name]))
            else:
                found += options
        return found

    def describe(self, action: argparse.Action) -> list[str]:
        """Return the description of one option."""
        text = as_rst(str(action.help))
        if not action.option_strings:
            return [f"``{metavar_of(action)}``", f"   {text}", ""]
        return [f".. option:: {', '.join(signatures(action))}", "", f"   {text}", ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("command-synopsis", CommandSynopsis)
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}
