"""What a check finds, as values: text and JSON are made of these."""

from __future__ import annotations

import dataclasses
import enum
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Finding", "Group", "State", "all_well", "guarded", "render", "to_json"]

# What is said of a lack is indented as far as the names.
_BELOW: Final = " " * 11


class State(enum.StrEnum):
    """Whether what was looked for is there."""

    OK = "ok"
    LACK = "lack"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``value`` is what was found, ``cost`` what cannot be done for lack of it,
    ``remedy`` what to do about that; both are empty where all is well.
    ``essential`` is what every dump, restore or lazy migration needs.
    """

    group: str
    name: str
    state: State
    value: str
    cost: str = ""
    remedy: str = ""
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Makes the findings of one group."""

    title: str

    def ok(self, name: str, value: str) -> Finding:
        """Say that something is there."""
        return Finding(self.title, name, State.OK, value)

    def lack(self, name: str, value: str, cost: str, remedy: str, *, essential: bool = False) -> Finding:
        """Say that something is missing."""
        return Finding(self.title, name, State.LACK, value, cost, remedy, essential)

    def unknown(self, name: str, value: str, remedy: str = "", *, essential: bool = False) -> Finding:
        """Say that it could not be found out."""
        return Finding(self.title, name, State.UNKNOWN, value, "", remedy, essential)


def guarded(
    group: Group, name: str, probe: Callable[[], Iterable[Finding]], *, essential: bool
) -> Iterator[Finding]:
    """Yield what a probe finds; where it fails, that it could not find out, and why."""
    try:
        yield from probe()
    except Exception as error:  # noqa: BLE001 - the other findings must reach the reader whatever this is
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "this is a failure of the check, not of the machine: please report it"
        yield group.unknown(name, reason, remedy, essential=essential)


def all_well(findings: Iterable[Finding]) -> bool:
    """Tell whether nothing essential is missing; what could not be found out may be."""
    return not any(finding.essential and finding.state is not State.OK for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, object]:
    """Return the report as what json.dumps takes; the keys stay what they are."""
    return {"findings": [dataclasses.asdict(finding) for finding in findings], "ok": all_well(findings)}


def render(findings: Sequence[Finding], width: int) -> str:
    """Return the report as text for people, ``width`` columns wide."""
    names = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    group = None
    for finding in findings:
        if finding.group != group:
            lines += ["", finding.group] if lines else [finding.group]
            group = finding.group
        lines += _lines(finding, names, width)
    missing = [finding.name for finding in findings if finding.essential and finding.state is not State.OK]
    lines.append("")
    if missing:
        told = f"Dump, restore and lazy migration need what is marked with !: {', '.join(missing)}."
        lines += textwrap.wrap(told, width, break_long_words=False)
    else:
        lines.append("Nothing is missing that every dump, restore and lazy migration needs.")
    return "\n".join(lines) + "\n"


def _lines(finding: Finding, names: int, width: int) -> Iterator[str]:
    mark = "!" if finding.essential and finding.state is not State.OK else " "
    head = f"{mark} {finding.state:<7}  {finding.name:<{names}}  "
    yield from textwrap.wrap(
        finding.value, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False
    )
    for first, text in ((_BELOW, finding.cost), (f"{_BELOW}-> ", finding.remedy)):
        rest = " " * len(first)
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
