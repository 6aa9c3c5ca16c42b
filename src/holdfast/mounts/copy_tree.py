"""A tree copied into an empty directory, by descriptors alone.

No path is ever resolved: each name is opened in its directory, never followed if it is a link, and what was opened is
looked at again, so that somebody who swaps a directory for a link meanwhile gets an error and nothing of what
the link leads to.  Mounts inside the tree are not entered.  Depth is bounded by nothing but the file system: the last
few levels are kept open, the way back to the others is ``..``, checked to be the directory that was left.
"""

from __future__ import annotations

import errno
import os
import stat

from holdfast.linux import syscalls
from holdfast.mounts.copy_inode import InodeCopy
from holdfast.mounts.root import Root

_RESOLVE = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should a FIFO have taken the file's place, opening it does not wait.  O_NOATIME needs the right to give
# files away, which copying owners needs anyway.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
#: Levels that are kept open; each costs two descriptors.
_KEPT = 32


class _Directory:
    """A directory of both trees; owns its descriptors, which are -1 while it is far above the one that is copied."""

    __slots__ = ("above", "info", "name", "pending", "source_fd", "target_fd", "target_id")

    def __init__(self, above: _Directory | None, name: str, source_fd: int, target_fd: int) -> None:
        self.above = above
        self.name = name
        self.source_fd = source_fd
        self.target_fd = target_fd
        self.info = os.fstat(source_fd)
        self.target_id = _identity(os.fstat(target_fd))
        self.pending: list[str] = []

    def close(self) -> None:
        for fd in (self.source_fd, self.target_fd):
            if fd >= 0:
                os.close(fd)
        self.source_fd = self.target_fd = -1

    def path(self, name: str) -> str:
        """Of ``name`` in it, from the root of the tree."""
        parts = [name]
        here: _Directory | None = self
        while here and here.above:
            parts.append(here.name)
            here = here.above
        return "/".join(reversed(parts))


