"""Block devices, and whether the host uses them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from holdfast.linux import syscalls
from holdfast.storage.attachments import Disk
from holdfast.storage.survey import look

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def loop(run_folder: Path) -> Iterator[str]:
    """A loop device with an ext4 on it."""
    file = run_folder / "tmp" / "loop-disk"
    with open(file, "wb") as disk:
        disk.truncate(8 << 20)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", file], check=True)
    done = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=False)
    if done.returncode:
        file.unlink()
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
    file.unlink()


def test_a_block_device(loop):
    found = look(loop, as_disk=True)
    assert (found.kind, found.size_bytes, found.disk_format, found.filesystem) == (
        "block device",
        8 << 20,
        "raw",
        "ext4",
    )
    assert not found.mounted
    disk = Disk(loop, "disk", read_only=False, block_device=True, device=found.device, inode=found.inode)
    fd = disk.open()
    syscalls.fallocate(fd, syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE, 4 << 20, 4096)
    os.close(fd)


def test_a_mounted_one(loop, tmp_path):
    target = tmp_path / "mnt"
    target.mkdir()
    syscalls.mount(loop, str(target), "ext4", syscalls.MS_RDONLY)
    try:
        assert look(loop, as_disk=True).mounted
    finally:
        syscalls.umount(str(target))
    assert not look(loop, as_disk=True).mounted


def test_mounted_where_this_process_does_not_see_it(loop, tmp_path):
    """In another mount namespace, as by a service with one of its own."""
    target = tmp_path / "mnt"
    target.mkdir()
    script = f"mount -o ro {loop} {target} && echo mounted && read -r _"
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "mounted\n"
        assert look(loop, as_disk=True).mounted
        other.stdin.write("\n")
    assert not look(loop, as_disk=True).mounted


def test_only_looked_at_as_a_disk(loop):
    found = look(loop)
    assert (found.kind, found.filesystem, found.mounted) == ("block device", "", False)
