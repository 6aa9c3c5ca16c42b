"""Disks in slots.

An attachment is a disk in a SCSI slot.  Its identity is the file behind the path (device and inode),
whether it is read-only, and its format: links and ``..`` do not make a second one.  A slot is taken
before anything is done and free again only when the device is gone.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from holdfast.errors import Exhausted, HoldfastError, InUse, InvalidInput, NotFound
from holdfast.image.records import Verity  # noqa: TC001  msgspec reads the type
from holdfast.machine.sandbox import CONTROLLERS, LUNS, Slot
from holdfast.spec import guest_requests as requests
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.disk_formats import identity
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal

GUEST_SECONDS = 20.0
#: For what the guest has to write back first: all of its memory may be waiting for a slow disk.
FLUSH_SECONDS = 600.0


class DiskKey(NamedTuple):
    """What makes two disks the same attachment."""

    device: int
    inode: int
    read_only: bool
    disk_format: str
    verity: str = ""
    #: Two levels of access are two attachments: for one of them there is a lease.
    level: str = ""


class Disk(msgspec.Struct, frozen=True):
    """A disk to attach.

    Attributes:
        path: on the host; only a name when ``open`` makes the file itself.
        kind: ``layer``, ``scratch`` or ``disk``: what it is for.  The host-wide rule of one writer is kept by a lease
            for a ``disk``; the others are Holdfast's own.
        device, inode: what was seen behind the path; 0 when nothing was looked at.
        verity: what the guest is to check it by.  Such a disk is another attachment than the same one unchecked.
        encrypted: a blank disk that the guest encrypts and formats before it mounts it.
        access: see :attr:`level`; empty for what follows from ``kind`` and ``read_only``.
        fork: what becomes of it when the pod is copied: see :data:`~holdfast.spec.disk_options.FORK`; empty for what is
            safe.
    """

    path: str
    kind: str
    read_only: bool
    disk_format: str = "raw"
    block_device: bool = False
    device: int = 0
    inode: int = 0
    verity: Verity | None = None
    encrypted: bool = False
    access: str = ""
    fork: str = ""

    @property
    def level(self) -> str:
        """Who may have the disk open: the three levels of utility VMs.

        ``none``: nobody is asked, for nobody ever writes to it (layers).  ``group``: any number of pods, read-only.
        ``individual``: this pod alone.  Nothing is granted on the file itself, and so nothing has to be taken back:
        QEMU gets an open descriptor, and the level is what is checked, by a lease, before that is made.
        """
        derived = "none" if self.kind == "layer" else "group" if self.read_only else "individual"
        return self.access or derived

    @property
    def in_copies(self) -> str:
        """What becomes of it when the pod is copied."""
        if self.read_only and self.fork != "deny":
            return "share"
        return self.fork or "copy"

    def open(self) -> int:
        """Opens the file; the caller owns the descriptor.

        Raises:
            NotFound: it is gone.
            InvalidInput: it is not what was seen when the plan was made, or no disk.
        """
        if self.level != "individual" and not self.read_only:
            why = f"access {self.level!r} is for reading only"
            raise InvalidInput("open disk", subject=self.path, why=why, code="access")
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        try:
            fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFound("open disk", subject=self.path, why=error, code="source-not-found") from None
        except OSError as error:
            raise InvalidInput("open disk", subject=self.path, why=error, code="source-unreadable") from None
        status = os.fstat(fd)
        changed = self.inode and identity(status) != (self.device, self.inode)
        disk = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
        if changed or not disk:
            os.close(fd)
            why = "another file is there now" if changed else "it is neither a file nor a block device"
            raise InvalidInput("open disk", subject=self.path, why=why, code="source-changed")
        return fd


class Attachment(msgspec.Struct, frozen=True):
    """A disk in a slot.  ``row`` is its line in the journal; ``access`` is the disk's :attr:`Disk.level`."""

    disk: Disk
    key: DiskKey
    slot: Slot
    size_bytes: int
    row: int
    leased: bool
    access: str


