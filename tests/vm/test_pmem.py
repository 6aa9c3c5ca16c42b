"""Layers on persistent memory: a virtio-pmem device, several layers in it, and what happens when there is no room."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import GuestFailed, HoldfastError, NotReleased
from holdfast.image.store import ImageStore
from holdfast.machine import accelerator, guest_image, ports, template
from holdfast.machine.config import DEFAULT_MEMORY_BYTES, MachineConfig
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.containers import Containers
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec.pmem import COUNT, PAGE, SIZE, PmemLimits
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.pmem import PmemLayers, whole_pages
from tests.fakes import Faulty
from tests.images import make_bundle
from tests.vm.cli import fails, text
from tests.vm.support import BUSYBOX, RICH, Session, assert_holds_nothing, output, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdfast.machine.vm import VirtualMachine

#: Of BUSYBOX.
LAYERS = 2


@pytest.fixture
def pmem_pod(data: Path, state_root: Path) -> Iterator[holdfast.Pod]:
    with holdfast.Pod(root=state_root, data=data, pmem=True) as pod:
        yield pod


@contextlib.contextmanager
def running_on_pmem(pod: holdfast.Pod, name: str, image: str = BUSYBOX, **options: Any) -> Iterator[None]:
    """A container with its layers in persistent memory that does nothing until the block ends."""
    stdio = Stdio(STDIN, STDOUT, STDERR)
    args = ["sh", "-c", "echo ready; read line"]
    request = container_request(name, pod.data, image=image, args=args, stdio=stdio, pmem=True, **options)
    with Session(pod, "run", request, stdin=True) as session:
        session.wait_for(b"ready")
        yield
        session.end_input()
        session.wait()


def disks(pod: holdfast.Pod) -> int:
    """How many layers have a SCSI slot."""
    return [disk["kind"] for disk in pod.storage()["attachments"]].count("layer")


def program(status: int) -> bytes:
    """An ELF file that ends with a status at once: machines that differ in one byte of one page of code."""
    code = b"\xb8\x3c\0\0\0\xbf" + struct.pack("<I", status) + b"\x0f\x05"  # exit(status)
    start = 0x400000 + PAGE
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, PAGE, start, start, PAGE, PAGE, PAGE)
    # Whole pages: the kernel maps no others from the device itself.
    return (header + segment).ljust(PAGE, b"\0") + code.ljust(PAGE, b"\x90")


def bundle_on_pmem(folder: Path, status: int) -> Path:
    """A bundle of one layer, uncompressed, with a program that ends with a status."""
    tree = folder / "tree"
    for name in ("proc", "dev"):
        (tree / name).mkdir(parents=True)
    (tree / "program").write_bytes(program(status))
    (tree / "program").chmod(0o755)
    (folder / "layer").mkdir()
    subprocess.run(["mkfs.erofs", "-d0", folder / "layer/layer.erofs", tree], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    windows = {"layerFolders": [str(folder / "layer"), str(folder / "scratch")]}
    return make_bundle(folder, ["/program"], root={"path": ""}, windows=windows, annotations={COUNT: "64"})


def test_layers_are_in_persistent_memory(pmem_pod):
    """Two containers of one image hold one copy of each layer; with the last its place is free."""
    pod = pmem_pod
    for _ in range(2):
        with running_on_pmem(pod, "a"), running_on_pmem(pod, "b"):
            found = pod.storage()
            assert {layer["device"] for layer in found["pmem"]} == {0}
            assert all(layer["holders"] == ["a", "b"] for layer in found["pmem"])
            assert not [disk for disk in found["attachments"] if disk["kind"] == "layer"]
            with Journal(pod.root) as journal:
                assert {row.state for row in journal.held(pod.name) if row.kind == "pmem"} == {"held"}
        assert pod.storage()["pmem"] == []
        assert_holds_nothing(pod)


def test_several_layers_share_a_device(pmem_pod, rich_tree):
    with running_on_pmem(pmem_pod, "rich", RICH):
        found = pmem_pod.storage()["pmem"]
        assert len(found) > 1
        assert {layer["device"] for layer in found} == {0}
        ends = [0, *(layer["offset"] + layer["size_bytes"] for layer in found)]
        assert [layer["offset"] for layer in found] == ends[:-1]
        assert all(layer["dax"] for layer in found)  # nothing was there before
    assert_holds_nothing(pmem_pod)


def test_without_asking_layers_are_disks(pmem_pod, data, run_folder):
    with running(pmem_pod, "a"):
        assert (pmem_pod.storage()["pmem"], disks(pmem_pod)) == ([], LAYERS)
    with holdfast.Pod(root=run_folder / "without", data=data) as pod, running_on_pmem(pod, "a"):
        assert (pod.storage()["pmem"], disks(pod)) == ([], LAYERS)


def test_a_reused_place_never_runs_the_code_that_was_there(pmem_pod, tmp_path):
    """QEMU's emulation keeps what it has translated, and does not see that the host writes to the device's file."""
    for status in (17, 99, 18):
        bundle = bundle_on_pmem(tmp_path / str(status), status)
        assert pmem_pod.run(bundle=bundle).status == status


def test_what_does_not_fit_becomes_a_disk(data, rich_tree, state_root):
    layers = [os.stat(layer.disk).st_size for layer in ImageStore(data).get(RICH).layers]
    room = whole_pages(max(layers))
    with holdfast.Pod(root=state_root, data=data, pmem=PmemLimits(1, room)) as pod:
        with running_on_pmem(pod, "a", RICH):
            placed = len(pod.storage()["pmem"])
            assert 0 < placed < len(layers)
            assert placed + disks(pod) == len(layers)
        assert_holds_nothing(pod)
    with holdfast.Pod(root=state_root, data=data, pmem=PmemLimits(64, PAGE)) as pod:
        with running_on_pmem(pod, "a"):
            assert (pod.storage()["pmem"], disks(pod)) == ([], LAYERS)
        assert_holds_nothing(pod)


def test_two_devices(data, state_root):
    """Each has room for one large layer: both are used, and used again; what finds no room meanwhile is a disk."""
    room = whole_pages(max(os.stat(layer.disk).st_size for layer in ImageStore(data).get(BUSYBOX).layers))
    with holdfast.Pod(root=state_root, data=data, pmem=PmemLimits(2, room)) as pod:
        for again in (False, True):
            with running_on_pmem(pod, "a"):
                places = [(layer["device"], layer["offset"]) for layer in pod.storage()["pmem"]]
                assert places == [(0, 0), (1, 0)]
                assert disks(pod) == 0
                assert output(pod.exec("a", ["cat", "/etc/release", "/etc/not-executable"])) == "tests\n#!/bin/sh\n"
                if again:
                    with running_on_pmem(pod, "b", verity=True):  # another of each: there is room beside the small one
                        assert [layer["holders"] for layer in pod.storage()["pmem"]].count(["a"]) == LAYERS
                        assert (len(pod.storage()["pmem"]), disks(pod)) == (LAYERS + 1, 1)
            assert pod.storage()["pmem"] == []
            assert_holds_nothing(pod)


class Rig:
    """A machine whose steps can fail, with an engine that has room for one layer in each of two devices."""

    def __init__(self, machine: VirtualMachine, journal: Journal, folder: Path, data: Path) -> None:
        self.machine = machine
        self.journal = journal
        self.folder = folder
        self.data = data
        self.faulty = Faulty(machine)
        room = whole_pages(max(os.stat(layer.disk).st_size for layer in ImageStore(data).get(BUSYBOX).layers))
        self.pmem = PmemLayers(
            self.faulty, machine, journal, "pod", data, PmemLimits(2, room),
            room_bytes=ports.pmem_room_bytes(DEFAULT_MEMORY_BYTES), stale_code=True,
        )  # fmt: skip
        self.engine = Engine(self.faulty, journal, "pod", data, pmem=self.pmem)
        self.containers = Containers("pod", folder, machine, self.engine)

    async def run(self, name: str, script: str = "cat /etc/release") -> str:
        """What a container prints."""
        request = container_request(
            name, self.data, image=BUSYBOX, args=["sh", "-c", script], pmem=True, stdio=Stdio(detach=True)
        )
        await self.containers.run(None, request)  # type: ignore[arg-type]
        assert await self.containers.wait(name) == 0
        await self.engine.release(name)
        return (self.folder / f"{name}.log").read_text()

    async def assert_nothing_left(self) -> None:
        """Nothing is held, mounted or stored; that the devices themselves stay is QEMU's doing."""
        assert (self.engine.held(), self.pmem.items(), self.journal.held()) == ([], [], [])
        assert "/run/layers" not in (await self.machine.request("mounts", {}, 5))["mountinfo"]
        for device in self.pmem._devices:
            assert device.pool.taken == []
            assert os.fstat(device.fd).st_blocks == 0


