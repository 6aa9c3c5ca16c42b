"""Tells the format of a disk's file by its own signatures, and whether it needs a further file.

=========  ===========================================================================================
``qcow2``  QEMU's docs/interop/qcow2.txt
``vhd``    Microsoft's "Virtual Hard Disk Image Format Specification": the footer, ``conectix``; fixed and dynamic
``vhdx``   [MS-VHDX]: ``vhdxfile``
``raw``    anything else
=========  ===========================================================================================

A file that only adds to another one is never opened: what is read from a disk must not decide which further files
of the host are read.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid

FORMATS = ("raw", "qcow2", "vhd", "vhdx")
_PARENT = " with another file"
_QCOW2_MAGIC = b"QFI\xfb"
_VHD_COOKIE, _VHD_FOOTER, _VHD_DIFFERENCING = b"conectix", 512, 4
_VHDX_REGIONS, _VHDX_BLOCK = (192 << 10, 256 << 10), 64 << 10
_VHDX_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_VHDX_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VHDX_HAS_PARENT = 2


def probe_format(fd: int, size_bytes: int) -> str:
    """One of :data:`FORMATS`, with a note that :func:`needs_parent` knows if it refers to another file.

    Raises:
        OSError: the disk cannot be read.
    """
    head = os.pread(fd, 512, 0)
    if head[:4] == _QCOW2_MAGIC and len(head) >= 80:
        return _qcow2(head)
    if head[:8] == b"vhdxfile":
        return "vhdx" + (_PARENT if _vhdx_has_parent(fd) else "")
    # A fixed disk has the footer at its end alone, the others have a copy in front.
    for footer in (head, os.pread(fd, _VHD_FOOTER, max(size_bytes - _VHD_FOOTER, 0))):
        if _is_vhd_footer(footer):
            return "vhd" + (_PARENT if struct.unpack_from(">I", footer, 60)[0] == _VHD_DIFFERENCING else "")
    return "raw"


def identity(status: os.stat_result) -> tuple[int, int]:
    """What makes two disks the same: device and inode of a file; of a block device its number, whatever node has it."""
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, -1  # no file has this inode
    return status.st_dev, status.st_ino


def needs_parent(disk_format: str) -> bool:
    """Whether the file is only what differs from another one."""
    return disk_format.endswith(_PARENT)


def plain(disk_format: str) -> str:
    """The format alone."""
    return disk_format.removesuffix(_PARENT)


def _qcow2(head: bytes) -> str:
    version, backing_offset = struct.unpack_from(">IQ", head, 4)
    (incompatible,) = struct.unpack_from(">Q", head, 72) if version >= 3 else (0,)
    return "qcow2" + (_PARENT if backing_offset or incompatible & 4 else "")


def _is_vhd_footer(footer: bytes) -> bool:
    """The cookie, and a checksum that is right: eight letters alone may stand at the end of any raw disk."""
    if len(footer) < _VHD_FOOTER or footer[:8] != _VHD_COOKIE:
        return False
    (checksum,) = struct.unpack_from(">I", footer, 64)
    total = sum(footer[:_VHD_FOOTER]) - sum(footer[64:68])
    return bool(checksum == ~total & 0xFFFFFFFF)


def _vhdx_has_parent(fd: int) -> bool:
    """The file parameters in the metadata region say so; a file without them QEMU does not open."""
    for at in _VHDX_REGIONS:
        table = os.pread(fd, _VHDX_BLOCK, at)
        if table[:4] == b"regi":
            for entry in _entries(table, 16, struct.unpack_from("<I", table, 8)[0]):
                if entry[:16] == _VHDX_METADATA:
                    return _parameters_have_parent(fd, struct.unpack_from("<Q", entry, 16)[0])
    return False


def _parameters_have_parent(fd: int, at: int) -> bool:
    if at >= 1 << 62:
        return False
    table = os.pread(fd, _VHDX_BLOCK, at)
    if table[:8] != b"metadata":
        return False
    for entry in _entries(table, 32, struct.unpack_from("<H", table, 10)[0]):
        if entry[:16] == _VHDX_PARAMETERS:
            value = os.pread(fd, 8, at + struct.unpack_from("<I", entry, 16)[0])
            return len(value) == 8 and bool(struct.unpack("<II", value)[1] & _VHDX_HAS_PARENT)
    return False


def _entries(table: bytes, first: int, count: int) -> list[bytes]:
    """The 32-byte entries of a region or metadata table, as many as there is room for."""
    room = max(len(table) - first, 0) // 32
    return [table[first + 32 * index : first + 32 * index + 32] for index in range(min(count, room))]
