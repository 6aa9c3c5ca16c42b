"""Shares of the host: directories of the pod's one export, bound to where a container wants them.

A machine has the export by 9p.  A sandbox on the host's kernel sees the folder itself, and then a share is bound with
what is mounted in it, and nothing has to be written back: there is one cache.
"""

from __future__ import annotations

import os

from holdfast.errors import InvalidInput
from holdfast.guest import mounting
from holdfast.guest import settings as settings_of
from holdfast.mounts.unmount import remove_mount_point, unmount, unmount_below

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Cache mode -> (9p device, where it is mounted).  All serve the pod's one export, in which every share is a
#: directory named by its number; one for each mode, since Linux mounts a virtio-9p device once (EBUSY).
#: ``mmap``: data always comes from the host, and shared writable maps (SQLite) still work.
_EXPORTS = {
    "mmap": ("holdfast", "/run/mounts/plan9"),
    "none": ("holdfast-none", "/run/mounts/plan9-none"),
    "loose": ("holdfast-loose", "/run/mounts/plan9-loose"),
}
#: The export itself, in a sandbox that sees it; set before the first request, if at all.
export = ""
_NINEP_DATA = "trans=virtio,version=9p2000.L,msize=512000,access=client,posixacl,cache="


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: shows a share at a path."""
    name = settings_of.text(settings, "ShareName")
    if not name.isdigit():
        raise InvalidInput("add share", subject=name, why="a share's name is a number")
    target = settings_of.path(settings, "MountPath")
    folder = _mount_export(settings_of.text(settings, "Cache") or "mmap")
    with mounting.NewMount(target):
        if export:
            mounting.bring(f"{folder}/{name}", target)  # read-only already, if it is to be, with all below it
        else:
            mounting.bind(f"{folder}/{name}", target, read_only=bool(settings.get("ReadOnly")))
    return {"path": target}
    yield


def _mount_export(cache: str) -> str:
    """Where the export is mounted with a cache mode; mounts it for the first share that wants that."""
    if cache not in _EXPORTS:
        raise InvalidInput("add share", subject=cache, why="unknown cache mode", code="cache-mode")
    if export:
        return export
    tag, folder = _EXPORTS[cache]
    if not os.path.ismount(folder):
        os.makedirs(folder, exist_ok=True)
        mounting.mount(tag, folder, "9p", 0, _NINEP_DATA + cache)
    return folder


def refresh(settings: dict[str, Any], _children: Children) -> Task:
    """Task: forgets what is cached of a file that the host has put in another one's place.

    Reads ask the host each time; pages that were mapped stay as long as somebody holds the file, and a container
    that has it mounted does.
    """
    try:
        fd = os.open(
            settings_of.path(settings, "MountPath"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:  # the new one is gone, too, or cannot be read
        return {}
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return {}
    yield


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes a share away; already gone is success.  The 9p mount behind it stays for the next."""
    target = settings_of.path(settings, "MountPath")
    if export:
        mounting.unmount_tree(target)
    else:
        yield from mounting.write_back(target, children)  # the 9p mount behind it writes late otherwise
        unmount_below(target)
    unmount(target)
    remove_mount_point(target)
    return {}
