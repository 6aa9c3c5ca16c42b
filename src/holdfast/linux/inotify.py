"""inotify(7): what happens to the names in directories."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd

IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000
#: Everything that makes a name stand for something else.
NAMES = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE

_HEADER = struct.Struct("iIII")
_READ_BYTES = 64 << 10


class Event(NamedTuple):
    """One event; ``watch`` is -1 when some were lost (``IN_Q_OVERFLOW``)."""

    watch: int
    mask: int
    name: bytes


class Inotify:
    """An inotify instance; :meth:`fileno` becomes readable when there are events.

    Raises:
        OSError: EMFILE: the user has as many as ``fs.inotify.max_user_instances`` allows.
    """

    def __init__(self) -> None:
        self._fd = OwnedFd(syscalls.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """The descriptor; it stays this object's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Closes it and ends all watches; a second call does nothing."""
        self._fd.close()

    def watch(self, dir_fd: int, mask: int = NAMES) -> int:
        """Watches the directory that ``dir_fd`` (O_PATH will do) has open; the same one gets the same number again.

        Raises:
            OSError: ENOSPC: the user has as many as ``fs.inotify.max_user_watches`` allows.
        """
        return syscalls.inotify_add_watch(self.fileno(), f"/proc/self/fd/{dir_fd}", mask | IN_ONLYDIR)

    def unwatch(self, watch: int) -> None:
        """Ends a watch; events that are queued already still come."""
        syscalls.inotify_rm_watch(self.fileno(), watch)

    def read(self) -> list[Event]:
        """What has happened since; does not wait."""
        try:
            data = os.read(self.fileno(), _READ_BYTES)
        except BlockingIOError:
            return []
        events, offset = [], 0
        while offset < len(data):
            watch, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            events.append(Event(watch, mask, data[offset : offset + length].rstrip(b"\0")))
            offset += length
        return events
