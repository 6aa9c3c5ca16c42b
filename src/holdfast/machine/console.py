"""The guest's console and QEMU's own messages: bounded, kept for the post-mortem."""

from __future__ import annotations

import asyncio
import os

#: The log file starts again when it reaches this size: a guest can print for ever.
_MOST_BYTES = 1 << 20
_TAIL_BYTES = 8 << 10


class Console:
    """Copies a pipe into a log file and remembers the last lines.  Owns both descriptors."""

    def __init__(self, reader_fd: int, log_path: str) -> None:
        self._reader_fd = reader_fd
        self._log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._written = 0
        self._tail = bytearray()
        os.set_blocking(reader_fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(reader_fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._reader_fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self._tail += data
        del self._tail[:-_TAIL_BYTES]
        if self._written > _MOST_BYTES:
            os.ftruncate(self._log_fd, 0)
            os.lseek(self._log_fd, 0, os.SEEK_SET)
            self._written = 0
        self._written += os.write(self._log_fd, data)

    def last_lines(self, count: int = 6) -> str:
        """The last lines printed, joined by `` | ``; control characters are left out.

        After a panic the reason stands first: what follows it is registers.
        """
        while self._reader_fd >= 0 and self._available():
            self._read()
        text = self._tail.decode("utf-8", "replace")
        lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        panics = [line for line in lines[:-count] if "Kernel panic" in line]
        return " | ".join([*panics[-1:], *lines[-count:]])

    def _available(self) -> bool:
        import select

        return bool(select.select([self._reader_fd], [], [], 0)[0])

    def close(self) -> None:
        """Stops copying; a second call does nothing."""
        if self._reader_fd >= 0:
            self._loop.remove_reader(self._reader_fd)
            os.close(self._reader_fd)
            os.close(self._log_fd)
            self._reader_fd = -1
