"""The chains of image files below a machine's disks, against a server that says what QEMU would."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, MachineFailed
from holdfast.machine.disks import LONGEST_CHAIN, DiskFile, Disks
from holdfast.machine.sandbox import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SLOT = Slot(1, 3)
SIZE = 1 << 20


class Qemu:
    """Keeps nodes, descriptors and devices as QEMU does, and refuses what a test wants it to."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.fdsets: set[int] = set()
        self.devices: dict[str, str] = {}
        self.refuses = ""
        self.streamed: list[tuple[str, str]] = []
        self.died: HoldfastError | None = None

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        if self.died is not None:
            raise self.died
        if command == self.refuses:
            raise MachineFailed(f"QEMU {command}", why="it will not", code="qemu-refused")
        if command == "blockdev-add":
            assert arguments["node-name"] not in self.nodes
            assert int(arguments["file"]["filename"].rpartition("/")[2]) in self.fdsets
            assert not arguments.get("backing") or arguments["backing"] in self.nodes
            self.nodes[arguments["node-name"]] = arguments
        elif command == "device_add":
            self.devices[arguments["id"]] = arguments["drive"]
        elif command == "block-stream":
            self.streamed.append((arguments["device"], arguments["base-node"]))
        elif command == "query-jobs":
            return []
        elif command == "query-named-block-nodes":
            return [{"node-name": name, "image": {"virtual-size": SIZE}} for name in self.nodes]
        return {}

    async def execute_if_there(self, command: str, arguments: dict[str, Any]) -> None:
        await self.execute(command, arguments)
        if command == "blockdev-del":
            self.nodes.pop(arguments["node-name"], None)
        elif command == "remove-fd":
            self.fdsets.discard(arguments["fdset-id"])

    async def add_fd(self, fdset: int, fd: int) -> int:
        if self.died is not None:
            raise self.died
        self.fdsets.add(fdset)
        os.fstat(fd)
        return 1

    async def delete_device(self, device: str, _seconds: float) -> None:
        await self.execute("device_del", {})
        self.devices.pop(device, None)

    def is_empty(self) -> bool:
        return not (self.nodes or self.fdsets or self.devices)


def run(test: Callable[[Qemu, Disks], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        qemu = Qemu()
        disks = Disks(qemu)  # type: ignore[arg-type]
        try:
            await test(qemu, disks)
        finally:
            disks.close()

    asyncio.run(main())


def file(kind: str = "raw") -> DiskFile:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, SIZE)
    return DiskFile(fd, kind)


async def plug(disks: Disks, *kinds: str) -> None:
    files = [file(kind) for kind in kinds]
    try:
        await disks.plug(SLOT, files, read_only=False)
    finally:
        for one in files:
            os.close(one.fd)


async def freeze(disks: Disks) -> None:
    fd = os.memfd_create("overlay")
    try:
        await disks.make_overlay(SLOT, fd)
    finally:
        os.close(fd)


def test_a_chain_is_plugged_in_from_the_lowest():
    async def test(qemu: Qemu, disks: Disks) -> None:
        await plug(disks, "raw", "qcow2", "qcow2")
        assert list(qemu.nodes) == ["d1-3", "d1-3.1", "d1-3.2"]
        assert [node["read-only"] for node in qemu.nodes.values()] == [True, True, False]
        assert [node.get("backing") for node in qemu.nodes.values()] == [None, "d1-3", "d1-3.1"]
        assert qemu.devices == {"disk1-3": "d1-3.2"}
        assert (await disks.plugged(), disks.top(SLOT)) == ({SLOT}, "d1-3.2")
        await disks.unplug(SLOT)
        assert qemu.is_empty()

    run(test)


@pytest.mark.parametrize("named", [True, False])
def test_what_has_no_name_need_not_come_to_the_host_s_disk(tmp_path, named):
    async def test(qemu: Qemu, disks: Disks) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        with open(path, "r+b") as opened:
            if not named:
                path.unlink()
            for slot, read_only in ((SLOT, False), (Slot(0, 0), True)):
                await disks.plug(slot, [DiskFile(opened.fileno(), "raw")], read_only=read_only)
        caches = [node.get("cache") for node in qemu.nodes.values()]
        assert caches == [None if named else {"no-flush": True}, None]

    run(test)


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
def test_what_is_refused_leaves_nothing(command):
    async def test(qemu: Qemu, disks: Disks) -> None:
        qemu.refuses = command
        with pytest.raises(MachineFailed):
            await plug(disks, "raw", "qcow2")
        assert qemu.is_empty()
        qemu.refuses = ""
        await plug(disks, "raw", "qcow2")

    run(test)


def test_a_machine_that_is_gone_says_so_once():
    """It raises the same error whatever is asked: one that named itself as its own cause could not be told."""

    async def test(qemu: Qemu, disks: Disks) -> None:
        qemu.died = MachineFailed("use the machine", why="QEMU was killed by signal 9", code="machine-died")
        with pytest.raises(MachineFailed) as caught:
            await plug(disks, "raw")
        assert str(caught.value) == "use the machine: QEMU was killed by signal 9"
        assert caught.value.as_dict()["code"] == "machine-died"

    run(test)


def test_a_file_on_top():
    async def test(qemu: Qemu, disks: Disks) -> None:
        await plug(disks, "raw")
        await freeze(disks)
        assert disks.top(SLOT) == "d1-3"  # until it has been put there
        assert qemu.nodes["d1-3.1"]["backing"] is None
        action = disks.overlay_action(SLOT)
        assert action == {"type": "blockdev-snapshot", "data": {"node": "d1-3", "overlay": "d1-3.1"}}
        disks.overlaid([SLOT])
        assert disks.top(SLOT) == "d1-3.1"
        await disks.drop_overlay(SLOT)  # it is there: nothing to drop
        assert [one.disk_format for one in disks.files(SLOT)] == ["raw", "qcow2"]
        await disks.unplug(SLOT)
        assert qemu.is_empty()

    run(test)


def test_a_file_that_was_not_put_there():
    async def test(qemu: Qemu, disks: Disks) -> None:
        await plug(disks, "raw")
        await freeze(disks)
        await disks.drop_overlay(SLOT)
        assert (list(qemu.nodes), len(qemu.fdsets), len(disks.files(SLOT))) == (["d1-3"], 1, 1)
        await freeze(disks)
        await disks.unplug(SLOT)
        assert qemu.is_empty()

    run(test)


def test_a_chain_that_has_become_too_long():
    """What lies between becomes part of the top file, and numbers that are free are used again."""

    async def test(qemu: Qemu, disks: Disks) -> None:
        await plug(disks, "raw")
        for _ in range(3 * LONGEST_CHAIN):
            await freeze(disks)
            disks.overlaid([SLOT])
            assert len(qemu.nodes) == len(qemu.fdsets) == len(disks.files(SLOT)) <= LONGEST_CHAIN
            assert disks.top(SLOT) == list(qemu.nodes)[-1]
        tops = [LONGEST_CHAIN - 1 + number * (LONGEST_CHAIN - 2) for number in range(3)]
        assert qemu.streamed == [(f"d1-3.{number}", "d1-3") for number in tops]
        await disks.unplug(SLOT)
        assert qemu.is_empty()

    run(test)
