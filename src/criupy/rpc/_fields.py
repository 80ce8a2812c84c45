"""How an option is written into the message: the metadata of ``_options.py``.

``Field`` is that metadata. Its ``put`` checks a value and writes it into a
``Draft``; most are ``one`` or ``many`` of a check of ``_option_checks.py``,
and write the field that is named like the option.
"""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

from criupy.rpc import _schema_pb2 as schema
from criupy.rpc._option_checks import (
    PORT_MAX,
    UINT32_MAX,
    absolute,
    alternatives,
    choice,
    descriptor,
    directory,
    each,
    external,
    inherited,
    integer,
    interface,
    join_namespace,
    mapping,
    path,
    refuse,
    string,
    text,
)
from criupy.rpc._option_types import CPU_CAPABILITY, JOINABLE_SINCE, CriuPath, Directory, Release

#: The oldest CRIU whose RPC is spoken here.
OLDEST: Final[Release] = (3, 0)


@dataclass(slots=True)
class Draft:
    """What the options of one request amount to so far."""

    request: str
    message: schema.Options = field(default_factory=schema.Options)
    inherit: list[int] = field(default_factory=list)
    since: dict[str, Release] = field(default_factory=dict)
    work_dir: Directory | None = None

    def need(self, option: str, version: Release) -> None:
        """Note that the value of an option needs a CRIU of at least this version."""
        self.since[option] = max(version, self.since.get(option, OLDEST))


Put: TypeAlias = Callable[[Draft, str, object], None]


@dataclass(frozen=True, slots=True)
class Field:
    """How an option travels.

    ``wire`` is the field of CRIU's criu_opts, None where it has the option's
    own name and empty where there is none. ``since`` is the first CRIU that
    reads it. ``swrk_only`` says that CRIU refuses it in service mode.
    """

    put: Put
    since: Release = OLDEST
    swrk_only: bool = False
    wire: str | None = None


def one(check: Callable[[str, object], object], since: Mapping[str, Release] | None = None) -> Put:
    """Set the field of the option's name; ``since`` tells of values that need a later CRIU than others."""

    def put(draft: Draft, option: str, value: object) -> None:
        setattr(draft.message, option, check(option, value))
        if since is not None and isinstance(value, str) and value in since:
            draft.need(option, since[value])

    return put


def many(check: Callable[[str, object], object]) -> Put:
    """Extend the repeated field of the option's name."""

    def put(draft: Draft, option: str, value: object) -> None:
        getattr(draft.message, option).extend(each(option, value, check))

    return put


def work_dir(draft: Draft, option: str, value: object) -> None:
    if isinstance(value, CriuPath):
        refuse(option, "a path or a descriptor, by which CRIU takes it", value)
    draft.work_dir = directory(option, value)


def externals(draft: Draft, option: str, value: object) -> None:
    found = each(option, value, external)
    draft.message.external.extend(found)
    for item in found:
        if item.startswith("net["):
            draft.need(option, (3, 11))
        elif item.startswith("pid["):
            draft.need(option, (3, 15))


