"""Mounts that a container gets, and gives back, while it runs.

What the guest has mounted is cloned (open_tree(2)) in the agent's mount namespace, and the clone is moved onto a place
under the container's root by a child that has entered the container's namespace: the only call made in there is
move_mount(2), or umount2(2) on the way back.  Everything before goes by descriptors of the container's root, and
its own links and ``..`` do not lead out of that.  A child, because a namespace once entered is not easily left, and
because the container's own filesystems may make it wait.
"""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import GuestFailed, InUse, InvalidInput, NotFound, NotReleased
from holdfast.guest import mount_points
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import options as mount_options
from holdfast.mounts.root import Root
from holdfast.mounts.table import unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_ATTRIBUTES = {
    syscalls.MS_RDONLY: syscalls.MOUNT_ATTR_RDONLY,
    syscalls.MS_NOSUID: syscalls.MOUNT_ATTR_NOSUID,
    syscalls.MS_NODEV: syscalls.MOUNT_ATTR_NODEV,
    syscalls.MS_NOEXEC: syscalls.MOUNT_ATTR_NOEXEC,
    syscalls.MS_NOATIME: syscalls.MOUNT_ATTR_NOATIME,
    syscalls.MS_NODIRATIME: syscalls.MOUNT_ATTR_NODIRATIME,
    syscalls.MS_NOSYMFOLLOW: syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}
_EMPTY = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
#: A container's mount table is its own making: more than this of it is not read.
_MOST_BYTES = 16 << 20


class HotMount:
    """One mount in a container: the kernel's number of it, and what was made to put it on."""

    def __init__(self, container: str, mount_id: int) -> None:
        self.container = container
        self.mount_id = mount_id
        self.made: list[str] = []


class HotMounts:
    """All of them.

    Args:
        pid_of: process id of a running container's first process; raises :class:`NotFound`.
    """

    def __init__(self, children: Children, pid_of: Callable[[str], int]) -> None:
        self._children = children
        self._pid_of = pid_of
        self._mounts: dict[str, HotMount] = {}

    def add(self, params: dict[str, Any]) -> Task:
        """Task: shows ``source`` at ``destination`` in a container; remembered by ``key``.

        Raises:
            NotFound: the container does not run.
            InUse: something is mounted there already.
            InvalidInput: the destination cannot be made, or is of another kind.
        """
        key, container, source, destination = (
            str(params.get(n)) for n in ("key", "container", "source", "destination")
        )
        if key in self._mounts:
            raise InUse("mount in container", subject=key, why="this mount exists", code="path-in-use")
        if not source.startswith("/") or not destination.strip("/"):
            raise InvalidInput("mount in container", subject=destination, why="no absolute paths")
        options = mount_options.parse([str(option) for option in params.get("options") or ()])
        namespace, root = self._enter(container)
        tree = -1
        try:
            tree = _clone(source, options)
            mount = HotMount(container, _mount_id(tree))
            self._mounts[key] = mount  # before it is done: a child that is given up may have done it
            directory = stat.S_ISDIR(os.fstat(tree).st_mode)
            try:
                mount.made = yield from self._children.call(
                    lambda: _put(namespace, root, tree, os.fsencode(destination), directory),
                    keep=(namespace, root, tree),
                )
            except (InUse, InvalidInput):  # of any other failure nobody knows how far it came
                del self._mounts[key]
                raise
        finally:
            _close(namespace, root, tree)
        return {"path": destination}

    def remove(self, params: dict[str, Any]) -> Task:
        """Task: takes a mount out of its container; already gone, like its container, is success.

        Raises:
            NotReleased: somebody uses it; it stays.
        """
        key = str(params.get("key"))
        mount = self._mounts.get(key)
        if mount is None:
            return {}
        try:
            pid = self._pid_of(mount.container)
            path = _find(pid, mount.mount_id)
            namespace, root = self._enter(mount.container)
        except NotFound:
            del self._mounts[key]  # its mount namespace went with it
            return {}
        try:
            yield from self._children.call(lambda: _take(namespace, root, mount, path), keep=(namespace, root))
        finally:
            _close(namespace, root)
        del self._mounts[key]
        return {}

    def renumber(self, numbers: dict[str, int]) -> None:
        """Mounts have been made anew, and the kernel has given them other numbers."""
        for mount in self._mounts.values():
            mount.mount_id = numbers.get(str(mount.mount_id), mount.mount_id)

    def _enter(self, container: str) -> tuple[int, int]:
        """Descriptors of a container's mount namespace and root."""
        pid = self._pid_of(container)
        try:
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return namespace, os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except BaseException:
                os.close(namespace)
                raise
        except OSError as error:  # it has just ended
            raise NotFound("enter container", subject=container, why=error, code="container-not-running") from None


