"""Standing beside a live source: connecting to it, and giving out what it has."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
import struct
from array import array
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import trio

from criupy._uffd.image_linux import Image
from criupy._uffd.server_linux import Server
from criupy._uffd.upstream_linux import Upstream
from criupy.errors import ImageError, PageServerError
from criupy.images import (
    PAGE_SIZE,
    FrameSize,
    RelayMarker,
    frame_size,
    is_zombie,
    lazy_entries,
    read_inventory,
    read_pagemap,
    read_pstree,
    write_marker,
)
from criupy.page_server._access import at
from criupy.page_server._admission_linux import Admission
from criupy.page_server._config import Config
from criupy.page_server._control_linux import SOCKET_NAME, listen
from criupy.page_server._held_linux import Holder
from criupy.page_server._relay_config import RelayConfig
from criupy.page_server._relay_linux import Relay
from criupy.page_server._server_linux import PageServer, running
from criupy.page_server._session import Session
from criupy.page_server._socket_linux import listen as listen_on
from criupy.page_server._spool import Spool
from criupy.page_server._twice_linux import HeldTwice
from criupy.wire.extension import KEY_LENGTH

__all__ = ["SourceTask", "load_source", "open_relay"]

log = logging.getLogger("criupy.page_server")


@dataclass(frozen=True, slots=True)
class SourceTask:
    """The lazy pages of a process that only its source has, as arrays ('Q') in address order."""

    pid: int
    starts: array[int]
    nr_pages: array[int]


def load_source(images_dir: Path) -> list[SourceTask]:
    """Read what a live source has; raise ImageError for images of another kind of dump."""
    read_inventory(images_dir)
    tasks = []
    for entry in read_pstree(images_dir):
        if is_zombie(images_dir, entry.pid):
            continue
        pagemap = read_pagemap(images_dir, entry.pid)
        entries = lazy_entries(pagemap)
        if any(entries.present):
            raise ImageError(
                pagemap.path,
                None,
                "its lazy pages are in the images, no source has them; serve the images (--lazy-pages)",
            )
        tasks.append(SourceTask(entry.pid, entries.starts, entries.nr_pages))
    if not any(task.starts for task in tasks):
        raise ImageError(images_dir, None, "no process has a lazy page: was it dumped with --lazy-pages?")
    return tasks


def _connect(config: RelayConfig) -> socket.socket:
    """Connect to the source; should this process die, the kernel resets it, and it goes on."""
    host, port = config.upstream
    where = at(host, port)
    hint = "is the dump waiting there (criu dump --lazy-pages --address ... --port ...)?"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise PageServerError(f"source {where}: no such host ({error.strerror}); see --upstream") from error
    last: OSError = OSError("it has no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(config.connect_timeout)
            sock.connect(address)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            last = error
        else:
            if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
                log.warning("source %s: its pages come in clear text over more than this host", where)
            return sock
    raise PageServerError(f"source {where}: {last.strerror or last}; {hint}") from last


def _add_cached(upstream: Upstream, tasks: Iterable[SourceTask]) -> None:
    """Keep pages in memory, in a file that has no room for those that are not there."""
    for task in tasks:
        indices = array("Q", accumulate(task.nr_pages, initial=0))
        total = indices.pop()
        fd = os.memfd_create(f"criupy-relay-{task.pid}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, total * PAGE_SIZE)
            upstream.add_image(Image(task.pid, task.starts, task.nr_pages, indices), fd)
        except BaseException:
            os.close(fd)
            raise


def _add_spooled(upstream: Upstream, spool: Spool) -> None:
    for task in spool.prepare():
        entries = task.entries
        fd = spool.open(task)
        try:
            upstream.add_image(Image(task.pid, entries.starts, entries.nr_pages, entries.page_indices), fd)
        except BaseException:
            os.close(fd)
            raise


class _Fetching:
    """The source and where its pages go, until the relay takes them over."""

    def __init__(self, images_dir: Path, relay: RelayConfig, stack: contextlib.ExitStack) -> None:
        tasks = load_source(images_dir)
        self.frame_size: FrameSize = frame_size(images_dir) or 32
        self.spool: Spool | None = None
        keeps_all = relay.spool is not None
        self.upstream = stack.enter_context(
            Upstream(
                link_timeout=relay.link_timeout,
                cache_pages=None if keeps_all else relay.cache // PAGE_SIZE,
            )
        )
        if relay.spool is not None:
            self.spool = Spool(images_dir, relay.spool)
            stack.callback(self.spool.discard)
            _add_spooled(self.upstream, self.spool)
        else:
            _add_cached(self.upstream, tasks)
        self.key = secrets.token_bytes(KEY_LENGTH)
        self._images_dir = images_dir
        self._relay = relay
        self._stack = stack

    def connect(self, unmark: contextlib.ExitStack) -> socket.socket:
        """Put the marker there, which ``unmark`` takes away, and connect; the source accepts once."""
        marker = write_marker(self._images_dir, RelayMarker(self.key, self._relay.hold_timeout))
        unmark.callback(marker.unlink, missing_ok=True)
        source = self._stack.enter_context(_connect(self._relay))
        self.upstream.start(os.dup(source.fileno()), self.frame_size)
        return source


def _listening(config: Config, stack: contextlib.ExitStack) -> Config:
    """Say where to listen with a socket that does."""
    if config.tls is not None:
        Admission(config.tls, config.address)  # to tell what is wrong with the files
    if config.listener is not None or config.connection is not None:
        return config
    listener = stack.enter_context(listen_on(config.address, config.port))
    return replace(config, listener=listener)


@contextlib.asynccontextmanager
async def open_relay(config: Config, relay_config: RelayConfig) -> AsyncIterator[tuple[PageServer, Relay]]:
    """Hold a live source and give its pages to one destination, while the block runs.

    ``config.images_dir`` has the images of the lazy dump that the source is of; a marker
    is put there, by which a destination of ours knows the relay. When the block ends and
    no page was asked for, the source goes on; later it is left to the second holder unless
    it has ended. Entering raises ImageError for images that no source serves, PageServerError when
    the source cannot be reached, nothing can be listened on or no second holder started, TlsError for
    files that TLS cannot be done with. Of these only what fails with the source costs its dump.
    """
    with contextlib.ExitStack() as stack:
        path = (relay_config.work_dir or config.images_dir) / SOCKET_NAME
        control = stack.enter_context(listen(path))
        unlink = stack.enter_context(contextlib.ExitStack())
        unlink.callback(path.unlink, missing_ok=True)
        # First what may fail: the source accepts once, and its dump ends with the connection.
        fetching = await trio.to_thread.run_sync(_Fetching, config.images_dir, relay_config, stack)
        native = stack.enter_context(
            Server(
                stall_timeout=config.stall_timeout,
                idle_timeout=config.idle_timeout,
                first_timeout=config.first_timeout,
                asks=True,
            )
        )
        native.add_upstream(fetching.upstream)
        config = await trio.to_thread.run_sync(_listening, config, stack)
        holder = Holder()
        stack.callback(holder.done)
        await trio.to_thread.run_sync(holder.start)
        unmark = stack.enter_context(contextlib.ExitStack())  # whoever is there then is no relay
        source = await trio.to_thread.run_sync(fetching.connect, unmark)
        relay = Relay(
            relay_config,
            native,
            fetching.upstream,
            HeldTwice(source, control, fetching.frame_size, relay_config.hold_timeout, holder),
            Session(fetching.key),
            fetching.spool,
            control,
        )
        server = PageServer(config, native, relay)
        warning = "whoever reaches it is given the memory of these processes, in clear text"
        try:
            log.info(
                "holding the source at %s, frames of %d bytes, %d lazy pages",
                at(*relay_config.upstream),
                fetching.frame_size,
                relay.snapshot().pages_total,
            )
            async with running(server, config, warning, beside=relay.run):
                unmark.pop_all()
                yield server, relay
        finally:
            with trio.CancelScope(shield=True):
                await relay.leave()
            if relay.is_left:
                unlink.pop_all()  # whoever has the source now is found there
