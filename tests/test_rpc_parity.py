"""The two clients are one: the same names, parameters, defaults and words, but for what is awaited."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from criupy import rpc, runc
from criupy.rpc import _async_lazy_client_linux as async_lazy
from criupy.rpc import _lazy_client_linux as lazy

PAIRS: list[tuple[Any, Any]] = [
    (rpc.Criu, rpc.AsyncCriu),
    (rpc.Operation, rpc.AsyncOperation),
    (rpc.Process, rpc.AsyncProcess),
    (rpc.PageServerChild, rpc.AsyncPageServerChild),
    (rpc.PreDumpLoop, rpc.AsyncPreDumpLoop),
    (rpc.LazyDump, rpc.AsyncLazyDump),
    (rpc.LazyRestore, rpc.AsyncLazyRestore),
    (rpc.Hooks, rpc.AsyncHooks),
    (runc.Runc, runc.AsyncRunc),
    (runc.ContainerCheckpoint, runc.AsyncContainerCheckpoint),
    (runc.ContainerRestore, runc.AsyncContainerRestore),
]

#: Public names of one kind of client only, and parameters; each with the reason.
ONLY_BLOCKING = {
    "Process.wait(timeout)": "trio.fail_after does it",
}

#: What the same name is called for the other client.
AWAITED = {
    "__enter__": "__aenter__",
    "__exit__": "__aexit__",
    "__iter__": "__aiter__",
    "__next__": "__anext__",
}


def public(kind: type) -> dict[str, Any]:
    """What a class offers: its public names, and the protocols of the language."""
    return {
        name: value for name, value in vars(kind).items() if not name.startswith("_") or name in KEPT_DUNDERS
    }


KEPT_DUNDERS = {*AWAITED, *AWAITED.values(), "__init__"}


def blocking_words(text: str) -> str:
    """What is said of the one client, said of the other."""
    text = re.sub(r"\bAsync(?=[A-Z])", "", text)
    text = re.sub(r"\bawait |\basync ", "", text)
    return text.replace("Awaitable[", "[")


def ids(value: object) -> str:
    return value.__name__ if isinstance(value, type) else ""


@pytest.mark.parametrize(("blocking", "other"), PAIRS, ids=ids)
def test_the_same_names(blocking: type, other: type) -> None:
    assert {AWAITED.get(name, name) for name in public(blocking)} == set(public(other))


@pytest.mark.parametrize(("blocking", "other"), PAIRS, ids=ids)
def test_the_same_parameters(blocking: type, other: type) -> None:
    """Names, kinds, defaults and types; what the one returns, the other returns when awaited."""
    for name, value in public(blocking).items():
        if not inspect.isfunction(value):
            continue
        counterpart = vars(other)[AWAITED.get(name, name)]
        ours, theirs = inspect.signature(value), inspect.signature(counterpart)
        expected = [
            parameter
            for parameter in ours.parameters.values()
            if f"{blocking.__name__}.{name}({parameter.name})" not in ONLY_BLOCKING
        ]
        found = list(theirs.parameters.values())
        assert [(p.name, p.kind, p.default) for p in expected] == [
            (p.name, p.kind, p.default) for p in found
        ], name
        if name == "__init__" and blocking is not rpc.Criu:
            continue  # not for callers
        assert [str(p.annotation) for p in expected] == [blocking_words(str(p.annotation)) for p in found], (
            name
        )
        assert str(ours.return_annotation) == blocking_words(str(theirs.return_annotation)), name


@pytest.mark.parametrize(("blocking", "other"), PAIRS, ids=ids)
def test_the_same_words(blocking: type, other: type) -> None:
    """Properties and methods have the same first line; so have the attributes that are documented."""
    for name, value in public(blocking).items():
        words, counterpart = inspect.getdoc(value), inspect.getdoc(vars(other)[AWAITED.get(name, name)])
        if not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        assert (words is None) == (counterpart is None), name
        if words is not None and counterpart is not None and not name.startswith("__"):
            assert words.splitlines()[0] == blocking_words(counterpart).splitlines()[0], name
            assert isinstance(value, property) == isinstance(vars(other)[name], property), name


@pytest.mark.parametrize(("blocking", "other"), PAIRS, ids=ids)
def test_what_is_awaited(blocking: type, other: type) -> None:
    """Nothing of the blocking client is async; what blocks is async in the other."""
    for name, value in public(blocking).items():
        if inspect.isfunction(value):
            assert not inspect.iscoroutinefunction(value), name
    never_wait = {
        name for name, value in public(other).items() if inspect.isfunction(value) and not is_async(value)
    }
    assert never_wait <= {
        "__init__",
        "__aiter__",
        # they return blocks
        "open_dump",
        "open_restore",
        "pre_dump_loop",
        "lazy_checkpoint",
        "lazy_dump",
        "lazy_restore",
        # signals, and looking
        "poll",
        "kill",
        "terminate",
    }


def is_async(value: Any) -> bool:
    return inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)


def test_the_same_attributes() -> None:
    """What is set when an object is made."""
    for blocking, other in PAIRS:
        ours = re.findall(r"self\.([a-z]\w*)\s*(?::[^=\n]*)?=", inspect.getsource(blocking))
        theirs = re.findall(r"self\.([a-z]\w*)\s*(?::[^=\n]*)?=", inspect.getsource(other))
        assert set(ours) == set(theirs), blocking.__name__


def test_every_public_class_has_its_counterpart() -> None:
    clients = {name for name in rpc.__all__ if name in {a.__name__ for pair in PAIRS for a in pair}}
    assert {f"Async{blocking.__name__}" for blocking, _ in PAIRS} == {other.__name__ for _, other in PAIRS}
    assert {name for name in rpc.__all__ if name.startswith("Async")} <= clients
    assert set(lazy.__all__) == {blocking_words(name) for name in async_lazy.__all__}
