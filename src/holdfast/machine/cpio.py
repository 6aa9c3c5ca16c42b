"""A writer of initial RAM disks: the ``newc`` archive that the kernel unpacks.

The format is five lines long (``Documentation/driver-api/early-userspace/buffer-format.rst``), and a
writer of our own can promise what ``cpio -o`` does not: the same members give the same bytes.  Owners
are root, times are zero, and inode numbers count from one.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TRAILER = "TRAILER!!!"
_MAX_SIZE = 0xFFFFFFFF


class Archive:
    """Members in the order they are added; :meth:`to_bytes` ends the archive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder, and the folders above it that were not added yet."""
        if name and name not in self._names:
            self._add(name, stat.S_IFDIR | mode, nlink=2)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link to ``target``."""
        self._add(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def to_bytes(self) -> bytes:
        """The whole archive, padded as the kernel and ``cpio`` like it."""
        return b"".join((*self._parts, _member(_TRAILER, 0, 0)))

    def _add(self, name: str, mode: int, data: bytes = b"", nlink: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        name = name.strip("/")
        if not name or name in self._names or _TRAILER in name:
            raise ValueError(f"member name {name!r} is empty, reserved or used already")
        if len(data) > _MAX_SIZE:
            raise ValueError(f"member {name!r} is larger than the format can say")
        # The kernel does not make missing folders: a member in one would silently be lost.
        self.folder(name.rpartition("/")[0])
        self._names.add(name)
        self._parts.append(_member(name, len(self._names), mode, data, nlink, device))


def _member(
    name: str, ino: int, mode: int, data: bytes = b"", nlink: int = 1, device: tuple[int, int] = (0, 0)
) -> bytes:
    raw = os.fsencode(name) + b"\0"
    fields: Iterable[int] = (ino, mode, 0, 0, nlink, 0, len(data), 0, 0, *device, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return b"".join((head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)))
