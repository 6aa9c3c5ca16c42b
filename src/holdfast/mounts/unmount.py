"""Unmounting that can be tried again, and never deletes through a mount."""

from __future__ import annotations

import errno
import os

from holdfast.errors import NotReleased
from holdfast.linux import syscalls
from holdfast.mounts import table

#: More mounts than this stacked on one path is a mistake, not a use.
_MOST_STACKED = 64


def unmount(target: str) -> None:
    """Unmounts everything stacked on ``target``; not mounted, or not there, is success.

    Raises:
        NotReleased: somebody still uses it.
    """
    for _ in range(_MOST_STACKED + 1):
        try:
            syscalls.umount(target, syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise NotReleased("unmount", subject=target, why=error, code="mount-busy") from None
    raise NotReleased(
        "unmount", subject=target, why=f"more than {_MOST_STACKED} mounts are stacked on it", code="mount-busy"
    )


def unmount_below(target: str) -> None:
    """Unmounts what is mounted below ``target``, the deepest first, not ``target`` itself.

    A container with the right to mount leaves such things, where its mounts are shared with what they were made from.

    Raises:
        NotReleased: somebody still uses it.
    """
    for entry in reversed(table.within(target.rstrip("/"))):
        if entry.target != target.rstrip("/"):
            unmount(entry.target)


def remove_mount_point(target: str) -> None:
    """Removes an empty mount point, a folder or a file: what is still mounted there stays untouched.

    Raises:
        NotReleased: it is not empty, or still a mount point.
    """
    try:
        try:
            os.rmdir(target)
        except NotADirectoryError:
            if os.path.ismount(target) or os.lstat(target).st_size:
                raise
            os.unlink(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise NotReleased("remove mount point", subject=target, why=error, code="mount-busy") from None
