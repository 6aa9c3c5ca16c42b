"""Removing a tree, or all that is below a directory, by descriptors: nothing is followed, no other mount is entered.

Depth is bounded by nothing but the file system: the way back up is ``..``, checked to be the directory that was left,
so that two descriptors do for any depth.

Runs in the guest too, so it imports next to nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys

from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL | FS_APPEND_FL.
_GETFLAGS, _SETFLAGS, _LOCKED = 0x80086601, 0x40086602, 0x30

_Identity = tuple[int, int]


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Removes ``name`` in the directory ``dir_fd`` and everything below; what is not there is no error.

    Raises:
        OSError: EXDEV: a mount is in the way; and others.  What was removed until then stays removed.
    """
    try:
        os.unlink(name, dir_fd=dir_fd)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        pass
    if not stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), name)
    folder = _enter(dir_fd, name)
    try:
        remove_below(folder)
        os.close(_leave(folder, _identity(dir_fd), name))
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=dir_fd)


def remove_below(dir_fd: int, *, unlock: bool = False, keep: bytes = b"") -> None:
    """Removes everything below a directory, which stays.

    Args:
        dir_fd: open for reading.
        unlock: whether to remove what is marked immutable or append-only, too (ioctl_iflags(2)).
        keep: name of a directory in it that is to be empty, but there.

    Raises:
        OSError: see :func:`remove_tree`.
    """
    # (name, identity of the directory that holds it) of every directory between dir_fd and `here`.
    trail: list[tuple[bytes, _Identity]] = []
    here = os.open(b".", _LIST, dir_fd=dir_fd)
    try:
        pending = [_unlink_files(here, unlock)]
        while trail or pending[-1]:
            if pending[-1]:
                below = pending[-1].pop()
                down = _enter(here, below)
                trail.append((below, _identity(here)))
                os.close(here)
                here = down
                pending.append(_unlink_files(here, unlock))
            else:
                pending.pop()
                last, above = trail.pop()
                up = _leave(here, above, last)
                os.close(here)
                here = up
                if trail or last != keep:
                    _remove(os.rmdir, last, here, unlock)
    finally:
        os.close(here)


def _enter(dir_fd: int, name: bytes, flags: int = _LIST) -> int:
    how = syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS
    return syscalls.openat2(dir_fd, name, flags | os.O_NOFOLLOW, how)


def _leave(dir_fd: int, above: _Identity, name: bytes) -> int:
    """Opens the directory above one, which must be the one that it was entered from."""
    up = os.open(b"..", _LIST, dir_fd=dir_fd)
    if _identity(up) != above:
        os.close(up)
        raise OSError(errno.EBUSY, "directory moved while it was removed", name)
    return up


def _unlink_files(dir_fd: int, unlock: bool) -> list[bytes]:
    """Removes all that is no directory; gives back the names of the directories."""
    directories = []
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                directories.append(name)
            else:
                _remove(os.unlink, name, dir_fd, unlock)
    return directories


def _remove(remove: Callable[..., None], name: bytes, dir_fd: int, unlock: bool) -> None:
    try:
        remove(name, dir_fd=dir_fd)
    except PermissionError:
        if not unlock:
            raise
        try:
            _unlock(dir_fd)
            mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # nobody can mark others
                with OwnedFd(_enter(dir_fd, name, os.O_RDONLY)) as marked:
                    _unlock(marked.fileno())
        except OSError:  # its file system has no marks: there is another reason, which is said now
            pass
        remove(name, dir_fd=dir_fd)


def _unlock(fd: int) -> None:
    """Takes the marks from an inode."""
    flags = int.from_bytes(fcntl.ioctl(fd, _GETFLAGS, bytes(8)), sys.byteorder)
    if flags & _LOCKED:
        fcntl.ioctl(fd, _SETFLAGS, (flags & ~_LOCKED).to_bytes(8, sys.byteorder))


def _identity(fd: int) -> _Identity:
    info = os.stat(fd)
    return info.st_dev, info.st_ino