@pytest.fixture
def run(data, state_root, tmp_path):
    def run(test: Any) -> None:
        async def main() -> None:
            guest = guest_image.find(data) or guest_image.ensure(data)
            version = accelerator.cached_qemu_version(data)
            config = MachineConfig(guest, "tcg", DEFAULT_MEMORY_BYTES, 1, version, True)
            folder, _ = await template.ensure(data, config, lambda _text: None)
            (tmp_path / "export").mkdir()
            machine = await template.clone(
                folder, config, export=str(tmp_path / "export"), console_log=str(tmp_path / "console")
            )
            with Journal(state_root) as journal:
                rig = Rig(machine, journal, tmp_path, data)
                try:
                    await test(rig)
                finally:
                    await machine.close()
                    rig.pmem.close()

        asyncio.run(main())

    return run


def test_a_guest_that_does_not_mount_it(run):
    """It fails, or its answer is lost, for one layer or for both: all is undone, and the places are used again."""

    async def test(rig: Rig) -> None:
        for count, after in ((1, False), (2, False), (1, True), (2, True)):
            faults = [rig.faulty.fail("Add VPMemDevice", after=after) for _ in range(count)]
            with pytest.raises(HoldfastError, match="injected"):
                await rig.run("a")
            assert all(fault.reached.is_set() for fault in faults)
            await rig.assert_nothing_left()
        assert await rig.run("a") == "tests\n"
        await rig.assert_nothing_left()
        assert len(rig.pmem._devices) == 2

    run(test)


