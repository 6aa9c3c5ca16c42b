"""Tells when a name may have come to stand for another file: a file shared alone is replaced by rename."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import Exhausted
from holdfast.linux import inotify
from holdfast.linux.inotify import Inotify

if TYPE_CHECKING:
    from collections.abc import Callable

#: How long until a name is looked at again when what it stands for could not be shown.
_AGAIN_SECONDS = 1.0
_LIMITS = {errno.EMFILE: "max_user_instances", errno.ENFILE: "max_user_instances", errno.ENOSPC: "max_user_watches"}


class Name(NamedTuple):
    """A name that is followed: the watch of its directory, what to call when it may have changed, and at the end."""

    watch: int
    name: bytes
    changed: Callable[[], None]
    close: Callable[[], None]


class Follower:
    """Follows names in directories.  Needs a running event loop as long as it follows any."""

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._names: dict[int, Name] = {}

    def follow(
        self, number: int, dir_fd: int, name: str, changed: Callable[[], None], close: Callable[[], None]
    ) -> None:
        """Calls ``changed`` whenever ``name`` in a directory may stand for another file, and once now.

        Args:
            number: to call it by when it need not be followed any more.
            dir_fd: the directory; only used now.
            close: called when it is forgotten.

        Raises:
            Exhausted: the host has no more inotify instances or watches.
        """
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._read)
            watch = self._inotify.watch(dir_fd)
        except OSError as error:
            self._close_if_idle()
            if error.errno not in _LIMITS:
                raise
            limit = f"fs.inotify.{_LIMITS[error.errno]}"
            raise Exhausted(
                "watch directory of shared file", subject=name, why=error, code="no-inotify",
                hint=f"raise {limit} (sysctl), or share the directory",
            ) from None  # fmt: skip
        self._names[number] = Name(watch, os.fsencode(name), changed, close)
        self._tell(number)  # for what has happened until now

    def forget(self, number: int) -> None:
        """Follows a name no more; one that is not followed is no error."""
        gone = self._names.pop(number, None)
        if gone is None:
            return
        gone.close()
        if self._inotify is not None and all(name.watch != gone.watch for name in self._names.values()):
            with contextlib.suppress(OSError):  # EINVAL: the directory itself is gone, and the watch with it
                self._inotify.unwatch(gone.watch)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._inotify is not None and not self._names:
            asyncio.get_running_loop().remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None

    def _read(self) -> None:
        assert self._inotify is not None
        changed: dict[int, None] = {}
        for event in self._inotify.read():
            for number, name in self._names.items():
                lost = event.mask & inotify.IN_Q_OVERFLOW
                if lost or (event.watch == name.watch and event.name in (name.name, b"")):
                    changed[number] = None
        for number in changed:
            self._tell(number)

    def _tell(self, number: int) -> None:
        name = self._names.get(number)
        if name is None:
            return
        try:
            name.changed()
        except OSError:  # no memory for one more mount, say: what was there until now stays meanwhile
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._tell, number)
