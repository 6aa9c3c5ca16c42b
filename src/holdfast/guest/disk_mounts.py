"""Disks in slots, mounted or linked, and let go of again."""

from __future__ import annotations

import os

from holdfast import trace
from holdfast.errors import InUse, Unsupported
from holdfast.guest import disks, mapped, mounting
from holdfast.guest import settings as settings_of
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.mounts.probe import NO_REPLAY
from holdfast.mounts.release import drop, drop_below, remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Path of a mounted disk, or of a link to one -> its controller, LUN and partition.
_disks: dict[str, tuple[int, int, int]] = {}


def add(settings: dict[str, Any], children: Children) -> Task:
    """Task: mounts a disk that is plugged in, or links its device."""
    target = settings_of.path(settings, "MountPath")
    place = (
        settings_of.number(settings, "Controller"),
        settings_of.number(settings, "Lun"),
        settings_of.number(settings, "Partition"),
    )
    device = yield from disks.wait_for_disk(*place)
    trace.mark("has found disk")
    try:
        device = yield from _map(settings, target, device, place, children)
        answer = _link_device(target, device) if settings.get("BlockDev") else _mount_disk(settings, target, device)
        _disks[target] = place
        return answer
    except BaseException as error:
        mapped.give_up(target)
        if settings.get("VerityInfo"):
            mapped.blame_contents("mount disk", device, error)
        raise


def _map(settings: dict[str, Any], target: str, device: str, place: tuple[int, int, int], children: Children) -> Task:
    """Task: what is to be mounted: the device itself, or one above it that checks or decrypts."""
    info: Any = settings.get("VerityInfo")
    encrypted, read_only = settings.get("Encrypted"), settings.get("ReadOnly")
    if not info and not encrypted:
        return device
    if isinstance(disks.places, disks.Told):
        raise Unsupported(
            "mount disk", subject=target, code="isolation-unsupported", hint="--isolation vm can do it",
            why="on the host's own kernel its mapped device would outlive a pod that is killed",
        )  # fmt: skip
    why = ""
    if settings.get("BlockDev"):  # hcsshim hands out the raw device then: #2757
        why = "a disk that is not mounted can neither be verified nor encrypted"
    elif info and (encrypted or not read_only or not isinstance(info, dict)):
        why = "only a read-only disk can be verified"
    elif encrypted and (read_only or place[2]):
        why = "only a whole, writable disk can be encrypted"
    if why:
        raise Unsupported("mount disk", subject=target, why=why, code="mapping-unsupported")
    if encrypted:
        return (yield from mapped.encrypted(target, device, children, place))
    return (yield from mapped.verity(target, device, info, place))


def _mount_disk(settings: dict[str, Any], target: str, device: str) -> dict[str, str]:
    read_only = bool(settings.get("ReadOnly"))
    fstype = mounting.filesystem_of(device, settings_of.text(settings, "Filesystem"))
    options = mount_options.parse([str(option) for option in settings.get("Options", ())])
    flags = options.flags | (syscalls.MS_RDONLY if read_only else 0)
    data = list(options.data)
    if flags & syscalls.MS_RDONLY and fstype in NO_REPLAY:
        data.append(NO_REPLAY[fstype])
    with mounting.NewMount(target):
        mounting.mount(device, target, fstype, flags, ",".join(data))
        for flag in options.propagation:
            mounting.mount("none", target, "", flag, "")
    return {"path": target, "device": device, "filesystem": fstype}


def _link_device(target: str, device: str) -> dict[str, str]:
    """Shows a disk that is not mounted: a link to its device, which keeps its place whatever the device is called."""
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    try:
        os.symlink(device, target)
    except FileExistsError:
        raise InUse("link device", subject=target, why="something else is there", code="path-in-use") from None
    return {"path": target, "device": device}


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: unmounts a disk and proves that it is unused; already gone is success."""
    target = settings_of.path(settings, "MountPath")
    place = (
        settings_of.number(settings, "Controller"),
        settings_of.number(settings, "Lun"),
        settings_of.number(settings, "Partition"),
    )
    if os.path.islink(target):
        disks.prove_closed(target)
        os.unlink(target)
        _disks.pop(target, None)
        return {}
    if not settings.get("ReadOnly"):
        yield from mounting.write_back(target, children)
    drop_below(target)
    drop(target)
    yield from mapped.release(target)
    remove_mount_point(target)
    _disks.pop(target, None)
    # Another mount of the same disk uses it rightly; the last one to go, and the eject, find out what is wrong.
    if not any(other[:2] == place[:2] and (other[2] == place[2] or not place[2]) for other in _disks.values()):
        yield from disks.prove_unused(*place)
    return {}


def grow(settings: dict[str, Any], children: Children) -> Task:
    """Task: makes a mounted ext4 as large as its disk has become."""
    target = settings_of.path(settings, "MountPath")
    place = (settings_of.number(settings, "Controller"), settings_of.number(settings, "Lun"), 0)
    if mapped.is_mapped(target):
        raise Unsupported("grow disk", subject=target, why="it is encrypted or verified", code="grow-unsupported")
    disks.rescan(*place[:2])
    device = yield from disks.wait_for_disk(*place)
    yield from mapped.run("grow disk", children, ["/usr/sbin/resize2fs", device])
    return {"path": target}


def eject(settings: dict[str, Any], _children: Children) -> Task:
    """Task: has the kernel let go of a disk; already gone is success."""
    yield from disks.eject(settings_of.number(settings, "Controller"), settings_of.number(settings, "Lun"))
    return {}
