"""Small files, read and written by system calls alone.

Python's files bring buffers, encodings and their look-ups, and an emulated processor that has just begun translates
each piece of code before it executes it first: of the 100 ms in which a clone became its own, that was 20.
"""

from __future__ import annotations

import os

_MOST_BYTES = 1 << 16


def read(path: str) -> str:
    """The beginning of a file, which is all of those that the kernel makes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST_BYTES).decode()
    finally:
        os.close(fd)


def write(path: str, data: bytes) -> None:
    """Makes a file anew, or tells the kernel something, at once."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
