"""Read-only layers on persistent memory, several packed into one device.

QEMU can neither map a file into a part of a device nor take a device out again.  So a device shows an unnamed, sparse
file; a layer is copied into a free place of it (cloned, where the filesystem shares blocks), mapped from there by the
guest, and punched out when nobody uses it any more.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from holdfast.errors import Exhausted, GuestFailed, InvalidInput, NotFound
from holdfast.image.records import Verity  # noqa: TC001  msgspec reads the type
from holdfast.linux import syscalls
from holdfast.machine import ports
from holdfast.spec import guest_requests as requests
from holdfast.spec.pmem import PAGE, PmemLimits, check_limits
from holdfast.storage.attachments import GUEST_SECONDS, add_causes, while_alive
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal

#: A guest's kernel sets aside RAM for every page of a device, so the first is small, and each next twice as large.
FIRST_BYTES = 256 << 20
#: What a device's size is a multiple of, whatever of it may be used.
_GRANULE = 16 << 20
MOST_MAPPINGS = 1024
#: Codes of the errors that mean "not here": a SCSI slot is taken then.  All others are errors.
NO_ROOM, TOO_BIG = "pmem-no-room", "pmem-too-big"
_FICLONERANGE = 0x4020940D
_PUNCH_HOLE, _KEEP_SIZE = 2, 1


class Pool:
    """Whole pages of a range that begins at 0, given out from the lowest free place on."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes // PAGE * PAGE
        self._taken: list[tuple[int, int]] = []

    def allocate(self, size_bytes: int) -> int | None:
        """A place for so much, rounded up to pages; None if there is none."""
        size = whole_pages(size_bytes)
        start = 0
        for offset, taken in [*self._taken, (self.size_bytes, 0)]:
            if offset - start >= size:
                bisect.insort(self._taken, (start, size))
                return start
            start = offset + taken
        return None

    def free(self, offset: int) -> None:
        """Gives a place back."""
        self._taken.remove(next(place for place in self._taken if place[0] == offset))

    @property
    def taken(self) -> list[tuple[int, int]]:
        """(offset, size) of what has been given out, by offset."""
        return list(self._taken)


