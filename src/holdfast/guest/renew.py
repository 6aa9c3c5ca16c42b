"""Shares in a machine that is a copy: its 9p mounts are of files that another QEMU has open, and are made anew.

Before the machine was copied, what was written went to the host, and nothing had a file of a share open
(:mod:`holdfast.guest.still`): then a mount is all that there is of it.  In the copy every mount of the old filesystems
is taken out, wherever a container has it, and one of the new ones put in its place.
"""

from __future__ import annotations

import os
from functools import partial

from holdfast.errors import GuestFailed
from holdfast.guest import shares
from holdfast.guest.mountinfo import living, mounted
from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task
    from holdfast.guest.mountinfo import Mounted

_ATTRIBUTES = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "nodiratime": syscalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}


def renew(pids: dict[str, int], children: Children) -> Task:
    """Task: makes every mount of a share anew; returns ``{"numbers": {old: new}}``, the kernel's numbers of mounts.

    Raises:
        GuestFailed: a mount could not be made; the machine is not to be used.
    """
    ours = [mount for mount in mounted("self") if mount.fstype == b"9p"]
    devices = {mount.device for mount in ours}
    pids = living(pids)  # one that ended just before the machine was copied need not have been waited for
    theirs = {name: [m for m in mounted(pid) if m.device in devices] for name, pid in pids.items()}
    exports = {mount.target: mount for mount in ours if os.fsdecode(mount.target) in _folders()}
    folder_of = {mount.device: mount.target for mount in exports.values()}
    namespaces = {name: os.open(f"/proc/{pids[name]}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) for name in pids}
    numbers: dict[str, int] = {}
    try:
        for name, mounts in theirs.items():
            if mounts:
                targets = [mount.target for mount in reversed(mounts)]
                work = partial(_take_out, namespaces[name], targets)
                yield from children.call(work, keep=(namespaces[name],))
        _detach(mount.target for mount in reversed(ours))
        for target in exports:
            shares.mount_folder(os.fsdecode(target))
        for mount in ours:
            if mount.target not in exports:
                _put_back(-1, [(_clone(mount, folder_of), mount.target)])
        for name, mounts in theirs.items():
            trees = [(_clone(mount, folder_of), mount.target) for mount in mounts]
            try:
                numbers |= {
                    str(mount.number): _number(tree) for mount, (tree, _) in zip(mounts, trees, strict=True)
                }  # fmt: skip
                if trees:
                    work = partial(_put_back, namespaces[name], trees)
                    yield from children.call(work, keep=(namespaces[name], *(tree for tree, _ in trees)))
            finally:
                for tree, _ in trees:
                    os.close(tree)
    except OSError as error:
        raise GuestFailed("make shares anew", why=error, code="share-not-renewed") from None
    finally:
        for namespace in namespaces.values():
            os.close(namespace)
    return {"numbers": numbers}


def _folders() -> set[str]:
    return {folder for _, folder in shares.EXPORTS.values()}


def _take_out(namespace: int, targets: list[bytes]) -> None:
    """In the child: unmounts what a container has; its processes stand still, so the places are what they were."""
    syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    _detach(targets)


def _detach(targets: Iterable[bytes]) -> None:
    for target in targets:
        syscalls.umount(os.fsdecode(target), syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


def _clone(mount: Mounted, folder_of: dict[tuple[int, ...], bytes]) -> int:
    """What a mount showed, of the new filesystem, with the same options; nowhere yet."""
    source = folder_of[mount.device] + (b"" if mount.root == b"/" else mount.root)
    tree = syscalls.open_tree(
        syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW
    )  # fmt: skip
    attributes = sum(_ATTRIBUTES.get(option, 0) for option in mount.options)
    cleared = syscalls.MOUNT_ATTR__ATIME if attributes & syscalls.MOUNT_ATTR_NOATIME else 0
    syscalls.mount_setattr(
        tree, "", syscalls.AT_EMPTY_PATH, attr_set=attributes, attr_clr=cleared, propagation=syscalls.MS_PRIVATE
    )
    return tree


def _put_back(namespace: int, trees: list[tuple[int, bytes]]) -> None:
    """Mounts clones where the old ones were; in a child if it is in another namespace."""
    if namespace >= 0:
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    for tree, target in trees:
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        if namespace < 0:
            os.close(tree)


def _number(fd: int) -> int:
    return syscalls.statx_mount(fd, "", syscalls.AT_EMPTY_PATH)[0]
