"""A process in a pod that is run to its end: bytes go in, and what it leaves comes out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio

if TYPE_CHECKING:
    from holdfast.pod.client import Client


class Result(msgspec.Struct, frozen=True):
    """What a process left: its exit status (128 + number for a signal) and its output."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode("utf-8", "replace")


def stdio_for(stdin: bytes | None) -> Stdio:
    """The streams of a process that gets ``stdin``, if it gets any."""
    return Stdio(STDIN if stdin is not None else 0, STDOUT, STDERR)


def complete(client: Client, method: str, request: msgspec.Struct, stdin: bytes | None) -> Result:
    """Has a process started, and attends it until it has ended.

    Raises:
        HoldfastError: it could not be started, or the machine or its monitor died.
    """
    output: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
    client.open(STDOUT, STDERR, *([STDIN] if stdin is not None else []))
    answer = client.request(method, msgspec.to_builtins(request))
    with _Feeder(stdin) as stdin_fd:
        status = client.attend(answer["key"], stdin_fd, lambda channel, data: output[channel].extend(data))
    return Result(status, bytes(output[STDOUT]), bytes(output[STDERR]))


class _Feeder:
    """Bytes as a readable descriptor: an unnamed file, so that no writer can block."""

    def __init__(self, data: bytes | None) -> None:
        self._data = data
        self._fd = -1

    def __enter__(self) -> int:
        if self._data is not None:
            self._fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
            view = memoryview(self._data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.lseek(self._fd, 0, os.SEEK_SET)
        return self._fd

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