def whole_pages(size_bytes: int) -> int:
    """``size_bytes`` rounded up; nothing has one page, too."""
    return max(1, -(-size_bytes // PAGE)) * PAGE


class PmemKey(NamedTuple):
    """What makes two layers the same: the file, and what it is checked by."""

    device: int
    inode: int
    verity: str = ""


class PmemMount(msgspec.Struct, frozen=True):
    """A layer on a device, mounted.

    Attributes:
        number, offset, size_bytes: the device, and the place in it.
        row: in the journal.
        dax: whether the guest maps files from the device, without a copy of its own.
    """

    key: PmemKey
    path: str
    number: int
    offset: int
    size_bytes: int
    guest_path: str
    row: int
    dax: bool = False


class Device:
    """A device and its file; ``used_bytes`` is how far up anything has ever been in it."""

    def __init__(self, number: int, fd: int, size_bytes: int) -> None:
        self.number = number
        self.fd = fd
        self.pool = Pool(size_bytes)
        self.used_bytes = 0


class PmemMachine(Protocol):
    """What is asked of a machine besides what every sandbox does."""

    async def plug_pmem(self, number: int, fd: int, size_bytes: int) -> None:
        """Plugs in a device, for good."""


class PmemLayers:
    """The persistent memory of one pod.  Owns its files.

    Args:
        data: where the files are made: on the filesystem of the layers.
        room_bytes: how much all devices may have together.
        stale_code: the machine does not see that code in its memory was changed by the host, which is so when it is
            emulated: QEMU goes on executing what it has translated.  A place that was used before is then mounted
            without DAX.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        machine: PmemMachine,
        journal: Journal,
        pod: str,
        data: Path,
        limits: PmemLimits,
        *,
        room_bytes: int,
        stale_code: bool,
    ) -> None:
        check_limits(limits)
        self._sandbox = sandbox
        self._machine = machine
        self._journal = journal
        self._pod = pod
        self._folder = data / "layers"
        self._limits = limits
        self._room_bytes = room_bytes
        self._stale_code = stale_code
        self._devices: list[Device] = []
        self._numbers = 0
        self._plugging = asyncio.Lock()
        self._shared: Counted[PmemKey, PmemMount] = Counted(self._unmake)

    async def mount(self, path: str, holder: str, verity: Verity | None = None) -> PmemMount:
        """Puts a layer into persistent memory and mounts it, or counts one more holder.

        Raises:
            Exhausted: ``pmem-no-room`` or ``pmem-too-big``: it is to go elsewhere.
            HoldfastError: what went wrong; nothing of it is left.
        """
        fd = _open(path)
        try:
            status = os.fstat(fd)
            key = PmemKey(status.st_dev, status.st_ino, verity.root_hash if verity else "")
            return await self._shared.acquire(key, holder, lambda: self._make(key, path, os.dup(fd), verity))
        finally:
            os.close(fd)

    async def unmount(self, mount: PmemMount, holder: str) -> None:
        """Lets go of a layer; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self._shared.release(mount.key, holder)

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _make(self, key: PmemKey, path: str, fd: int, verity: Verity | None) -> PmemMount:
        try:
            size = whole_pages(os.fstat(fd).st_size)
            device, offset = await self._place(path, size)
            fresh = offset >= device.used_bytes
            device.used_bytes = max(device.used_bytes, offset + size)
            row = -1
            try:
                detail = {"device": device.number, "offset": offset, "size_bytes": size}
                row = self._journal.intend(self._pod, "pmem", path, detail)
                # In a task of its own: nobody may free the place while a thread writes to it.
                copying = asyncio.ensure_future(asyncio.to_thread(copy_into, fd, device.fd, offset))
                try:
                    await asyncio.shield(copying)
                except asyncio.CancelledError:
                    await asyncio.wait({copying})
                    raise
            except BaseException:
                self._give_back(device, offset, size, row)
                raise
        finally:
            os.close(fd)
        guest_path = f"/run/layers/p{device.number}-{offset}-{size}"
        mount = PmemMount(key, path, device.number, offset, size, guest_path, row)
        try:
            dax = await self._mount_in_guest(mount, verity, no_dax=self._stale_code and not fresh)
        except BaseException as error:
            undo = Undo()  # it may be mounted all the same: the answer may be what went wrong
            undo.push("unmount layer", lambda: self._unmake(key, mount))
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes:
                raise HalfMade(error, mount) from error
            raise
        self._journal.hold(row)
        return msgspec.structs.replace(mount, dax=dax)

    async def _mount_in_guest(self, mount: PmemMount, verity: Verity | None, *, no_dax: bool) -> bool:
        mapping = requests.LCOWVPMemMappingInfo(mount.offset, mount.size_bytes)
        settings = requests.LCOWMappedVPMemDevice(mount.number, mount.guest_path, mapping, _verity_info(verity), no_dax)
        request = requests.encode(requests.GuestRequest("Add", settings))
        answer = await self._sandbox.request("modify", request, GUEST_SECONDS)
        if not isinstance(answer, dict) or answer.get("path") != mount.guest_path:
            raise GuestFailed("mount layer", subject=mount.path, why="the guest answered with nonsense")
        return answer.get("dax") is True

    async def _unmake(self, _key: PmemKey, mount: PmemMount) -> None:
        """Guest first, then host; may be asked for again."""
        self._journal.releasing(mount.row)
        mapping = requests.LCOWVPMemMappingInfo(mount.offset, mount.size_bytes)
        settings = requests.LCOWMappedVPMemDevice(mount.number, mount.guest_path, mapping)
        request = requests.encode(requests.GuestRequest("Remove", settings))
        await while_alive(self._sandbox, lambda: self._sandbox.request("modify", request, GUEST_SECONDS))
        device = next(device for device in self._devices if device.number == mount.number)
        self._give_back(device, mount.offset, mount.size_bytes, mount.row)

    def _give_back(self, device: Device, offset: int, size: int, row: int) -> None:
        syscalls.fallocate(device.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)
        device.pool.free(offset)
        if row >= 0:
            self._journal.release(row)

    # -- devices ------------------------------------------------------------------------------

    async def _place(self, path: str, size: int) -> tuple[Device, int]:
        """A free place in the first device that has one; a new device if none has."""
        async with self._plugging:
            for device in self._devices:
                if len(device.pool.taken) < MOST_MAPPINGS:
                    offset = device.pool.allocate(size)
                    if offset is not None:
                        return device, offset
            device = await self._new_device(path, size)
            offset = device.pool.allocate(size)
            assert offset is not None
            return device, offset

    async def _new_device(self, path: str, size: int) -> Device:
        number = self._numbers
        room = self._room_bytes - sum(_backing(device.pool.size_bytes) for device in self._devices)
        usable = min(self._limits.size_bytes, max(FIRST_BYTES << min(number, 32), 1 << (size - 1).bit_length()))
        usable = min(usable, max(room, 0) // _GRANULE * _GRANULE)
        if self._limits.count and size > self._limits.size_bytes:
            raise Exhausted(
                "place layer", subject=path, why=f"a device has at most {self._limits.size_bytes} bytes", code=TOO_BIG
            )
        if number >= min(self._limits.count, ports.BRIDGES * ports.PLACES) or size > usable:
            raise Exhausted("place layer", subject=path, why="no room in persistent memory", code=NO_ROOM)
        fd = _unnamed(self._folder)
        self._numbers += 1  # whatever comes: what QEMU may have taken, it does not give back
        try:
            os.ftruncate(fd, _backing(usable))
            read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                await self._machine.plug_pmem(number, read_only, _backing(usable))
            finally:
                os.close(read_only)
        except BaseException:
            os.close(fd)
            raise
        device = Device(number, fd, usable)
        self._devices.append(device)
        return device

    def close(self) -> None:
        """Closes the files, when the machine is gone; a second call does nothing."""
        while self._devices:
            os.close(self._devices.pop().fd)

    def items(self) -> list[tuple[PmemMount, list[str]]]:
        """Every layer with its holders, by place."""
        found = [(mount, holders) for _, mount, holders in self._shared.items()]
        return sorted(found, key=lambda item: (item[0].number, item[0].offset))

    def describe(self) -> list[dict[str, Any]]:
        """For ``holdfast storage``."""
        return [
            {
                "device": mount.number,
                "offset": mount.offset,
                "size_bytes": mount.size_bytes,
                "file": mount.path,
                "dax": mount.dax,
                "holders": holders,
                "guest_path": mount.guest_path,
            }
            for mount, holders in self.items()
        ]


def _verity_info(verity: Verity | None) -> requests.DeviceVerityInfo | None:
    if verity is None:
        return None
    return requests.DeviceVerityInfo(
        ext4_size_in_bytes=verity.hash_offset_bytes, version=1, algorithm=verity.algorithm, super_block=True,
        root_digest=verity.root_hash, salt=verity.salt, block_size=verity.hash_offset_bytes // verity.data_blocks,
    )  # fmt: skip


def _backing(usable_bytes: int) -> int:
    return -(-usable_bytes // _GRANULE) * _GRANULE


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound("open layer", subject=path, why=error, code="source-not-found") from None
    except OSError as error:
        raise InvalidInput("open layer", subject=path, why=error, code="source-unreadable") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput("open layer", subject=path, why="it is no file", code="source-changed")
    return fd


def _unnamed(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def copy_into(source: int, target: int, offset: int) -> None:
    """Copies all of a file to an offset of another: by sharing its blocks, in the kernel, or by hand.

    Raises:
        Exhausted: the host's disk is full.
    """
    size = os.fstat(source).st_size
    try:
        try:
            fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, 0, 0, offset))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                raise
        done = 0
        while done < size:
            try:
                count = os.copy_file_range(source, target, size - done, done, offset + done)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                count = os.pwrite(target, os.pread(source, 1 << 20, done), offset + done)
            if not count:
                raise OSError(errno.EIO, "the layer became shorter")
            done += count
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Exhausted("copy layer", why=error, code="disk-full") from None
        raise
