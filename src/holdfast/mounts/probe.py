"""Tells a filesystem by its superblock.

Magic numbers and offsets are those of libblkid and of each filesystem's on-disk format description.
A disk that none of these matches is refused: Holdfast never formats a disk that a user brought.
"""

from __future__ import annotations

import os

#: (filesystem, offset of the magic in bytes, magic)
_MAGICS = (
    ("ext4", 1024 + 56, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", 0, b"hsqs"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("iso9660", 0x8001, b"CD001"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("exfat", 3, b"EXFAT   "),
    ("ntfs", 3, b"NTFS    "),
    ("vfat", 82, b"FAT32   "),
    ("vfat", 54, b"FAT1"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("swap", 4086, b"SWAPSPACE2"),
)

#: Mount data that keeps a read-only mount from replaying a journal, which would write.
NO_REPLAY = {"ext4": "noload", "xfs": "norecovery"}


def probe_filesystem(fd: int) -> str:
    """The kernel's name of the filesystem on an open disk or image, or ``""`` when none is recognised.

    Raises:
        OSError: the disk cannot be read.
    """
    head = os.pread(fd, 0x10048, 0)
    for name, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return ""
