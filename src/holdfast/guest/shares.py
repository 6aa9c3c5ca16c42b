"""Shares of the host: directories of the pod's one export, bound to where a container wants them.

A machine has the export by 9p.  A sandbox on the host's kernel sees the folder itself, and then a share is bound with
what is mounted in it, and nothing has to be written back: there is one cache.
"""

from __future__ import annotations

import os

from holdfast.errors import GuestFailed, InvalidInput, from_dict, from_exception
from holdfast.guest import mounting
from holdfast.guest import settings as settings_of
from holdfast.linux import syscalls
from holdfast.mounts import table
from holdfast.mounts.release import drop, remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Cache mode -> (9p device, where it is mounted).  All serve the pod's one export, in which every share is a
#: directory named by its number; one for each mode, since Linux mounts a virtio-9p device once (EBUSY).
#: ``mmap``: data always comes from the host, and shared writable maps (SQLite) still work.
EXPORTS = {
    "mmap": ("holdfast", "/run/mounts/plan9"),
    "none": ("holdfast-none", "/run/mounts/plan9-none"),
    "loose": ("holdfast-loose", "/run/mounts/plan9-loose"),
}
_SHARES = "/run/mounts/shares"
#: The export itself, in a sandbox that sees it; set before the first request, if at all.
export = ""
_NINEP_DATA = "trans=virtio,version=9p2000.L,msize=512000,access=client,posixacl,cache="


class _Group:
    """Shares that came together: where they are, and which are wanted."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.targets: set[str] = set()


#: Where a group is in the export -> where it is shown.
_groups: dict[str, _Group] = {}


def add(settings: dict[str, Any], children: Children) -> Task:
    """Task: shows a share at a path; returns ``{"path": it}``."""
    answer = yield from add_all([settings], children)
    return _only(answer)


def add_all(many: list[Any], _children: Children) -> Task:
    """Task: the same for many; returns ``{"results": [...]}``: for each where it is, or why it is not there."""
    folders: dict[str, int] = {}
    try:
        return {"results": [_outcome(_add, each, folders) for each in many]}
    finally:
        for fd in folders.values():
            os.close(fd)
    yield


def _only(answer: dict[str, Any]) -> Any:
    result = answer["results"][0]
    if error := result.get("error"):
        raise from_dict(error)
    return result


def _outcome(act: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return act(*arguments)
    except Exception as error:
        return {"error": from_exception(error).as_dict()}


def _add(settings: object, folders: dict[str, int]) -> dict[str, Any]:
    """Shows a share.

    Args:
        folders: the directories of the export that shares of this request are in, as far as they are open: each look
            at them is a question to the host.
    """
    settings = settings_of.item(settings)
    name = settings_of.text(settings, "ShareName")
    group, _, number = name.rpartition("/")
    if not number.isdigit() or (group and not (group[0] == "b" and group[1:].isdigit())):
        raise InvalidInput("add share", subject=name, why="a share's name is a number, or a group's and a number")
    target = settings_of.path(settings, "MountPath")
    cache = settings_of.text(settings, "Cache") or "mmap"
    if export and group:
        return {"path": _show_with_group(f"{export}/{group}", number, target)}
    with mounting.NewMount(target):
        if export:
            mounting.bring(f"{export}/{name}", target)  # read-only already, if it is to be, with all below it
        else:
            folder = f"{cache}/{group}"
            if folder not in folders:
                folders[folder] = _open(f"{_mount_export(cache)}/{group}")
            _bind(folders[folder], number, target, read_only=bool(settings.get("ReadOnly")))
    return {"path": target}


def _open(folder: str) -> int:
    try:
        return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise GuestFailed("add share", subject=folder, why=error, code="mount-failed") from None


def _bind(folder: int, name: str, target: str, *, read_only: bool) -> None:
    try:
        tree = syscalls.open_tree(folder, name, syscalls.OPEN_TREE_CLONE)
        try:
            if read_only:
                attributes = syscalls.MOUNT_ATTR_RDONLY
                syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, attr_set=attributes)
            syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(tree)
    except OSError as error:
        raise GuestFailed("bind", subject=f"share {name} at {target}", why=error, code="mount-failed") from None


def _show_with_group(source: str, number: str, target: str) -> str:
    """Where a share of a group is, in a sandbox that sees the export: all of a group come with the first of them.

    A machine could have a group by one mount, too, but then all that a runtime asks of a mount's source would be asked
    of the host, which takes longer than a mount for each.

    Raises:
        InvalidInput: it is not to be where the others are.
    """
    shown = _groups.get(source)
    if shown is None:
        where = os.path.dirname(target)
        with mounting.NewMount(where):
            mounting.bring(source, where)
        shown = _groups[source] = _Group(where)
    if target != f"{shown.where}/{number}":
        raise InvalidInput("add share", subject=target, why=f"its group is at {shown.where}", code="path-in-use")
    shown.targets.add(target)
    return target


def is_shown(target: str) -> bool:
    """Whether a share is at a path."""
    if any(target in group.targets for group in _groups.values()):
        return True
    return target.startswith(f"{_SHARES}/") and os.path.ismount(target)


def _mount_export(cache: str) -> str:
    """Where the export is mounted with a cache mode; mounts it for the first share that wants that."""
    if cache not in EXPORTS:
        raise InvalidInput("add share", subject=cache, why="unknown cache mode", code="cache-mode")
    if export:
        return export
    folder = EXPORTS[cache][1]
    if not os.path.ismount(folder):
        mount_folder(folder)
    return folder


def mount_folder(folder: str) -> None:
    """Mounts the export in the folder of a cache mode."""
    cache, tag = next((cache, tag) for cache, (tag, where) in EXPORTS.items() if where == folder)
    os.makedirs(folder, exist_ok=True)
    mounting.mount(tag, folder, "9p", 0, _NINEP_DATA + cache)


def refresh(settings: dict[str, Any], _children: Children) -> Task:
    """Task: forgets what is cached of a file that the host has put in another one's place.

    Reads ask the host each time; pages that were mapped stay as long as somebody holds the file, and a container
    that has it mounted does.
    """
    try:
        fd = os.open(
            settings_of.path(settings, "MountPath"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:  # the new one is gone, too, or cannot be read
        return {}
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return {}
    yield


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes a share away; already gone is success.  The 9p mount behind it stays for the next."""
    answer = yield from remove_all([settings], children)
    return _only(answer)


