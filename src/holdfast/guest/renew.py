"""Shares in a machine that is a copy: its 9p mounts are of files that another QEMU has open, and are made anew.

Before the machine is copied, every container stands still (cgroups(7), ``cgroup.freeze``), what was written is with the
host, and nothing has a file of a share open: then a mount is all that there is of it.  In the copy every mount of the
old filesystems is taken out, wherever a container has it, and one of the new ones put in its place.
"""

from __future__ import annotations

import os
from functools import partial

from holdfast.errors import GuestFailed, InUse, TimedOut
from holdfast.guest import mounting, shares
from holdfast.guest.loop import sleep
from holdfast.linux import syscalls
from holdfast.mounts.table import unescape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_CGROUPS = "/sys/fs/cgroup"
#: Control groups that stand still.
_still: list[str] = []
_FREEZE_S = 5.0
_POLL_S = 0.002
_ATTRIBUTES = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "nodiratime": syscalls.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
}


class Mounted:
    """One line of mountinfo (proc_pid_mountinfo(5)).

    Attributes:
        root: what of its filesystem is mounted.
    """

    __slots__ = ("device", "fstype", "number", "options", "parent", "root", "target")

    def __init__(self, line: bytes) -> None:
        before, _, after = line.partition(b" - ")
        number, parent, device, root, target, options = before.split(b" ")[:6]
        self.number, self.parent = int(number), int(parent)
        self.device = tuple(map(int, device.split(b":")))
        self.root, self.target = unescape(root), unescape(target)
        self.options = options.decode().split(",")
        self.fstype = after.split(b" ", 1)[0]


def mounted(pid: int | str) -> list[Mounted]:
    """Every mount that a process sees, in the kernel's order."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [Mounted(line) for line in file]


# -- before ------------------------------------------------------------------------------------------


def stand_still(pids: dict[str, int], children: Children) -> Task:
    """Task: has all containers stand still, with nothing of a share in use, if the machine has any.

    They do in the copy until it has been made different from this machine: nothing draws the same random numbers twice.

    Args:
        pids: of the first process of each container that runs.

    Raises:
        InUse: a process has a file of a share open, or is in one; something is mounted in one.  Nothing stands still.
    """
    devices = {mount.device for mount in mounted("self") if mount.fstype == b"9p"}
    groups = {name: group for name, pid in pids.items() if (group := _group(pid))}
    try:
        for group in groups.values():
            _still.append(group)
            _set_frozen(group, True)
        for name, group in groups.items():
            yield from _until_frozen(name, group)
        if devices:
            yield from _leave_shares(pids, groups, devices, children)
    except BaseException:
        go_on()
        raise
    return {}


def _leave_shares(
    pids: dict[str, int], groups: dict[str, str], devices: set[tuple[int, ...]], children: Children
) -> Task:  # fmt: skip
    for name, group in groups.items():
        _check_mounts(name, mounted(pids[name]), devices)
        for process in _processes(group):
            _check_process(name, process, devices)
    for _, folder in shares.EXPORTS.values():
        yield from mounting.write_back(folder, children)


def go_on() -> None:
    """Has all containers go on; those that do, and those that are gone, are no error."""
    while _still:
        _set_frozen(_still.pop(), False)


def _group(pid: int) -> str:
    """A process's control group, which need not have its container's name; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            path = file.read().rpartition("::")[2].strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return _CGROUPS + path


def _set_frozen(group: str, frozen: bool) -> None:
    try:
        with open(f"{group}/cgroup.freeze", "w") as file:
            file.write("1" if frozen else "0")
    except OSError:  # it is gone
        return


def _until_frozen(name: str, group: str) -> Task:
    waited = 0.0
    while True:
        try:
            with open(f"{group}/cgroup.events") as file:
                if "frozen 1" in file.read():
                    return
        except FileNotFoundError:
            return
        if waited > _FREEZE_S:
            raise TimedOut("freeze container", subject=name, why=f"it has not stopped within {_FREEZE_S:g} s")
        yield sleep(_POLL_S)
        waited += _POLL_S


def _processes(folder: str) -> list[int]:
    found = []
    for path, _, files in os.walk(folder):
        if "cgroup.procs" in files:
            with open(f"{path}/cgroup.procs") as file:
                found += [int(line) for line in file]
    return found


def _check_mounts(name: str, mounts: list[Mounted], devices: set[tuple[int, ...]]) -> None:
    """What is mounted in a share would be in the way of taking that out."""
    of_shares = {mount.number for mount in mounts if mount.device in devices}
    for mount in mounts:
        if mount.parent in of_shares:
            raise _in_use(name, f"something is mounted in a share, at {os.fsdecode(mount.target)}")


def _check_process(name: str, pid: int, devices: set[tuple[int, ...]]) -> None:
    folder = f"/proc/{pid}"
    try:
        files = [*(f"fd/{fd}" for fd in os.listdir(f"{folder}/fd")), "cwd", "root", "exe"]
        for file in files:
            try:
                device = os.stat(f"{folder}/{file}").st_dev
            except OSError:  # closed, or of a kernel thread
                continue
            if (os.major(device), os.minor(device)) in devices:
                raise _in_use(name, f"process {pid} has {os.readlink(f'{folder}/{file}')} open ({file})")
        with open(f"{folder}/maps") as maps:
            for line in maps:
                major, minor = (int(part, 16) for part in line.split()[3].split(":"))
                if (major, minor) in devices:
                    raise _in_use(name, f"process {pid} has {line.split(maxsplit=5)[5].strip()} mapped")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return


def _in_use(name: str, why: str) -> InUse:
    return InUse(
        "freeze share", subject=name, why=why, code="share-in-use",
        hint="close it, or leave it, and try again; a disk can be copied whatever is open",
    )  # fmt: skip


# -- after -------------------------------------------------------------------------------------------


def renew(pids: dict[str, int], children: Children) -> Task:
    """Task: makes every mount of a share anew; returns ``{"numbers": {old: new}}``, the kernel's numbers of mounts.

    Raises:
        GuestFailed: a mount could not be made; the machine is not to be used.
    """
    ours = [mount for mount in mounted("self") if mount.fstype == b"9p"]
    devices = {mount.device for mount in ours}
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