class Attachments:
    """The slots of one pod."""

    def __init__(self, sandbox: Sandbox, journal: Journal, pod: str, reserved: tuple[Slot, ...] = ()) -> None:
        self._sandbox = sandbox
        self._journal = journal
        self._pod = pod
        self._taken: set[Slot] = set(reserved)
        #: (device, inode, alone) -> the journal's rows of the attachments that a lease is for.
        self._leases: dict[tuple[int, int, bool], set[int]] = {}
        self._shared: Counted[DiskKey, Attachment] = Counted(self._detach)

    async def attach(self, disk: Disk, holder: str, opened: Callable[[], int] | None = None) -> Attachment:
        """Puts a disk into a slot, or counts one more holder of it.

        Args:
            opened: yields an open descriptor, which is then owned here, of a file that has no path of its own.

        Raises:
            Exhausted: no slot is free.
            InUse: the disk is open elsewhere in a way that does not go together.
        """
        fd = opened() if opened is not None else disk.open()
        try:
            status = os.fstat(fd)
            root_hash = disk.verity.root_hash if disk.verity else ""
            key = DiskKey(*identity(status), disk.read_only, disk.disk_format, root_hash, disk.level)
            return await self._shared.acquire(key, holder, lambda: self._attach(disk, key, os.dup(fd)))
        finally:
            os.close(fd)

    async def detach(self, attachment: Attachment, holder: str) -> None:
        """Lets go of a disk; the last holder unplugs it.  Can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps the disk busy, or did not let go of it in time.
        """
        await self._shared.release(attachment.key, holder)

    async def abandon(self, attachment: Attachment, holder: str) -> None:
        """As :meth:`detach`, for a holder that will not try again; what is left then is for :meth:`retry`.

        Raises:
            NotReleased: see :meth:`detach`.
        """
        await self._shared.abandon(attachment.key, holder)

    async def grow(self, attachment: Attachment, size_bytes: int) -> None:
        """Makes a disk of Holdfast's own larger; the guest is not told."""
        await self._sandbox.resize_disk(attachment.slot, size_bytes)
        if self._shared.value(attachment.key) is None:  # it has been let go of meanwhile
            return
        self._shared.replace(attachment.key, msgspec.structs.replace(attachment, size_bytes=size_bytes))

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _attach(self, disk: Disk, key: DiskKey, fd: int) -> Attachment:
        undo = Undo()
        attachment = None
        try:
            slot = self._free_slot(disk)
            self._taken.add(slot)
            undo.push("free slot", lambda: self._taken.discard(slot))
            size = os.lseek(fd, 0, os.SEEK_END)
            row = self._journal.intend(self._pod, "attachment", disk.path, _detail(disk, slot))
            undo.push("journal", lambda: self._journal.release(row))
            leased = disk.kind == "disk"
            if leased:
                alone = disk.level == "individual"
                self._journal.lease(self._pod, key.device, key.inode, disk.path, writable=alone)
                self._leases.setdefault((key.device, key.inode, alone), set()).add(row)
                undo.push("end lease", lambda: self._end_lease(key, row))
                _check_still_there(disk, key)
                if disk.block_device and alone:
                    fd = _claim(disk, fd)
            attachment = made = Attachment(disk, key, slot, size, row, leased, disk.level)
            # From here on nothing is given back before the device is gone, so undoing is one act, not a list of them.
            undo.forget()
            undo.push("unplug disk", lambda: self._take_out(made))
            await self._sandbox.plug_disk(slot, fd, disk.disk_format, disk.read_only, disk.block_device)
            self._journal.hold(row)
        except BaseException as error:
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes and attachment is not None:
                raise HalfMade(error, attachment) from error
            raise
        finally:
            os.close(fd)
        return attachment

    async def _detach(self, _key: DiskKey, attachment: Attachment) -> None:
        """Guest first, then host; every step may be asked for again."""
        slot = attachment.slot
        self._journal.releasing(attachment.row)
        eject = requests.encode(requests.GuestRequest("Remove", requests.SCSIDevice(slot.controller, slot.lun)))
        await while_alive(self._sandbox, lambda: self._sandbox.request("modify", eject, GUEST_SECONDS))
        await self._take_out(attachment)

    async def _take_out(self, attachment: Attachment) -> None:
        """The host's half of a detach."""
        await while_alive(self._sandbox, lambda: self._sandbox.unplug_disk(attachment.slot))
        if attachment.leased:
            self._end_lease(attachment.key, attachment.row)
        self._taken.discard(attachment.slot)
        self._journal.release(attachment.row)

    def _end_lease(self, key: DiskKey, row: int) -> None:
        """Ends it with the last attachment that needs it, made or in the making: one file in two formats is two."""
        lease = (key.device, key.inode, key.level == "individual")
        rows = self._leases.get(lease, set())
        rows.discard(row)
        if not rows:
            self._journal.end_lease(self._pod, key.device, key.inode, writable=lease[2])
            self._leases.pop(lease, None)

    # -- copies of the pod --------------------------------------------------------------------

    async def adopt(self, attachment: Attachment, holders: dict[str, int], plug: Callable[[], Awaitable[None]]) -> None:
        """Takes over a disk that the machine, which does not run yet, is to have: recorded, leased, and plugged in.

        Args:
            attachment: as another pod had it; with another line in the journal it is ours.
            holders: who has it, and how often.

        Raises:
            InUse: another pod writes to it.
        """
        disk, key, slot = attachment.disk, attachment.key, attachment.slot
        row = self._journal.intend(self._pod, "attachment", disk.path, _detail(disk, slot))
        self._taken.add(slot)
        if attachment.leased:
            self._journal.lease(self._pod, key.device, key.inode, disk.path, writable=not disk.read_only)
            self._leases.setdefault((key.device, key.inode, not disk.read_only), set()).add(row)
        await plug()
        self._journal.hold(row)
        self._shared.adopt(key, msgspec.structs.replace(attachment, row=row), holders)

    @property
    def shared(self) -> Counted[DiskKey, Attachment]:
        """The attachments by key."""
        return self._shared

    def _free_slot(self, disk: Disk) -> Slot:
        for controller in range(CONTROLLERS):
            for lun in range(LUNS):
                slot = Slot(controller, lun)
                if slot not in self._taken:
                    return slot
        raise Exhausted(
            "attach disk", subject=disk.path, why=f"all {CONTROLLERS * LUNS} SCSI slots are taken", code="no-free-slot",
            hint="detach something, or use another pod",
        )  # fmt: skip

    @property
    def free(self) -> int:
        """Slots left."""
        return CONTROLLERS * LUNS - len(self._taken)

    def items(self) -> list[tuple[Attachment, list[str]]]:
        """Every attachment with its holders, by slot."""
        found = [(attachment, holders) for _, attachment, holders in self._shared.items()]
        return sorted(found, key=lambda item: item[0].slot)


