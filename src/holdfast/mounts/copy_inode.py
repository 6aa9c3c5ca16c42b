"""What one inode is made of, copied to another: data without its holes, owner, mode, xattrs, times.

Nothing here is named by a path that somebody else could change: files and directories are given as descriptors, and
what cannot be opened (a symbolic link, device, FIFO, socket) as ``/proc/self/fd/N`` of an O_PATH descriptor, which the
kernel follows to that inode and no further, even if it is a link (path_resolution(7), "magic links").
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_NOT_COPIED = (
    # Labels belong to the place, not to the file: the volume's own policy gives them.
    "security.selinux",
    # What overlayfs itself reads: in a volume it could redirect or hide directories.
    "trusted.overlay.",
    "user.overlay.",
    # XFS shows how it stores what system.posix_acl_* says, too.
    "trusted.SGI_ACL_",
)
_NOT_HERE = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EPERM)
_CHUNK_BYTES = 1 << 30
_BUFFER_BYTES = 256 << 10


class InodeCopy:
    """Copies inodes between two trees, and remembers what their file systems refuse.

    Attributes:
        data_bytes: how much data was copied; holes count nothing.
        dropped: name of an xattr that the target cannot have -> how often.
    """

    __slots__ = ("_gid", "_mover", "_uid", "data_bytes", "dropped")

    def __init__(self) -> None:
        self.data_bytes = 0
        self.dropped: dict[str, int] = {}
        self._mover = 0
        # The owner of all that is made here, and the kernel need not be told again.
        self._uid, self._gid = os.geteuid(), os.getegid()

    def contents(self, source_fd: int, target_fd: int, info: os.stat_result) -> None:
        """Copies the data of a regular file into an empty one.

        Args:
            source_fd: the file, open for reading.
            target_fd: the empty one, open for writing.
            info: of the source.

        Raises:
            OSError: reading or writing failed; ENOSPC for one.
        """
        if info.st_blocks * 512 >= info.st_size:
            self._extent(source_fd, target_fd, 0, info.st_size)
        else:
            self._extents(source_fd, target_fd, info.st_size)

    def _extents(self, source_fd: int, target_fd: int, size: int) -> None:
        """Only the data: what is not written stays a hole."""
        offset = 0
        while offset < size:
            try:
                start = os.lseek(source_fd, offset, os.SEEK_DATA)
                end = min(size, os.lseek(source_fd, start, os.SEEK_HOLE))
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # a hole up to the end
                if error.errno not in _NOT_HERE:
                    raise
                start, end = offset, size
            self._extent(source_fd, target_fd, start, end)
            offset = end
        os.ftruncate(target_fd, size)

    def _extent(self, source_fd: int, target_fd: int, offset: int, end: int) -> None:
        """Copies up to ``end``, or to the end of a file that has become shorter."""
        mover = self._mover
        while offset < end:
            try:
                count = _MOVERS[mover](source_fd, target_fd, offset, min(end - offset, _CHUNK_BYTES))
            except OSError as error:
                if error.errno not in _NOT_HERE or mover == len(_MOVERS) - 1:
                    raise
                mover += 1
                if error.errno != errno.EINVAL:
                    self._mover = mover
                continue
            if count == 0:
                # The end, or (Linux 5.3 to 5.18, some file systems) a file that cannot be copied so.
                if mover == len(_MOVERS) - 1:
                    return
                mover += 1
            offset += count
            self.data_bytes += count

    def attributes(self, info: os.stat_result, source: int | str, target: int | str) -> None:
        """Gives ``target`` the owner, mode, xattrs and times of ``source``, in the order in which they survive.

        A change of owner takes setuid, setgid and capabilities away, a default ACL or a file made inside changes modes
        and times: so this comes after data and children.

        Args:
            info: of the source.
            source: descriptor, or a path that leads to it and to nothing else.
            target: as ``source``.

        Raises:
            OSError: the target refuses something that it could have.
        """
        if info.st_uid != self._uid or info.st_gid != self._gid:
            os.chown(target, info.st_uid, info.st_gid)
        if not stat.S_ISLNK(info.st_mode):
            os.chmod(target, stat.S_IMODE(info.st_mode))
        self._xattrs(source, target)
        os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))

    def _xattrs(self, source: int | str, target: int | str) -> None:
        try:
            names = os.listxattr(source)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return
        for name in names:
            if name.startswith(_NOT_COPIED):
                continue
            try:
                value = os.getxattr(source, name)
                os.setxattr(target, name, value)
            except OSError as error:
                refused = error.errno == errno.EPERM and name.startswith("security.")
                if error.errno != errno.EOPNOTSUPP and not refused:
                    raise OSError(error.errno, f"extended attribute {name}: {error.strerror}") from None
                self.dropped[name] = self.dropped.get(name, 0) + 1


def _send(source_fd: int, target_fd: int, offset: int, count: int) -> int:
    os.lseek(target_fd, offset, os.SEEK_SET)
    return os.sendfile(target_fd, source_fd, offset, count)


def _read_and_write(source_fd: int, target_fd: int, offset: int, count: int) -> int:
    data = os.pread(source_fd, min(count, _BUFFER_BYTES), offset)
    return os.pwrite(target_fd, data, offset)


# From the best to the one that always works.  The first shares blocks where that can be done (btrfs and XFS, as ioctl
# FICLONE would) or copies on the server (NFS), and refuses two file systems (EXDEV; so an overlay and anything else);
# the second spares one copy of two.
_MOVERS: tuple[Callable[[int, int, int, int], int], ...] = (
    lambda source_fd, target_fd, offset, count: os.copy_file_range(source_fd, target_fd, count, offset, offset),
    _send,
    _read_and_write,
)
