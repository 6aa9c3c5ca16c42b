"""Room for copies of disks, taken before anything is copied."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import Exhausted
from holdfast.machine.disk_copies import _reserve
from holdfast.machine.disks import DiskFile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path):
    """A disk with data in one place, and the empty file of its copy."""
    with open(tmp_path / "disk", "w+b") as disk, open(tmp_path / "copy", "w+b") as copy:
        disk.seek(1 << 20)
        disk.write(os.urandom(1 << 20))
        disk.flush()
        for file in (disk, copy):
            os.ftruncate(file.fileno(), 8 << 20)
        yield disk.fileno(), copy.fileno()


def test_the_room_of_what_is_there_is_taken(files):
    disk, copy = files
    assert _reserve(DiskFile(disk, "raw"), copy, 0) == 0
    assert 1 << 20 <= os.fstat(copy).st_blocks * 512 < 2 << 20


def test_others_that_only_count_on_room_count(files):
    disk, copy = files
    needed = _reserve(DiskFile(disk, "qcow2"), copy, 0)
    assert needed >= 1 << 20
    room = os.fstatvfs(copy)
    with pytest.raises(Exhausted) as caught:
        _reserve(DiskFile(disk, "qcow2"), copy, room.f_blocks * room.f_frsize)
    assert caught.value.code == "disk-full"
