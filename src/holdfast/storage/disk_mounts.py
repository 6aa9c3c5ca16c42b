"""Disks that the guest has mounted, each once for all its holders; the returned path is authoritative."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import GuestFailed
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import GUEST_SECONDS, Attachment, Attachments, Disk, DiskKey
from holdfast.storage.counted import Counted
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.sandbox import Sandbox


class MountKey(NamedTuple):
    """What makes two disk mounts the same: the disk, the partition, the filesystem's options."""

    disk: DiskKey
    partition: int
    options: tuple[str, ...]


class DiskMount(msgspec.Struct, frozen=True):
    """A mounted disk and where the guest has it."""

    key: MountKey
    attachment: Attachment
    guest_path: str


class DiskMounts:
    """Attaches and mounts; a failed mount detaches, and unmounting always detaches, counts deciding the rest."""

    def __init__(self, sandbox: Sandbox, attachments: Attachments) -> None:
        self._sandbox = sandbox
        self._attachments = attachments
        self._numbers: set[int] = set()
        self._shared: Counted[MountKey, DiskMount] = Counted(self._unmount)

    async def mount(
        self,
        disk: Disk,
        holder: str,
        *,
        options: tuple[str, ...] = (),
        partition: int = 0,
        filesystem: str = "",
        opened: Callable[[], int] | None = None,
    ) -> DiskMount:
        """Attaches a disk and mounts it at the lowest free ``/run/mounts/scsi/m<n>``, or counts one more holder.

        Raises:
            HoldfastError: what went wrong; nothing of it is left.
        """
        attachment = await self._attachments.attach(disk, holder, opened)
        try:
            # The order in which options are written makes no other mount.
            key = MountKey(attachment.key, partition, tuple(sorted(options)))
            return await self._shared.acquire(key, holder, lambda: self._mount(key, attachment, filesystem))
        except BaseException as error:
            undo = Undo()
            undo.push("detach", lambda: self._attachments.detach(attachment, holder))
            causes = await undo.unwind()
            if causes and hasattr(error, "causes"):
                error.causes += tuple(causes)
            raise

    async def unmount(self, mount: DiskMount, holder: str) -> None:
        """Lets go of a mounted disk; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self._shared.release(mount.key, holder)
        await self._attachments.detach(mount.attachment, holder)

    async def _mount(self, key: MountKey, attachment: Attachment, filesystem: str) -> DiskMount:
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        self._numbers.add(number)
        path = f"/run/mounts/scsi/m{number}"
        slot = attachment.slot
        settings = requests.LCOWMappedVirtualDisk(
            mount_path=path, lun=slot.lun, controller=slot.controller, partition=key.partition,
            read_only=key.disk.read_only, options=key.options, filesystem=filesystem,
        )  # fmt: skip
        try:
            request = requests.GuestRequest("Add", settings)
            answer = await self._sandbox.request("modify", requests.encode(request), GUEST_SECONDS)
        except BaseException:
            self._numbers.discard(number)
            raise
        if not isinstance(answer, dict) or answer.get("path") != path:
            raise GuestFailed("mount disk", subject=attachment.disk.path, why="the guest answered with nonsense")
        return DiskMount(key, attachment, path)

    async def _unmount(self, key: MountKey, mount: DiskMount) -> None:
        slot = mount.attachment.slot
        if not self._sandbox.died.done():
            settings = requests.LCOWMappedVirtualDisk(
                mount_path=mount.guest_path, lun=slot.lun, controller=slot.controller, partition=key.partition,
                read_only=key.disk.read_only,
            )  # fmt: skip
            await self._sandbox.request(
                "modify", requests.encode(requests.GuestRequest("Remove", settings)), GUEST_SECONDS
            )
        self._numbers.discard(int(mount.guest_path.rpartition("m")[2]))

    def path_of(self, attachment: Attachment) -> list[str]:
        """Where the guest has an attachment mounted."""
        return sorted(m.guest_path for _, m, _ in self._shared.items() if m.attachment.key == attachment.key)
