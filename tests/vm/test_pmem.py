"""Layers on persistent memory: a virtio-pmem device, several layers in it, and what happens when there is no room."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.api import container_request
from holdfast.errors import GuestFailed
from holdfast.image.store import ImageStore
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.spec.pmem import COUNT, PAGE, SIZE, PmemLimits
from holdfast.storage.journal import Journal
from holdfast.storage.pmem import whole_pages
from tests.images import make_bundle
from tests.vm.cli import fails, text
from tests.vm.support import BUSYBOX, RICH, Session, assert_holds_nothing, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
