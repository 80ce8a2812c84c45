"""All options of a request, from keyword arguments to CRIU's message.

What CRIU would settle in silence, or refuse without saying why, is an
OptionError here: an unknown option, one that the request does not heed, two
that contradict each other.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, get_type_hints

from criupy.errors import OptionError
from criupy.rpc import _options
from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._fields import OLDEST, Draft, Field
from criupy.rpc._option_types import Directory, Release

#: CRIU's own name for its log.
DEFAULT_LOG_FILE: Final = "criu.log"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The options of one request.

    ``message`` lacks what the client sets: images_dir_fd, images_dir,
    work_dir_fd, pid, notify_scripts, lazy_pages and the address of a lazy
    transfer. The worker must inherit ``inherit``. ``since`` tells, for the
    options that need one later than 3.0, the first CRIU that heeds them; a
    False asks for nothing new. ``swrk_only`` are options that CRIU refuses in
    service mode. ``log_file`` is the log's name in the work directory, None
    when CRIU logs to its standard error.
    """

    message: schema.Options
    inherit: tuple[int, ...]
    since: Mapping[str, Release]
    swrk_only: tuple[str, ...]
    work_dir: Directory | None
    log_file: str | None


def _declared(declaration: type) -> Mapping[str, Field]:
    fields = {}
    for name, hint in get_type_hints(declaration, include_extras=True).items():
        (fields[name],) = (data for data in hint.__metadata__ if isinstance(data, Field))
    return MappingProxyType(fields)


#: The options of each request.
REQUESTS: Final[Mapping[str, Mapping[str, Field]]] = MappingProxyType(
    {
        "dump": _declared(_options.DumpOptions),
        "lazy_dump": _declared(_options.LazyDumpOptions),
        "pre_dump": _declared(_options.PreDumpOptions),
        "restore": _declared(_options.RestoreOptions),
        "lazy_restore": _declared(_options.LazyRestoreOptions),
        "page_server": _declared(_options.PageServerOptions),
        "check": _declared(_options.CheckOptions),
        "cpuinfo": _declared(_options.CpuinfoOptions),
    }
)

# Fields of CRIU's message that are no options here.
_INSTEAD: Final = MappingProxyType(
    {
        "images_dir": "an argument of the call, not an option of CRIU",
        "images_dir_fd": "images_dir=, which takes a descriptor too",
        "lazy_pages": "lazy_dump() or lazy_restore()",
        "notify_scripts": "hooks=",
        "pid": "an argument of the call, not an option of CRIU",
        "ps": "page_server= or ps_socket=",
        "work_dir_fd": "work_dir=, which takes a descriptor too",
    }
)


def encode(request: str, options: Mapping[str, object]) -> Encoded:
    """Check the options of a request and put them into CRIU's message; None counts as not given."""
    fields = REQUESTS[request]
    given = {name: value for name, value in options.items() if value is not None}
    draft = Draft(request)
    swrk_only = []
    for name, value in given.items():
        if name not in fields:
            raise _unknown(request, name)
        field = fields[name]
        field.put(draft, name, value)
        if field.since > OLDEST and value is not False:
            draft.need(name, field.since)
        if field.swrk_only:
            swrk_only.append(name)
    for rule in _RULES:
        for option, expected in rule(draft, given):
            raise OptionError(option, expected)
    return Encoded(
        message=draft.message,
        inherit=tuple(draft.inherit),
        since=MappingProxyType(draft.since),
        swrk_only=tuple(swrk_only),
        work_dir=draft.work_dir,
        log_file=None if draft.message.log_to_stderr else draft.message.log_file or DEFAULT_LOG_FILE,
    )


def _unknown(request: str, name: str) -> OptionError:
    if name in _INSTEAD:
        return OptionError(name, f"expected {_INSTEAD[name]}")
    takers = [other for other, fields in REQUESTS.items() if name in fields]
    if name == "page_server" and request == "lazy_dump":
        return OptionError(name, "expected address= and port= with lazy_dump, which serves pages itself")
    if takers:
        return OptionError(name, f"expected with {' or '.join(takers)}, not with {request}")
    # An option that this very request takes is the likelier one.
    for candidates in (REQUESTS[request], {other for fields in REQUESTS.values() for other in fields}):
        for close in difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.7):
            return OptionError(name, f"expected an option of {request}; did you mean {close}?")
    return OptionError(name, f"expected an option of {request}, there is none of this name")


# Rules: each yields an option and what was expected of it. The values have passed their checks.

_Rule = Callable[[Draft, Mapping[str, object]], Iterator[tuple[str, str]]]


def _ends(_draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if given.get("leave_running") and given.get("leave_stopped"):
        yield "leave_running", "expected without leave_stopped: the tasks end up either running or stopped"


def _log(_draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if "log_file" in given and given.get("log_to_stderr"):
        yield "log_to_stderr", "expected without log_file, with which CRIU would ignore it"


def _page_server(draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if "ps_socket" not in given:
        return
    if "page_server" in given:
        yield "ps_socket", "expected without page_server: one connection carries the pages"
    # A dump begins TLS where it connects. On this socket it has no session, and CRIU segfaults.
    if given.get("tls") and draft.request != "page_server":
        yield "ps_socket", f"expected without tls: in {draft.request} CRIU encrypts only its own connections"


def _tls(_draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in given.items():
        if name.startswith("tls_") and value is not False and not given.get("tls"):
            yield name, "expected together with tls=True, without which nothing is encrypted"


def _incremental(draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if draft.request == "pre_dump" and given.get("track_mem") is False:
        yield "track_mem", "expected True: a pre-dump always tracks memory"
    # A track_mem=False of the caller's own says that a full dump is meant.
    tracked = "track_mem" in given or given.get("auto_dedup")
    if draft.request in {"dump", "lazy_dump"} and "parent_img" in given and not tracked:
        yield "parent_img", "expected together with track_mem=True, without which CRIU writes all pages again"


def _cgroups(_draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    mode = given.get("manage_cgroups_mode")
    if mode is not None and given.get("manage_cgroups") is (mode == "ignore"):
        yield "manage_cgroups", f'expected to agree with manage_cgroups_mode="{mode}", which alone is enough'


def _mounts(draft: Draft, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    looked_for = given.get("auto_ext_mnt") or any(item.startswith("mnt[]") for item in draft.message.external)
    for name in ("ext_sharing", "ext_masters"):
        if given.get(name) and not looked_for:
            yield (
                name,
                "expected together with auto_ext_mnt=True, without which CRIU does not look for mounts",
            )


def _namespaces(draft: Draft, _given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if draft.message.empty_ns and any(entry.ns == "net" for entry in draft.message.join_ns):
        yield "empty_ns", "expected without a network namespace in join_ns: it is either empty or that one"


_RULES: Final[tuple[_Rule, ...]] = (
    _ends,
    _log,
    _page_server,
    _tls,
    _incremental,
    _cgroups,
    _mounts,
    _namespaces,
)
