"""A process in the guest, as the monitor has it: its streams there, and where they lead to here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from holdfast.pod.messages import Stdio
    from holdfast.wire.aio import Connection, Stream

_LOG_BYTES = 1 << 20


class Process:
    """A process in the guest, and what connects it to its client.

    Args:
        client: whose process it is; None if it is nobody's.
        log: the file for the output of nobody's.

    Attributes:
        code: its exit status, when it has ended.
        streams: those that the guest has of it.
    """

    def __init__(self, key: str, client: Connection | None, log: Path) -> None:
        self.key = key
        self.client = client
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.streams: list[Stream] = []
        self._log = log
        self._pumps: list[asyncio.Task[None]] = []

    def connect(self, stdio: Stdio, stdout: Stream, stderr: Stream | None) -> None:
        """Passes its output on: to its client, or to the log."""
        if self.client is None:
            self.keep(stream for stream in (stdout, stderr) if stream)
            return
        self._pumps.append(asyncio.ensure_future(pump(stdout, self.client.open_stream(stdio.stdout))))
        if stderr is not None:
            self._pumps.append(asyncio.ensure_future(pump(stderr, self.client.open_stream(stdio.stderr))))

    def keep(self, outputs: Iterable[Stream]) -> None:
        """Writes its output to the log."""
        log = _Log(self._log)
        self._pumps += [asyncio.ensure_future(log.take(stream)) for stream in outputs]

    def discard(self) -> None:
        """Reads its output and throws it away."""
        self._pumps += [asyncio.ensure_future(_discard(stream)) for stream in self.streams]

    async def last_byte(self) -> None:
        """Waits for the last byte of its output."""
        if self._pumps:
            await asyncio.wait(self._pumps)

    async def code_or(self, *others: asyncio.Future[Any]) -> None:
        """Waits for its exit status, or for one of the others."""
        await asyncio.wait({self.code, *others}, return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Passes nothing on any more."""
        for task in self._pumps:
            task.cancel()
        for stream in self.streams:
            stream.close()


async def pump(source: Stream, target: Stream) -> None:
    """Copies a stream to its end; a lost connection on either side ends it quietly, others say why."""
    with contextlib.suppress(HoldfastError):
        while data := await source.read():
            await target.write(data)
        target.write_eof()


async def _discard(stream: Stream) -> None:
    with contextlib.suppress(HoldfastError):
        while await stream.read():
            pass


class _Log:
    """A detached process's output; the file starts again when it has grown too large."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0

    async def take(self, stream: Stream) -> None:
        with contextlib.suppress(HoldfastError, OSError), open(self._path, "ab", buffering=0) as file:
            while data := await stream.read():
                if self._written > _LOG_BYTES:
                    os.ftruncate(file.fileno(), 0)
                    self._written = 0
                self._written += file.write(data)
