"""Locks on disks: among themselves, and with QEMU's own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from holdfast.linux import disk_locks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """An open file of its own, as another process would have: the locks are the open file's."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_readers_or_one_writer(disk, first, second, fits):
    """Values are whether each only reads."""
    with opened(disk) as one, opened(disk) as other:
        disk_locks.share(one, read_only=first)
        if fits:
            disk_locks.share(other, read_only=second)
        else:
            with pytest.raises(BlockingIOError):
                disk_locks.share(other, read_only=second)
    with opened(disk) as one:
        disk_locks.share(one, read_only=False)


@pytest.mark.parametrize("read_only", [True, False])
def test_who_claims_it_is_alone(disk, read_only):
    with opened(disk) as one, opened(disk) as other:
        disk_locks.claim(one)
        with pytest.raises(BlockingIOError):
            disk_locks.claim(other)
        with pytest.raises(BlockingIOError):
            disk_locks.share(other, read_only=read_only)
    with opened(disk) as one, opened(disk) as other:
        disk_locks.share(one, read_only=read_only)
        with pytest.raises(BlockingIOError):
            disk_locks.claim(other)


@pytest.mark.parametrize("how", ["reads", "writes", "claims"])
def test_qemu_is_kept_from_it(disk, tmp_path, how):
    """qemu-img reads, and lets nobody write meanwhile."""
    copy = ["qemu-img", "convert", "-f", "raw", "-O", "raw", disk, tmp_path / "copy"]
    with opened(disk) as fd:
        if how == "claims":
            disk_locks.claim(fd)
        else:
            disk_locks.share(fd, read_only=how == "reads")
        done = subprocess.run(copy, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (how == "reads"), done
    if how != "reads":
        assert "lock" in done.stderr


def test_what_is_no_file_has_none():
    with open("/dev/null", "rb") as device:
        disk_locks.share(device.fileno(), read_only=False)
