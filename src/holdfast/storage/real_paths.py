"""A tree of the host's by real paths, those without links and ``..``; and what paths with such lead to, and lack.

Paths are bytes, relative to the tree's root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.storage.steps import MountPoint

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from types import TracebackType

_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_REAL = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_ON_THE_WAY = MountPoint("")
#: The kernel's own MAXSYMLINKS.
_MOST_LINKS = 40


class RealPaths:
    """Makes and removes by real paths: a link that has come into the way is refused (ELOOP).

    Args:
        root_fd: the tree's root; stays the caller's.
    """

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        # Names that are asked for one after the other are mostly in one directory.
        self._last: tuple[bytes, OwnedFd] | None = None

    def __enter__(self) -> RealPaths:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None:
            self._last[1].close()

    def _at(self, path: bytes) -> tuple[bytes, int]:
        """The last name of a path, and the directory that it is in."""
        head, _, name = path.rpartition(b"/")
        if self._last is None or self._last[0] != head:
            fd = OwnedFd(syscalls.openat2(self._root_fd, head or b".", _DIRECTORY, _REAL))
            if self._last is not None:
                self._last[1].close()
            self._last = (head, fd)
        return name, self._last[1].fileno()

    def stat(self, path: bytes) -> os.stat_result:
        """lstat(2)."""
        name, dir_fd = self._at(path)
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def identity(self, path: bytes) -> tuple[int, int, int]:
        """Device, inode and birth time of what is there itself: :func:`holdfast.linux.syscalls.statx_birth`."""
        name, dir_fd = self._at(path)
        return syscalls.statx_birth(dir_fd, name, syscalls.AT_SYMLINK_NOFOLLOW)

    def readlink(self, path: bytes) -> bytes:
        """readlink(2)."""
        name, dir_fd = self._at(path)
        return os.readlink(name, dir_fd=dir_fd)

    def make(self, path: bytes, mode: int, *, directory: bool) -> tuple[int, int, int]:
        """Makes a directory, or an empty file, with just this mode; returns its :meth:`identity`.

        Raises:
            OSError: EEXIST: the name is taken; and others.  Nothing is left of it.
        """
        name, dir_fd = self._at(path)
        flags = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with contextlib.ExitStack() as undo:
            if directory:
                os.mkdir(name, 0o700, dir_fd=dir_fd)
                undo.callback(self._unmake, path)
            with OwnedFd(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)) as made:
                if not directory:
                    undo.callback(self._unmake, path)
                os.fchmod(made.fileno(), mode)
                identity = syscalls.statx_birth(made.fileno(), "", syscalls.AT_EMPTY_PATH)
            undo.pop_all()
        return identity

    def _unmake(self, path: bytes) -> None:
        with contextlib.suppress(OSError):
            self.remove_empty(path)

    def remove_empty(self, path: bytes) -> None:
        """Removes a directory or a file.

        Raises:
            OSError: ENOTEMPTY: something is in it; EINVAL: it is neither; EBUSY: it is a mount point; and others.
        """
        name, dir_fd = self._at(path)
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.rmdir(name, dir_fd=dir_fd)
        elif not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        elif status.st_size:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        else:
            os.unlink(name, dir_fd=dir_fd)


def lacking(tree: RealPaths, points: Iterable[MountPoint]) -> dict[bytes, MountPoint]:
    """What is missing of the mount points, and of the way to each, by real path, outermost first.

    One that cannot be made is left out: something on the way is no directory, or links lead in a circle.
    """
    found: dict[bytes, MountPoint] = {}
    there: set[bytes] = set()
    for point in points:
        try:
            real, missing = _follow(tree, os.fsencode(point.path), found, there)
        except OSError:
            continue
        found |= dict.fromkeys(missing, _ON_THE_WAY)
        if real in missing or (point.directory and found.get(real) is _ON_THE_WAY):
            found[real] = point
    return found


def _follow(tree: RealPaths, path: bytes, found: Collection[bytes], there: set[bytes]) -> tuple[bytes, list[bytes]]:
    """Where a path leads, its links followed inside the tree, and what it leads through that is missing.

    Args:
        found: what is known to be missing.
        there: what is known to be there and no link; gets more.

    Raises:
        OSError: ENOTDIR, ELOOP, and others of lstat(2).
    """
    missing: list[bytes] = []
    names, here, links = path.split(b"/")[::-1], b"", 0
    while names:
        name, above = names.pop(), here
        if name in (b"", b"."):
            continue
        if name == b"..":
            here = above.rpartition(b"/")[0]
            continue
        here = above + b"/" + name if above else name
        if here in there or here in found:
            continue
        try:
            if above in found or above in missing:
                raise FileNotFoundError
            link = stat.S_ISLNK(tree.stat(here).st_mode)
        except FileNotFoundError:
            missing.append(here)
            continue
        if not link:
            there.add(here)
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = tree.readlink(here)
        names += target.split(b"/")[::-1]
        here = b"" if target.startswith(b"/") else above
    return here, missing
