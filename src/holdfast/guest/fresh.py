"""Filesystems that are empty in every copy of the machine (``fork=fresh``), whatever they hold in this one.

Their roots are opened before the machine is copied, when all that could use them stands still.  So the copy has them
open, too, and removes all that is below before anything goes on there: mounts, their numbers and options, sizes and
quotas stay what they were.
"""

from __future__ import annotations

import os
from functools import partial

from holdfast.errors import GuestFailed, InUse
from holdfast.guest.mountinfo import mounted
from holdfast.linux import syscalls
from holdfast.mounts.removing import remove_below
from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task
    from holdfast.guest.mountinfo import Mounted
    from holdfast.linux.fds import OwnedFd

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: What mkfs makes in the root of an ext4, and e2fsck wants there.
_LOST_AND_FOUND = b"lost+found"


class _Filesystem:
    """One of them: its root, open, how errors call it, and the directory in it that stays."""

    __slots__ = ("keep", "name", "root")

    def __init__(self, root: int, name: str, keep: bytes = b"") -> None:
        self.root = root
        self.name = name
        self.keep = keep


_held: list[_Filesystem] = []


def hold(disks: list[str], memory: dict[str, list[str]], pids: dict[str, int]) -> set[tuple[int, int]]:
    """Opens filesystems until :func:`let_go`; returns their device numbers.

    Args:
        disks: where they are mounted.
        memory: places of those that containers have in memory, by container; of those that have ended nothing is left.
        pids: of a process of each container that runs, which sees its mounts.

    Raises:
        InUse: one in memory is not where it was mounted.
    """
    types = {mount.target: mount.fstype for mount in mounted("self")} if disks else {}
    for path in disks:
        keep = _LOST_AND_FOUND if types.get(os.fsencode(path), b"").startswith(b"ext") else b""
        _held.append(_Filesystem(os.open(path, _LIST), path, keep))
    for container in memory.keys() & pids.keys():
        try:
            root = Root(f"/proc/{pids[container]}/root")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        with root:
            for place in memory[container]:
                found = _memory_at(container, root, place, mounted(pids[container]))
                _held.append(_Filesystem(found.release(), f"{place} of {container}"))
    devices = [os.fstat(each.root).st_dev for each in _held]
    return {(os.major(device), os.minor(device)) for device in devices}


def _memory_at(container: str, root: Root, place: str, mounts: list[Mounted]) -> OwnedFd:
    """The root of what a container has mounted at a place: a tmpfs, and all of it, or it is something else by now.

    What is mounted over it may be a tmpfs, too: then there are two at that place.
    """
    targets = [mount.target for mount in mounts]
    try:
        with root.resolve(os.fsencode(place), _LIST) as found:
            number, is_root = syscalls.statx_mount(found.fileno(), "", syscalls.AT_EMPTY_PATH)
            for mount in mounts:
                whole = is_root and (mount.fstype, mount.root) == (b"tmpfs", b"/")
                if mount.number == number and whole and targets.count(mount.target) == 1:
                    return found.dup()
    except OSError:  # it is not there at all
        pass
    raise InUse(
        "freeze fresh mount", subject=container, why=f"{place} is not what was mounted there", code="fresh-in-use",
        hint="a mount that is to be empty in copies must stay where it is",
    )  # fmt: skip


def let_go() -> None:
    """Closes them."""
    while _held:
        os.close(_held.pop().root)


def empty(children: Children) -> Task:
    """Task: in a copy, removes all that is in them.

    Raises:
        GuestFailed: something could not be removed; the machine is not to be used.
    """
    try:
        for each in _held:
            yield from children.call(partial(_empty, each), keep=(each.root,))
    finally:
        let_go()


def _empty(filesystem: _Filesystem) -> None:
    try:
        remove_below(filesystem.root, unlock=True, keep=filesystem.keep)
    except OSError as error:
        raise GuestFailed("empty fresh mount", subject=filesystem.name, why=error, code="fresh-not-emptied") from None
