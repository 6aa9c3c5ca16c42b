"""Copies of disks as they were when the machine was frozen, of disks that go on as they are: the user's own.

Where the filesystem can share blocks, a copy is made at once, whatever its size.  Elsewhere QEMU copies what is on the
disk while the guest goes on, and before each write of it what that would have changed.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

from holdfast.errors import Exhausted, MachineFailed
from holdfast.linux import syscalls
from holdfast.machine.disks import DiskFile
from holdfast.machine.jobs import wait_for_job
from holdfast.machine.sparse import data_of

if TYPE_CHECKING:
    from holdfast.machine.disks import Disks
    from holdfast.machine.qmp import Qmp
    from holdfast.machine.sandbox import Slot

#: As long as a disk may take to copy.
_COPY_SECONDS = 3600.0


class Copies:
    """The copies that one freeze makes.

    Args:
        wanted: for each disk an empty file, open for writing; the descriptors stay the caller's.
    """

    def __init__(self, qmp: Qmp, disks: Disks, wanted: dict[Slot, int]) -> None:
        self._qmp = qmp
        self._disks = disks
        self._wanted = wanted
        self._shared = {slot: fd for slot, fd in wanted.items() if self._can_share(slot, fd)}
        self._copied: dict[Slot, int] = {}

    def _can_share(self, slot: Slot, fd: int) -> bool:
        *below, top = self._disks.files(slot)
        return not below and not top.block_device and _share_blocks(top.fd, fd)

    async def prepare(self) -> None:
        """Does what can be done before the machine is stopped.

        Raises:
            Exhausted: there is no room for a copy.
        """
        copied = self._wanted.keys() - self._shared.keys()
        taken = 0
        # First those whose room is really taken.
        for slot in sorted(copied, key=lambda slot: self._disks.files(slot)[0].disk_format != "raw"):
            fd = self._wanted[slot]
            os.ftruncate(fd, await self._disks.size(slot))
            taken += await asyncio.to_thread(_reserve, self._disks.files(slot)[0], fd, taken)
            self._copied[slot] = fd
            await self._qmp.add_fd(_fdset(slot), fd)
            file = {"driver": "file", "filename": f"/dev/fdset/{_fdset(slot)}", "discard": "unmap"}
            await self._qmp.execute("blockdev-add", {"node-name": _name(slot), "driver": "raw", "file": file})

    def actions(self) -> list[dict[str, Any]]:
        """What begins the copying, as actions of QMP's ``transaction``."""
        return [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": _name(slot), "device": self._disks.top(slot), "target": _name(slot), "sync": "full",
                    "auto-dismiss": False,
                },
            }
            for slot in self._copied
        ]  # fmt: skip

    def at_stop(self) -> None:
        """Makes the copies that share blocks; QEMU has written everything to the files."""
        for slot, fd in self._shared.items():
            if not _share_blocks(self._disks.files(slot)[0].fd, fd):
                raise MachineFailed("copy disk", subject=slot, why="it could share its blocks a moment ago, and cannot")

    async def finish(self) -> dict[Slot, tuple[DiskFile, ...]]:
        """Waits until all are complete; the machine runs.

        Raises:
            MachineFailed: a disk could not be read, or there is no room for its copy.
        """
        for slot in self._copied:
            await wait_for_job(self._qmp, _name(slot), _COPY_SECONDS)
        files: dict[Slot, tuple[DiskFile, ...]] = {}
        for slot, fd in self._wanted.items():
            disk_format = "raw" if slot in self._copied else self._disks.files(slot)[0].disk_format
            files[slot] = (DiskFile(fd, disk_format),)
        return files

    async def close(self) -> None:
        """Ends what still goes on, and has QEMU close the files."""
        for slot in self._copied:
            await self._qmp.execute_if_there("job-cancel", {"id": _name(slot)})
            await wait_for_job(self._qmp, _name(slot), _COPY_SECONDS, failed=True)
            await self._qmp.execute_if_there("blockdev-del", {"node-name": _name(slot)})
            await self._qmp.execute_if_there("remove-fd", {"fdset-id": _fdset(slot)})


def _reserve(source: DiskFile, target_fd: int, others: int) -> int:
    """Takes the room for all that is on a disk.

    If QEMU found none for what it copies before a write of the guest, that write would fail.

    Args:
        others: bytes that are free still and that others are to have.

    Returns:
        bytes of this disk that are to be so: where in the copy they will be, only QEMU knows.
    """
    size = os.fstat(source.fd).st_size
    try:
        if source.disk_format == "raw":
            for start, end in data_of(source.fd, size):
                os.posix_fallocate(target_fd, start, end - start)
            return 0
        needed = os.fstat(source.fd).st_blocks * 512
        room = os.fstatvfs(target_fd)
        if room.f_bavail * room.f_frsize < others + needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return needed
    except OSError as error:
        raise Exhausted(
            "copy disk", subject=os.readlink(f"/proc/self/fd/{source.fd}"), why=error, code="disk-full",
            hint="make room there, or attach it read-only",
        ) from None  # fmt: skip


def _share_blocks(source_fd: int, target_fd: int) -> bool:
    """Makes a file share the other's blocks (ioctl_ficlone(2)); False if their filesystem cannot."""
    try:
        fcntl.ioctl(target_fd, syscalls.FICLONE, source_fd)
    except OSError:
        return False
    return True


def _name(slot: Slot) -> str:
    return f"copy{slot.controller}-{slot.lun}"


def _fdset(slot: Slot) -> int:
    return 600 + slot.controller * 64 + slot.lun
