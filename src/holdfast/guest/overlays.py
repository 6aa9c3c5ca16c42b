"""A writable overlay over one mount of a container: what is written goes elsewhere, and what lies below stays.

overlayfs shows a directory without what is mounted in it, so each mount below gets an overlay of its own.  It knows
directories alone: of a file the container gets a copy.
"""

from __future__ import annotations

import os
import stat

from holdfast.errors import GuestFailed, NotFound
from holdfast.guest import mounting, upper
from holdfast.guest import settings as settings_of
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import table
from holdfast.mounts.copy_inode import InodeCopy
from holdfast.mounts.release import drop, drop_below, remove_mount_point
from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: As much memory as an overlay may fill, where there is no disk for what is written to it.
_MEMORY_SIZE = "64m"


def add(settings: dict[str, Any], children: Children) -> Task:
    """Task: shows what is at a path at another, writable, with all that is mounted below.

    Raises:
        NotFound: there is nothing.
        GuestFailed: it cannot be done.
    """
    target, source = settings_of.path(settings, "MountPath"), settings_of.path(settings, "Source")
    scratch = settings_of.text(settings, "ScratchPath")
    try:
        directory = stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as error:
        raise NotFound("put overlay over mount", subject=source, why=error, code="source-not-found") from None
    with mounting.NewMount(target, directory=directory):
        try:
            if scratch:  # a folder on the disk for the container's own writes, and gone with that
                os.makedirs(scratch, 0o700)
            folder = scratch or upper.make_in_memory(target, _MEMORY_SIZE)
            for number, below in enumerate(["", *_mounted_below(source)] if directory else [""]):
                with _open(source, below) as lower, _open(target, below) as shown:
                    yield from _cover(lower.fileno(), shown.fileno(), f"{folder}/{number}", children)
        except BaseException as error:
            drop_below(target)
            drop(target)
            upper.give_up(target)
            if isinstance(error, OSError):
                raise GuestFailed("put overlay over mount", subject=source, why=error, code="mount-failed") from None
            raise
    return {"path": target}


def _mounted_below(source: str) -> list[str]:
    """Where below ``source`` something is mounted that is seen, each after the one that it is on."""
    found = []
    top = os.path.realpath(source)
    for entry in table.within(top):
        try:
            seen = table.mount_id(entry.target) == (entry.number, True)
        except OSError:  # another mount hides it
            seen = False
        below = entry.target[len(top) :].strip("/")
        if seen and below:
            found.append(below)
    return found


def _open(top: str, below: str) -> OwnedFd:
    """Opens what is below a folder, following nothing out of it; or, with an empty path, the folder or file itself."""
    if not below:
        return OwnedFd(os.open(top, os.O_PATH | os.O_CLOEXEC))
    with Root(top) as root:
        return root.resolve(os.fsencode(below))


def _cover(lower_fd: int, shown_fd: int, folder: str, children: Children) -> Task:
    """Task: puts an overlay, or a copy, of one mount where it is to be shown.

    Both are descriptors: whoever else has what lies below may rename it meanwhile.

    Args:
        folder: for what is written; to be made.
    """
    lower, shown = f"/proc/self/fd/{lower_fd}", f"/proc/self/fd/{shown_fd}"
    os.mkdir(folder, 0o700)
    mode = os.stat(lower).st_mode
    if stat.S_ISDIR(mode):
        os.mkdir(f"{folder}/upper")
        upper.look_like(lower, f"{folder}/upper")
        upper.mount_overlay([lower], folder, shown)
    elif stat.S_ISREG(mode):
        yield from children.call(lambda: _copy(lower, f"{folder}/file"), keep=(lower_fd,))
        mounting.bind(f"{folder}/file", shown, read_only=False)
    else:  # what is written to a device, a FIFO or a socket is not kept in it
        mounting.bind(lower, shown, read_only=False)


def _copy(source: str, target: str) -> None:
    """Copies a file with its owner, mode, xattrs and times."""
    try:
        with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
            InodeCopy().contents(old.fileno(), new.fileno(), os.fstat(old.fileno()))
        upper.look_like(source, target)
    except OSError as error:
        raise GuestFailed("copy file", subject=target, why=error, code="mount-failed") from None


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes an overlay away; already gone is success.

    Raises:
        NotReleased: somebody uses it.
    """
    target = settings_of.path(settings, "MountPath")
    if os.path.isdir(target):
        yield from mounting.write_back(target, children)
        drop_below(target)
    drop(target)
    yield from upper.remove(target, children)
    remove_mount_point(target)
    return {}