def _detail(disk: Disk, slot: Slot) -> dict[str, Any]:
    return {
        "slot": str(slot), "read_only": disk.read_only, "kind": disk.kind, "format": disk.disk_format,
        "access": disk.level,
    }  # fmt: skip


def _claim(disk: Disk, fd: int) -> int:
    """Opens a block device once more, as its only user, and closes ``fd``.

    The claim (open(2), O_EXCL) lasts as long as any copy of the descriptor: neither can the host mount the device
    then, nor does a partition of it go to one pod and the whole to another, of which leases know nothing.

    Raises:
        InUse: somebody has it, or a part of it, or what it is a part of.
    """
    flags = os.O_RDONLY if disk.read_only else os.O_RDWR
    try:
        claimed = os.open(f"/proc/self/fd/{fd}", flags | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InUse(
            "open disk", subject=disk.path, why="the host, or another pod, uses it, a part of it, or what it is in",
            code="disk-in-use", hint="unmount it, or end that pod first",
        ) from None  # fmt: skip
    os.close(fd)
    return claimed


def _check_still_there(disk: Disk, key: DiskKey) -> None:
    """A volume may have been removed, rightly, after it was opened and before the lease on it was taken."""
    try:
        found = identity(os.stat(disk.path))
    except OSError as error:
        raise NotFound("open disk", subject=disk.path, why=error, code="source-not-found") from None
    if found != (key.device, key.inode):
        raise InvalidInput("open disk", subject=disk.path, why="another file is there now", code="source-changed")


async def while_alive(sandbox: Sandbox, action: Callable[[], Awaitable[object]]) -> None:
    """Asks a machine to let go of something; one that has died, even meanwhile, has let go of everything."""
    if sandbox.died.done():
        return
    try:
        await action()
    except Exception:
        if not sandbox.died.done():
            raise


def add_causes(error: BaseException, causes: list[Exception]) -> None:
    """What could not be undone is reported with what made the undoing necessary."""
    if causes and isinstance(error, HoldfastError):
        error.also(*causes)