def test_a_guest_that_does_not_unmount_it(run):
    """It stays recorded, and nobody joins or replaces it, until it is gone; whoever comes next tries that first."""

    async def test(rig: Rig) -> None:
        for after in (False, True):
            rig.faulty.fail("Remove VPMemDevice", after=after, always=True)
            with pytest.raises(NotReleased):
                await rig.run("a")
            assert {row.kind for row in rig.journal.held()} == {"pmem"}
            assert [mount.number for mount, _ in rig.pmem.items()] == [0, 1]
            with pytest.raises(HoldfastError, match="injected"):
                await rig.run("b")
            rig.faulty.heal()
            await rig.engine.release("a")
            await rig.assert_nothing_left()
            # Neither made nor unmade, and held by nobody.
            rig.faulty.fail("Add VPMemDevice", after=True)
            rig.faulty.fail("Remove VPMemDevice", after=after)
            with pytest.raises(HoldfastError, match="injected") as caught:
                await rig.run("c")
            assert caught.value.causes
            assert [holders for _, holders in rig.pmem.items()] == [[]]
            assert await rig.run("c") == "tests\n" * (1 + after)  # the log goes on
            await rig.assert_nothing_left()

    run(test)


def test_verified_layers(pmem_pod):
    with running_on_pmem(pmem_pod, "a", verity=True):
        assert [layer["dax"] for layer in pmem_pod.storage()["pmem"]] == [False] * LAYERS
    assert_holds_nothing(pmem_pod)


def test_nothing_else_falls_back(pmem_pod, tmp_path):
    """A layer that the guest cannot mount is an error, and leaves nothing."""
    bundle = bundle_on_pmem(tmp_path / "bundle", 1)
    (tmp_path / "bundle/layer/layer.erofs").write_bytes(bytes(64 << 10))
    for _ in range(2):
        with pytest.raises(GuestFailed) as failed:
            pmem_pod.run(bundle=bundle)
        assert failed.value.code == "no-filesystem"
    assert_holds_nothing(pmem_pod)
    assert pmem_pod.storage()["pmem"] == []


def test_by_command(data, state_root):
    assert "in persistent memory, if there is room" in text("plan", "--pmem", BUSYBOX, "true")
    assert text("run", "--pmem", BUSYBOX, "echo", "hello") == "hello\n"
    for annotation, code in ((f"{COUNT}=129", "pmem-count"), (f"{SIZE}=4097", "pmem-size")):
        assert fails("run", "--annotation", annotation, BUSYBOX, "true")["code"] == code
