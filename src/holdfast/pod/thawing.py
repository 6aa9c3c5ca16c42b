"""Going on from a snapshot: a machine with the same disks in the same slots, and a monitor that knows what it has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from holdfast.machine import vm
from holdfast.machine.disks import DiskFile
from holdfast.machine.qcow2 import write_empty
from holdfast.storage import scratch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.pod.snapshot import FrozenPod, Snapshot
    from holdfast.storage.engine import Engine
    from holdfast.storage.frozen import FrozenDisk


async def thaw(
    snapshot: Snapshot, record: FrozenPod, engine_of: Callable[[vm.VirtualMachine], Engine], data: Path, *, export: str,
    console_log: str, hold_fd: int, hostname: str,
) -> tuple[vm.VirtualMachine, Engine]:  # fmt: skip
    """Starts a machine from a snapshot, and takes over what it holds.

    Args:
        engine_of: makes the pod's engine for a machine.
        export, console_log, hold_fd, hostname: see :func:`vm.start`.

    Raises:
        InUse: another pod writes to a disk that this one is to read.
        MachineFailed: QEMU refuses the snapshot, or the guest does not answer.
        GuestFailed: it cannot be made different from the others.
    """
    engine: Engine

    async def plug_all(machine: vm.VirtualMachine) -> None:
        nonlocal engine
        engine = engine_of(machine)
        await engine.adopt(record.storage, lambda disk: _plug(machine, disk, snapshot, data))

    # Opened anew: copies of a descriptor share the place that is read next.
    state_fd = os.open(f"/proc/self/fd/{snapshot.state_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        machine = await vm.start(
            record.machine, ram_path="", ram_shared=False, export=export, console_log=console_log,
            ram_fd=snapshot.ram_fd, state_fd=state_fd, hold_fd=hold_fd, hostname=hostname, plug=plug_all,
        )  # fmt: skip
    finally:
        os.close(state_fd)
    return machine, engine


async def _plug(machine: vm.VirtualMachine, frozen: FrozenDisk, snapshot: Snapshot, data: Path) -> int:
    """Plugs in a disk, with an empty file on top if it may be written to; returns the lowest file's descriptor."""
    attachment = frozen.attachment
    files = [DiskFile(snapshot.file(f.number), f.disk_format, f.block_device) for f in frozen.files]
    top = -1
    try:
        if not attachment.disk.read_only:
            top = scratch.unnamed(data / "scratch")
            write_empty(top, attachment.size_bytes)
            files.append(DiskFile(top, "qcow2"))
        await machine.disks.plug(attachment.slot, files, read_only=attachment.disk.read_only)
    finally:
        if top >= 0:
            os.close(top)
    return files[0].fd
