"""The disks of a QEMU machine: each slot's device, and the chain of image files below it.

A disk is one file when it is plugged in.  Each freeze of the machine puts an empty qcow2 file on top and leaves what
is below unchanged for ever, so that copies of the machine can go on from it: nothing is copied, whatever the disk's
size.  Node names and device ids follow from the slot, so that what is plugged in can be asked for: ``d0-3``, and
``d0-3.1`` for the file on top of that.  No file is opened by QEMU itself: it gets descriptors, and we keep copies to
hand on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import HoldfastError
from holdfast.machine.jobs import wait_for_job
from holdfast.machine.qcow2 import write_empty
from holdfast.machine.sandbox import Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from holdfast.machine.qmp import Qmp

_UNPLUG_SECONDS = 10.0
#: As long as a disk may take to copy.
_SHORTEN_SECONDS = 3600.0
#: Formats whose drivers QEMU calls otherwise.
_DRIVERS = {"vhd": "vpc"}
#: Files of one disk, before they are made one: each costs QEMU a little for every read, and us a descriptor.
LONGEST_CHAIN = 8


class DiskFile(NamedTuple):
    """One file of a disk's chain."""

    fd: int
    disk_format: str
    block_device: bool = False


class Chain:
    """The files of one slot, the lowest first, and the size of the disk that they make."""

    def __init__(self, slot: Slot, read_only: bool) -> None:
        self.slot = slot
        self.read_only = read_only
        self.files: list[DiskFile] = []
        #: How many were between the lowest and the next, and have become part of that.
        self.merged = 0
        #: Whether the last of the files has been made to be put on top, and is not there yet.
        self.next = False

    def node(self, place: int) -> str:
        """Name of the block node of one of the files, the lowest being at 0."""
        name = f"d{self.slot.controller}-{self.slot.lun}"
        return f"{name}.{self.merged + place}" if place else name

    @property
    def top(self) -> str:
        """Name of the block node that the device has."""
        return self.node(max(0, len(self.files) - 1 - self.next))

    def fdset(self, place: int) -> int:
        """QEMU's number for the descriptors of one of the files."""
        numbers = LONGEST_CHAIN + 1  # but for the lowest, no two of a chain are so far apart
        number = 1 + (self.merged + place) % numbers if place else 0
        return 1000 + (self.slot.controller * 64 + self.slot.lun) * (numbers + 1) + number


