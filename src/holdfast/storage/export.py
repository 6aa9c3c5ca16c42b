"""The folder that a sandbox exports: the host's half of shares.

An entry is a clone of the host's mount, made detached, made read-only if it is to be, and published by one
``move_mount``.  The export lives in the monitor's own mount namespace, so that nothing of it is seen on the host or
outlives the monitor.

Directories that are shared together are in a *group*, a filesystem of its own in the export that holds nothing but
their mount points: all of it goes by one umount(2), where each alone takes the kernel as long as the making of ten.

A single file gets a folder of its own with that one name in it: nothing beside it becomes visible.  When the
host replaces the file (editors and package managers write a new one and rename it), the new one is published
in a second folder, and one ``renameat2`` exchanges the two: at each moment the name is the old file or the
new one.  While the name is gone on the host, or is no regular file, it does not exist in the guest either.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import InvalidInput, NotFound, Unsupported
from holdfast.linux import syscalls, user_namespaces
from holdfast.mounts.release import remove_mount_point
from holdfast.storage.follow import Follower

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.machine.sandbox import Sandbox


#: How the guest caches a share's data.  ``mmap``: not at all, but for what is mapped; ``none``: nor that, so
#: that there are no writable shared maps; ``loose``: as if nobody else wrote.
CACHE_MODES = ("mmap", "none", "loose")
DEFAULT_CACHE = "mmap"
#: Nothing is executed through a share's mount on the host, and no device opened: QEMU only reads and writes files.
_ATTRIBUTES = syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOSUID


class ShareKey(NamedTuple):
    """What is to be shared, and how; ``device`` and ``inode`` are those that were seen at ``path``.

    Attributes:
        fork: what becomes of it in a copy of the pod: ``share``, ``deny``, or empty for what is safe.
    """

    device: int
    inode: int
    path: str
    read_only: bool
    recursive: bool
    cache: str = DEFAULT_CACHE
    fork: str = ""


class Identity(NamedTuple):
    """What makes two shares the same: a directory, the names of it that are shown, and how.

    Attributes:
        mount, device, inode: of the directory, however its path was spelled; of the file, if that has no name.
        names: empty for all; else the file's name in the directory.
        shown: what the guest sees it called; not the same as its name if the path is a link to it.
    """

    mount: int
    device: int
    inode: int
    names: tuple[str, ...]
    shown: str
    read_only: bool
    recursive: bool
    cache: str
    fork: str = ""


class Place(NamedTuple):
    """Where in the export a share is: its number, and the first number of its group, or -1 if it is alone."""

    number: int
    group: int = -1

    def __str__(self) -> str:
        return f"b{self.group}/{self.number}" if self.group >= 0 else str(self.number)


class Export:
    """The entries of one pod's export."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._follower = Follower()
        #: First number of a group -> those of it that are there.
        self._groups: dict[int, set[int]] = {}

    def _path(self, name: object) -> str:
        return f"{self._sandbox.export}/{name}"

    def make_group(self, group: int, numbers: Sequence[int]) -> None:
        """Makes a group for these of its shares: read-only from the start, for a guest could put links into it.

        Raises:
            OSError: the kernel refused it; nothing of it is left.
        """
        fs_fd = syscalls.fsopen("tmpfs")
        try:
            syscalls.fsconfig_string(fs_fd, "mode", "0755")
            syscalls.fsconfig_create(fs_fd)
            tree = syscalls.fsmount(fs_fd, _ATTRIBUTES)
        finally:
            os.close(fs_fd)
        target = self._path(f"b{group}")
        try:
            for number in numbers:
                os.mkdir(str(number), 0o755, dir_fd=tree)
            syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_RDONLY)
            os.mkdir(target, 0o755)
            try:
                syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
            except BaseException:
                os.rmdir(target)
                raise
        finally:
            os.close(tree)
        self._groups[group] = set(numbers)

    def publish(self, place: Place, key: ShareKey, identity: Identity, replaced: Callable[[], None]) -> None:
        """Shows a directory or a file; what is left when it fails is for :meth:`withdraw`.

        Args:
            replaced: called when another file is shown in its place.

        Raises:
            NotFound, InvalidInput: see :func:`open_source`.
            OSError: the kernel refused it.
        """
        fd = open_source(key)
        try:
            seen = _identity(fd)
            tree = clone_tree(key, fd)
            try:
                if place.group >= 0:
                    target = self._path(place)
                    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
                else:
                    _make_entry(self._path(place), identity.shown, tree)
            finally:
                os.close(tree)
            if identity.names:
                self._follow(place.number, key, identity.shown, fd, seen, replaced)
        finally:
            os.close(fd)

    def _follow(
        self, number: int, key: ShareKey, shown_as: str, fd: int, seen: tuple[int, int], replaced: Callable[[], None]
    ) -> None:
        """From now on the entry shows what the file's name stands for, in the directory where that is now.

        The directory stays open, and a link is not followed: whoever can write there (another share's guest,
        perhaps) can choose among the files there, and gets at nothing else.
        """
        home = _home(fd)
        if home is None:
            return
        dir_fd, name = home
        shown: tuple[int, int] | None = seen

        def look() -> None:
            nonlocal shown
            file_fd = _open_file(dir_fd, name)
            try:
                now = _identity(file_fd) if file_fd >= 0 else None
                if now != shown:
                    self._replace(number, key, shown_as, file_fd)
                    replaced()
                    shown = now
            finally:
                if file_fd >= 0:
                    os.close(file_fd)

        try:
            self._follower.follow(number, dir_fd, name, look, lambda: os.close(dir_fd))
        except BaseException:
            os.close(dir_fd)
            raise

    def _replace(self, number: int, key: ShareKey, shown_as: str, file_fd: int) -> None:
        """Shows another file, or none (-1), in the place of the one that is shown; no moment is between the two."""
        entry, other = self._path(number), self._path(f".{number}")
        _clear_entry(other, shown_as)
        try:
            tree = clone_tree(key, file_fd) if file_fd >= 0 else -1
            try:
                _make_entry(other, shown_as, tree)
            finally:
                if tree >= 0:
                    os.close(tree)
            syscalls.renameat2(other, entry, syscalls.RENAME_EXCHANGE)
        finally:
            _clear_entry(other, shown_as)

    def withdraw(self, places: Sequence[tuple[Place, str]]) -> list[Exception | None]:
        """Takes entries away, each a place and the file's name, if it is one; already gone is success.

        Returns:
            for each why it is still there, or None.
        """
        groups: dict[int, set[int]] = {}
        for place, _ in places:
            groups.setdefault(place.group, set()).add(place.number)
        whole = {group for group, numbers in groups.items() if group >= 0 and self._groups.get(group, set()) <= numbers}
        errors = {group: self._outcome(lambda: self._drop_group(group)) for group in whole}  # noqa: B023  called here
        return [
            errors[place.group] if place.group in whole else self._outcome(lambda: self._withdraw(place, name))  # noqa: B023
            for place, name in places
        ]

    @staticmethod
    def _outcome(act: Callable[[], None]) -> Exception | None:
        try:
            act()
        except Exception as error:
            return error
        return None

    def _drop_group(self, group: int) -> None:
        target = self._path(f"b{group}")
        _detach_tree(target)
        remove_mount_point(target)
        self._groups.pop(group, None)

    def _withdraw(self, place: Place, name: str) -> None:
        self._follower.forget(place.number)
        entry = self._path(place)
        if name:
            _clear_entry(entry, name)
            return
        _detach_tree(entry)
        if place.group >= 0:
            self._groups[place.group].discard(place.number)
        else:
            remove_mount_point(entry)


