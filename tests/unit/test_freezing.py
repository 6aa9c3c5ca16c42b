"""What an engine holds, as data, and back in another engine: on a fake machine."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.errors import HoldfastError
from holdfast.storage.engine import Engine
from holdfast.storage.fork_policy import emptied
from holdfast.storage.frozen import FrozenDisk, FrozenStorage
from holdfast.storage.journal import Journal
from holdfast.storage.steps import MountDisk
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


class Two:
    """The engines of a pod and of its copy, on one state root."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        self.machine, self.copied = FakeSandbox(str(folder / "a")), FakeSandbox(str(folder / "b"))
        self.engine, self.copy = (
            Engine(machine, journal, pod, folder) for machine, pod in ((self.machine, "p"), (self.copied, "q"))
        )

    def disk(self, name: str) -> str:
        path = self.folder / name
        path.write_bytes(b"filesystem".ljust(4096, b"\0"))
        return str(path)

    async def hold(self, holder: str, path: str, *, read_only: bool, **more: Any) -> None:
        await self.engine.prepare(holder, (step(path, read_only=read_only, **more),))

    def record(self) -> FrozenStorage:
        """As it is when it has been in another process."""
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.engine.freeze()), type=FrozenStorage)

    async def adopt(self, record: FrozenStorage) -> None:
        """The machine has the same in the same places, and each disk it may write to is a file of its own."""
        self.copied.mounts = dict(self.machine.mounts)
        self.copied.devices = set(self.machine.devices)

        async def plug(disk: FrozenDisk) -> int:
            attachment = disk.attachment
            fd = os.dup(self.machine.disks[attachment.slot].fd)
            try:
                await self.copied.plug_disk(attachment.slot, fd, "raw", attachment.disk.read_only, False)
            finally:
                os.close(fd)
            return self.copied.disks[attachment.slot].fd

        await self.copy.adopt(record, plug)

    async def release(self) -> None:
        for engine in (self.engine, self.copy):
            for holder in engine.held():
                await engine.release(holder)


def step(path: str, **more: Any) -> MountDisk:
    status = os.stat(path)
    return MountDisk(id="m0", path=path, device=status.st_dev, inode=status.st_ino, disk_format="raw", **more)


@pytest.fixture
def run(tmp_path):
    def run(test: Callable[[Two], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            with Journal(tmp_path / "state") as journal:
                for pod in "pq":
                    journal.add_pod(pod, os.getpid(), "vm")
                two = Two(tmp_path, journal)
                await test(two)
                await two.release()
                assert (two.machine.disks, two.copied.disks, two.copied.mounts) == ({}, {}, {})
                assert (journal.held(), journal.leases()) == ([], [])

        asyncio.run(main())

    return run


def test_an_empty_pod(run):
    async def test(two: Two) -> None:
        record = two.record()
        assert (record.disks, record.mounts, record.holders) == ((), (), ())
        await two.adopt(record)

    run(test)


def test_holders_and_counts(run):
    """Who holds what is the same there, and each lets go of its own."""

    async def test(two: Two) -> None:
        path = two.disk("disk")
        for holder in "ab":
            await two.hold(holder, path, read_only=True)
        await two.adopt(two.record())
        assert two.copy.held() == ["a", "b"]
        assert two.copy.attachments.items()[0][1] == ["a", "b"]
        await two.copy.release("a")
        assert len(two.copied.disks) == len(two.machine.disks) == 1
        await two.copy.release("b")
        assert (two.copied.disks, len(two.machine.disks)) == ({}, 1)

    run(test)


def test_a_disk_that_is_read_is_leased_by_both(run):
    async def test(two: Two) -> None:
        await two.hold("a", two.disk("disk"), read_only=True)
        await two.adopt(two.record())
        assert {lease["pod"] for lease in two.journal.leases()} == {"p", "q"}

    run(test)


def test_a_copy_of_a_disk_that_is_written_is_another_disk(run):
    """It needs no lease, and whoever asks for the file does not get it."""

    async def test(two: Two) -> None:
        path = two.disk("disk")
        await two.hold("a", path, read_only=False)
        await two.adopt(two.record())
        assert {lease["pod"] for lease in two.journal.leases()} == {"p"}
        await two.engine.release("a")
        await two.copy.prepare("b", (step(path, read_only=False),))
        assert [holders for _, holders in two.copy.attachments.items()] == [["a"], ["b"]]
        await two.copy.release("b")
        await two.copy.release("a")
        assert two.copied.disks == {}

    run(test)


@pytest.mark.parametrize("fork", ["deny", "share"])
def test_refused(run, fork):
    async def test(two: Two) -> None:
        path = two.disk("disk")
        await two.hold("a", path, read_only=False, fork=fork)
        with pytest.raises(HoldfastError) as caught:
            two.engine.freeze()
        assert caught.value.code == "not-forkable"
        assert path in str(caught.value)

    run(test)


def test_what_is_to_be_empty_is_so_in_copies_of_copies(run):
    async def test(two: Two) -> None:
        paths = [two.disk(name) for name in "abc"]
        await two.hold("a", paths[0], read_only=False, fork="fresh")
        await two.hold("b", paths[1], read_only=False)
        await two.hold("c", paths[2], read_only=True)
        found = emptied(two.record(), {})
        assert found == {"disks": [two.engine.held_by("a").paths["m0"]], "memory": {}}
        await two.adopt(two.record())
        assert emptied(two.copy.freeze(), {}) == found

    run(test)


@pytest.mark.parametrize(
    ("has", "wants", "fits"),
    [
        ("fresh", "fresh", True), ("fresh", "", True), ("", "copy", True),
        ("fresh", "copy", False), ("", "fresh", False), ("deny", "copy", False),
    ],
)  # fmt: skip
def test_who_comes_later_says_the_same_or_nothing(run, has, wants, fits):
    async def test(two: Two) -> None:
        path = two.disk("disk")
        await two.hold("a", path, read_only=False, fork=has)
        if fits:
            await two.hold("b", path, read_only=False, fork=wants)
        else:
            with pytest.raises(HoldfastError) as caught:
                await two.hold("b", path, read_only=False, fork=wants)
            assert caught.value.code == "fork-policy"
            assert two.engine.held() == ["a"]
        assert [a.disk.fork for a, _ in two.engine.attachments.items()] == [has]

    run(test)


def test_while_something_is_released(run):
    async def test(two: Two) -> None:
        await two.hold("a", two.disk("disk"), read_only=True)
        releasing = asyncio.ensure_future(two.engine.release("a"))
        await asyncio.sleep(0)
        with pytest.raises(HoldfastError) as caught:
            two.engine.freeze()
        assert caught.value.code == "busy"
        await releasing

    run(test)
