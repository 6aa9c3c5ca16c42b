"""The engine's care of shared and encrypted scratch disks and of verified layers, on a fake machine."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from holdfast.errors import HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.image.records import Verity
from holdfast.storage.growing import grow_scratch
from holdfast.storage.scratch import LUKS_BYTES
from holdfast.storage.steps import CombineLayers, MakeScratch, MountLayer
from tests.unit import test_engine as on_fake

sandbox_factory = on_fake.sandbox_factory  # a fixture
SIZE = 16 << 20
TREE = Verity("ab" * 32, "00" * 32, 1, 4096)


@pytest.fixture
def run(sandbox_factory, state_root, tmp_path):
    suite = on_fake.TestEngineOnFake()
    return lambda test: asyncio.run(suite._with_pod(test, sandbox_factory, state_root, tmp_path))


def container(pod, *, encrypted=False, verity=None):
    layer, *_ = pod.container()
    layer = msgspec.structs.replace(layer, verity=verity)
    return (layer, MakeScratch("scratch", SIZE, encrypted, True), CombineLayers("root", ("layer0",), "scratch"))


def scratch_disks(pod):
    return [(a, holders) for a, holders in pod.engine.attachments.items() if a.disk.kind == "scratch"]


def test_one_disk_for_all(run):
    async def test(pod):
        a, b = await asyncio.gather(pod.prepare("a", *container(pod)), pod.prepare("b", *container(pod)))
        ((_, holders),) = scratch_disks(pod)
        assert holders == ["a", "b"]
        assert {a.paths["scratch"].rpartition("/m")[0], b.paths["scratch"].rpartition("/m")[0]} == {"/run/mounts/scsi"}
        assert a.paths["scratch"].endswith("/scratch/a")
        assert a.paths["scratch"] == b.paths["scratch"][:-1] + "a"
        assert pod.engine.snapshot().scratch == {False}
        await pod.engine.release("a")
        assert scratch_disks(pod)[0][1] == ["b"]
        await pod.prepare("a", *container(pod))
        await pod.engine.release("b")
        await pod.engine.release("a")
        assert pod.engine.snapshot().scratch == frozenset()
        await pod.expect_nothing()

    run(test)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["plug", "Add MappedVirtualDisk", "Add CombinedLayers"])
def test_a_failure_leaves_nothing_and_can_be_tried_again(run, step, after):
    async def test(pod):
        pod.sandbox.fail(step, after=after)
        with pytest.raises(HoldfastError):
            await pod.prepare("a", *container(pod))
        await pod.expect_nothing()
        assert pod.engine.snapshot().scratch == frozenset()
        await pod.prepare("a", *container(pod))
        await pod.engine.release("a")
        await pod.expect_nothing()

    run(test)


@pytest.mark.parametrize("step", ["unplug", "Remove MappedVirtualDisk", "Remove CombinedLayers", "Remove SCSIDevice"])
def test_a_failed_release_goes_on_at_the_next_try(run, step):
    async def test(pod):
        await pod.prepare("a", *container(pod))
        pod.sandbox.fail(step)
        with pytest.raises(HoldfastError):
            await pod.engine.release("a")
        await pod.engine.release("a")
        await pod.expect_nothing()

    run(test)


def test_encrypted_and_plain_are_two(run):
    async def test(pod):
        await pod.prepare("a", *container(pod, encrypted=True))
        await pod.prepare("b", *container(pod))
        sizes = {a.disk.encrypted: a.size_bytes for a, _ in scratch_disks(pod)}
        assert sizes[True] == SIZE + LUKS_BYTES  # as much room as was asked for
        assert pod.engine.snapshot().scratch == {False, True}
        await pod.engine.release("a")
        await pod.engine.release("b")
        await pod.expect_nothing()

    run(test)


def test_a_verified_layer_is_another_attachment(run):
    async def test(pod):
        await pod.prepare("a", *container(pod))
        await pod.prepare("b", *container(pod, verity=TREE))
        await pod.prepare("c", *container(pod, verity=TREE))
        layers = {a.key.verity: holders for a, holders in pod.engine.attachments.items() if a.disk.kind == "layer"}
        assert layers == {"": ["a"], TREE.root_hash: ["b", "c"]}
        path = next(step.path for step in container(pod) if isinstance(step, MountLayer))
        assert pod.engine.snapshot().layers == {(path, ""), (path, TREE.root_hash)}
        for holder in "abc":
            await pod.engine.release(holder)
        await pod.expect_nothing()

    run(test)


def test_growing(run):
    async def test(pod):
        await pod.prepare("a", *container(pod))
        pod.sandbox.fail("Update MappedVirtualDisk")
        with pytest.raises(HoldfastError):
            await grow_scratch(pod.engine, "a", 2 * SIZE)
        assert await grow_scratch(pod.engine, "a", 2 * SIZE) == 2 * SIZE
        assert scratch_disks(pod)[0][0].size_bytes == 2 * SIZE
        with pytest.raises(InvalidInput):
            await grow_scratch(pod.engine, "a", SIZE)
        with pytest.raises(NotFound):
            await grow_scratch(pod.engine, "b", 2 * SIZE)
        await pod.prepare("b", *container(pod, encrypted=True))
        with pytest.raises(Unsupported):
            await grow_scratch(pod.engine, "b", 2 * SIZE)
        await pod.engine.release("a")
        await pod.engine.release("b")
        await pod.expect_nothing()

    run(test)
