"""Pumps between a process's stdio and the connection's streams, within the credit of each.

Whoever makes them has opened the streams; a terminal's two directions are one.
"""

from __future__ import annotations

import errno
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.guest.loop import Loop
    from holdfast.wire.mux import Mux

_READ_EVENTS = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


class Output:
    """Reads a descriptor into a stream.  Owns the descriptor."""

    def __init__(self, loop: Loop, mux: Mux, fd: int, channel: int, ended: Callable[[], None]) -> None:
        self._loop, self._mux, self._fd, self.channel = loop, mux, fd, channel
        self._ended = ended
        self._draining = False
        os.set_blocking(fd, False)
        self.pump()

    def pump(self) -> None:
        """Watches the descriptor while there is credit; called again when credit arrives."""
        if self._fd < 0:
            return
        if self._draining:
            self._read(0)
        elif self._mux.room(self.channel):
            self._loop.watch(self._fd, _READ_EVENTS, self._read)
        else:
            self._loop.unwatch(self._fd)

    def drain(self) -> None:
        """The process has ended: send what it left in the pipe, then the end, whoever else holds the pipe open."""
        self._draining = True
        self.pump()

    @property
    def finished(self) -> bool:
        """Whether the end has been sent."""
        return self._fd < 0

    def _read(self, _events: int) -> None:
        while room := self._mux.room(self.channel):
            try:
                data = os.read(self._fd, room)
            except BlockingIOError:
                if self._draining:
                    self._finish()
                return
            except OSError as error:
                if error.errno != errno.EIO:  # EIO: the terminal's last user is gone
                    raise
                data = b""
            if not data:
                self._finish()
                return
            self._mux.write(self.channel, data)
            if not self._draining:
                break
        if not self._mux.room(self.channel):
            self._loop.unwatch(self._fd)

    def _finish(self) -> None:
        self.abandon()
        self._mux.write_eof(self.channel)
        self._ended()

    def abandon(self) -> None:
        """Closes the descriptor without a word to the peer."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1


class Input:
    """Writes a stream into a descriptor.  Owns the descriptor."""

    def __init__(self, loop: Loop, mux: Mux, fd: int, channel: int) -> None:
        self._loop, self._mux, self._fd, self.channel = loop, mux, fd, channel
        self._pending = bytearray()
        self._eof = False
        os.set_blocking(fd, False)

    @property
    def finished(self) -> bool:
        """Whether nothing can be written any more."""
        return self._fd < 0

    def feed(self, data: bytes) -> None:
        """Bytes from the peer; credit goes back as the process takes them."""
        if self._fd < 0:  # nobody reads any more: swallow, so that the sender does not stall
            self._mux.consumed(self.channel, len(data))
            return
        self._pending += data
        self._write(0)

    def end(self) -> None:
        """The peer has no more; the descriptor closes when all is written."""
        self._eof = True
        self._write(0)

    def _write(self, _events: int) -> None:
        while self._fd >= 0 and self._pending:
            try:
                count = os.write(self._fd, memoryview(self._pending)[:65536])
            except BlockingIOError:
                self._loop.watch(self._fd, select.EPOLLOUT, self._write)
                return
            except OSError:  # EPIPE, or EIO of a terminal: the reader is gone
                count = len(self._pending)
                self._pending.clear()
                self.abandon()
                self._mux.consumed(self.channel, count)
                return
            del self._pending[:count]
            self._mux.consumed(self.channel, count)
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            if self._eof:
                self.abandon()

    def abandon(self) -> None:
        """Closes the descriptor."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
