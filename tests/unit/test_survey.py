"""Looking at sources: what stands behind a path, never an exception for what is found."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from holdfast.spec.runtime import DISK_TYPES, Mount
from holdfast.storage.survey import look, survey

if TYPE_CHECKING:
    from pathlib import Path


def ext4(path: Path, size: int = 1 << 16) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(1024 + 56)
        file.write(b"\x53\xef")
    return path


def qcow2(path: Path, *, version: int = 3, backing: int = 0, incompatible: int = 0, length: int = 4096) -> Path:
    head = struct.pack(">4sIQ", b"QFI\xfb", version, backing).ljust(72, b"\0") + struct.pack(">Q", incompatible)
    path.write_bytes(head.ljust(length, b"\0")[:length])
    return path


def test_kinds(tmp_path):
    (tmp_path / "file").write_text("five!")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nosuch")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        found = {
            name: look(str(tmp_path / name), as_disk=as_disk).kind
            for as_disk in (False, True)
            for name in ("file", "link", "dangling", "loop", "fifo", "socket", "nosuch", "file/below", "a\0b", "")
        }
    (tmp_path / "socket").unlink()
    (tmp_path / "fifo").unlink()
    assert found == {
        "file": "file", "link": "file", "dangling": "dangling link", "loop": "unreadable", "fifo": "FIFO",
        "socket": "socket", "nosuch": "missing", "file/below": "unreadable", "a\0b": "unreadable", "": "directory",
    }  # fmt: skip
    assert look("/dev/null").kind == "character device"
    assert look("/dev/null", as_disk=True).kind == "character device"
    assert look(str(tmp_path / "nosuch")).why == "No such file or directory"
    assert look("\udcff" * 3).kind == "missing"


def test_identity_is_of_what_the_link_means(tmp_path):
    status = ext4(tmp_path / "disk").stat()
    (tmp_path / "link").symlink_to("disk")
    os.link(tmp_path / "disk", tmp_path / "hard")
    (tmp_path / "dir").mkdir()
    for path in ("disk", "link", "hard", "dir/../disk", "./disk"):
        found = look(f"{tmp_path}/{path}", as_disk=True)
        assert (found.device, found.inode) == (status.st_dev, status.st_ino)
        assert (found.filesystem, found.disk_format, found.size_bytes) == ("ext4", "raw", 1 << 16)


@pytest.mark.parametrize(
    ("more", "disk_format"),
    [
        ({}, "qcow2"),
        ({"version": 2}, "qcow2"),
        ({"version": 2, "incompatible": 4}, "qcow2"),  # version 2 has no such field
        ({"backing": 512}, "qcow2 with another file"),
        ({"version": 2, "backing": 512}, "qcow2 with another file"),
        ({"incompatible": 4}, "qcow2 with another file"),
        ({"incompatible": 3}, "qcow2"),
        ({"length": 60}, "raw"),
    ],
)
def test_qcow2(tmp_path, more, disk_format):
    found = look(str(qcow2(tmp_path / "disk", **more)), as_disk=True)
    assert found.disk_format == disk_format
    assert found.filesystem == ""


def test_a_directory_is_not_looked_into(tmp_path):
    assert look(str(tmp_path), as_disk=True).kind == "directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_disk_that_may_not_be_read(tmp_path):
    ext4(tmp_path / "disk").chmod(0)
    found = look(str(tmp_path / "disk"), as_disk=True)
    assert (found.kind, found.why) == ("unreadable", "Permission denied")


def test_what_is_surveyed(tmp_path):
    disk = str(ext4(tmp_path / "disk"))
    mounts = (
        Mount("/a", "virtual-disk", disk),
        Mount("/b", "bind", str(tmp_path)),
        Mount("/c", "none", str(tmp_path / "x"), ("rbind",)),
        Mount("/d", "tmpfs", "/tmp"),
        Mount("/e", "bind", "relative"),
        Mount("/f", "bind", ""),
    )
    found = survey(mounts, DISK_TYPES)
    assert set(found) == {disk, str(tmp_path), str(tmp_path / "x")}
    assert found[disk].filesystem == "ext4"


def test_a_file_that_is_a_disk_and_shared(tmp_path):
    """Whichever comes last: what is on the disk must be known."""
    disk = str(ext4(tmp_path / "disk"))
    mounts = (Mount("/a", "virtual-disk", disk), Mount("/b", "bind", disk))
    for order in (mounts, mounts[::-1]):
        assert survey(order, DISK_TYPES)[disk].filesystem == "ext4"
