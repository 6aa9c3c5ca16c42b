"""The engine carries out plans, and lets go of what they acquired.

It acquires in the plan's order, remembering each acquisition at once, so that a failure in the middle, or
the container's end, releases all of it in reverse, the layers last.  A release that fails keeps what it
could not let go of; the next try goes on from there.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from holdfast.errors import Exhausted, InUse, InvalidInput, NotFound, Unsupported
from holdfast.spec import guest_requests as requests
from holdfast.storage import scratch as scratch_disks
from holdfast.storage.attachments import (
    FLUSH_SECONDS,
    GUEST_SECONDS,
    Attachment,
    Attachments,
    Disk,
    add_causes,
    while_alive,
)
from holdfast.storage.counted import Counted
from holdfast.storage.disk_mounts import DiskMounts
from holdfast.storage.pci import FunctionKey, Functions, Node
from holdfast.storage.plan import PodSnapshot
from holdfast.storage.pmem import NO_ROOM, TOO_BIG, PmemLayers
from holdfast.storage.pod_volumes import PodVolumes
from holdfast.storage.shares import ShareKey, Shares
from holdfast.storage.steps import (
    AnyStep,
    AssignDevice,
    CombineLayers,
    FillVolume,
    MakeScratch,
    MountDisk,
    MountLayer,
    RunContainer,
    ShareDirectory,
    UseVolume,
)  # fmt: skip
from holdfast.storage.undo import UNDO_SECONDS, Undo, not_released
from holdfast.storage.volume_disks import replay, same_file
from holdfast.storage.volumes import name_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox
    from holdfast.spec.hints import Hint
    from holdfast.storage.journal import Journal

#: Disks attached at once: QEMU takes commands one by one, but guests probe and mount side by side.
_AT_ONCE = 8
_SWEEP_SECONDS = 1.0
#: To let go of what the guest has to write back first, and then unmounts and ejects.
_WRITTEN_SECONDS = FLUSH_SECONDS + UNDO_SECONDS
#: Disks and shares do not depend on each other; QEMU takes 50 ms to let go of a disk, whatever else it does.
_GROUP = "disks and shares"


class Held:
    """What one container, or one attach, holds.

    Attributes:
        paths: id of each step done -> the path that it yielded in the guest.
        nodes: device nodes that came with assigned devices.
        undo, layers: how to let go of all: first of the one, then, though it was acquired side by side, of the other.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.paths: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.undo = Undo()
        self.layers = Undo()
        self.failed = False
        self.work: asyncio.Task[None]
        self.releasing: asyncio.Task[list[Exception]] | None = None


