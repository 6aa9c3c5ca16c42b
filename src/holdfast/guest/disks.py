"""Finds a disk by where it is plugged in, never by its letter.

``/dev/sdX`` letters and SCSI host numbers come in the order of discovery, which no one promises.  What
is fixed is the PCI address that the host gave each controller: below it sysfs shows the SCSI host
number, and ``<host>:0:0:<lun>`` names the disk.
"""

from __future__ import annotations

import errno
import os
import stat
from time import monotonic

from holdfast.errors import GuestFailed, NotFound, NotReleased
from holdfast.guest.loop import sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.guest.loop import Task

#: PCI device numbers of SCSI controllers 0 to 3 on bus 0; machine/config.py plugs them in there.
CONTROLLER_PCI_SLOTS = (0x10, 0x11, 0x12, 0x13)
_POLL_SECONDS = 0.002
_PARTITION_SECONDS = 2.0
_BUSY_SECONDS = 0.5
_hosts: dict[int, int] = {}


def _scsi_host(controller: int) -> int:
    """The guest's SCSI host number of a controller.

    Raises:
        GuestFailed: there is no such controller.
    """
    if controller not in _hosts:
        if not 0 <= controller < len(CONTROLLER_PCI_SLOTS):
            raise GuestFailed("find SCSI controller", subject=controller, why="there are controllers 0 to 3")
        base = f"/sys/bus/pci/devices/0000:00:{CONTROLLER_PCI_SLOTS[controller]:02x}.0"
        try:
            device = next(name for name in os.listdir(base) if name.startswith("virtio"))
            host = next(name for name in os.listdir(f"{base}/{device}") if name.startswith("host"))
        except (OSError, StopIteration) as error:
            raise GuestFailed("find SCSI controller", subject=controller, why=error or "not in sysfs") from None
        _hosts[controller] = int(host[4:])
    return _hosts[controller]


def sysfs_path(controller: int, lun: int) -> str:
    """The disk's folder in sysfs, whether it is there or not."""
    return f"/sys/bus/scsi/devices/{_scsi_host(controller)}:0:0:{lun}"


def wait_for_disk(controller: int, lun: int, partition: int = 0) -> Task:
    """Task: waits until the kernel has made the disk and its device can be opened; returns ``/dev/...``.

    The device node appears before it can be opened (ENXIO) and sysfs before the node (ENOENT): both are
    waited out.  ``partition`` counts from 1; 0 is the whole disk.

    Raises:
        NotFound: the disk has no such partition.
    """
    folder = sysfs_path(controller, lun) + "/block"
    last = None
    while True:
        if partition and last is not None and monotonic() > last:
            raise NotFound(
                "find partition", subject=f"{partition} of disk {controller}:{lun}", code="no-partition",
                why=f"the guest's kernel finds {_partitions(folder)} on it",
            )  # fmt: skip
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            names = []
        if len(names) > 1:
            raise GuestFailed("find disk", subject=f"{controller}:{lun}", why=f"several devices: {names}")
        if names:
            device = _openable(names[0], f"{folder}/{names[0]}", partition)
            if device:
                return device
            if last is None and partition and _openable(names[0], "", 0):
                last = monotonic() + _PARTITION_SECONDS  # the kernel reads the table right after
        yield sleep(_POLL_SECONDS)


def _partitions(folder: str) -> str:
    found = [name for disk in os.listdir(folder) for name in os.listdir(f"{folder}/{disk}") if name.startswith(disk)]
    numbers = sorted(int(name.lstrip("abcdefghijklmnopqrstuvwxyz") or 0) for name in found)
    return "partitions " + ", ".join(map(str, numbers)) if numbers else "no partitions"


def _openable(disk: str, folder: str, partition: int) -> str:
    name = disk
    if partition:
        name = f"{disk}{partition}"
        if not os.path.isdir(f"{folder}/{name}"):
            return ""
    try:
        os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):
            return ""
        raise GuestFailed("open disk", subject=f"/dev/{name}", why=error) from None
    return f"/dev/{name}"


def prove_unused(controller: int, lun: int, partition: int = 0) -> Task:
    """Task: checks that no filesystem of the disk is mounted anywhere in the guest any more.

    An exclusive open of a block device fails with EBUSY as long as a superblock holds it (open(2)); a
    lazily unmounted filesystem that somebody still uses is caught here, where umount was content.  So does
    the kernel's own look for partitions at a disk that has just come, which is waited out.

    Raises:
        NotReleased: something still uses it.
    """
    try:
        names = os.listdir(sysfs_path(controller, lun) + "/block")
    except FileNotFoundError:
        return
    started = monotonic()
    for disk in names:
        name = f"{disk}{partition}" if partition else disk
        while _is_busy(f"/dev/{name}"):
            if monotonic() - started > _BUSY_SECONDS:
                raise NotReleased(
                    "unmount disk", subject=f"{controller}:{lun}", why="the guest still uses it", code="disk-busy",
                    hint="end the processes that have files open on it, then detach again",
                )  # fmt: skip
            yield sleep(_POLL_SECONDS)


def _is_busy(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        # What cannot be opened yet, or no more, nobody has mounted.
        if error.errno not in (errno.EBUSY, errno.ENOENT, errno.ENXIO):
            raise
        return error.errno == errno.EBUSY
    return False


def rescan(controller: int, lun: int) -> None:
    """Has the kernel ask the disk how large it is now."""
    with open(f"{sysfs_path(controller, lun)}/rescan", "w") as file:
        file.write("1\n")


def prove_closed(link: str) -> None:
    """Checks that no process has the device open that a link leads to: nothing but its descriptors would tell.

    Raises:
        NotReleased: one has.
    """
    try:
        device = os.stat(link).st_rdev
    except FileNotFoundError:  # ejected already
        return
    for pid in os.listdir("/proc"):
        if pid.isdecimal() and pid != "1" and device in _open_devices(pid):
            raise NotReleased(
                "release disk", subject=link, why=f"process {pid} of the guest has it open", code="disk-busy",
                hint="end the processes that have it open, then detach again",
            )  # fmt: skip


def _open_devices(pid: str) -> set[int]:
    """Numbers of the block devices that a process has open; of one that has just ended, none."""
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{fd}")
            if stat.S_ISBLK(status.st_mode):
                found.add(status.st_rdev)
    except OSError:
        return found
    return found


def eject(controller: int, lun: int) -> Task:
    """Task: tells the guest's kernel to let go of the disk and waits until it has; already gone is success."""
    yield from prove_unused(controller, lun)
    folder = sysfs_path(controller, lun)
    try:
        with open(f"{folder}/delete", "w") as file:
            file.write("1\n")
    except FileNotFoundError:
        return
    started = monotonic()
    while os.path.isdir(folder):
        yield sleep(_POLL_SECONDS)
        if monotonic() - started > 30:
            raise NotReleased("eject disk", subject=f"{controller}:{lun}", why="the guest's kernel keeps it")
