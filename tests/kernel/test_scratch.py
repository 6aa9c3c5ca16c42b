"""Scratch disks on filesystems of the kernel's: valid, sparse, and gone when there is no room."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import Exhausted
from holdfast.linux import syscalls
from holdfast.storage import scratch
from holdfast.storage.scratch import MIN_BYTES, copy, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a tmpfs of a size."""
    mounted = []

    def make(options: str) -> Path:
        folder = tmp_path / f"small{len(mounted)}"
        folder.mkdir()
        syscalls.mount("none", str(folder), "tmpfs", data=options)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        syscalls.umount(str(folder))


def free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_bsize


def check(fd: int) -> None:
    done = subprocess.run(
        ["/sbin/e2fsck", "-fn", f"/proc/self/fd/{fd}"], pass_fds=[fd], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("where", ["disk", "tmpfs"])
def test_valid_and_sparse(tmp_path, small, where):
    folder = tmp_path if where == "disk" else small("size=32m")
    prepared = prepare(folder, MIN_BYTES)
    fd = copy(prepared)
    try:
        check(fd)
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_blocks * 512 < MIN_BYTES // 8
    finally:
        os.close(fd)


def test_a_loop_mount_of_a_copy_can_be_written(tmp_path):
    fd = copy(prepare(tmp_path, MIN_BYTES))
    target = tmp_path / "mnt"
    target.mkdir()
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", f"/proc/self/fd/{fd}"], pass_fds=[fd], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no loop devices here: {done.stderr.strip()}")
        device = done.stdout.strip()
        try:
            syscalls.mount(device, str(target), "ext4")
            try:
                (target / "file").write_bytes(b"x" * (1 << 20))
                assert os.stat(target).st_uid == 0
            finally:
                syscalls.umount(str(target))
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)
        check(fd)
    finally:
        os.close(fd)


def test_no_room_to_copy(small):
    folder = small("size=16m")
    prepared = prepare(folder, MIN_BYTES)
    with open(folder / "filler", "wb") as file:
        file.write(bytes(free(folder) - (64 << 10)))
    before = free(folder)
    with pytest.raises(Exhausted) as failure:
        copy(prepared)
    assert failure.value.code == "disk-full"
    assert free(folder) == before
    (folder / "filler").unlink()
    os.close(copy(prepared))


def test_no_room_to_prepare(small):
    folder = small("size=64k")
    before = free(folder)
    with pytest.raises(Exhausted) as failure:
        prepare(folder, MIN_BYTES)
    assert failure.value.code == "disk-full"
    assert os.listdir(folder / "scratch") == []
    assert before - free(folder) <= 4096


def test_no_inode_left(small):
    folder = small("size=1m,nr_inodes=3")
    (folder / "scratch").mkdir()
    (folder / "filler").touch()
    with pytest.raises(Exhausted) as failure:
        prepare(folder, MIN_BYTES)
    assert failure.value.code == "disk-full"


def test_a_filesystem_that_clones(tmp_path, monkeypatch):
    """Where files can share blocks a copy takes no space at all; elsewhere the kernel's refusal is not an error."""
    asked = []

    def clone(target: int, request: int, source: int) -> int:
        asked.append(request)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "ioctl", clone)
    os.close(copy(prepare(tmp_path, MIN_BYTES)))
    assert asked == [syscalls.FICLONE]

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(scratch.fcntl, "ioctl", broken)
    with pytest.raises(OSError, match="Input/output"):
        copy(prepare(tmp_path, MIN_BYTES))
