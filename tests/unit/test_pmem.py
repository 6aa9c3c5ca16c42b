"""Persistent memory: the allocator against a model, the limits, and the bookkeeping with a machine that pretends."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Exhausted, GuestFailed, HoldfastError, InvalidInput, MachineFailed
from holdfast.spec.pmem import COUNT, DEFAULT_BYTES, PAGE, SIZE, PmemLimits, pmem_limits
from holdfast.storage.journal import Journal
from holdfast.storage.pmem import FIRST_BYTES, NO_ROOM, TOO_BIG, PmemLayers, Pool, copy_into, whole_pages
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

MIB = 1 << 20
ROOMY = PmemLimits(64)


# -- the allocator --------------------------------------------------------------------------------


@given(st.integers(0, 40 * PAGE), st.lists(st.integers(-12, 9 * PAGE), max_size=60))
def test_the_pool_agrees_with_a_map_of_pages(size, actions):
    """A positive action asks for so many bytes, another frees one of what is there."""
    pool = Pool(size)
    pages = [False] * (size // PAGE)
    places: list[tuple[int, int]] = []
    for action in actions:
        if action > 0:
            count = whole_pages(action) // PAGE
            runs = (n for n in range(len(pages) - count + 1) if not any(pages[n : n + count]))
            expected = next(runs, None)
            offset = pool.allocate(action)
            assert offset == (None if expected is None else expected * PAGE)
            if expected is not None:
                pages[expected : expected + count] = [True] * count
                places.append((expected * PAGE, count * PAGE))
        elif places:
            offset, length = places.pop(-action % len(places))
            pool.free(offset)
            pages[offset // PAGE : (offset + length) // PAGE] = [False] * (length // PAGE)
        assert pool.taken == sorted(places)


# -- limits ---------------------------------------------------------------------------------------


def test_limits():
    assert pmem_limits({}) == PmemLimits(0, DEFAULT_BYTES)
    assert pmem_limits({COUNT: "128", SIZE: "8192"}) == PmemLimits(128, 8192)


@pytest.mark.parametrize(
    ("annotations", "code"),
    [
        ({COUNT: "129"}, "pmem-count"),
        ({COUNT: "many"}, "pmem-count"),
        ({COUNT: "-1"}, "pmem-count"),
        ({COUNT: "1", SIZE: "4097"}, "pmem-size"),
        ({COUNT: "1", SIZE: "0"}, "pmem-size"),
        ({COUNT: "1", SIZE: "9" * 30}, "pmem-size"),
    ],
)
def test_limits_that_are_wrong(annotations, code):
    with pytest.raises(InvalidInput) as wrong:
        pmem_limits(annotations)
    assert wrong.value.code == code


# -- bookkeeping ----------------------------------------------------------------------------------


class Machine(FakeSandbox):
    """Remembers its devices and what is mounted, and fails when told to.

    Attributes:
        files: device -> (a descriptor of its file, its size).
        there: guest path -> settings of the request.
        fail: what the next request of this kind (``plug``, ``Add``, ``Remove``) raises.
    """

    def __init__(self) -> None:
        super().__init__("")
        self.files: dict[int, tuple[int, int]] = {}
        self.there: dict[str, dict[str, Any]] = {}
        self.fail: dict[str, HoldfastError] = {}

    async def plug_pmem(self, number: int, fd: int, size_bytes: int) -> None:
        await asyncio.sleep(0)
        if "plug" in self.fail:
            raise self.fail.pop("plug")
        assert number not in self.files
        self.files[number] = (os.dup(fd), size_bytes)

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        await asyncio.sleep(0)
        action, settings = params["RequestType"], params["Settings"]
        if action in self.fail:
            raise self.fail.pop(action)
        path = settings["MountPath"]
        if action == "Remove":
            self.there.pop(path, None)
            return {}
        self.there[path] = settings
        return {"path": path, "dax": not settings.get("NoDax", False)}

    def read(self, mount: Any, size: int) -> bytes:
        return os.pread(self.files[mount.number][0], size, mount.offset)

    def close_files(self) -> None:
        for fd, _ in self.files.values():
            os.close(fd)


class Rig:
    def __init__(self, folder: Path, journal: Journal, limits: PmemLimits, room: int) -> None:
        self.folder = folder
        self.journal = journal
        self.machine = Machine()
        self.layers = PmemLayers(
            self.machine, self.machine, journal, "pod", folder, limits, room_bytes=room, stale_code=True
        )

    def file(self, name: str, size: int) -> str:
        path = self.folder / name
        path.write_bytes((name.encode() * size)[:size])
        return str(path)


@pytest.fixture
def run(tmp_path, state_root):
    def run(test: Callable[[Rig], Awaitable[None]], limits: PmemLimits = ROOMY, room: int = 8 * FIRST_BYTES) -> None:
        async def main() -> None:
            with Journal(state_root) as journal:
                rig = Rig(tmp_path, journal, limits, room)
                try:
                    await test(rig)
                finally:
                    rig.layers.close()
                    rig.machine.close_files()
                assert rig.layers.items() == []
                assert rig.machine.there == {}
                assert journal.held("pod") == []

        asyncio.run(main())

    return run


def test_one_file_has_one_place(run):
    async def test(rig: Rig) -> None:
        path = rig.file("a", 5000)
        os.link(path, rig.folder / "b")
        first, second = await asyncio.gather(
            rig.layers.mount(path, "one"), rig.layers.mount(str(rig.folder / "b"), "two")
        )
        assert first == second
        assert (first.guest_path, first.dax) == ("/run/layers/p0-0-8192", True)
        assert rig.machine.read(first, 8192) == b"a" * 5000 + bytes(3192)
        assert rig.machine.there[first.guest_path]["MappingInfo"] == {"DeviceSizeInBytes": 8192}
        assert [row.state for row in rig.journal.held("pod")] == ["held"]
        await rig.layers.unmount(first, "one")
        assert len(rig.machine.there) == 1
        await rig.layers.unmount(first, "two")
        assert rig.machine.read(first, 8192) == bytes(8192)  # punched out

    run(test)


def test_layers_are_packed_and_places_used_again(run):
    async def test(rig: Rig) -> None:
        mounts = [await rig.layers.mount(rig.file(name, size), "c") for name, size in (("a", 1), ("b", 9000), ("c", 1))]
        assert [mount.offset for mount in mounts] == [0, 4096, 4096 * 4]
        await rig.layers.unmount(mounts[1], "c")
        again = await rig.layers.mount(rig.file("d", 4097), "c")
        # What was translated of the layer that was there must not be executed: no DAX.
        assert (again.offset, again.dax) == (4096, False)
        assert rig.machine.read(again, 4097) == b"d" * 4097
        assert set(rig.machine.files) == {0}
        for mount in (mounts[0], mounts[2], again):
            await rig.layers.unmount(mount, "c")

    run(test)


def test_a_device_that_is_full_is_followed_by_one_twice_as_large(run):
    async def test(rig: Rig) -> None:
        for name in "abc":
            os.truncate(rig.file(name, 1), FIRST_BYTES)
        mounts = [await rig.layers.mount(str(rig.folder / name), "c") for name in "abc"]
        assert [(mount.number, mount.offset) for mount in mounts] == [(0, 0), (1, 0), (1, FIRST_BYTES)]
        assert [size for _, size in rig.machine.files.values()] == [FIRST_BYTES, 2 * FIRST_BYTES]
        os.truncate(rig.file("d", 1), 6 * FIRST_BYTES)  # 5 of 8 are left, by the machine's RAM
        with pytest.raises(Exhausted) as full:
            await rig.layers.mount(str(rig.folder / "d"), "c")
        assert full.value.code == NO_ROOM
        for mount in mounts:
            await rig.layers.unmount(mount, "c")

    run(test)


@pytest.mark.parametrize(
    ("limits", "code"), [(PmemLimits(1, 2 * PAGE), NO_ROOM), (PmemLimits(64, PAGE), TOO_BIG), (PmemLimits(), NO_ROOM)]
)
def test_no_room_and_too_big_are_told_apart(run, limits, code):
    async def test(rig: Rig) -> None:
        first = await rig.layers.mount(rig.file("a", 1), "c") if limits.count else None
        with pytest.raises(Exhausted) as refused:
            await rig.layers.mount(rig.file("b", 2 * PAGE), "c")
        assert refused.value.code == code
        if first is not None:
            await rig.layers.unmount(first, "c")

    run(test, limits)


@pytest.mark.parametrize("step", ["plug", "Add"])
def test_what_fails_leaves_nothing_and_works_when_tried_again(run, step):
    async def test(rig: Rig) -> None:
        path = rig.file("a", 100)
        rig.machine.fail[step] = MachineFailed("x") if step == "plug" else GuestFailed("x")
        with pytest.raises((MachineFailed, GuestFailed)):
            await rig.layers.mount(path, "c")
        assert rig.journal.held("pod") == []
        mount = await rig.layers.mount(path, "c")
        assert mount.offset == 0
        assert mount.number == (1 if step == "plug" else 0)  # QEMU may have taken the first all the same
        await rig.layers.unmount(mount, "c")

    run(test)


def test_what_cannot_be_let_go_of_stays_and_is_tried_again(run):
    async def test(rig: Rig) -> None:
        mount = await rig.layers.mount(rig.file("a", 100), "c")
        rig.machine.fail["Remove"] = GuestFailed("x")
        with pytest.raises(GuestFailed):
            await rig.layers.unmount(mount, "c")
        assert [row.state for row in rig.journal.held("pod")] == ["releasing"]
        assert len(rig.layers.items()) == 1
        await rig.layers.unmount(mount, "c")

    run(test)


def test_with_the_machine_everything_is_gone(run):
    async def test(rig: Rig) -> None:
        mount = await rig.layers.mount(rig.file("a", 100), "c")
        rig.machine.die()
        rig.machine.there.clear()
        await rig.layers.unmount(mount, "c")

    run(test)


def test_copying_from_another_filesystem(tmp_path):
    source, target = os.memfd_create("source"), os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    try:
        data = os.urandom(3 * MIB + 17)
        os.write(source, data)
        copy_into(source, target, PAGE)
        assert os.pread(target, len(data) + 100, PAGE) == data
    finally:
        os.close(source)
        os.close(target)