class Disks:
    """The disks of one machine.  Owns copies of their descriptors until :meth:`close`."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._chains: dict[Slot, Chain] = {}

    async def plug(self, slot: Slot, files: Sequence[DiskFile], *, read_only: bool) -> None:
        """Plugs in a disk; undoes itself when it fails.

        Args:
            files: its chain, the lowest first; the descriptors stay the caller's.
        """
        chain = self._chains[slot] = Chain(slot, read_only)
        device = _device(slot)
        try:
            for number, file in enumerate(files):
                chain.files.append(file._replace(fd=os.dup(file.fd)))
                await self._add_node(chain, number, read_only=read_only or number < len(files) - 1)
            await self._qmp.execute("device_add", {
                "driver": "scsi-hd", "id": device, "bus": f"scsi{slot.controller}.0", "channel": 0, "scsi-id": 0,
                "lun": slot.lun, "drive": chain.top, "serial": device,
                # A full host disk stops the guest before it sees anything (see VirtualMachine._on_no_space): told of a
                # failed write, it would drop the page and read back something else later.
                "werror": "enospc", "rerror": "report",
            })  # fmt: skip
        except BaseException as error:
            # Whether an interrupted command ran cannot be known: everything is taken back, in any case.
            await asyncio.shield(self._take_back(slot, error))
            raise

    async def _add_node(self, chain: Chain, number: int, *, read_only: bool, backing: bool = True) -> None:
        file, node, fdset = chain.files[number], chain.node(number), chain.fdset(number)
        with _as_opened(file.fd, read_only=read_only) as fd:
            await self._qmp.add_fd(fdset, fd)
        options: dict[str, Any] = {
            "node-name": node, "driver": _DRIVERS.get(file.disk_format, file.disk_format), "read-only": read_only,
            "discard": "unmap",
            "file": {
                "driver": "host_device" if file.block_device else "file", "filename": f"/dev/fdset/{fdset}",
                "read-only": read_only, "discard": "unmap",
            },
        }  # fmt: skip
        if not read_only and not os.fstat(file.fd).st_nlink:
            # A file without a name ends with the machine: what the guest flushes need never come to the host's disk.
            options["cache"] = {"no-flush": True}
        if file.disk_format == "qcow2":  # never opens another file by itself, whatever the image says
            options["backing"] = chain.node(number - 1) if number and backing else None
        await self._qmp.execute("blockdev-add", options)

    async def _take_back(self, slot: Slot, error: BaseException) -> None:
        try:
            await self.unplug(slot)
        except HoldfastError as left:
            if isinstance(error, HoldfastError):
                error.also(left)

    async def unplug(self, slot: Slot) -> None:
        """Takes a disk out; the slot is free when QEMU has said that the device is gone.  Already gone is success."""
        await self._qmp.delete_device(_device(slot), _UNPLUG_SECONDS)
        await self.drop_overlay(slot)
        chain = self._chains.get(slot) or Chain(slot, read_only=True)
        for number in reversed(range(max(1, len(chain.files)))):
            await self._qmp.execute_if_there("blockdev-del", {"node-name": chain.node(number)})
            await self._qmp.execute_if_there("remove-fd", {"fdset-id": chain.fdset(number)})
        self._chains.pop(slot, None)
        _close(chain.files)

    async def resize(self, slot: Slot, size_bytes: int) -> None:
        """Makes the disk in a slot larger, its file as well."""
        await self._qmp.execute("block_resize", {"node-name": self._chains[slot].top, "size": size_bytes})

    async def plugged(self) -> set[Slot]:
        """The slots that QEMU says are occupied."""
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True})
        return {slot for node in nodes if (slot := _slot_of(str(node["node-name"]))) is not None}

    async def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that the guest has read from each disk and written to it, by slot, since it started or was frozen."""
        found = await self._qmp.execute("query-blockstats", {})
        return {
            str(slot): (int(one["stats"]["rd_bytes"]), int(one["stats"]["wr_bytes"]))
            for one in found
            if (slot := _slot_of(str(one.get("node-name", "")))) is not None
        }

    # -- freezing -----------------------------------------------------------------------------

    def files(self, slot: Slot) -> tuple[DiskFile, ...]:
        """A disk's chain, the lowest first; the descriptors stay ours."""
        return tuple(self._chains[slot].files)

    def top(self, slot: Slot) -> str:
        """Name of the block node that a disk's device has."""
        return self._chains[slot].top

    async def size(self, slot: Slot) -> int:
        """Bytes of a disk, as the guest sees it."""
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True})
        return next(int(one["image"]["virtual-size"]) for one in nodes if one["node-name"] == self.top(slot))

    async def make_overlay(self, slot: Slot, fd: int) -> None:
        """Makes an empty file a qcow2 disk, to be put on top of a disk later.

        Args:
            fd: an empty file, open for reading and writing; it stays the caller's.

        Raises:
            MachineFailed: QEMU could not.
        """
        chain = self._chains[slot]
        if len(chain.files) >= LONGEST_CHAIN:
            await self._shorten(chain)
        number = len(chain.files)
        write_empty(fd, await self.size(slot))
        chain.files.append(DiskFile(os.dup(fd), "qcow2"))
        chain.next = True
        await self._add_node(chain, number, read_only=False, backing=False)

    async def _shorten(self, chain: Chain) -> None:
        """Takes what lies between the lowest file and the top one into that, while the guest goes on.

        The lowest stays: QEMU would read all of it, holes too, to find out what there is.  Who has the others keeps
        them.

        Raises:
            MachineFailed: QEMU could not, as when there is no room.
        """
        job = f"shorten-{chain.top}"
        stream = {"job-id": job, "device": chain.top, "base-node": chain.node(0), "auto-dismiss": False}
        await self._qmp.execute("block-stream", stream)
        await wait_for_job(self._qmp, job, _SHORTEN_SECONDS)
        for place in reversed(range(1, len(chain.files) - 1)):
            await self._qmp.execute_if_there("blockdev-del", {"node-name": chain.node(place)})
            await self._qmp.execute_if_there("remove-fd", {"fdset-id": chain.fdset(place)})
        lowest, *gone, top = chain.files
        chain.files, chain.merged = [lowest, top], chain.merged + len(gone)
        _close(gone)

    def overlay_action(self, slot: Slot) -> dict[str, Any]:
        """What puts it there, as an action of QMP's ``transaction``."""
        chain = self._chains[slot]
        top = len(chain.files) - 1
        return {"type": "blockdev-snapshot", "data": {"node": chain.node(top - 1), "overlay": chain.node(top)}}

    def overlaid(self, slots: Iterable[Slot]) -> None:
        """The transaction has been done: from now on that file is the top."""
        for slot in slots:
            self._chains[slot].next = False

    async def drop_overlay(self, slot: Slot) -> None:
        """Forgets a file that was made to be put on top and has not been."""
        chain = self._chains.get(slot)
        if chain is None or not chain.next:
            return
        number = len(chain.files) - 1
        await self._qmp.execute_if_there("blockdev-del", {"node-name": chain.node(number)})
        await self._qmp.execute_if_there("remove-fd", {"fdset-id": chain.fdset(number)})
        chain.next = False
        _close([chain.files.pop()])

    def close(self) -> None:
        """Closes our copies; QEMU is gone, or is to go on without us."""
        for chain in self._chains.values():
            _close(chain.files)
        self._chains.clear()


@contextlib.contextmanager
def _as_opened(fd: int, *, read_only: bool) -> Iterator[int]:
    """The descriptor as QEMU looks for it: a file that it opens for reading only must be open for reading only."""
    if not read_only or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        yield fd
        return
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield again
    finally:
        os.close(again)


def _device(slot: Slot) -> str:
    return f"disk{slot.controller}-{slot.lun}"


def _slot_of(node: str) -> Slot | None:
    """The slot whose disk has a block node, None for a node of anything else."""
    controller, _, lun = node[1:].partition(".")[0].partition("-")
    if node[:1] != "d" or not (controller.isdecimal() and lun.isdecimal()):
        return None
    return Slot(int(controller), int(lun))


def _close(files: list[DiskFile]) -> None:
    while files:
        os.close(files.pop().fd)