def remove_all(many: list[Any], children: Children) -> Task:
    """Task: the same for many; returns ``{"results": [...]}``: for each nothing, or why it is still there.

    Raises:
        NotReleased: what was written last is not all on the host; all are still there.
    """
    targets = [settings_of.path(settings_of.item(each), "MountPath") for each in many]
    if export:
        return {"results": [_outcome(_remove, target, ()) for target in targets]}
    # All shares are of these filesystems, which write late otherwise: one writing for all of them.
    for _, folder in EXPORTS.values():
        yield from mounting.write_back(folder, children)
    below = _below(targets)
    results = [_outcome(_remove, target, below.get(target, ())) for target in targets]
    if not export and os.path.ismount(EXPORTS["loose"][1]):
        _forget_names()
    for folder in {os.path.dirname(target) for target in targets} - {_SHARES}:  # of groups
        try:
            os.rmdir(folder)
        except OSError:  # others of it are there
            continue
    return {"results": results}


def _forget_names() -> None:
    """Has the kernel forget directories that it keeps in memory, as it does those of shares that are cached "loose".

    The same directory shared again, under another number, would be found in memory with the old one's 9p handles, which
    lead nowhere now: a directory has one entry in memory only (fs/dcache.c, d_splice_alias).
    """
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def _remove(target: str, below: Iterable[str]) -> dict[str, Any]:
    """Takes a share away, and its group if it was the last of that."""
    for inner in below:
        drop(inner)
    source, group = next(((s, g) for s, g in _groups.items() if target in g.targets), ("", None))
    if group is None:
        _unmount(target)
    elif len(group.targets) > 1:
        group.targets.discard(target)
    else:
        _unmount(group.where)
        del _groups[source]
    return {}


def _unmount(target: str) -> None:
    if export:
        mounting.unmount_tree(target)
    drop(target)
    remove_mount_point(target)


def _below(targets: list[str]) -> dict[str, list[str]]:
    """What containers have mounted in shares: by share, the deepest first."""
    found: dict[str, list[str]] = {}
    shares = set(targets)
    for entry in reversed(table.within(os.path.commonpath(targets))):
        above = os.path.dirname(entry.target)
        while len(above) > 1 and above not in shares:
            above = os.path.dirname(above)
        if above in shares and entry.target not in shares:
            found.setdefault(above, []).append(entry.target)
    return found
