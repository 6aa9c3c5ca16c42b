"""Acquiring what a plan says, step by step, for one holder.

Each acquisition is remembered at once (``Engine.keep``), so that whatever fails later, it is let go of.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from holdfast import trace
from holdfast.errors import Exhausted, Unsupported
from holdfast.spec import guest_requests as requests
from holdfast.storage import scratch as scratch_disks
from holdfast.storage.attachments import Disk
from holdfast.storage.export import ShareKey
from holdfast.storage.held import (
    SIDE_BY_SIDE,
    WRITTEN_SECONDS,
    KeptDisk,
    KeptRoot,
    KeptScratch,
    KeptShares,
    KeptVolume,
)  # fmt: skip
from holdfast.storage.pci import FunctionKey
from holdfast.storage.pmem import NO_ROOM, TOO_BIG
from holdfast.storage.steps import (
    AnyStep,
    AssignDevice,
    CombineLayers,
    FillVolume,
    MakeMountPoints,
    MakeScratch,
    MountDisk,
    MountLayer,
    OverlayMount,
    RunContainer,
    ShareDirectory,
    UseVolume,
)  # fmt: skip
from holdfast.storage.undo import UNDO_SECONDS
from holdfast.storage.volume_disks import replay
from holdfast.storage.volumes import name_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.storage.engine import Engine
    from holdfast.storage.held import Held
    from holdfast.storage.pmem import PmemLayers

#: Disks attached at once: QEMU takes commands one by one, but guests probe and mount side by side.
_AT_ONCE = 8
#: Undone before the shares that they are in.
_FOLDERS = "folders of shares"
#: Of a scratch disk's mount: the kernel need not write, behind the container's back, all the inode tables that making
#: the filesystem has left out (ext4(5)): the disk is gone before they are needed.
_SCRATCH = ("noinit_itable",)


class Acquisition:
    """One holder's, under way."""

    def __init__(self, engine: Engine, held: Held) -> None:
        self._engine = engine
        self._held = held

    async def acquire(self, steps: tuple[AnyStep, ...]) -> None:
        """Does the steps: independent ones side by side, then in order the root filesystem's and what lies on it."""
        side_by_side = MountLayer | MakeScratch | MountDisk | UseVolume | AssignDevice
        parallel: list[Any] = [step for step in steps if isinstance(step, side_by_side)]
        shares = tuple(step for step in steps if isinstance(step, ShareDirectory))
        await self._all([*parallel, shares] if shares else parallel)
        trace.mark("disks and shares")
        for step in steps:
            if isinstance(step, CombineLayers):
                await self._combine(step)
                root, scratch = self._held.paths[step.id], self._held.paths.get(step.scratch, "")
            elif isinstance(step, FillVolume):
                await self._engine.volumes.fill(step, self._volume_path(step), root, scratch)
            elif isinstance(step, OverlayMount):
                below = self._held.paths[step.below]
                path = self._volume_path(step, group="", seconds=WRITTEN_SECONDS, below=below)
                await self._engine.volumes.cover(path, below, self._held.paths.get(step.scratch, ""))
            elif isinstance(step, MakeMountPoints):
                await self._make_mount_points(step)

    async def _all(self, steps: list[Any]) -> None:
        """Does independent steps side by side; the first failure is raised when all have come to an end."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(step: AnyStep) -> None:
            async with gate:
                await self._do(step)

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

    async def _do(self, step: AnyStep | tuple[ShareDirectory, ...]) -> None:
        match step:
            case tuple():
                await self._share(step)
            case MountLayer():
                if step.pmem and self._engine.pmem is not None and await self._mount_pmem(step, self._engine.pmem):
                    return
                disk = Disk(step.path, "layer", read_only=True, verity=step.verity)
                await self._mount_disk(step.id, disk, filesystem="erofs")
            case MakeScratch():
                await self._mount_scratch(step)
            case MountDisk():
                if step.read_only and name_of(self._engine.data, step.path):
                    await asyncio.to_thread(replay, self._engine.journal.root, step.path)
                disk = Disk(
                    step.path, "disk", step.read_only, step.disk_format, step.block_device, step.device, step.inode,
                    access=step.access, fork=step.fork,
                )  # fmt: skip
                await self._mount_disk(
                    step.id, disk, filesystem=step.filesystem, options=step.options, partition=step.partition,
                    block_dev=step.block_dev,
                )  # fmt: skip
            case AssignDevice():
                await self._assign(step)
            case UseVolume(kind="disk"):
                self._held.undo.push(f"disk of volume {step.name}", lambda: self._drop_unused(step))
                path = self._volume_path(step)
                await self._engine.volumes.use(step, path, await self._volume_disk(step))
            case UseVolume():
                path = self._volume_path(step, _FOLDERS if step.kind == "share" else SIDE_BY_SIDE)
                await self._engine.volumes.use(step, path)
            case CombineLayers() | FillVolume() | OverlayMount() | MakeMountPoints() | RunContainer():
                raise AssertionError(step)

    async def _share(self, steps: tuple[ShareDirectory, ...]) -> None:
        """Shows directories and files of the host, all by one request, and then the folders that are wanted of them."""
        keys = [(ShareKey(s.device, s.inode, s.path, s.read_only, s.recursive, s.cache, s.fork), s.file) for s in steps]
        shares = await self._engine.shares.add_all(keys, self._held.holder)
        self._engine.keep(self._held, KeptShares(tuple(share.number for share in shares)))
        self._held.paths |= {step.id: share.guest_path for step, share in zip(steps, shares, strict=True)}
        folders = [(step.id, self._held.paths[step.id], step.sub_path) for step in steps if step.sub_path]
        await self._all([UseVolume(id, path, "share", (), below) for id, path, below in folders])

    async def _mount_disk(
        self,
        step_id: str,
        disk: Disk,
        *,
        filesystem: str,
        options: tuple[str, ...] = (),
        partition: int = 0,
        block_dev: bool = False,
        opened: Callable[[], int] | None = None,
    ) -> None:
        mount = await self._engine.disks.mount(
            disk, self._held.holder, options=options, partition=partition, filesystem=filesystem, block_dev=block_dev,
            opened=opened,
        )  # fmt: skip
        self._engine.keep(self._held, KeptDisk(mount.key, disk.kind == "layer"))
        self._held.paths[step_id] = mount.guest_path

    async def _mount_pmem(self, step: MountLayer, pmem: PmemLayers) -> bool:
        """False if there is no room for it."""
        try:
            mount = await pmem.mount(step.path, self._held.holder, step.verity)
        except Exhausted as error:
            if error.code in (NO_ROOM, TOO_BIG):
                return False
            raise
        self._held.layers.push(f"layer {step.path}", lambda: pmem.unmount(mount, self._held.holder), SIDE_BY_SIDE)
        self._held.paths[step.id] = mount.guest_path
        return True

    async def _assign(self, step: AssignDevice) -> None:
        functions = self._engine.functions
        if functions is None:
            raise Unsupported(
                "assign device", subject=step.address, why="this pod was started without places for devices",
                code="no-ports", hint="holdfast run --device makes one that has them; so does pod create --pci-ports",
            )  # fmt: skip
        assigned = await functions.assign(FunctionKey(step.address, step.function), self._held.holder)
        holder = self._held.holder
        self._held.undo.push(f"device {step.address}", lambda: functions.release(assigned, holder), SIDE_BY_SIDE)
        self._held.nodes += assigned.nodes

    async def _mount_scratch(self, step: MakeScratch) -> None:
        owner = f"pod {self._engine.pod}" if step.shared else self._held.holder
        disk = Disk(f"scratch of {owner}", "scratch", read_only=False, encrypted=step.encrypted)
        if not step.shared:
            fd = await _new_scratch(self._engine.data, step)
            await self._mount_disk(step.id, disk, filesystem="ext4", options=_SCRATCH, opened=lambda: fd)
            return
        data, scratch = self._engine.data, self._engine.scratch
        kept = await scratch.acquire(step.encrypted, self._held.holder, lambda: _new_scratch(data, step))
        self._engine.keep(self._held, KeptScratch(step.encrypted))
        await self._mount_disk(step.id, disk, filesystem="ext4", options=_SCRATCH, opened=lambda: os.dup(kept))
        # The guest makes the folder with the root filesystem, and removes it with that.
        self._held.paths[step.id] += f"/scratch/{self._held.holder}"

    async def _volume_disk(self, step: UseVolume) -> str:
        """Where the disk of a volume is mounted that is kept on one: made for its first user, lives as the pod does."""
        async with self._engine.making_disk:
            held = self._engine.held_by(_disk_holder(step))
            if held is None or held.failed:
                held = await self._engine.prepare(_disk_holder(step), (step.disk,))
        return held.paths[step.disk.id]

    async def _drop_unused(self, step: UseVolume) -> None:
        """Lets go of the disk of a volume that could not be made."""
        if step.name not in self._engine.volumes.kinds:
            await self._engine.release(_disk_holder(step))

    def _volume_path(
        self, step: UseVolume | FillVolume | OverlayMount, group: str = SIDE_BY_SIDE,
        seconds: float = UNDO_SECONDS, below: str = "",
    ) -> str:  # fmt: skip
        """Where a volume is to be shown.  Recorded before it is: the guest may have done it without an answer."""
        path = self._held.paths[step.id] = self._engine.volumes.new_path(step, self._held.holder)
        self._engine.keep(self._held, KeptVolume(path, step.name, group, seconds, below))
        return path

    async def _make_mount_points(self, step: MakeMountPoints) -> None:
        points, holder = self._engine.mount_points, self._held.holder
        # A container that could not be removed may have something mounted on them.
        self._held.undo.push("mount points", lambda: points.release(holder), waits=True)
        await points.make(step, holder)

    async def _combine(self, step: CombineLayers) -> None:
        root = f"/run/gcs/c/{self._held.holder}/rootfs"
        settings = requests.LCOWCombinedLayers(
            container_id=self._held.holder, container_root_path=root,
            layers=tuple(requests.Layer(path=self._held.paths[layer]) for layer in step.layers),
            scratch_path=self._held.paths[step.scratch] if step.scratch else "",
        )  # fmt: skip
        # Before it is done: the guest may have done it even when its answer does not come.
        self._engine.keep(self._held, KeptRoot(self._held.holder, root, tuple(layer.path for layer in settings.layers)))
        await self._engine.ask_guest("Add", settings)
        self._held.paths[step.id] = root


def _disk_holder(step: UseVolume) -> str:
    return f"volume:{step.name}"  # no container can have a colon in its name


async def _new_scratch(data: Path, step: MakeScratch) -> int:
    """Makes a scratch disk in a thread; the caller owns the descriptor, and nobody does if it is not there any more."""
    make = scratch_disks.blank if step.encrypted else scratch_disks.formatted
    made = asyncio.ensure_future(asyncio.to_thread(make, data, step.size_bytes))
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(_close_result)
        raise


def _close_result(made: asyncio.Task[int]) -> None:
    if not made.cancelled() and made.exception() is None:
        os.close(made.result())
