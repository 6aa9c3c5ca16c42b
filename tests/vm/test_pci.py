"""Assigned devices, with one that QEMU emulates in place of the host's: a disk of zeros that is no SCSI disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import HoldfastError, MachineFailed, NotFound, Unsupported
from holdfast.machine import accelerator, guest_image, template
from holdfast.machine.config import DEFAULT_MEMORY_BYTES, MachineConfig
from holdfast.pod.containers import Containers
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.pci import PCI, FunctionKey, Functions
from tests.fakes import Faulty
from tests.vm.support import BUSYBOX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from holdfast.machine.vm import VirtualMachine

DISK, PLAIN, NONE = FunctionKey("0000:01:00.0"), FunctionKey("0000:02:00.0", 3), FunctionKey("0000:03:00.0")
EMULATED: dict[FunctionKey, dict[str, Any]] = {
    DISK: {"driver": "virtio-blk-pci", "drive": "null"},
    PLAIN: {"driver": "edu"},
    NONE: {"driver": "virtio-blk-pci", "drive": "there-is-none"},
}


class Rig:
    """A machine with places for devices, and an engine that takes emulated ones."""

    def __init__(self, machine: VirtualMachine, journal: Journal, folder: Path, data: Path) -> None:
        self.machine = machine
        self.journal = journal
        self.folder = folder
        self.data = data
        self.faulty = Faulty(machine)
        self.functions = Functions(self.faulty, machine, journal, "pod", EMULATED.__getitem__)
        self.engine = Engine(self.faulty, journal, "pod", data, functions=self.functions)
        self.containers = Containers("pod", folder, machine, self.engine)

    async def start(self, name: str, script: str, *devices: FunctionKey) -> None:
        request = container_request(
            name, self.data, image=BUSYBOX, args=["sh", "-c", script], devices=[str(key) for key in devices],
            stdio=Stdio(detach=True),
        )  # fmt: skip
        await self.containers.run(None, request)  # type: ignore[arg-type]

    async def run(self, name: str, script: str, *devices: FunctionKey) -> str:
        await self.start(name, script, *devices)
        assert await self.containers.wait(name) == 0
        await self.engine.release(name)
        return (self.folder / f"{name}.log").read_text()

    async def in_qemu(self) -> list[str]:
        """What is behind the ports, as QEMU has it."""
        return [
            child["name"]
            for child in await self.machine.qmp.execute("qom-list", {"path": "/machine/peripheral"})
            if child["name"].startswith("function")
        ]


@contextlib.asynccontextmanager
async def rig(data: Path, state_root: Path, tmp_path: Path) -> AsyncIterator[Rig]:
    guest = guest_image.find(data) or guest_image.ensure(data)
    config = MachineConfig(guest, "tcg", DEFAULT_MEMORY_BYTES, 1, accelerator.cached_qemu_version(data), True)
    folder, _ = await template.ensure(data, config, lambda _text: None)
    export = tmp_path / "export"
    export.mkdir()
    machine = await template.clone(folder, config, export=str(export), console_log=str(tmp_path / "console"))
    try:
        with Journal(state_root) as journal:
            await machine.qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "null", "read-zeroes": True})
            yield Rig(machine, journal, tmp_path, data)
            assert journal.held() == []
    finally:
        await machine.close()


@pytest.fixture
def run(data, state_root, tmp_path):
    def run(test: Any) -> None:
        async def main() -> None:
            async with rig(data, state_root, tmp_path) as made:
                await test(made)

        asyncio.run(main())

    return run


def test_a_device_and_its_node_reach_the_container_and_go_with_it(run):
    async def test(rig: Rig) -> None:
        for name in ("first", "second"):  # the place is free again after the first
            text = await rig.run(name, "ls /dev/vd*; head -c 4096 /dev/vdb | tr '\\0' x | wc -c", DISK)
            assert text == "/dev/vdb\n4096\n"
            assert await rig.in_qemu() == []
        # Who has not asked for it does not have it.
        assert await rig.run("third", "ls /dev | grep -c vd || true") == "0\n"

    run(test)


def test_holders_share_a_device_and_the_last_takes_it_out(run):
    async def test(rig: Rig) -> None:
        await rig.start("a", "sleep 1000", DISK, PLAIN)
        await rig.start("b", "sleep 1000", DISK)
        found = {device["device"]: device for device in rig.functions.describe()}
        assert (found["0000:01:00.0"]["holders"], found["0000:01:00.0"]["nodes"]) == (["a", "b"], ["/dev/vdb"])
        assert (found["0000:02:00.0/3"]["holders"], found["0000:02:00.0/3"]["nodes"]) == (["a"], [])
        assert sorted(row.kind for row in rig.journal.held() if row.kind == "pci") == ["pci", "pci"]
        assert len(await rig.in_qemu()) == 2
        for name, left in (("a", 1), ("b", 0)):
            await rig.containers.kill(name, 9)
            assert await rig.containers.wait(name) == 137
            await rig.engine.release(name)
            assert len(await rig.in_qemu()) == left

    run(test)


def test_what_cannot_be_plugged_in_leaves_nothing(run):
    async def test(rig: Rig) -> None:
        for _ in range(2):
            with pytest.raises(MachineFailed, match="there-is-none"):
                await rig.run("a", "true", DISK, NONE)
            assert await rig.in_qemu() == []
            assert rig.engine.held() == []

    run(test)


def test_a_guest_that_does_not_find_it(run):
    """The host's half is done by then, and is undone; the port is free for the next one, who gets the device."""

    async def test(rig: Rig) -> None:
        for after in (False, True):
            rig.faulty.fail("Add VPCIDevice", after=after)
            with pytest.raises(HoldfastError, match="injected"):
                await rig.run("a", "true", DISK)
            assert await rig.in_qemu() == []
            assert (rig.functions.describe(), rig.engine.held(), rig.journal.held()) == ([], [], [])
        assert await rig.run("a", "ls /dev/vd*; head -c 4096 /dev/vdb | tr '\\0' x | wc -c", DISK) == "/dev/vdb\n4096\n"
        assert await rig.in_qemu() == []

    run(test)


def test_a_host_that_cannot(data, state_root):
    """A device that is not there, or not given to vfio-pci, is refused; so is any, by a pod without places."""
    here = min(os.listdir(PCI), default="") if os.path.isdir(PCI) else ""
    with holdfast.Pod(root=state_root, data=data, ports=True) as pod:
        with pytest.raises(NotFound) as missing:
            pod.run(BUSYBOX, ["true"], devices=["ffff:ff:1f.7"])
        assert missing.value.code == "device-not-found"
        if here:
            with pytest.raises(Unsupported) as taken:
                pod.run(BUSYBOX, ["true"], devices=[here])
            assert taken.value.code in ("no-iommu", "device-not-vfio")
        assert pod.run(BUSYBOX, ["true"]).status == 0
    with holdfast.Pod(root=state_root, data=data) as pod, pytest.raises(Unsupported) as without:
        pod.run(BUSYBOX, ["true"], devices=["0000:01:00.0"])
    assert without.value.code == "no-ports"