class TreeCopy:
    """One copy of one tree.

    Args:
        source_fd: the directory to copy (any descriptor of it; the caller keeps it).
        target_fd: the empty directory that becomes like it, attributes included; on one file system, and with no
            default ACL that would be inherited.

    Attributes:
        entries: how many names were made.
        inodes: what was copied of them.
    """

    def __init__(self, source_fd: int, target_fd: int) -> None:
        self.entries = 0
        self.inodes = InodeCopy()
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._trail: list[_Directory] = []
        self._name = self._failed_at = ""
        #: (device, inode) of a file with several names -> where its first copy is, and what that is.
        self._first: dict[tuple[int, int], tuple[_Directory, str, tuple[int, int]]] = {}

    def run(self) -> None:
        """Copies; may be called once.

        Raises:
            OSError: EBUSY: something else changed the trees; EXDEV: something is mounted in one of them; and others.
                :meth:`where` says on what.  What was made until then is there.
        """
        with Root(self._target_fd) as self._target_root:
            try:
                self._enter(None, "", *self._open_roots())
                while True:
                    here = self._trail[-1]
                    if here.pending:
                        self._down(here, here.pending.pop())
                        continue
                    self._name = ""
                    self.inodes.attributes(here.info, here.source_fd, here.target_fd)
                    if here.above is None:
                        return
                    self._up(here, here.above)
            finally:
                self._failed_at = self.where()
                while self._trail:
                    self._trail.pop().close()

    def where(self) -> str:
        """Path in the tree of what is being copied, or was when it failed."""
        return self._trail[-1].path(self._name).rstrip("/") if self._trail else self._failed_at

    # -- directories

    def _open_roots(self) -> tuple[int, int]:
        source_fd = os.open(".", _LIST | os.O_NOATIME, dir_fd=self._source_fd)
        try:
            return source_fd, os.open(".", _LIST, dir_fd=self._target_fd)
        except BaseException:
            os.close(source_fd)
            raise

    def _enter(self, above: _Directory | None, name: str, source_fd: int, target_fd: int) -> None:
        """Takes both descriptors, copies all that is no directory, and notes the directories."""
        here = _Directory(above, name, source_fd, target_fd)
        self._trail.append(here)
        if len(self._trail) > _KEPT + 1:
            self._trail[-_KEPT - 2].close()
        files, others = [], []
        with os.scandir(source_fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    here.pending.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                else:
                    others.append(entry.name)
        here.pending.sort(reverse=True)  # taken from the end
        for name in sorted(files):
            self._name = name
            self._file(here, name)
        for name in sorted(others):
            self._name = name
            self._other(here, name)
        self.entries += len(files) + len(others) + len(here.pending)

    def _down(self, above: _Directory, name: str) -> None:
        self._name = name
        source_fd = _open_directory(above.source_fd, name, os.O_NOATIME)
        try:
            if _identity(os.fstat(source_fd)) == self._trail[0].target_id:
                raise OSError(errno.EINVAL, "the volume lies inside what is copied into it")
            os.mkdir(name, 0o700, dir_fd=above.target_fd)
            target_fd = _open_directory(above.target_fd, name)
        except BaseException:
            os.close(source_fd)
            raise
        self._enter(above, name, source_fd, target_fd)

    def _up(self, here: _Directory, above: _Directory) -> None:
        if above.source_fd < 0:
            above.source_fd = _back(here.source_fd, _identity(above.info), os.O_NOATIME)
            above.target_fd = _back(here.target_fd, above.target_id)
        self._trail.pop().close()

    # -- all the rest

    def _file(self, here: _Directory, name: str) -> None:
        source_fd = os.open(name, _READ, dir_fd=here.source_fd)
        try:
            info = os.fstat(source_fd)
            if not stat.S_ISREG(info.st_mode):
                raise OSError(errno.EBUSY, "file replaced while it was copied")
            if info.st_nlink > 1 and self._link(here, name, info):
                return
            target_fd = os.open(name, _MAKE, 0o600, dir_fd=here.target_fd)
            try:
                if info.st_nlink > 1:
                    self._first[_identity(info)] = here, name, _identity(os.fstat(target_fd))
                if info.st_size:
                    self.inodes.contents(source_fd, target_fd, info)
                self.inodes.attributes(info, source_fd, target_fd)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)

    def _other(self, here: _Directory, name: str) -> None:
        """A symbolic link, FIFO, socket or device."""
        source_fd = os.open(name, _LOOK, dir_fd=here.source_fd)
        try:
            info = os.fstat(source_fd)
            if stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode):
                raise OSError(errno.EBUSY, "file replaced while it was copied")
            if info.st_nlink > 1 and self._link(here, name, info):
                return
            if stat.S_ISLNK(info.st_mode):
                os.symlink(os.readlink("", dir_fd=source_fd), name, dir_fd=here.target_fd)
            else:
                os.mknod(name, stat.S_IFMT(info.st_mode) | 0o600, info.st_rdev, dir_fd=here.target_fd)
            target_fd = os.open(name, _LOOK, dir_fd=here.target_fd)
            try:
                self._made(here, name, info, os.fstat(target_fd))
                self.inodes.attributes(info, f"/proc/self/fd/{source_fd}", f"/proc/self/fd/{target_fd}")
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)

    def _made(self, here: _Directory, name: str, info: os.stat_result, made: os.stat_result) -> None:
        if stat.S_IFMT(made.st_mode) != stat.S_IFMT(info.st_mode) or made.st_rdev != info.st_rdev:
            raise OSError(errno.EBUSY, "file replaced while it was made")
        if info.st_nlink > 1:
            self._first[_identity(info)] = here, name, _identity(made)

    def _link(self, here: _Directory, name: str, info: os.stat_result) -> bool:
        """Makes ``name`` a further name of a copy that exists; False if there is none, or it has too many."""
        if _identity(info) not in self._first:
            return False
        directory, first, identity = self._first[_identity(info)]
        try:
            if directory is here:
                os.link(first, name, src_dir_fd=here.target_fd, dst_dir_fd=here.target_fd, follow_symlinks=False)
                return True
            path = os.fsencode(directory.path(first))
            with self._target_root.resolve(path, os.O_PATH | os.O_NOFOLLOW) as old:
                if _identity(os.fstat(old.fileno())) != identity:
                    raise OSError(errno.EBUSY, "file replaced while it was copied")
                os.link(f"/proc/self/fd/{old.fileno()}", name, dst_dir_fd=here.target_fd)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            return False
        return True


def _open_directory(dir_fd: int, name: str, flags: int = 0) -> int:
    return syscalls.openat2(dir_fd, name, _LIST | flags, _RESOLVE)


def _back(fd: int, identity: tuple[int, int], flags: int = 0) -> int:
    """The directory above, which must be the one that was left."""
    up = os.open("..", _LIST | flags, dir_fd=fd)
    if _identity(os.fstat(up)) != identity:
        os.close(up)
        raise OSError(errno.EBUSY, "directory moved while it was copied")
    return up


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
