"""Finds a disk by where it is plugged in, never by its letter.

``/dev/sdX`` letters and SCSI host numbers come in the order of discovery, which no one promises.  What
is fixed is the PCI address that the host gave each controller: below it sysfs shows the SCSI host
number, and ``<host>:0:0:<lun>`` names the disk.  An agent without a machine is told the device: see ``host.py``.
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
_BLOCK = "/sys/class/block"


class Scsi:
    """The disks of a machine, by controller and LUN."""

    def __init__(self) -> None:
        self._hosts: dict[int, int] = {}

    def names(self, controller: int, lun: int) -> list[str]:
        """The kernel's names of the devices there, such as ``sda``: one, if it has found the disk already.

        Raises:
            GuestFailed: there is no such controller.
        """
        try:
            return os.listdir(self._folder(controller, lun) + "/block")
        except FileNotFoundError:
            return []

    def rescan(self, controller: int, lun: int) -> None:
        """Has the kernel ask the disk how large it is now."""
        with open(self._folder(controller, lun) + "/rescan", "w") as file:
            file.write("1\n")

    def eject(self, controller: int, lun: int) -> Task:
        """Task: tells the kernel to let go of the disk and waits until it has; already gone is success."""
        folder = self._folder(controller, lun)
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

    def _folder(self, controller: int, lun: int) -> str:
        """The disk's folder in sysfs, whether it is there or not."""
        return f"/sys/bus/scsi/devices/{self._host(controller)}:0:0:{lun}"

    def _host(self, controller: int) -> int:
        """The guest's SCSI host number of a controller."""
        if controller not in self._hosts:
            if not 0 <= controller < len(CONTROLLER_PCI_SLOTS):
                raise GuestFailed("find SCSI controller", subject=controller, why="there are controllers 0 to 3")
            base = f"/sys/bus/pci/devices/0000:00:{CONTROLLER_PCI_SLOTS[controller]:02x}.0"
            try:
                device = next(name for name in os.listdir(base) if name.startswith("virtio"))
                host = next(name for name in os.listdir(f"{base}/{device}") if name.startswith("host"))
            except (OSError, StopIteration) as error:
                why = str(error) or "not in sysfs"
                raise GuestFailed("find SCSI controller", subject=controller, why=why) from None
            self._hosts[controller] = int(host[4:])
        return self._hosts[controller]


class Told:
    """The disks of a sandbox without controllers: the host has said which device is in which slot."""

    def __init__(self) -> None:
        self.devices: dict[tuple[int, int], str] = {}

    def names(self, controller: int, lun: int) -> list[str]:
        """See :meth:`Scsi.names`."""
        name = self.devices.get((controller, lun))
        return [name] if name else []

    def rescan(self, controller: int, lun: int) -> None:
        """See :meth:`Scsi.rescan`: this kernel is the one that has made it larger."""

    def eject(self, controller: int, lun: int) -> Task:
        """See :meth:`Scsi.eject`."""
        self.devices.pop((controller, lun), None)
        return
        yield


#: Where this agent's disks are; another is set before the first request, if at all.
places: Scsi | Told = Scsi()


def wait_for_disk(controller: int, lun: int, partition: int = 0) -> Task:
    """Task: waits until the kernel has made the disk and its device can be opened; returns ``/dev/...``.

    The device node appears before it can be opened (ENXIO) and sysfs before the node (ENOENT): both are
    waited out.  ``partition`` counts from 1; 0 is the whole disk.

    Raises:
        NotFound: the disk has no such partition.
    """
    last = None
    names: list[str] = []
    while True:
        if partition and last is not None and monotonic() > last:
            raise NotFound(
                "find partition", subject=f"{partition} of disk {controller}:{lun}", code="no-partition",
                why=f"the guest's kernel finds {_partitions(names)} on it",
            )  # fmt: skip
        names = places.names(controller, lun)
        if len(names) > 1:
            raise GuestFailed("find disk", subject=f"{controller}:{lun}", why=f"several devices: {names}")
        if names:
            device = _openable(names[0], partition)
            if device:
                return device
            if last is None and partition and _openable(names[0], 0):
                last = monotonic() + _PARTITION_SECONDS  # the kernel reads the table right after
        yield sleep(_POLL_SECONDS)


def _partitions(disks: list[str]) -> str:
    found = [(name, disk) for disk in disks for name in os.listdir(f"{_BLOCK}/{disk}") if name.startswith(disk)]
    numbers = sorted(int(name.removeprefix(disk).removeprefix("p") or 0) for name, disk in found)
    return "partitions " + ", ".join(map(str, numbers)) if numbers else "no partitions"


def _device(disk: str, partition: int) -> str:
    """``sda1``, and ``loop0p1``: a name that ends in a digit has a letter before the number."""
    return f"{disk}{'p' if disk[-1:].isdigit() else ''}{partition}" if partition else disk


def _openable(disk: str, partition: int) -> str:
    name = _device(disk, partition)
    if partition and not os.path.isdir(f"{_BLOCK}/{disk}/{name}"):
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
    started = monotonic()
    for disk in places.names(controller, lun):
        while _is_busy(f"/dev/{_device(disk, partition)}"):
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
    """See :meth:`Scsi.rescan`."""
    places.rescan(controller, lun)


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
    """Task: has the kernel let go of a disk that nothing uses any more; already gone is success.

    Raises:
        NotReleased: something uses it.
    """
    yield from prove_unused(controller, lun)
    yield from places.eject(controller, lun)
