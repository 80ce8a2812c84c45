"""The part of criupy-page-server that stands beside a live source."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import asdict

import trio

from criupy._command.process_linux import status_ready
from criupy._command.signals_linux import stop_on_signal
from criupy.errors import CommandError, PageServerError
from criupy.page_server._cli import report
from criupy.page_server._config import Config
from criupy.page_server._options import PageServerOptions
from criupy.page_server._relay_config import RelayConfig
from criupy.page_server._relay_linux import Fate, Relay
from criupy.page_server._relaying_linux import open_relay
from criupy.page_server._server_linux import PageServer

__all__ = ["serve_relay"]

log = logging.getLogger("criupy.page_server")

# For destinations to read the last answer and go.
_FAREWELL = 5.0


async def serve_relay(options: PageServerOptions, config: Config, awaited: int | None) -> int:
    """Relay until the source has ended, or for ever where it is spooled; return the exit status.

    ``awaited`` is the pipe to a parent that waits for this to be ready.
    """
    assert options.upstream is not None  # noqa: S101
    relay_config = RelayConfig(
        upstream=options.upstream,
        cache=options.cache,
        spool=options.spool,
        close_when_spooled=options.close_when_spooled,
        hold_timeout=options.hold_timeout,
        work_dir=options.work_dir,
    )
    failure: CommandError | None = None
    async with open_relay(config, relay_config) as (server, relay), trio.open_nursery() as nursery:
        stopping = _Stopping(server, relay, nursery, options.stop_timeout)
        await nursery.start(stop_on_signal, stopping)
        try:
            if awaited is not None:
                _tell_parent(awaited)
            if options.status_fd is not None:
                status_ready(options.status_fd)
            nursery.start_soon(_end_with_source, server, relay)
            await stopping.wait()
        except CommandError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    report(options, server, received=False, upstream=_plain(relay), fate=relay.fate.name.lower())
    return _judge(relay)


def _tell_parent(awaited: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # it was killed, and nobody waits
        os.write(awaited, b"\0")
    os.close(awaited)


async def _end_with_source(server: PageServer, relay: Relay) -> None:
    """Accept no more when the source has ended, unless its pages are in the spool."""
    await relay.wait()
    if relay.is_spooled and relay.fate is Fate.CLOSED:
        return
    if relay.fate is Fate.LOST:  # what was kept may be enough
        server.stop()
        return
    # Who was lost in this moment comes back, to be told.
    with trio.move_on_after(_FAREWELL):
        await relay.heard()
    server.stop()
    server.cut()


class _Stopping:
    """What a wish to stop does: nothing is decided by it as long as a destination needs the source."""

    def __init__(self, server: PageServer, relay: Relay, nursery: trio.Nursery, patience: float) -> None:
        self._server = server
        self._relay = relay
        self._nursery = nursery
        self._patience = patience
        self._asked = False
        self._leaving = trio.CancelScope()

    def __call__(self) -> None:
        again, self._asked = self._asked, True
        if self._relay.is_needed:
            if again:
                self._leaving.cancel()
            else:
                log.warning(
                    "asked to stop, but the destination needs the source: going on until its session ends; "
                    "--abort lets the source go on, another request to stop leaves it frozen"
                )
        elif again:
            self._server.cut()
        else:
            self._nursery.start_soon(self._stop)

    async def _stop(self) -> None:
        if self._relay.fate is Fate.HELD:
            try:
                await self._relay.abort("asked to stop, and no destination has come")
            except PageServerError as error:
                log.warning("%s", error)
        self._server.stop()
        await trio.sleep(self._patience)
        self._server.cut()

    async def wait(self) -> None:
        """Wait until there is nothing more to serve, or until asked to leave it."""
        with self._leaving:
            await self._server.wait()


def _plain(relay: Relay) -> dict[str, object]:
    state = asdict(relay.last)
    return state | {"link": relay.last.link.name.lower(), "reply_fault": relay.last.reply_fault.name.lower()}


def _judge(relay: Relay) -> int:
    """Return 0 when the destination has everything and the source has ended well; raise PageServerError."""
    if relay.is_left:
        raise PageServerError("stopped with the source frozen: it is for --abort or --hold-timeout to decide")
    match relay.fate:
        case Fate.CLOSED if not relay.status:
            return 0
        case Fate.CLOSED:
            raise PageServerError(f"the source ended with status {relay.status}: see the log of the dump")
        case Fate.RESUMED:
            raise PageServerError(f"the migration did not happen, the source goes on: {relay.why}")
        case _:
            if relay.is_spooled:
                return 0
            raise PageServerError("the source was lost, see above")