def open_source(key: ShareKey) -> int:
    """What is to be shared, opened (O_PATH) once and for all; the caller owns the descriptor.

    Raises:
        NotFound: it is gone.
        InvalidInput: something else is there than what was seen.
    """
    try:
        fd = os.open(key.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound("share", subject=key.path, why=error, code="source-not-found") from None
    if _identity(fd) != (key.device, key.inode):
        os.close(fd)
        raise InvalidInput("share", subject=key.path, why="another file is there now", code="source-changed")
    return fd


def identify(key: ShareKey, *, file: bool) -> Identity:
    """What makes a share the same as another one.

    Raises:
        NotFound, InvalidInput: see :func:`open_source`.
    """
    fd = open_source(key)
    try:
        shown = os.path.basename(key.path) if file else ""
        names: tuple[str, ...] = ()
        where = _identity(fd)
        mount = _mount_of(fd)
        home = _home(fd) if file else None
        if home is not None:
            dir_fd, name = home
            names, where = (name,), _identity(dir_fd)
            os.close(dir_fd)
        return Identity(mount, *where, names, shown, key.read_only, key.recursive, key.cache, key.fork)
    finally:
        os.close(fd)


def clone_tree(key: ShareKey, source_fd: int = -1) -> int:
    """A detached copy of the mount at a host path, read-only if the share is; the caller owns the descriptor.

    Args:
        source_fd: what is at the path, if it is open already; stays the caller's.

    Raises:
        NotFound, InvalidInput: see :func:`open_source`.
    """
    fd = open_source(key) if source_fd < 0 else source_fd
    try:
        recursive = syscalls.AT_RECURSIVE if key.recursive else 0
        tree = syscalls.open_tree(fd, "", syscalls.AT_EMPTY_PATH | syscalls.OPEN_TREE_CLONE | recursive)
    except OSError as error:
        if error.errno != errno.EINVAL or key.recursive or not user_namespaces.inside():
            raise
        raise Unsupported(
            "share", subject=key.path, code="rootless-unsupported", hint="share it with them: rbind",
            why="other filesystems are mounted in it, and without root nothing that they cover is shown",
        ) from None  # fmt: skip
    finally:
        if fd != source_fd:
            os.close(fd)
    try:
        # Private: what is mounted in the copy later must not show up on the host.
        attributes = _ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if key.read_only else 0)
        syscalls.mount_setattr(
            tree, "", syscalls.AT_EMPTY_PATH | recursive, attr_set=attributes, propagation=syscalls.MS_PRIVATE
        )
    except BaseException:
        os.close(tree)
        raise
    return tree


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _mount_of(fd: int) -> int:
    """The number of the mount that a descriptor was opened through: the same directory may be in several."""
    number, _ = syscalls.statx_mount(fd, "", syscalls.AT_EMPTY_PATH)
    if number:
        return number
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _home(file_fd: int) -> tuple[int, str] | None:
    """The directory that an open file is in (the caller's to close) and its name there; None if it has none."""
    folder, name = os.path.split(os.readlink(f"/proc/self/fd/{file_fd}"))
    try:
        dir_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    found = _open_file(dir_fd, name)
    if found >= 0:
        same = _identity(found) == _identity(file_fd)
        os.close(found)
        if same:
            return dir_fd, name
    os.close(dir_fd)
    return None


def _open_file(dir_fd: int, name: str) -> int:
    """The regular file of a name (O_PATH), or -1 if there is none."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def _make_entry(entry: str, name: str, tree: int) -> None:
    """Makes an entry of the export and moves a detached mount there: on it, or on ``name`` in it; -1 is none."""
    os.mkdir(entry, 0o755)
    if tree < 0:
        return
    target = entry
    if name:
        target = f"{entry}/{name}"
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def _clear_entry(entry: str, name: str) -> None:
    """Removes an entry that nothing leads to any more, also if the machine has its file open still."""
    if os.path.isdir(entry):
        _detach_tree(f"{entry}/{name}")
        if os.path.lexists(f"{entry}/{name}"):
            os.unlink(f"{entry}/{name}")
        os.rmdir(entry)


def _detach_tree(target: str) -> None:
    """Drops a share's whole tree with one call: sub-mounts came with it and go with it."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
