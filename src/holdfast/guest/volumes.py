"""Volumes of a pod: each made by the first container that asks for it, shared by all that ask later.

A volume is mounted once, at a place of its own that no container sees, and stays until the pod ends: what is in it
outlives whoever uses it.  A container gets a bind of it, or of a folder in it.  That folder is found and made under the
volume by its open directory, for what is in there are links that containers have made.
"""

from __future__ import annotations

import os
import stat

from holdfast.errors import GuestFailed, InUse, InvalidInput, NotFound, Unsupported
from holdfast.guest import disks, mounting, shares
from holdfast.guest import settings as settings_of
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.mounts.release import drop, drop_below, remove_mount_point
from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_MASTERS = "/run/mounts/masters"
#: Name of a volume -> where it is mounted, and how it was made.
_masters: dict[str, tuple[str, str, list[str]]] = {}
#: Where a volume of an image is -> the root filesystem, and the place in it that it is filled from.
_filled: dict[str, tuple[str, str]] = {}
#: Type of a volume -> filesystem, mode of folders that are made in it.
_TYPES = {
    "disk": ("", 0o755),
    "tmpfs": ("tmpfs", 0o755),
    "sandbox": ("tmpfs", 0o777),
    "sandbox-tmp": ("tmpfs", 0o777),
    "hugepages": ("hugetlbfs", 0o777),
}


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: shows a volume, or a folder of it, at a path; makes the volume if nobody has."""
    kind, sub_path = settings_of.text(settings, "Type"), settings_of.text(settings, "SubPath")
    target = settings_of.path(settings, "MountPath")
    if kind == "uvm":  # a path of the guest's own
        if isinstance(disks.places, disks.Told):
            raise Unsupported(
                "use guest's path", subject=target, why="without a machine it would be the host's own",
                code="isolation-unsupported", hint="share it: type=bind",
            )  # fmt: skip
        if not os.path.exists(target):
            raise NotFound("use guest's path", subject=target, why="the guest has none", code="uvm-not-found")
        return {"path": target}
    if kind == "share":
        master = settings_of.path(settings, "Name")
        if not shares.is_shown(master):
            raise InvalidInput("add volume", subject=master, why="no share is there", code="volume-type")
    elif kind in _TYPES:
        options = [str(option) for option in settings.get("Options", ())]
        disk = settings_of.path(settings, "Source") if kind == "disk" else ""
        master = _master(settings_of.text(settings, "Name"), kind, options, disk)
    else:
        raise InvalidInput("add volume", subject=kind, why="unknown type", code="volume-type")
    _bind(master, sub_path, target, _TYPES[kind][1] if kind in _TYPES else -1)
    return {"path": target}
    yield


def _master(name: str, kind: str, options: list[str], disk: str) -> str:
    """Where a volume is; makes it for the first who wants it: a mount, or a folder of a disk for it alone."""
    if name not in _masters:
        where = f"{disk}/volume" if disk else f"{_MASTERS}/m{len(_masters)}"
        parsed = mount_options.parse(options)
        if disk:
            _make_folder(where, dict(word.split("=", 1) for word in parsed.data))
        else:
            with mounting.NewMount(where):
                mounting.mount(name, where, _TYPES[kind][0], parsed.flags, parsed.data_text)
        _masters[name] = (where, kind, options)
    where, *made = _masters[name]
    if made != [kind, options]:
        why = f"the pod has it as {made[0]} with options {','.join(made[1]) or 'none'}"
        raise InUse("use volume", subject=name, why=why, code="volume-conflict")
    return where


def _make_folder(path: str, data: dict[str, str]) -> None:
    """Makes the folder of a volume, with the owner and mode that a tmpfs of these options would have (tmpfs(5))."""
    os.makedirs(path, exist_ok=True)  # there is one if its maker was not heard of
    os.chown(path, int(data.get("uid", 0)), int(data.get("gid", 0)))
    os.chmod(path, int(data.get("mode", "1777"), 8))


def _bind(master: str, sub_path: str, target: str, mode: int) -> None:
    """Shows what is at a path below a volume; a folder that is missing is made with ``mode``, unless that is -1."""
    umask = os.umask(0)
    path = os.fsencode(sub_path)
    recursive = syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE | syscalls.OPEN_TREE_CLONE
    try:
        with Root(master) as root, root.resolve(path) if mode < 0 else root.mkdir_all(path, mode) as found:
            tree = syscalls.open_tree(found.fileno(), "", recursive)
            try:
                _move(tree, target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
            finally:
                os.close(tree)
    except OSError as error:
        raise GuestFailed("use volume", subject=sub_path or "/", why=error, code="volume-path") from None
    finally:
        os.umask(umask)


def _move(tree: int, target: str, *, directory: bool) -> None:
    with mounting.NewMount(target, directory=directory):
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def remove(settings: dict[str, Any], _children: Children) -> Task:
    """Task: takes a container's view of a volume away; the volume stays.  Already gone is success."""
    target = settings_of.path(settings, "MountPath")
    if settings_of.text(settings, "Type") != "uvm":
        if os.path.ismount(target):
            # What others have mounted in the volume is seen here too, and stays theirs.
            syscalls.mount("none", target, "", syscalls.MS_REC | syscalls.MS_PRIVATE)
            _take_away(target)
        remove_mount_point(target)
        _filled.pop(target, None)
    return {}
    yield


def _take_away(target: str) -> None:
    """Unmounts a view, by one call if nothing is below it: the mount table of many volumes is long."""
    try:
        syscalls.umount(target, syscalls.UMOUNT_NOFOLLOW)
    except OSError:
        drop_below(target)
    if os.path.ismount(target):
        drop(target)


def add_image(settings: dict[str, Any], children: Children) -> Task:
    """Task: makes a volume of an image for one container, and copies into it what the image has at its path.

    Raises:
        InvalidInput: ``volume-not-directory``; and others of :func:`~holdfast.mounts.copy_up.copy_up`.
    """
    target, source = settings_of.path(settings, "MountPath"), settings_of.text(settings, "Source")
    root, path = settings_of.path(settings, "ContainerRootPath"), settings_of.path(settings, "Path")
    filled = {place: where for where, (of, place) in _filled.items() if of == root}
    with mounting.NewMount(target):
        if source:  # a folder on the disk for the container's own writes, and gone with that
            os.makedirs(source, 0o755)
            mounting.bind(source, target, read_only=False)
        else:
            mounting.mount("volume", target, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755")
        place = yield from children.call(lambda: _fill(root, path, target, list(filled)))
        if place in filled:  # two names of one place are one volume
            drop(target)
            mounting.bind(filled[place], target, read_only=False)
        _filled[target] = (root, place)
    return {"path": target}


def _fill(root_path: str, path: str, target: str, filled: list[str]) -> str:
    """Copies what the image has into a volume, unless one is ``filled`` for that place; returns the place."""
    from holdfast.mounts.copy_up import Volume, copy_up, resolve_volumes  # few pods need it

    target_fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with Root(root_path) as root:
            [volume] = resolve_volumes(root, [Volume(path, path, (path,))])
            if volume.path not in filled:
                copy_up(root, path, target_fd)
            return volume.path
    finally:
        os.close(target_fd)
