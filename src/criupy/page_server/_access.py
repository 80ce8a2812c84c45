"""Who may connect, and where a listening socket is reached from."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Network", "at", "household", "is_allowed", "is_loopback", "parse_network"]

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def at(host: str, port: int) -> str:
    """Write an address and a port as people do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_network(text: str) -> Network:
    """Parse an address or a network in CIDR notation; raise ValueError, in one line."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no network such as 10.0.0.0/8 or fd00::/8 ({error})") from None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])  # a link-local one names its interface
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def household(host: str) -> object:
    """Return what one peer has in common whichever of its addresses it uses: of IPv6 the first 64 bits."""
    address = _address(host)
    return address if address.version == 4 else int(address) >> 64


def is_allowed(host: str, allow: Sequence[Network]) -> bool:
    """Tell whether a peer may connect; with no networks at all every peer may."""
    address = _address(host)
    return not allow or any(address in network for network in allow)


def is_loopback(host: str) -> bool:
    """Tell whether what listens on this address is reached from this machine only."""
    return _address(host).is_loopback
