"""The kernel inside a ``bzImage``, so that the guest need not unpack it.

A distribution's ``bzImage`` unpacks itself with a decompressor that runs in the guest: emulated, that is
two of the four and a half seconds from starting QEMU to the agent.  Unpacked here, once, and without what
only its unpacker needed, it is an ELF file whose Xen note tells QEMU where to enter it (PVH: QEMU 4.0,
Linux 4.21 with ``CONFIG_PVH``).  The one thing lost is that the unpacker places the kernel at a random
address; every clone of one template shares that address anyway.
"""

from __future__ import annotations

import bz2
import lzma
import shutil
import struct
import subprocess
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PT_LOAD, _PT_NOTE = 1, 4
_XEN_PHYS32_ENTRY = 18
_ZSTD_TIMEOUT_S = 60


def unpack(image: bytes) -> bytes:
    """The ELF kernel inside ``image`` if QEMU can enter it, else ``image`` itself, which always works."""
    elf = image if image.startswith(b"\x7fELF") else decompress(_payload(image))
    try:
        return _trimmed(elf) if _is_elf64(elf) and _has_pvh_entry(elf) else image
    except struct.error:
        return image


def _payload(image: bytes) -> bytes:
    """What the boot protocol's header (version 2.08 and newer) says is the packed kernel."""
    if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, 0x206)[0] < 0x208:
        return b""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    return image[start : start + length]


def decompress(data: bytes) -> bytes:
    """``data`` unpacked by what it begins with, or nothing if that cannot be done; what follows it is ignored."""
    try:
        if data.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
            return lzma.LZMADecompressor().decompress(data)
        if data.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(wbits=31).decompress(data)
        if data.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(data)
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            return _zstd(data)
    except (lzma.LZMAError, zlib.error, OSError):
        pass
    return b""


def _zstd(data: bytes) -> bytes:
    """The standard library learns zstd in Python 3.14; until then the program, if it is installed."""
    program = shutil.which("zstd")
    if not program:
        return b""
    try:
        # A failure is not looked at: the size that a kernel ends with is one, after all has been unpacked.
        return subprocess.run(
            [program, "-dcq"], input=data, capture_output=True, check=False, timeout=_ZSTD_TIMEOUT_S
        ).stdout
    except subprocess.TimeoutExpired:
        return b""


def _is_elf64(elf: bytes) -> bool:
    return elf.startswith(b"\x7fELF\x02\x01")


def _segments(elf: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each program header: where it is, its type, and the offset and size of its contents."""
    table, size, count = (struct.unpack_from(form, elf, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56)))
    for at in range(table, table + size * count, size):
        kind, _flags, offset, _vaddr, _paddr, length = struct.unpack_from("<IIQQQQ", elf, at)
        yield at, kind, offset, length


def _has_pvh_entry(elf: bytes) -> bool:
    for _at, kind, offset, length in _segments(elf):
        at, end = offset, offset + length
        while kind == _PT_NOTE and at + 12 <= end:
            name_size, size, note = struct.unpack_from("<III", elf, at)
            if note == _XEN_PHYS32_ENTRY and elf[at + 12 : at + 16] == b"Xen\0":
                return True
            at += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return False


def _trimmed(elf: bytes) -> bytes:
    """``elf`` without what is not loaded: sections, and zeros that end a segment (they hold the .bss)."""
    head = bytearray(elf[:64])
    head[40:48] = bytes(8)  # no section headers: neither their place
    head[58:64] = bytes(6)  # nor their size, count and names
    end = 64
    kept = bytearray(elf)
    kept[:64] = head
    for at, kind, offset, length in _segments(elf):
        if kind == _PT_LOAD:
            length = len(elf[offset : offset + length].rstrip(b"\0"))
            struct.pack_into("<Q", kept, at + 32, length)
        end = max(end, offset + length, at + 56)
    return bytes(kept[:end])
