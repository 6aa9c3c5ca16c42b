"""Disks that the guest has mounted, each once for all its holders; the returned path is authoritative."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import GuestFailed, HoldfastError, InUse
from holdfast.mounts import options as mount_options
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import (
    FLUSH_SECONDS,
    GUEST_SECONDS,
    Attachment,
    Attachments,
    Disk,
    DiskKey,
    add_causes,
    while_alive,
)  # fmt: skip
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.fork_policy import check_same
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.sandbox import Sandbox


class MountKey(NamedTuple):
    """What makes two disk mounts the same: the disk, the partition, the filesystem's options.

    With ``block_dev`` it is not mounted at all: there is a link to the device.
    """

    disk: DiskKey
    partition: int
    options: tuple[str, ...]
    block_dev: bool = False


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
        self._paths: dict[str, MountKey] = {}
        self._shared: Counted[MountKey, DiskMount] = Counted(self._unmount)

    async def mount(
        self,
        disk: Disk,
        holder: str,
        *,
        options: tuple[str, ...] = (),
        partition: int = 0,
        filesystem: str = "",
        block_dev: bool = False,
        guest_path: str = "",
        opened: Callable[[], int] | None = None,
    ) -> DiskMount:
        """Attaches a disk and mounts it at the lowest free ``/run/mounts/scsi/m<n>``, or counts one more holder.

        Args:
            block_dev: make a link to the device there instead.
            guest_path: where to; what is mounted already is somewhere else, perhaps, and what is returned counts.

        Raises:
            InUse: ``path-in-use``: the path has another disk; ``disk-in-use``: one of two wants it mounted and the
                other its device, to write to; ``mount-options``: it is mounted with other ones of the filesystem;
                ``fork-policy``: it is attached with another one.
            HoldfastError: what went wrong; nothing of it is left.
        """
        attachment = await self._attachments.attach(disk, holder, opened)
        try:
            check_same(disk, attachment.disk)
            # The order in which options are written makes no other mount.
            key = MountKey(attachment.key, partition, tuple(sorted(options)), block_dev)
            return await self._shared.acquire(key, holder, lambda: self._mount(key, attachment, filesystem, guest_path))
        except BaseException as error:
            # A task of its own: a second cancellation must not stop it half-way.
            add_causes(error, await asyncio.shield(asyncio.ensure_future(self._give_up(attachment, holder))))
            raise

    async def _give_up(self, attachment: Attachment, holder: str) -> list[Exception]:
        await self._shared.settle()  # nobody ejects a disk that the guest is just mounting
        undo = Undo()
        undo.push("detach", lambda: self._attachments.abandon(attachment, holder))
        return await undo.unwind()

    async def unmount(self, mount: DiskMount, holder: str) -> None:
        """Lets go of a mounted disk; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self._shared.release(mount.key, holder)
        await self._attachments.detach(mount.attachment, holder)

    async def retry(self) -> list[Exception]:
        """Lets go of what is left that nobody holds, mounts before the disks under them; see :meth:`Counted.retry`."""
        return [*await self._shared.retry(), *await self._attachments.retry()]

    @property
    def left(self) -> bool:
        """See :attr:`Counted.left`: such a mount keeps the disk busy for whoever holds that."""
        return self._shared.left

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()
        await self._attachments.settle()

    def _take_path(self, key: MountKey, attachment: Attachment, wanted: str) -> str:
        """Reserves the path; nothing else of the pod gets it as long as it is in use."""
        others = [
            other for other in self._paths.values() if other.disk == key.disk and other.block_dev != key.block_dev
        ]
        if not key.disk.read_only and any(
            0 in (other.partition, key.partition) or other.partition == key.partition for other in others
        ):
            raise InUse(
                "mount disk", subject=attachment.disk.path, code="disk-in-use",
                why="it would be mounted and open as a device at the same time",
            )  # fmt: skip
        same = [other for other in self._paths.values() if other.disk == key.disk and other.partition == key.partition]
        if not key.block_dev and any(
            _of_filesystem(other) != _of_filesystem(key) for other in same if not other.block_dev
        ):
            raise InUse(
                "mount disk", subject=attachment.disk.path, code="mount-options",
                why="it is mounted with other options of its filesystem, and the kernel would silently drop these",
                hint="use the same options, or the other's",
            )  # fmt: skip
        if wanted in self._paths:
            raise InUse("mount disk", subject=wanted, why="another disk is there", code="path-in-use")
        numbered = (f"/run/mounts/scsi/m{number}" for number in range(len(self._paths) + 1))
        path = wanted or next(path for path in numbered if path not in self._paths)
        self._paths[path] = key
        return path

    async def _mount(self, key: MountKey, attachment: Attachment, filesystem: str, wanted: str) -> DiskMount:
        path = self._take_path(key, attachment, wanted)
        slot = attachment.slot
        mount = DiskMount(key, attachment, path)
        settings = requests.LCOWMappedVirtualDisk(
            mount_path=path, lun=slot.lun, controller=slot.controller, partition=key.partition,
            read_only=key.disk.read_only, options=key.options, filesystem=filesystem, block_dev=key.block_dev,
            encrypted=attachment.disk.encrypted, ensure_filesystem=attachment.disk.encrypted,
            verity_info=_verity_info(attachment.disk),
        )  # fmt: skip
        try:
            request = requests.GuestRequest("Add", settings)
            answer = await self._sandbox.request("modify", requests.encode(request), GUEST_SECONDS)
            if not isinstance(answer, dict) or answer.get("path") != path:
                raise GuestFailed("mount disk", subject=attachment.disk.path, why="the guest answered with nonsense")
        except BaseException as error:
            if isinstance(error, HoldfastError) and error.code == "path-in-use":  # somebody else's is there, and stays
                self._paths.pop(path, None)
                raise
            if isinstance(error, GuestFailed):  # the guest knows its own name of the disk only
                error.subject = f"{attachment.disk.path} ({error.subject})"
            # It may be mounted all the same: the answer may be what went wrong.
            undo = Undo()
            undo.push("unmount disk", lambda: self._unmount(key, mount))
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes:
                raise HalfMade(error, mount) from error
            raise
        return mount

    async def _unmount(self, key: MountKey, mount: DiskMount) -> None:
        slot = mount.attachment.slot
        settings = requests.LCOWMappedVirtualDisk(
            mount_path=mount.guest_path, lun=slot.lun, controller=slot.controller, partition=key.partition,
            read_only=key.disk.read_only, block_dev=key.block_dev,
        )  # fmt: skip
        request = requests.encode(requests.GuestRequest("Remove", settings))
        seconds = GUEST_SECONDS if key.disk.read_only else FLUSH_SECONDS
        await while_alive(self._sandbox, lambda: self._sandbox.request("modify", request, seconds))
        self._paths.pop(mount.guest_path, None)

    def adopt(self, key: MountKey, guest_path: str, holders: dict[str, int]) -> None:
        """Takes over a mount that the guest has, of a disk that has been adopted."""
        attachment = self._attachments.shared.value(key.disk)
        assert attachment is not None, key
        self._paths[guest_path] = key
        self._shared.adopt(key, DiskMount(key, attachment, guest_path), holders)

    @property
    def shared(self) -> Counted[MountKey, DiskMount]:
        """The mounts by key."""
        return self._shared

    def path_of(self, attachment: Attachment) -> list[str]:
        """Where the guest has an attachment mounted."""
        return sorted(m.guest_path for _, m, _ in self._shared.items() if m.attachment.key == attachment.key)


def _of_filesystem(key: MountKey) -> tuple[int, tuple[str, ...]]:
    """Options that hold for a filesystem wherever it is mounted, not for one mount of it (mount(2))."""
    options = mount_options.parse(key.options)
    return options.flags & mount_options.OF_FILESYSTEM, options.data


def _verity_info(disk: Disk) -> requests.DeviceVerityInfo | None:
    verity = disk.verity
    if verity is None:
        return None
    return requests.DeviceVerityInfo(
        ext4_size_in_bytes=verity.hash_offset_bytes, version=1, algorithm=verity.algorithm, super_block=True,
        root_digest=verity.root_hash, salt=verity.salt, block_size=verity.hash_offset_bytes // verity.data_blocks,
    )  # fmt: skip
