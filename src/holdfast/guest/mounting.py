"""Mounting in the guest: a mount point that is unmade if anything fails, and errors that say what was mounted."""

from __future__ import annotations

import errno
import os

from holdfast.errors import GuestFailed, InUse, NotReleased, Unsupported
from holdfast.guest.launch import load_on_demand
from holdfast.linux import syscalls
from holdfast.mounts.probe import probe_filesystem
from holdfast.mounts.release import drop, remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Filesystem -> the module that has it, where that is called otherwise.
_MODULES = {"iso9660": "isofs"}


class NewMount:
    """A mount point in the making, for ``with``: on an error what is mounted there goes again, and what was made.

    Raises:
        InUse: something is mounted there already, or a link to a device is there.
    """

    def __init__(self, target: str, *, directory: bool = True) -> None:
        self.target = target
        self._directory = directory
        self._made = False

    def __enter__(self) -> NewMount:
        try:
            self._make()
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.target), 0o755, exist_ok=True)
            self._make()
        return self

    def _make(self) -> None:
        try:
            if self._directory:
                os.mkdir(self.target, 0o755)
            else:
                os.close(os.open(self.target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            self._made = True
        except FileExistsError:
            if os.path.ismount(self.target) or os.path.islink(self.target):
                raise InUse(
                    "mount", subject=self.target, why="something else is mounted there", code="path-in-use"
                ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            drop(self.target)
            if self._made:
                remove_mount_point(self.target)


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mounts, loading the filesystem's module if it is one that few pods need.

    Raises:
        Unsupported: the guest's kernel does not know the filesystem.
        GuestFailed: it refuses; with its own text.
    """
    try:
        try:
            syscalls.mount(source, target, fstype, flags, data)
        except OSError as error:
            if error.errno != errno.ENODEV or not load_on_demand(_MODULES.get(fstype, fstype)):
                raise
            syscalls.mount(source, target, fstype, flags, data)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Unsupported(
                "mount", subject=f"{source} as {fstype}", why="the guest's kernel does not know this filesystem",
                code="filesystem-unsupported",
            ) from None  # fmt: skip
        raise GuestFailed("mount", subject=f"{source} as {fstype}", why=error, code="mount-failed") from None


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Binds one path to another.

    Raises:
        GuestFailed: the kernel refused it.
    """
    try:
        syscalls.mount(source, target, "", syscalls.MS_BIND)
        if read_only:  # MS_BIND ignores MS_RDONLY the first time: mount(2)
            syscalls.mount("none", target, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    except OSError as error:
        raise GuestFailed("bind", subject=f"{source} at {target}", why=error, code="mount-failed") from None


def bring(source: str, target: str) -> None:
    """Moves what is mounted at a path to another, or binds it if it is no mount of its own, with all that is below it.

    Raises:
        GuestFailed: the kernel refused it.
    """
    try:
        try:
            syscalls.move_mount(syscalls.AT_FDCWD, source, syscalls.AT_FDCWD, target, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # move_mount(2): nothing is mounted just there
                raise
            syscalls.mount(source, target, "", syscalls.MS_BIND | syscalls.MS_REC)
    except OSError as error:
        raise GuestFailed("bind", subject=f"{source} at {target}", why=error, code="mount-failed") from None


def unmount_tree(target: str) -> None:
    """Drops what :func:`bring` has brought, by one call; not mounted, or not there, is success."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise NotReleased("unmount", subject=target, why=error, code="mount-busy") from None


def write_back(target: str, children: Children) -> Task:
    """Task: writes out what is cached of a filesystem, before it is unmounted; what is not mounted has nothing cached.

    In a process of its own: it may take long, and unmounting then does not.  Its errors are said here or nowhere, for
    umount(2) does not tell (syncfs(2) does, since Linux 5.8).

    Raises:
        NotReleased: something could not be written; said once, and the next try goes on.
    """
    if os.path.ismount(target):
        yield from children.call(lambda: _sync(target))


def _sync(target: str) -> None:
    try:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # the host has lost it (a stale NFS handle): nothing can be written there any more
        return
    try:
        syscalls.syncfs(fd)
    except OSError as error:
        raise NotReleased(
            "write back", subject=target, why=error, code="not-written",
            hint="what was written last is not all there; detach again to let go of it all the same",
        ) from None  # fmt: skip
    finally:
        os.close(fd)


def filesystem_of(device: str, asked: str = "") -> str:
    """The filesystem on a device, which must be ``asked`` if that is given.

    Raises:
        GuestFailed: it holds another, or none that can be mounted.
    """
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = probe_filesystem(fd)
    finally:
        os.close(fd)
    if asked and found and asked != found:
        raise GuestFailed("mount disk", subject=device, why=f"it holds {found}, not {asked}", code="wrong-filesystem")
    if found in ("luks", "swap") or not found:
        raise GuestFailed(
            "mount disk", subject=device, code="no-filesystem",
            why=f"it holds {found}, which cannot be mounted" if found else "no known filesystem on it",
            hint="make one with mkfs; Holdfast never formats a disk that it did not make",
        )  # fmt: skip
    return found
