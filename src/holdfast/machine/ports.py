"""Places for what is plugged into a machine that runs, besides disks: persistent memory and PCI functions.

QEMU's root bus takes nothing new, so bridges are prepared: five conventional ones with 31 places each for persistent
memory, and eight root ports for assigned functions.  They, and the address space for the memory, are only in
machines that are started for it, which have saves of their own.

Persistent memory is virtio-pmem.  QEMU 7.2 opens its file by path only, and ``/dev/fdset`` does not work there: so it
gets a descriptor and then opens that by ``/proc/self/fd``.  It refuses to unplug the device ("virtio based memory
devices cannot be unplugged"): a device stays as long as its machine.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.machine.qmp import Qmp

#: PCI device numbers on bus 0.  The agent finds what is behind them by these (guest/pmem.py, guest/pci.py).
PORT_SLOT, FIRST_BRIDGE_SLOT = 0x8, 0x9
PORTS = 8
BRIDGES, PLACES = 5, 31
#: Persistent memory for each byte of RAM.  The guest's kernel takes 1/64 of it from RAM to describe its pages: at 8,
#: an eighth of RAM; two devices of 4 GiB were seen to use up all of 256 MiB ("System is deadlocked on memory").
PMEM_PER_RAM = 8
_FIRST_FDSET = 3000
_UNPLUG_SECONDS = 10.0


def pmem_room_bytes(memory_bytes: int) -> int:
    """How much persistent memory a machine with so much RAM can have, all devices together."""
    return memory_bytes * PMEM_PER_RAM


def memory_argument(memory_bytes: int) -> str:
    """Of ``-m``: the slot is a formality, virtio-pmem takes none; it makes QEMU leave room to align."""
    return f"size={memory_bytes // (1 << 20)}M,maxmem={memory_bytes + pmem_room_bytes(memory_bytes)}B,slots=1"


def arguments() -> list[str]:
    """The bridges, for QEMU's command line."""
    argv: list[str] = []
    for number in range(PORTS):
        where = f"addr={PORT_SLOT:#x}.{number},multifunction=on,chassis={number + 1},slot={number + 1},port={number}"
        argv += ["-device", f"pcie-root-port,id=port{number},bus=pcie.0,{where},io-reserve=0"]
    for number in range(BRIDGES):
        where = f"addr={FIRST_BRIDGE_SLOT + number:#x},chassis_nr={100 + number}"
        argv += ["-device", f"pci-bridge,id=bridge{number},bus=pcie.0,{where}"]
    return argv


def place_of(device: str) -> str:
    """Where a device of that id is: ``slot 0:3``, ``pmem 0`` or ``port 1``; empty for one that is always there."""
    found = re.fullmatch(r"disk(\d+)-(\d+)|pmem(\d+)dev|function(\d+)", device)
    if found is None:
        return ""
    controller, lun, pmem, port = found.groups()
    if port:
        return f"port {port}"
    return f"pmem {pmem}" if pmem else f"slot {controller}:{lun}"


async def plug_pmem(qmp: Qmp, number: int, fd: int, size_bytes: int) -> None:
    """Plugs in persistent memory that shows a file, read-only.  It cannot be taken out again.

    Raises:
        MachineFailed: QEMU refused.
    """
    backend, fdset = f"pmem{number}", _FIRST_FDSET + number
    passed = await qmp.add_fd(fdset, fd)
    try:
        await qmp.execute("object-add", {
            "qom-type": "memory-backend-file", "id": backend, "mem-path": f"/proc/self/fd/{passed}",
            "size": size_bytes, "share": True, "readonly": True,
        })  # fmt: skip
        bridge, place = divmod(number, PLACES)
        await qmp.execute("device_add", {
            "driver": "virtio-pmem-pci", "id": f"{backend}dev", "memdev": backend, "bus": f"bridge{bridge}",
            "addr": f"{place + 1:#x}",
        })  # fmt: skip
    except BaseException:
        # In use it stays: then the device is there, though the answer was lost.
        await asyncio.shield(_quietly(qmp, backend))
        raise
    finally:
        await asyncio.shield(qmp.execute_if_there("remove-fd", {"fdset-id": fdset}))


async def _quietly(qmp: Qmp, backend: str) -> None:
    from holdfast.errors import HoldfastError

    try:
        await qmp.execute("object-del", {"id": backend})
    except HoldfastError:
        return


async def plug_function(qmp: Qmp, port: int, options: dict[str, Any]) -> None:
    """Plugs a PCI function into a port; undoes itself when it fails.

    Args:
        options: of ``device_add``, its driver among them.

    Raises:
        MachineFailed: QEMU refused: the host's device is not there, or not free.
    """
    try:
        await qmp.execute("device_add", {**options, "id": f"function{port}", "bus": f"port{port}"})
    except BaseException:
        await asyncio.shield(unplug_function(qmp, port))
        raise


async def unplug_function(qmp: Qmp, port: int) -> None:
    """Takes a function out; returns when it is gone; already gone is success.

    Raises:
        NotReleased: the guest did not let go of it in time.
    """
    await qmp.delete_device(f"function{port}", _UNPLUG_SECONDS)
