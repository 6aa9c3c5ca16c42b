"""Who keeps a mount busy."""

from __future__ import annotations

import os

from holdfast.linux import syscalls
from holdfast.mounts import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: More than these are counted, not named.
_MOST_NAMED = 8


def describe(target: str) -> str:
    """Who holds the mount on top of ``target``, for an error: processes, loop devices, what is mounted on it.

    Processes that this one may not look into are not found; empty when nobody is.
    """
    found = list(holders(target))
    text = "; ".join(found[:_MOST_NAMED])
    if len(found) > _MOST_NAMED:
        text += f"; and {len(found) - _MOST_NAMED} more"
    return text


def holders(target: str) -> Iterator[str]:
    """Each thing that holds the mount on top of ``target``, in words."""
    try:
        number, _ = table.mount_id(target)
    except OSError:
        return
    for entry in table.within(target):
        if entry.parent == number and entry.number != number:
            yield f"mounted on it: {entry.target}"
    for name in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{name}/loop/backing_file") as file:
                behind = file.read().rstrip("\n")
        except OSError:
            continue
        if table.is_within(behind, target):
            yield f"loop device /dev/{name} on {behind}"
    for name in sorted(filter(str.isdecimal, os.listdir("/proc")), key=int):
        uses = list(dict.fromkeys(_uses(f"/proc/{name}", number)))
        if uses:
            more = f" and {len(uses) - 2} more" if len(uses) > 2 else ""
            yield f"process {name} ({_command(name)}): {', '.join(uses[:2])}{more}"


def _uses(process: str, number: int) -> Iterator[str]:
    """How a process uses the mount of that number.  Any part of it may end meanwhile, or be none of our business."""
    for name in ("cwd", "root", "exe"):
        if _mount_of(f"{process}/{name}") == number:
            yield f"{name} {_link(f'{process}/{name}')}"
    for fd in _names(f"{process}/fd"):
        try:
            with open(f"{process}/fdinfo/{fd}") as file:
                uses = any(line.split() == ["mnt_id:", str(number)] for line in file)
        except OSError:
            continue
        if uses:
            yield f"open {_link(f'{process}/fd/{fd}')}"
    for mapped in _names(f"{process}/map_files"):
        if _mount_of(f"{process}/map_files/{mapped}") == number:
            yield f"mapped {_link(f'{process}/map_files/{mapped}')}"


def _mount_of(path: str) -> int:
    try:
        return syscalls.statx_mount(syscalls.AT_FDCWD, path)[0]
    except OSError:
        return 0


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "?"


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