def _clone(source: str, options: mount_options.MountOptions) -> int:
    try:
        tree = syscalls.open_tree(syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW)
    except OSError as error:
        raise GuestFailed("clone mount", subject=source, why=error, code="mount-failed") from None
    attributes = sum(attribute for flag, attribute in _ATTRIBUTES.items() if options.flags & flag)
    cleared = syscalls.MOUNT_ATTR__ATIME if attributes & syscalls.MOUNT_ATTR_NOATIME else 0
    try:
        for kind in (syscalls.MS_PRIVATE, *options.propagation):
            syscalls.mount_setattr(
                tree, "", syscalls.AT_EMPTY_PATH, attr_set=attributes, attr_clr=cleared,
                propagation=kind & ~syscalls.MS_REC,
            )  # fmt: skip
    except OSError as error:
        os.close(tree)
        raise GuestFailed("set mount's options", subject=source, why=error, code="mount-failed") from None
    return tree


def _put(namespace: int, root_fd: int, tree: int, destination: bytes, directory: bool) -> list[str]:
    """In the child: makes the mount point and mounts; returns the paths that were made, outermost first."""
    made: list[bytes] = []
    text = os.fsdecode(destination)
    with Root(root_fd) as root:
        try:
            target = _mount_point(root, destination, directory, made)
            with target:
                syscalls.setns(namespace, syscalls.CLONE_NEWNS)
                syscalls.move_mount(tree, "", target.fileno(), "", _EMPTY)
        except OSError as error:
            mount_points.unmake(root, made)
            kind = "directory" if directory else "file"
            raise InvalidInput(
                "mount in container", subject=text, why=f"{error.strerror} (errno {error.errno})",
                code="mount-point", hint=f"a {kind} is to be mounted there: is the place one, and its folder writable?",
            ) from None  # fmt: skip
        except BaseException:
            mount_points.unmake(root, made)
            raise
    return [os.fsdecode(path) for path in made]


def _mount_point(root: Root, path: bytes, directory: bool, made: list[bytes]) -> OwnedFd:
    """Opens the mount point, made if it is missing.

    Raises:
        InUse: something is mounted there already.
    """
    target = mount_points.place(root, path, directory, made)
    try:
        with _above(root, target, path, directory) as above:
            same = _mount_id(target.fileno()) == _mount_id(above.fileno())
        if not same:
            raise InUse(
                "mount in container", subject=os.fsdecode(path), why="something else is mounted there",
                code="path-in-use",
            )  # fmt: skip
    except BaseException:
        target.close()
        raise
    return target


def _above(root: Root, target: OwnedFd, path: bytes, directory: bool) -> OwnedFd:
    """The directory that a mount point is in: of a directory, where it really is; a file does not know."""
    if directory:
        return OwnedFd(os.open(b"..", os.O_PATH | os.O_CLOEXEC, dir_fd=target.fileno()))
    return root.resolve(path.rstrip(b"/").rpartition(b"/")[0])


def _find(pid: int, mount_id: int) -> bytes:
    """Where a process has a mount, whatever it was moved to.

    Raises:
        NotFound: nowhere.
    """
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            for line in file.read(_MOST_BYTES).splitlines():
                fields = line.split(b" ", 5)
                if fields[0] == b"%d" % mount_id:
                    return unescape(fields[4])
    except OSError as error:
        raise NotFound("find mount", subject=mount_id, why=error) from None
    raise NotFound("find mount", subject=mount_id)


def _take(namespace: int, root_fd: int, mount: HotMount, path: bytes) -> None:
    """In the child: unmounts, and removes the mount point if it was made."""
    with Root(root_fd) as root:
        try:
            folder, name = root.parent(path)
            with folder:
                top = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder.fileno())
                try:
                    if _mount_id(top) != mount.mount_id:
                        raise OSError(errno.EBUSY, "something else is mounted over it")
                finally:
                    os.close(top)
                syscalls.setns(namespace, syscalls.CLONE_NEWNS)
                os.fchdir(folder.fileno())
                syscalls.umount(name, syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            raise NotReleased(
                "unmount in container", subject=os.fsdecode(path), why=error, code="mount-busy",
                hint="end the processes that have files open on it, then detach again",
            ) from None  # fmt: skip
        mount_points.unmake(root, [os.fsencode(made) for made in mount.made])


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise OSError(errno.ENOENT, "the kernel does not tell mounts' numbers")


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