class Engine:
    """The storage of one pod.

    Args:
        data: the data folder, for scratch disks.
        writable_shares: whether the pod may have any.
        pmem: for layers that are to be in persistent memory; without it they get SCSI slots.
        functions: for assigned devices.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        journal: Journal,
        pod: str,
        data: Path,
        *,
        writable_shares: bool = True,
        pmem: PmemLayers | None = None,
        functions: Functions | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._journal = journal
        self._pod = pod
        self._data = data
        self._writable_shares = writable_shares
        self._pmem = pmem
        self._functions = functions
        self.attachments = Attachments(sandbox, journal, pod)
        self.disks = DiskMounts(sandbox, self.attachments)
        self.shares = Shares(sandbox, journal, pod)
        self.volumes = PodVolumes(sandbox)
        #: Which mounts the pod's containers share -> those that have said so.
        self._hints: dict[Hint, set[str]] = {}
        #: Files of scratch disks that containers share, by whether they are encrypted.
        self._scratch: Counted[bool, int] = Counted(_close)
        self._held: dict[str, Held] = {}
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def data(self) -> Path:
        """The data folder."""
        return self._data

    def snapshot(self) -> PodSnapshot:
        """What planning must know of the pod."""
        attached = [((a.key.device, a.key.inode), a, tuple(holders)) for a, holders in self.attachments.items()]
        disks = {identity: not attachment.key.read_only for identity, attachment, _ in attached}
        holders = {identity: names for identity, _, names in attached}
        layers = frozenset((a.disk.path, a.key.verity) for a, _ in self.attachments.items() if a.disk.kind == "layer")
        scratch = frozenset(encrypted for encrypted, _, _ in self._scratch.items())
        return PodSnapshot(
            self.attachments.free, frozenset(self._held), disks, holders, layers, scratch, self._writable_shares,
            tuple(self._hints),
        )  # fmt: skip

    async def prepare(self, holder: str, steps: tuple[AnyStep, ...]) -> Held:
        """Carries out the storage steps of a plan for ``holder``.

        Raises:
            InUse: ``holder`` holds something already.
            HoldfastError: a step failed; everything done before it has been undone, and what could not be is
                among the error's causes.
        """
        earlier = self._held.get(holder)
        if earlier is not None and earlier.failed:
            await self.release(holder)
        if holder in self._held:
            raise InUse("prepare storage", subject=holder, why="it holds some already", code="holder-in-use")
        held = self._held[holder] = Held(holder)
        # A task of its own, so that what it acquires in the moment of a cancellation is released too.
        held.work = asyncio.ensure_future(self._acquire(held, steps))
        try:
            await asyncio.shield(held.work)
        except BaseException as error:
            held.failed = True
            held.work.cancel()
            add_causes(error, await asyncio.shield(self._letting_go(held)))
            raise
        if held.releasing is not None or self._held.get(holder) is not held:
            raise InUse("prepare storage", subject=holder, why="it was released meanwhile", code="released")
        return held

    async def _acquire(self, held: Held, steps: tuple[AnyStep, ...]) -> None:
        await self._sweep()
        side_by_side = MountLayer | MakeScratch | MountDisk | ShareDirectory | UseVolume | AssignDevice
        parallel = [step for step in steps if isinstance(step, side_by_side)]
        await self._all(held, parallel)
        for step in steps:
            if isinstance(step, CombineLayers):
                await self._combine(held, step)
                root, scratch = held.paths[step.id], held.paths.get(step.scratch, "")
            elif isinstance(step, FillVolume):
                await self.volumes.fill(step, self._volume_path(held, step), root, scratch)

    async def _sweep(self) -> None:
        """Tries again to unmake what earlier failures have left, but waits for that only a moment: it may be stuck."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.ensure_future(self._retry())
        await asyncio.wait({self._sweeping}, timeout=_SWEEP_SECONDS)

    async def _retry(self) -> None:
        for shared in (self.disks, self.shares, self._pmem, self._functions):
            if shared is not None:
                await shared.retry()

    async def _all(self, held: Held, steps: list[Any]) -> None:
        """Does independent steps side by side; the first failure is raised when all have come to an end."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(step: AnyStep) -> None:
            async with gate:
                await self._do(held, step)

        tasks = [asyncio.ensure_future(one(step)) for step in steps]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _do(self, held: Held, step: AnyStep) -> None:
        match step:
            case MountLayer():
                if step.pmem and self._pmem is not None and await self._mount_pmem(held, step, self._pmem):
                    return
                disk = Disk(step.path, "layer", read_only=True, verity=step.verity)
                await self._mount_disk(held, step.id, disk, filesystem="erofs")
            case MakeScratch():
                await self._mount_scratch(held, step)
            case MountDisk():
                if step.read_only and name_of(self._data, step.path):
                    await asyncio.to_thread(replay, self._journal.root, step.path)
                disk = Disk(
                    step.path, "disk", step.read_only, step.disk_format, step.block_device, step.device, step.inode,
                    access=step.access,
                )  # fmt: skip
                await self._mount_disk(
                    held, step.id, disk, filesystem=step.filesystem, options=step.options, partition=step.partition,
                    block_dev=step.block_dev,
                )  # fmt: skip
            case ShareDirectory():
                key = ShareKey(step.device, step.inode, step.path, step.read_only, step.recursive, step.cache)
                share = await self.shares.add(key, held.holder, file=step.file)
                seconds = UNDO_SECONDS if step.read_only else _WRITTEN_SECONDS
                held.undo.push(f"share {step.path}", lambda: self.shares.remove(share, held.holder), _GROUP, seconds)
                held.paths[step.id] = share.guest_path
                if step.sub_path:
                    folder = UseVolume(step.id, share.guest_path, "share", (), step.sub_path)
                    await self.volumes.use(folder, self._volume_path(held, folder, group=""))
            case AssignDevice():
                await self._assign(held, step)
            case UseVolume():
                path = self._volume_path(held, step)
                await self.volumes.use(step, path)
            case CombineLayers() | FillVolume() | RunContainer():
                raise AssertionError(step)

    async def _mount_disk(
        self,
        held: Held,
        step_id: str,
        disk: Disk,
        *,
        filesystem: str,
        options: tuple[str, ...] = (),
        partition: int = 0,
        block_dev: bool = False,
        opened: Callable[[], int] | None = None,
    ) -> None:
        mount = await self.disks.mount(
            disk, held.holder, options=options, partition=partition, filesystem=filesystem, block_dev=block_dev,
            opened=opened,
        )  # fmt: skip
        undo = held.layers if disk.kind == "layer" else held.undo
        seconds = UNDO_SECONDS if disk.read_only else _WRITTEN_SECONDS
        undo.push(f"disk {disk.path}", lambda: self.disks.unmount(mount, held.holder), _GROUP, seconds)
        held.paths[step_id] = mount.guest_path

    async def _mount_pmem(self, held: Held, step: MountLayer, pmem: PmemLayers) -> bool:
        """False if there is no room for it."""
        try:
            mount = await pmem.mount(step.path, held.holder, step.verity)
        except Exhausted as error:
            if error.code in (NO_ROOM, TOO_BIG):
                return False
            raise
        held.layers.push(f"layer {step.path}", lambda: pmem.unmount(mount, held.holder), _GROUP)
        held.paths[step.id] = mount.guest_path
        return True

    async def _assign(self, held: Held, step: AssignDevice) -> None:
        functions = self._functions
        if functions is None:
            raise Unsupported(
                "assign device", subject=step.address, why="this pod was started without places for devices",
                code="no-ports", hint="holdfast run --device makes one that has them; so does pod create --pci-ports",
            )  # fmt: skip
        assigned = await functions.assign(FunctionKey(step.address, step.function), held.holder)
        held.undo.push(f"device {step.address}", lambda: functions.release(assigned, held.holder), _GROUP)
        held.nodes += assigned.nodes

    async def _mount_scratch(self, held: Held, step: MakeScratch) -> None:
        owner = f"pod {self._pod}" if step.shared else held.holder
        disk = Disk(f"scratch of {owner}", "scratch", read_only=False, encrypted=step.encrypted)
        if not step.shared:
            fd = await _new_scratch(self._data, step)
            await self._mount_disk(held, step.id, disk, filesystem="ext4", opened=lambda: fd)
            return
        kept = await self._scratch.acquire(step.encrypted, held.holder, lambda: _new_scratch(self._data, step))
        held.undo.push("the pod's scratch", lambda: self._scratch.release(step.encrypted, held.holder), _GROUP)
        await self._mount_disk(held, step.id, disk, filesystem="ext4", opened=lambda: os.dup(kept))
        # The guest makes the folder with the root filesystem, and removes it with that.
        held.paths[step.id] += f"/scratch/{held.holder}"

    def _volume_path(self, held: Held, step: UseVolume | FillVolume, group: str = _GROUP) -> str:
        """Where a volume is to be shown.  Recorded before it is: the guest may have done it without an answer."""
        path = held.paths[step.id] = self.volumes.new_path(step, held.holder)
        held.undo.push(f"volume {step.name}", lambda: self.volumes.release(path), group)
        return path

    async def _combine(self, held: Held, step: CombineLayers) -> None:
        root = f"/run/gcs/c/{held.holder}/rootfs"
        settings = requests.LCOWCombinedLayers(
            container_id=held.holder, container_root_path=root,
            layers=tuple(requests.Layer(path=held.paths[layer]) for layer in step.layers),
            scratch_path=held.paths[step.scratch] if step.scratch else "",
        )  # fmt: skip
        # Before it is done: the guest may have done it even when its answer does not come.
        held.undo.push("root filesystem", lambda: self._uncombine(settings), seconds=_WRITTEN_SECONDS)
        await self._guest("Add", settings)
        held.paths[step.id] = root

    async def _uncombine(self, settings: requests.LCOWCombinedLayers) -> None:
        only_path = requests.LCOWCombinedLayers(
            container_id=settings.container_id, container_root_path=settings.container_root_path
        )
        await while_alive(self._sandbox, lambda: self._guest("Remove", only_path, FLUSH_SECONDS))

    async def _guest(
        self, action: requests.RequestType, settings: requests.Settings, seconds: float = GUEST_SECONDS
    ) -> Any:
        request = requests.encode(requests.GuestRequest(action, settings))
        return await self._sandbox.request("modify", request, seconds)

    def say_hints(self, container: str, hints: tuple[Hint, ...]) -> None:
        """From now on the pod knows these, as long as it lives."""
        for hint in hints:
            self._hints.setdefault(hint, set()).add(container)

    def unsay_hints(self, container: str) -> None:
        """A container that has said some did not start."""
        for hint, said_by in list(self._hints.items()):
            said_by.discard(container)
            if not said_by:
                del self._hints[hint]

    def also_release(self, holder: str, what: str, action: Callable[[], Awaitable[object]]) -> None:
        """Adds something to be released before everything that ``holder`` holds so far."""
        self._held[holder].undo.push(what, action)

    async def grow_scratch(self, holder: str, size_bytes: int) -> int:
        """Makes the scratch disk that ``holder`` writes to larger, meanwhile; returns its size.

        Raises:
            NotFound: it has none.
            InvalidInput: the disk is larger already.
            Unsupported: it is encrypted.
        """
        size_bytes = scratch_disks.whole_blocks(size_bytes)
        disks = [a for a, holders in self.attachments.items() if a.disk.kind == "scratch" and holder in holders]
        if not disks:
            raise NotFound("grow scratch disk", subject=holder, why="it has none", code="no-scratch")
        await self._grow(disks[0], size_bytes, f"scratch disk {holder}")
        return size_bytes

    async def grow_volume(self, path: str, size_bytes: int) -> int:
        """The same for a volume that this pod writes to.

        Args:
            path: of its disk, on the host.

        Raises:
            NotFound: this pod does not, or does not any more.
            InvalidInput: the disk is larger already.
        """
        writable = [a for a, _ in self.attachments.items() if not a.disk.read_only]
        disks = [a for a in writable if same_file(path, a.disk.path) and self.disks.path_of(a)]
        if not disks:
            raise NotFound("grow volume", subject=path, why="the pod does not write to it", code="not-attached")
        await self._grow(disks[0], size_bytes, f"volume {path}")
        return size_bytes

    async def _grow(self, disk: Attachment, size_bytes: int, what: str) -> None:
        if disk.disk.encrypted:
            raise Unsupported(f"grow {what}", why="it is encrypted", code="grow-unsupported")
        if size_bytes < disk.size_bytes:
            why = f"{size_bytes} bytes are less than the {disk.size_bytes} that it has"
            raise InvalidInput(f"grow {what}", why=why, code="scratch-size")
        await self.attachments.grow(disk, size_bytes)
        slot, paths = disk.slot, self.disks.path_of(disk)
        if not paths:  # it has been let go of meanwhile
            raise NotFound(f"grow {what}", why="it is not mounted any more", code="not-attached")
        path = paths[0]
        settings = requests.LCOWMappedVirtualDisk(mount_path=path, lun=slot.lun, controller=slot.controller)
        await self._guest("Update", settings)

    def holds(self, holder: str) -> bool:
        """Whether anything is still held for ``holder``."""
        return holder in self._held

    def held(self) -> list[str]:
        """Everybody who holds something, in the order of their coming."""
        return list(self._held)

    def has_writable(self) -> bool:
        """Whether something outside the pod could lose writes if the machine were simply killed."""
        disks = any(a.disk.kind == "disk" and not a.disk.read_only for a, _ in self.attachments.items())
        return disks or any(not share.key.read_only for share, _ in self.shares.items())

    async def release(self, holder: str) -> None:
        """Lets go of everything that ``holder`` holds, in reverse; what is not held is no error.

        Raises:
            NotReleased: something could not be let go of; it stays held, and the next call tries again.
        """
        held = self._held.get(holder)
        if held is None:
            return
        errors = await asyncio.shield(self._letting_go(held))
        if errors:
            raise not_released("release storage", holder, errors)

    def _letting_go(self, held: Held) -> asyncio.Task[list[Exception]]:
        """Who releases at the same time shares the outcome; who gives up waiting for it does not stop it."""
        if held.releasing is None:
            held.releasing = asyncio.ensure_future(self._let_go(held))
        return held.releasing

    async def _let_go(self, held: Held) -> list[Exception]:
        try:
            await asyncio.wait({held.work})
            if self.disks.left and not held.failed:
                await self._sweep()
            errors = [*await held.undo.unwind(), *await held.layers.unwind()]
            if held.failed:  # what was given up while it was made
                await self._scratch.settle()
                await self.disks.settle()
                await self.shares.settle()
                for other in (self._pmem, self._functions):
                    if other is not None:
                        await other.settle()
        finally:
            held.releasing = None
        if held.undo.empty and held.layers.empty:
            del self._held[held.holder]
        return errors

    def describe(self) -> dict[str, Any]:
        """Everything the pod holds: attachments by slot, shares by number; for ``holdfast storage``."""
        attachments = [
            {
                "slot": str(a.slot),
                "file": a.disk.path,
                "kind": a.disk.kind,
                "format": a.disk.disk_format,
                "read_only": a.disk.read_only,
                "access": a.access,
                "size_bytes": a.size_bytes,
                "holders": holders,
                "guest_paths": self.disks.path_of(a),
                "volume": name_of(self._data, a.disk.path),
            }
            for a, holders in self.attachments.items()
        ]
        shares = [
            {
                "share": s.number,
                "path": s.key.path,
                "kind": "file" if s.file else "directory",
                "read_only": s.key.read_only,
                "cache": s.key.cache,
                "holders": holders,
                "guest_path": s.guest_path,
            }
            for s, holders in self.shares.items()
        ]
        pmem = self._pmem.describe() if self._pmem is not None else []
        devices = self._functions.describe() if self._functions is not None else []
        return {
            "pod": self._pod, "attachments": attachments, "pmem": pmem, "shares": shares, "devices": devices,
            "volumes": self.volumes.describe(),
            "free_slots": self.attachments.free,
        }  # fmt: skip


async def _new_scratch(data: Path, step: MakeScratch) -> int:
    """Makes a scratch disk in a thread; the caller owns the descriptor, and nobody does if it is not there any more."""
    make = scratch_disks.blank if step.encrypted else scratch_disks.formatted
    made = asyncio.ensure_future(asyncio.to_thread(make, data, step.size_bytes))
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(_close_result)
        raise


async def _close(_encrypted: bool, fd: int) -> None:
    os.close(fd)


def _close_result(made: asyncio.Task[int]) -> None:
    if not made.cancelled() and made.exception() is None:
        os.close(made.result())
