"""Layers on persistent memory: a piece of a device each, mapped by device-mapper and mounted, with DAX where it can be.

A device is found by the PCI address that the host gave it; the kernel's own numbers (``/dev/pmem0``) come in the
order of discovery.  What was made for a mount is remembered by its mount point, and taken away by that.
"""

from __future__ import annotations

import errno
import os

from holdfast.errors import GuestFailed, InvalidInput, TimedOut
from holdfast.guest import dm, mapped, mounting
from holdfast.guest import settings as settings_of
from holdfast.guest.launch import load_on_demand
from holdfast.guest.loop import sleep
from holdfast.linux import syscalls
from holdfast.mounts.probe import NO_REPLAY
from holdfast.mounts.release import drop, remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Where the bridges are on bus 0, and how many devices each has: machine/ports.py.
_FIRST_BRIDGE_SLOT, _PLACES = 0x9, 31
_PCI = "/sys/bus/pci/devices"
_POLL_SECONDS = 0.002
_PAGE = 4096
#: Mount point -> mapped devices made for it, the lowest first.
_held: dict[str, list[str]] = {}


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: mounts a layer; returns ``{"path", "device", "dax"}``."""
    number, target = settings_of.number(settings, "DeviceNumber"), settings_of.path(settings, "MountPath")
    mapping: Any = settings.get("MappingInfo") or {}
    info: Any = settings.get("VerityInfo")
    if not isinstance(mapping, dict) or not isinstance(info or {}, dict):
        raise InvalidInput("read request", subject=target, why="MappingInfo or VerityInfo is not an object")
    place = (settings_of.number(mapping, "DeviceOffsetInBytes"), settings_of.number(mapping, "DeviceSizeInBytes"))
    load_on_demand("virtio_pmem")
    device = yield from wait_for_device(number)
    yield from _release(target)
    made: list[str] = []
    try:
        if any(place):
            device = yield from _linear(number, device, place, made)
        if info:
            device = yield from _verity(number, device, info, made)
        _held[target] = made
        dax = _mount(target, device, bool(info) or bool(settings.get("NoDax")))
    except BaseException as error:
        _give_up(target, made)
        if info:
            mapped.blame_contents("mount layer", device, error)
        raise
    return {"path": target, "device": device, "dax": dax}


def remove(settings: dict[str, Any], _children: Children) -> Task:
    """Task: unmounts a layer and takes its mapping away; already gone is success."""
    target = settings_of.path(settings, "MountPath")
    drop(target)
    yield from _release(target)
    remove_mount_point(target)
    return {}


def wait_for_device(number: int) -> Task:
    """Task: waits until the kernel has made the block device, and it can be opened; returns ``/dev/pmem<n>``."""
    bridge, place = divmod(number, _PLACES)
    while True:
        name = _find(f"{_PCI}/0000:00:{_FIRST_BRIDGE_SLOT + bridge:02x}.0", f":{place + 1:02x}.0")
        if name:
            try:
                os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENXIO):
                    raise GuestFailed("open persistent memory", subject=f"/dev/{name}", why=error) from None
            else:
                return f"/dev/{name}"
        try:
            yield sleep(_POLL_SECONDS)
        except TimedOut as error:
            error.why = f"persistent memory device {number} does not appear"
            raise


def _find(bridge: str, ending: str) -> str:
    """The block device below one PCI function: ``virtio1/ndbus0/region0/namespace0.0/block/pmem0``."""
    try:
        path = next(
            f"{bridge}/{name}" for name in os.listdir(bridge) if name.startswith("0000:") and name.endswith(ending)
        )
        for beginning in ("virtio", "ndbus", "region", "namespace"):
            path = next(f"{path}/{name}" for name in os.listdir(path) if _is_one(name, beginning))
        return next(iter(os.listdir(f"{path}/block")))
    except (OSError, StopIteration, IndexError):
        return ""


def _is_one(name: str, beginning: str) -> bool:
    return name.startswith(beginning) and name[len(beginning) : len(beginning) + 1].isdigit()


def _linear(number: int, device: str, place: tuple[int, int], made: list[str]) -> Task:
    offset, size = place
    if offset % _PAGE or size % _PAGE or not size:
        raise InvalidInput("map layer", subject=device, why=f"{size} bytes at {offset}: not whole pages")
    load_on_demand("dm_mod")
    name = f"dm-linear-pmem{number}-{offset}-{size}"
    made.append(name)
    table = dm.target("linear", size // dm.SECTOR, f"{_node(device)} {offset // dm.SECTOR}")
    return (yield from dm.create(name, table, read_only=True))


def _verity(number: int, device: str, info: dict[str, Any], made: list[str]) -> Task:
    load_on_demand("dm_verity")
    root, table = mapped.verity_table(_node(device), info)
    name = f"dm-verity-pmem{number}-{root}"
    made.append(name)
    return (yield from dm.create(name, table, read_only=True))


def _node(device: str) -> str:
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _mount(target: str, device: str, no_dax: bool) -> bool:
    """Mounts, and says whether files are mapped from the device itself.

    A filesystem that cannot do that is free to refuse the option, or to go on without and say so in the mount table.
    """
    fstype = mounting.filesystem_of(device)
    with mounting.NewMount(target):
        if not no_dax:
            try:
                mounting.mount(device, target, fstype, syscalls.MS_RDONLY, "dax")
                return _is_dax(target)
            except GuestFailed:  # without, then
                pass
        mounting.mount(device, target, fstype, syscalls.MS_RDONLY, NO_REPLAY.get(fstype, ""))
    return False


def _is_dax(target: str) -> bool:
    with open("/proc/self/mounts") as file:
        for line in file:
            fields = line.split(" ")
            if fields[1] == target:
                return bool({"dax", "dax=always"} & set(fields[3].split(",")))
    return False


def _release(target: str) -> Task:
    names = _held.get(target, [])
    while names:
        yield from dm.remove(names[-1])
        names.pop()
    _held.pop(target, None)


def _give_up(target: str, made: list[str]) -> None:
    """On the way out of a failure, perhaps a deadline's: what stays is for the next try."""
    while made and dm.remove_now(made[-1]) is None:
        made.pop()
    if made:
        _held[target] = made
    else:
        _held.pop(target, None)
