"""Filesystems are told by their superblocks, and nothing else is taken for one."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.mounts import probe
from holdfast.mounts.probe import NO_REPLAY, probe_filesystem

if TYPE_CHECKING:
    from pathlib import Path


def look(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return probe_filesystem(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("name", "offset", "magic"), probe._MAGICS)
def test_every_magic(tmp_path, name, offset, magic):
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(1 << 20)
        file.seek(offset)
        file.write(magic)
    assert look(tmp_path / "disk") == name
    with open(tmp_path / "disk", "rb+") as file:
        file.seek(offset)
        file.write(bytes(len(magic)))
    assert look(tmp_path / "disk") == ""


@pytest.mark.parametrize("size", [0, 1, 512, 1079, 1080, 1081, 4096, 0x10047])
def test_short_disks(tmp_path, size):
    (tmp_path / "disk").write_bytes(bytes(size))
    assert look(tmp_path / "disk") == ""


def test_a_magic_that_is_cut_off(tmp_path):
    for name, offset, magic in probe._MAGICS:
        (tmp_path / "disk").write_bytes(bytes(offset) + magic[:-1])
        assert look(tmp_path / "disk") == "", name


@pytest.mark.parametrize(
    ("program", "arguments", "name"),
    [
        ("mke2fs", ["-q", "-F", "-t", "ext4"], "ext4"),
        ("mke2fs", ["-q", "-F", "-t", "ext2"], "ext4"),  # the kernel's ext4 mounts all three
        ("mkswap", ["-q"], "swap"),
        ("mkfs.vfat", ["-F", "32"], "vfat"),
        ("mkfs.vfat", ["-F", "12"], "vfat"),
        ("mkfs.xfs", ["-q"], "xfs"),
        ("mkfs.btrfs", ["-q"], "btrfs"),
    ],
)
def test_what_the_tools_make(tmp_path, program, arguments, name):
    path = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        pytest.skip(f"no {program} here")
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(320 << 20 if program in ("mkfs.xfs", "mkfs.btrfs") else 40 << 20)
    subprocess.run([path, *arguments, disk], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert look(disk) == name


def test_erofs(tmp_path):
    path = shutil.which("mkfs.erofs")
    if path is None:
        pytest.skip("no mkfs.erofs here")
    (tmp_path / "tree").mkdir()
    subprocess.run([path, "--quiet", tmp_path / "disk", tmp_path / "tree"], check=True, stdout=subprocess.DEVNULL)
    assert look(tmp_path / "disk") == "erofs"


@given(st.binary(max_size=2000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_anything_may_be_on_a_disk(tmp_path, data):
    (tmp_path / "disk").write_bytes(data)
    assert look(tmp_path / "disk") in {"", *(name for name, _, _ in probe._MAGICS)}


def test_a_disk_that_cannot_be_read():
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            probe_filesystem(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_filesystems_with_a_journal_are_not_replayed_when_read_only():
    assert NO_REPLAY == {"ext4": "noload", "xfs": "norecovery"}
