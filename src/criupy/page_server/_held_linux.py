"""The relay's side of the second holder of its source: see ``_holder_linux``."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from typing import Final, Literal

from criupy.errors import PageServerError
from criupy.page_server._holder_linux import CLOSING, DONE, GIVE, HOLDING, LINGER_RESET, READY

__all__ = ["Holder", "HolderState"]

HolderState = Literal["holding", "closing"]

_MESSAGES: Final[dict[HolderState, bytes]] = {"holding": HOLDING, "closing": CLOSING}
_START: Final = 30.0  # seconds; a Python on a machine that swaps
_END: Final = 5.0


class Holder:
    """A process that decides about the source when this one has died.

    ``log`` is the descriptor that it writes its lines to, by default our
    standard error. Every call but ``has_died`` may block for a while.
    """

    def __init__(self, *, log: int | None = None) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Which process it is, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def is_done(self) -> bool:
        """Whether it is not ours to care for any more."""
        return self._process is None

    @property
    def has_died(self) -> bool:
        """Whether it has ended though nobody said ``done``."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start it, holding nothing yet; raise PageServerError where that fails."""
        if self._process is not None:
            raise ValueError("start: it has been started")
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise PageServerError(f"the holder cannot be started: {error}") from error
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "criupy.page_server._holder_linux", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise PageServerError(f"the holder cannot be started: {error}") from error
        try:
            ours.settimeout(_START)
            word = ours.recv(len(READY))
            if word != READY:
                raise PageServerError(f"the holder ended at its start, with status {process.wait()}")
        except TimeoutError as error:
            raise PageServerError(f"the holder did not start within {_START:g} seconds") from error
        else:
            self._process, self._socket = process, ours
        finally:
            if self._socket is None:
                ours.close()
                _end(process)

    def give(
        self,
        upstream: int,
        control: int,
        frame_size: Literal[24, 32],
        hold_timeout: float | None,
    ) -> None:
        """Give it duplicates of the socket to the source and of the control socket that listens.

        From now on a crash of ours tells the source nothing. The holder keeps it frozen then, for
        ``hold_timeout`` seconds (None: until an operator says abort).
        """
        source = socket.socket(fileno=upstream)
        try:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)  # should both of us crash
        finally:
            source.detach()
        seconds = "-" if hold_timeout is None else f"{hold_timeout!r}"
        self._send(GIVE + f" {frame_size} {seconds}".encode(), [upstream, control])

    def tell(self, state: HolderState) -> None:
        """Tell what is to be done when we die.

        ``closing`` is for when the destination has all pages, before we say CLOSE, and after
        the last byte of everything else is written: the holder may have to finish a frame.
        """
        self._send(_MESSAGES[state])

    def done(self) -> None:
        """End it, without a word to the source.

        Where we have closed our socket before, the holder's is the last one, and the source
        sees the end of the connection only now: a reset, or a plain end if the linger is off.
        """
        process, self._process = self._process, None
        ours, self._socket = self._socket, None
        if process is None or ours is None:
            return
        with ours, contextlib.suppress(OSError):  # it has died
            ours.send(DONE)
        _end(process)

    def leave(self) -> None:
        """Leave everything to it, as our death would."""
        if self._process is not None:
            self._process.returncode = 0  # or it would be told of as one that was forgotten
        self._process = None
        ours, self._socket = self._socket, None
        if ours is not None:
            ours.close()

    def _send(self, message: bytes, fds: list[int] | None = None) -> None:
        if self._socket is None:
            raise ValueError("the holder has not been started, or is done")
        try:
            socket.send_fds(self._socket, [message], fds or [])
        except OSError as error:
            raise PageServerError(f"the holder has died: {error.strerror}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a holder that has been told, or that is of no use."""
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