def page_server(draft: Draft, option: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != 2:
        refuse(option, "a pair of address and port", value)
    address = text(option, value[0])
    if draft.request == "page_server":
        # CRIU resolves names only where it connects.
        try:
            listen = ipaddress.ip_address(address)
        except ValueError:
            refuse(option, "an IPv4 or IPv6 address to listen on", address)
        if getattr(listen, "scope_id", None) is not None:
            refuse(option, "an address without a zone", address)
        port = integer(0, PORT_MAX, "a port")(option, value[1])
    else:
        port = integer(1, PORT_MAX, "a port to connect to")(option, value[1])
    draft.message.ps.address = address
    draft.message.ps.port = port


def ps_socket(draft: Draft, option: str, value: object) -> None:
    number, status = inherited(option, value)
    if not stat.S_ISSOCK(status.st_mode):
        refuse(option, "a socket", value)
    draft.message.ps.fd = number
    draft.inherit.append(number)


def pidfd_store_sk(draft: Draft, option: str, value: object) -> None:
    number, status = descriptor(option, value)
    if not stat.S_ISSOCK(status.st_mode):
        refuse(option, "a Unix datagram socket", value)
    draft.message.pidfd_store_sk = number


def status_fd(draft: Draft, option: str, value: object) -> None:
    number, status = descriptor(option, value)
    # CRIU opens /proc/PID/fd/N anew, which sockets and event descriptors do not allow.
    if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        refuse(option, "a pipe, a file or a terminal", value)
    draft.message.status_fd = number


def inherit_fd(draft: Draft, option: str, value: object) -> None:
    seen: dict[int, str] = {}
    for key, given in mapping(option, value, "resource keys to descriptors").items():
        name = text(option, key)
        number, _ = inherited(option, given)
        if number in seen:
            # CRIU closes each as it puts it away, so a second entry would find it closed.
            refuse(option, f"a descriptor for each resource alone (os.dup); {number} is there twice", name)
        seen[number] = name
        draft.message.inherit_fd.add(key=name, fd=number)
    draft.inherit.extend(seen)


def veths(draft: Draft, option: str, value: object) -> None:
    for inner, outer in mapping(option, value, "interface names to interface names").items():
        name, at, bridge = text(option, outer).partition("@")
        interface(option, name)
        if at:
            interface(option, bridge)
        draft.message.veths.add(if_in=interface(option, inner), if_out=f"{name}{at}{bridge}")


def ext_mnt(draft: Draft, option: str, value: object) -> None:
    for key, val in mapping(option, value, "names to names").items():
        draft.message.ext_mnt.add(key=path(option, key), val=path(option, val))


def cg_root(draft: Draft, option: str, value: object) -> None:
    for controller, root in mapping(option, value, "controllers to paths").items():
        entry = draft.message.cg_root.add(path=absolute(option, root))
        if controller != "":
            entry.ctrl = text(option, controller)


def unix_sk_ino(draft: Draft, option: str, value: object) -> None:
    for inode in each(option, value, integer(1, UINT32_MAX, "an inode")):
        draft.message.unix_sk_ino.add(inode=inode)
    # CRIU reads the list only where this field is on the wire, whatever it says.
    if not draft.message.HasField("ext_unix_sk"):
        draft.message.ext_unix_sk = False


def cpu_cap(draft: Draft, option: str, value: object) -> None:
    names = alternatives(tuple(CPU_CAPABILITY))
    if isinstance(value, (str, bytes)) or not isinstance(value, Collection) or not value:
        refuse(option, f"a collection of {names}", value)
    bits = 0
    for name in value:
        bits |= choice(CPU_CAPABILITY)(option, name)
    if bits and "none" in value:
        refuse(option, '"none" alone', value)
    draft.message.cpu_cap = bits


def exec_cmd(draft: Draft, option: str, value: object) -> None:
    words = each(option, value, lambda name, word: string(name, word, "a str"))
    if not words or not words[0]:
        refuse(option, "a program and its arguments", value)
    draft.message.exec_cmd.extend(words)


def join_ns(draft: Draft, option: str, value: object) -> None:
    for ns in each(option, value, join_namespace):
        entry = draft.message.join_ns.add(ns=ns.ns, ns_file=str(ns.ns_file))
        if ns.extra_opt is not None:
            entry.extra_opt = ns.extra_opt
        if ns.ns in JOINABLE_SINCE:
            draft.need(option, JOINABLE_SINCE[ns.ns])


# Fields that this schema does not know.

_VARINT: Final = 0
_LENGTH: Final = 2
_NUMBER_MAX: Final = (1 << 29) - 1
_RESERVED: Final = range(19000, 20000)


def extra(draft: Draft, option: str, value: object) -> None:
    known = schema.Options.DESCRIPTOR.fields_by_number
    for number, content in mapping(option, value, "field numbers to values").items():
        if isinstance(number, bool) or not isinstance(number, int):
            refuse(option, "field numbers for keys", number)
        if not 0 < number <= _NUMBER_MAX or number in _RESERVED:
            refuse(option, f"a field number from 1 to {_NUMBER_MAX} outside 19000 to 19999", number)
        if number in known:
            refuse(option, f"a field that is not known: {number} is {known[number].name}", number)
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            raw = b"".join(each(option, content, partial(_raw, number)))
        else:
            raw = _raw(number, option, content)
        draft.message.MergeFromString(raw)


def _raw(number: int, option: str, value: object) -> bytes:
    """Encode one field as protobuf does: int and bool as a varint, str and bytes with their length."""
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            refuse(option, "a number of at most 64 bits", value)
        return _varint(number << 3 | _VARINT) + _varint(value % (1 << 64))
    if isinstance(value, str):
        value = string(option, value, "a str").encode()
    if not isinstance(value, bytes):
        refuse(option, "bool, int, str, bytes, or a sequence of one of them", value)
    return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
