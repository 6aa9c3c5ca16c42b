"""Slots: taken before anything is done, free when the device is gone.  The rest is the engine's suite."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, InvalidInput, MachineFailed, NotFound
from holdfast.machine.sandbox import Slot
from holdfast.storage.attachments import Attachments, Disk, add_causes, while_alive
from holdfast.storage.counted import HalfMade
from holdfast.storage.journal import Journal
from tests.fakes import FakeSandbox, Faulty

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


@pytest.fixture
def run(state_root: Path, tmp_path: Path):
    def run(test: Callable[[Attachments, Faulty, Journal], Awaitable[None]], reserved: tuple[Slot, ...] = ()) -> None:
        async def main() -> None:
            with Journal(state_root) as journal:
                sandbox = Faulty(FakeSandbox(str(tmp_path)))
                try:
                    await test(Attachments(sandbox, journal, "pod", reserved), sandbox, journal)
                finally:
                    await sandbox.close()

        asyncio.run(main())

    return run


def disk(folder: Path, name: str = "disk", **more: object) -> Disk:
    (folder / name).write_bytes(bytes(8192))
    return Disk(str(folder / name), "disk", **{"read_only": False, **more})


def test_lowest_free_slot_first_and_reserved_ones_never(run, tmp_path):
    async def test(attachments: Attachments, _sandbox: Faulty, _journal: Journal) -> None:
        assert attachments.free == 254
        made = [await attachments.attach(disk(tmp_path, f"d{n}"), "a") for n in range(65)]
        assert [str(a.slot) for a in made[:3]] == ["0:1", "0:2", "0:3"]
        assert [str(a.slot) for a in made[-2:]] == ["1:1", "1:2"]
        await attachments.detach(made[1], "a")
        assert (await attachments.attach(disk(tmp_path, "again"), "a")).slot == Slot(0, 2)
        assert [a.slot for a, _ in attachments.items()] == sorted(a.slot for a, _ in attachments.items())

    run(test, (Slot(0, 0), Slot(1, 0)))


def test_what_is_known_of_an_attachment(run, tmp_path):
    async def test(attachments: Attachments, _sandbox: Faulty, journal: Journal) -> None:
        made = await attachments.attach(disk(tmp_path), "a")
        assert made.size_bytes == 8192
        [row] = journal.held("pod")
        assert (row.id, row.kind, row.object) == (made.row, "attachment", str(tmp_path / "disk"))
        assert row.detail.items() >= {"slot": "0:0", "read_only": False, "kind": "disk", "format": "raw"}.items()

    run(test)


@pytest.mark.parametrize(("kind", "leased"), [("disk", True), ("layer", False), ("scratch", False)])
def test_only_what_users_bring_is_leased(run, tmp_path, kind, leased):
    async def test(attachments: Attachments, _sandbox: Faulty, journal: Journal) -> None:
        (tmp_path / "file").write_bytes(bytes(512))
        made = await attachments.attach(Disk(str(tmp_path / "file"), kind, read_only=True), "a")
        assert bool(journal.leases()) == leased
        await attachments.detach(made, "a")
        assert journal.leases() == []

    run(test)


def test_other_formats_of_one_file_are_other_attachments(run, tmp_path):
    async def test(attachments: Attachments, sandbox: Faulty, _journal: Journal) -> None:
        one = disk(tmp_path, read_only=True)
        first = await attachments.attach(one, "a")
        second = await attachments.attach(Disk(one.path, "disk", True, "qcow2"), "a")
        assert first.slot != second.slot
        assert await sandbox.plugged() == {first.slot, second.slot}

    run(test)


def test_an_unnamed_file(run, tmp_path):
    async def test(attachments: Attachments, _sandbox: Faulty, _journal: Journal) -> None:
        def unnamed() -> int:
            fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
            os.ftruncate(fd, 4096)
            return fd

        made = await attachments.attach(Disk("scratch of c", "scratch", read_only=False), "a", unnamed)
        assert made.size_bytes == 4096
        await attachments.detach(made, "a")

    run(test)  # a descriptor that is left fails the test


def test_opening_says_what_is_wrong(tmp_path):
    with pytest.raises(NotFound, match="open disk"):
        Disk(str(tmp_path / "nosuch"), "disk", read_only=True).open()
    with pytest.raises(InvalidInput, match="neither a file nor a block device"):
        Disk(str(tmp_path), "disk", read_only=True).open()
    with pytest.raises(InvalidInput, match="open disk") as failure:
        Disk(str(tmp_path), "disk", read_only=False).open()
    assert failure.value.code == "source-unreadable"
    os.mkfifo(tmp_path / "fifo")  # opening it does not wait for a writer
    with pytest.raises(InvalidInput, match="neither"):
        Disk(str(tmp_path / "fifo"), "disk", read_only=True).open()
    (tmp_path / "file").write_bytes(b"x")
    status = (tmp_path / "file").stat()
    with pytest.raises(InvalidInput, match="another file") as failure:
        Disk(str(tmp_path / "file"), "disk", True, device=status.st_dev, inode=status.st_ino + 1).open()
    assert failure.value.code == "source-changed"
    fd = Disk(str(tmp_path / "file"), "disk", True, device=status.st_dev, inode=status.st_ino).open()
    assert stat.S_ISREG(os.fstat(fd).st_mode)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_failed_plug_that_could_not_be_undone_is_retried(run, tmp_path):
    async def test(attachments: Attachments, sandbox: Faulty, journal: Journal) -> None:
        one = disk(tmp_path)
        sandbox.fail("plug")
        sandbox.fail("unplug", always=True)
        with pytest.raises(HoldfastError, match="plug: injected; also: unplug: injected"):
            await attachments.attach(one, "a")
        assert attachments.free == 255
        assert [holders for _, holders in attachments.items()] == [[]]
        assert len(await attachments.retry()) == 1
        sandbox.heal()
        assert await attachments.retry() == []
        assert attachments.free == 256
        assert journal.held() == journal.leases() == []
        await attachments.attach(one, "a")

    run(test)


def test_while_alive(tmp_path):
    async def test() -> None:
        sandbox = FakeSandbox(str(tmp_path))

        async def fail() -> None:
            raise MachineFailed("use the machine")

        async def die() -> None:
            sandbox.die()
            await fail()

        with pytest.raises(MachineFailed):
            await while_alive(sandbox, fail)
        await while_alive(sandbox, die)
        await while_alive(sandbox, fail)

    asyncio.run(test())


def test_causes_are_added_to_errors_that_have_them():
    error = HoldfastError("x")
    add_causes(error, [OSError("y")])
    assert str(error) == "x; also: y"
    add_causes(OSError("z"), [OSError("y")])
    add_causes(HalfMade(error, 1), [OSError("y")])
