"""Freezing a running pod: what a copy of it goes on from, while it goes on itself."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import HoldfastError
from holdfast.pod.snapshot import FORMAT_VERSION, FrozenContainers, FrozenPod, Snapshot
from holdfast.storage import fork_policy, scratch
from holdfast.storage.frozen import FrozenDisk, FrozenFile, refused

if TYPE_CHECKING:
    from holdfast.machine.disks import DiskFile
    from holdfast.machine.sandbox import PodSandbox, Slot
    from holdfast.machine.vm import VirtualMachine
    from holdfast.pod.attach import HotAttach
    from holdfast.pod.containers import Containers
    from holdfast.pod.messages import PodRequest
    from holdfast.storage.engine import Engine
    from holdfast.storage.frozen import FrozenStorage


async def freeze(
    config: PodRequest, machine: PodSandbox, engine: Engine, containers: Containers, attached: HotAttach
) -> Snapshot:
    """Freezes a pod in which nothing changes meanwhile; the snapshot is the caller's.

    Raises:
        Unsupported: something of it cannot be copied; nothing has been done then.
        InUse: something is being released; or a container uses what cannot be taken from it while it does.
        MachineFailed: QEMU refused.
    """
    from holdfast.machine.vm import VirtualMachine

    if not isinstance(machine, VirtualMachine):
        raise refused(
            f"pod {config.name}", "it has no machine: nothing can freeze processes of the host",
            "start it with --isolation vm",
        )  # fmt: skip
    storage = engine.freeze()
    with contextlib.ExitStack() as stack:
        ours, copies = _new_files(storage, engine, stack)
        running: list[FrozenContainers] = []
        # Asked for while the guest stands still: of what ends after that, a copy sees the end itself.
        fresh = fork_policy.emptied(storage, containers.freeze().specs)
        origin, files = await machine.freeze(ours, copies, fresh, lambda: running.append(containers.freeze()))
        stack.callback(origin.close)
        storage, fds = await _with_files(storage, machine, files)
        record = FrozenPod(
            FORMAT_VERSION, config.name, time.time_ns(), machine.config, config.writable_shares, storage,
            running[0], attached.freeze(),
        )  # fmt: skip
        with contextlib.ExitStack() as kept:
            handed = []
            for fd in (origin.ram_fd, origin.state_fd, *fds):
                handed.append(os.dup(fd))
                kept.callback(os.close, handed[-1])
            snapshot = Snapshot.make(record, handed[0], handed[1], handed[2:])
            kept.pop_all()
            return snapshot


def _new_files(
    storage: FrozenStorage, engine: Engine, stack: contextlib.ExitStack
) -> tuple[dict[Slot, int], dict[Slot, int]]:
    """Empty files, closed with ``stack``.

    For what is written from now on to disks of the pod's own, and for copies of the user's, which go on as they are.
    """
    overlays: dict[Slot, int] = {}
    copies: dict[Slot, int] = {}
    users = {a.slot for a, _ in engine.attachments.items() if a.leased}
    for disk in storage.disks:
        attachment = disk.attachment
        if attachment.disk.read_only:
            continue
        if attachment.slot in users:
            copies[attachment.slot] = fd = _near(Path(attachment.disk.path), engine.data)
        else:
            overlays[attachment.slot] = fd = scratch.unnamed(engine.data / "scratch")
        stack.callback(os.close, fd)
    return overlays, copies


def _near(path: Path, data: Path) -> int:
    """A file beside another, so that it can share that one's blocks, if it can be there at all."""
    try:
        return scratch.unnamed(path.parent)
    except HoldfastError:
        return scratch.unnamed(data / "scratch")


async def _with_files(
    storage: FrozenStorage, machine: VirtualMachine, frozen: dict[Slot, tuple[DiskFile, ...]]
) -> tuple[FrozenStorage, list[int]]:
    """The record with the files that each disk now has below it, and their descriptors.

    A disk that can be written to is recorded as large as the guest sees it, which need not be the size of its file.
    """
    fds: list[int] = []
    disks: list[FrozenDisk] = []
    for disk in storage.disks:
        slot, attachment = disk.attachment.slot, disk.attachment
        if not attachment.disk.read_only:
            attachment = msgspec.structs.replace(attachment, size_bytes=await machine.disks.size(slot))
        files = frozen.get(slot) or machine.disks.files(slot)
        numbered = []
        for file in files:
            numbered.append(FrozenFile(len(fds), file.disk_format, file.block_device))
            fds.append(file.fd)
        disks.append(msgspec.structs.replace(disk, attachment=attachment, files=tuple(numbered)))
    return msgspec.structs.replace(storage, disks=tuple(disks)), fds
