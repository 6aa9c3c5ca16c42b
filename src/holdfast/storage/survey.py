"""Looks at the sources that a specification names, so that planning itself can be pure.

What is seen here is checked again when the file is opened: identity (device and inode) must be the same,
so that a path swapped in between is not followed.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from holdfast.mounts.probe import probe_filesystem
from holdfast.storage.disk_formats import identity, probe_format

if TYPE_CHECKING:
    from holdfast.spec.runtime import Mount

_KINDS = {
    stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFBLK: "block device", stat.S_IFCHR: "character device",
    stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket",
}  # fmt: skip


class Source(msgspec.Struct, frozen=True):
    """What stands behind a path on the host.

    Attributes:
        kind: ``directory``, ``file``, ``block device``, ``character device``, ``FIFO``, ``socket``, ``missing``,
            ``dangling link``, or ``unreadable``.
        why: for the last three: the kernel's text.
        disk_format: of what is used as a disk; see :func:`~holdfast.storage.disk_formats.probe_format`.
        filesystem: on a raw disk; empty when none is recognised or the format hides it.
        mounted: a block device that somebody uses alone: it, or a part of it, is mounted, swapped to, in an array, or
            written to by a pod.
    """

    path: str
    kind: str
    why: str = ""
    device: int = 0
    inode: int = 0
    size_bytes: int = 0
    disk_format: str = "raw"
    filesystem: str = ""
    mounted: bool = False


def survey(mounts: tuple[Mount, ...], disk_types: tuple[str, ...]) -> dict[str, Source]:
    """Everything that ``mounts`` bind or plug in, by the path as written."""
    disks = {mount.source for mount in mounts if mount.kind in disk_types}
    return {
        mount.source: look(mount.source, as_disk=mount.source in disks)
        for mount in mounts
        if mount.source.startswith("/") and (mount.kind in disk_types or mount.kind == "bind")
    }


def look(path: str, *, as_disk: bool = False) -> Source:
    """What stands behind ``path``; never raises for what it finds."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        dangling = os.path.islink(path)
        return Source(path, "dangling link" if dangling else "missing", why=error.strerror or "")
    except OSError as error:
        return Source(path, "unreadable", why=error.strerror or "")
    except ValueError as error:  # a NUL in it
        return Source(path, "unreadable", why=str(error))
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "unreadable")
    found = Source(path, kind, device=status.st_dev, inode=status.st_ino, size_bytes=status.st_size)
    if as_disk and kind in ("file", "block device"):
        device, inode = identity(status)
        return _look_inside(msgspec.structs.replace(found, device=device, inode=inode), status)
    return found


def lasting(source: Source, *, disk: bool = False) -> Source:
    """The same, told by what outlives a restart of the host, at which devices are numbered anew.

    Of a directory that is the id of its filesystem.  A file that is shared alone is followed by its name as long as the
    pod runs, and may be another one at any time; a disk is told by what is on it: of these, device and inode are 0.
    """
    if disk or source.kind == "file":
        return msgspec.structs.replace(source, device=0, inode=0)
    if source.kind != "directory":
        return source
    try:
        return msgspec.structs.replace(source, device=filesystem_of(source.path))
    except OSError as error:  # gone since it was looked at
        return msgspec.structs.replace(source, kind="unreadable", why=error.strerror or "")


def filesystem_of(path: str) -> int:
    """What tells a filesystem from others: of most it is made of the UUID, where ``st_dev`` changes with a restart."""
    return os.statvfs(path).f_fsid


def _look_inside(source: Source, status: os.stat_result) -> Source:
    try:
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return msgspec.structs.replace(source, kind="unreadable", why=error.strerror or "")
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        disk_format = probe_format(fd, size)
        filesystem = probe_filesystem(fd) if disk_format == "raw" else ""
    except OSError as error:
        return msgspec.structs.replace(source, kind="unreadable", why=error.strerror or "")
    finally:
        os.close(fd)
    mounted = stat.S_ISBLK(status.st_mode) and _is_used(source.path)
    return msgspec.structs.replace(
        source, size_bytes=size, disk_format=disk_format, filesystem=filesystem, mounted=mounted
    )


def _is_used(device: str) -> bool:
    """An exclusive open fails as long as the kernel uses the device or a part of it, whoever mounted it (open(2))."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
