"""Overlays, and the folders that take what is written to them: on a scratch disk, or in a little memory."""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import InUse, NotReleased
from holdfast.guest import mounting
from holdfast.linux import syscalls, user_namespaces
from holdfast.mounts import overlay
from holdfast.mounts.copy_inode import InodeCopy
from holdfast.mounts.release import drop, remove_mount_point
from holdfast.mounts.root import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_PLACES = "/run/mounts/places"
_LINKS = "/run/overlay-links"
#: Overlay -> the folder that was made for what is written to it, and goes with it.
_folders: dict[str, str] = {}


def mount_overlay(layers: list[str], folder: str, target: str) -> None:
    """Mounts layers, the first on top; by mount(2), since the guest's kernel need not have ``lowerdir+``.

    Args:
        folder: gets ``upper`` and ``work``.

    Raises:
        GuestFailed: the kernel refuses.
    """
    upper, work = f"{folder}/upper", f"{folder}/work"
    os.makedirs(upper, 0o755, exist_ok=True)
    os.makedirs(work, 0o755, exist_ok=True)
    above = [f"upperdir={overlay.escape(upper)}", f"workdir={overlay.escape(work)}"]
    if user_namespaces.inside():  # only the host's root has the xattrs that overlayfs uses otherwise (Linux 5.11)
        above.append("userxattr")
    overlay.mount(layers, above, target, _LINKS, lambda data: mounting.mount("overlay", target, "overlay", 0, data))


def look_like(lower: str, shown: str) -> None:
    """Gives what is shown the owner, mode, xattrs and times of what it is shown for.

    What has an owner that a user namespace has not stays ours.
    """
    info = os.stat(lower)
    try:
        InodeCopy().attributes(info, lower, shown)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL) or not user_namespaces.inside():
            raise
        os.chmod(shown, stat.S_IMODE(info.st_mode))


def check_free(target: str) -> None:
    """Raises if what an earlier overlay at the same place has written could not be removed yet.

    Raises:
        InUse: so it is.
    """
    if target in _folders:
        raise InUse("mount overlay", subject=target, why="an earlier one's folder is there", code="path-in-use")


def make(target: str, folder: str) -> None:
    """Makes the folder for an overlay's changes, unless it is there: then it is a disk, and for this overlay alone."""
    if not os.path.isdir(folder):
        _folders[target] = folder
        os.makedirs(folder, 0o755)


def make_in_memory(target: str, size: str) -> str:
    """A little memory for an overlay's changes; returns the folder.

    Args:
        size: the most that it holds, as tmpfs(5) has it.
    """
    folder = _place(target)
    with mounting.NewMount(folder):
        data = f"size={size},mode=0755"
        mounting.mount("places", folder, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, data)
    return folder


def give_up(target: str) -> None:
    """Takes away what was made for an overlay that could not be mounted."""
    _remove_memory(target)
    if target in _folders:
        _remove_folder(_folders.pop(target))  # as good as empty


def remove(target: str, children: Children) -> Task:
    """Task: takes away what was made for an overlay that is unmounted; can be tried again.

    Raises:
        NotReleased: something is in use.
    """
    _remove_memory(target)
    folder = _folders.get(target)
    if folder is not None:
        # It may hold a container's whole output: not in the process that everything else waits for.
        yield from children.call(lambda: _remove_folder(folder))
        del _folders[target]


def _place(target: str) -> str:
    return f"{_PLACES}/{target.strip('/').replace('/', '-')}"


def _remove_memory(target: str) -> None:
    drop(_place(target))
    remove_mount_point(_place(target))


def _remove_folder(folder: str) -> None:
    """Removes all below ``folder`` and itself; what is mounted there is not entered."""
    above, name = os.path.split(folder)
    try:
        above_fd = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        remove_tree(above_fd, os.fsencode(name))
    except OSError as error:
        raise NotReleased("remove scratch folder", subject=folder, why=error, code="scratch-busy") from None
    finally:
        os.close(above_fd)
