"""The file of a saved pod: a plain tar, and only ever the one that is written here.

::

    manifest.json     what the others are: of each its size, where it has data, and the digest of that
    record, ram, state, disks/<number> ...    the data of a sparse file, one extent after the other

Whatever is read comes from who knows where.  So nothing of a tar's headers is interpreted: what the manifest says
decides what each of them must be, byte for byte, and where; a file that is anything else is damaged.  Digests tell
damage, not malice: who can write a save decides what runs in the pod that it becomes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, Exhausted
from holdfast.machine.sparse import data_of
from holdfast.storage.restore import SavedPod  # noqa: TC001  msgspec reads the types

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RECORD, RAM, STATE = "record", "ram", "state"
_BLOCK = 512
#: Of zeros: a stretch of so many is no data, wherever it is aligned to that.
_STRETCH = 1 << 16
_ZEROS = bytes(_STRETCH)
_CHUNK = 1 << 20
_NO_SUM = "0" * 64
_MOST_MANIFEST_BYTES = 64 << 20
#: Of a member: 64 TiB, more than a disk may have.
_MOST_BYTES = 1 << 46


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a host must have for a saved machine to go on.

    Attributes:
        guest: id of the guest image; ``kernel`` is its kernel's release.
        processor: the host's model, where the machine sees it (KVM); else empty.
        key: see :attr:`MachineConfig.key`.
    """

    guest: str
    kernel: str
    qemu_version: str
    accelerator: str
    processor: str
    memory_bytes: int
    cpus: int
    expandable: bool
    key: str


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sparse file.

    Attributes:
        extents: start and length of each part that has data, in their order.
        sha256: of the data.
    """

    name: str
    size_bytes: int
    extents: tuple[tuple[int, int], ...]
    sha256: str = _NO_SUM

    @property
    def data_bytes(self) -> int:
        """Bytes that are stored."""
        return sum(length for _, length in self.extents)


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that is only read and that must be there: an image's layer, or a disk of the user's.

    Attributes:
        number: its place among the disks' files.
        path: absolute, or in the data folder.
        diff_id: of a layer, ``sha256:...``; empty for a disk.
        images: that have the layer, as they were called.
        mark: tells its contents from others; see :func:`holdfast.pod.saving.mark_of`.
    """

    number: int
    path: str
    block_device: bool
    size_bytes: int
    mark: str
    diff_id: str = ""
    images: tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of it.

    Attributes:
        holdfast: version of Holdfast that wrote it.
        pod, saved_ns: which, and when, since the epoch.
        mounts: what the pod's containers have of the host.
        check: digest of the manifest with zeros in this place.
    """

    version: int
    holdfast: str
    pod: str
    saved_ns: int
    needs: Needs
    members: tuple[Member, ...]
    references: tuple[Reference, ...]
    mounts: SavedPod
    check: str = _NO_SUM

    def member(self, name: str) -> Member:
        """One of the members.

        Raises:
            Corrupt: there is none of that name.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise damaged(f"it has no {name}")

    def encode(self) -> bytes:
        """As JSON, with its own digest."""
        plain = msgspec.structs.replace(self, check=_NO_SUM)
        check = hashlib.sha256(msgspec.json.encode(plain)).hexdigest()
        return msgspec.json.encode(msgspec.structs.replace(plain, check=check))


class _Versioned(msgspec.Struct):
    version: int


def damaged(why: str) -> Corrupt:
    """What is said of a save that is not what it should be."""
    return Corrupt("read saved pod", why=why, code="save-damaged")


def decode(data: bytes) -> Manifest:
    """The manifest that :meth:`Manifest.encode` wrote.

    Raises:
        Corrupt: ``save-damaged``, ``save-version``.
    """
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != FORMAT_VERSION:
            why = f"its format is version {version}, not {FORMAT_VERSION}"
            raise Corrupt("read saved pod", why=why, code="save-version", hint="restore it with the Holdfast it is of")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(f"its manifest: {error}") from None
    if manifest.encode() != data:
        raise damaged("its manifest has changed since it was written")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """What is consistent in itself may still be nonsense, written by somebody else."""
    names = [member.name for member in manifest.members]
    disks = [name.removeprefix("disks/") for name in names[3:]]
    stored = [int(number) for number in disks if number.isascii() and number.isdecimal() and len(number) < 6]
    if names != [RECORD, RAM, STATE, *(f"disks/{number}" for number in stored)]:
        raise damaged("its members are not those of a saved pod")
    referred = [reference.number for reference in manifest.references]
    if sorted(stored + referred) != list(range(len(stored) + len(referred))):
        raise damaged("files of its disks are missing")
    for member in manifest.members:
        end = 0
        for start, length in member.extents:
            if start < end or length <= 0 or start + length > member.size_bytes:
                raise damaged(f"{member.name} has data where none can be")
            end = start + length
        if not 0 <= member.size_bytes <= _MOST_BYTES:
            raise damaged(f"{member.name} has {member.size_bytes} bytes")
    if manifest.member(RAM).size_bytes != manifest.needs.memory_bytes:
        raise damaged("its RAM is not as large as its machine's")


# -- sparse files -----------------------------------------------------------------------------------


def describe(name: str, fd: int) -> Member:
    """A file as a member, without its digest; zeros are no data."""
    size = os.fstat(fd).st_size
    extents: list[tuple[int, int]] = []
    for start, end in data_of(fd, size):
        for at in range(start - start % _STRETCH, end, _STRETCH):
            first, last = max(at, start), min(at + _STRETCH, end)
            data = os.pread(fd, last - first, first)
            if data == _ZEROS[: len(data)]:
                continue
            if extents and sum(extents[-1]) == first:
                extents[-1] = (extents[-1][0], last - extents[-1][0])
            else:
                extents.append((first, last - first))
    return Member(name, size, tuple(extents))


def copy(fd: int, member: Member, target_fd: int) -> str:
    """Writes a file's data to the same places of another; returns their digest."""
    digest = hashlib.sha256()
    for start, length in member.extents:
        at = start
        for data in _read(fd, start, length):
            digest.update(data)
            at = _write_at(target_fd, data, at)
    return digest.hexdigest()


def copy_out(fd: int, member: Member, target_fd: int) -> str:
    """Writes a file's data, at the target's place, one extent after the other; returns their digest."""
    digest = hashlib.sha256()
    for start, length in member.extents:
        for data in _read(fd, start, length):
            digest.update(data)
            write_all(target_fd, data)
    return digest.hexdigest()


def copy_in(fd: int, offset: int, member: Member, target_fd: int) -> None:
    """Makes an empty file what a member is.

    Args:
        offset: where in ``fd`` the member's data begins.

    Raises:
        Corrupt: the data is not what the manifest says.
        Exhausted: no room.
    """
    digest = hashlib.sha256()
    try:
        os.ftruncate(target_fd, member.size_bytes)
        for start, length in member.extents:
            at = start
            for data in _read(fd, offset, length):
                digest.update(data)
                at = _write_at(target_fd, data, at)
            offset += length
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise Exhausted("restore pod", subject=member.name, why=error, code="disk-full") from None
        raise
    if digest.hexdigest() != member.sha256:
        raise damaged(f"{member.name} has changed since it was written")


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of it, at the descriptor's place."""
    while data:
        data = data[os.write(fd, data) :]


def _write_at(fd: int, data: memoryview, at: int) -> int:
    """Writes all of it; returns where it ends."""
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
    return at


def _read(fd: int, start: int, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_CHUNK, length)))
    while length:
        count = os.preadv(fd, [buffer[:length]], start)
        if not count:
            raise damaged("it is shorter than it says")
        yield buffer[:count]
        start, length = start + count, length - count


# -- the tar ----------------------------------------------------------------------------------------


def write(fd: int, manifest: Manifest, sources: Sequence[int]) -> Manifest:
    """Writes the file in one go, the digests last; returns the manifest with them.

    Args:
        fd: of an empty file.
        sources: descriptors of the members.
    """
    room = len(manifest.encode())
    _put_header(fd, MANIFEST, room)
    _pad(fd, room, bytes(room))
    members = []
    for member, source in zip(manifest.members, sources, strict=True):
        _put_header(fd, member.name, member.data_bytes)
        members.append(msgspec.structs.replace(member, sha256=copy_out(source, member, fd)))
        _pad(fd, member.data_bytes)
    write_all(fd, bytes(2 * _BLOCK))
    manifest = msgspec.structs.replace(manifest, members=tuple(members))
    data = manifest.encode()
    assert len(data) == room
    _write_at(fd, memoryview(data), _BLOCK)
    return manifest


def read(fd: int) -> tuple[Manifest, list[int]]:
    """The manifest, and where each member's data begins; that all are there, but not yet what is in them.

    Raises:
        Corrupt: it is no save, or not all of one.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, _BLOCK, 0)
    try:
        length = tarfile.TarInfo.frombuf(head, "ascii", "strict").size
    except (tarfile.TarError, ValueError):
        raise damaged("it is no saved pod") from None
    if head != _header(MANIFEST, length) or not 0 < length <= min(_MOST_MANIFEST_BYTES, size):
        raise damaged("it is no saved pod")
    manifest = decode(os.pread(fd, length, _BLOCK))
    offset = _BLOCK + _rounded(length)
    offsets = []
    for member in manifest.members:
        if os.pread(fd, _BLOCK, offset) != _header(member.name, member.data_bytes):
            raise damaged(f"{member.name} is not where it should be")
        offsets.append(offset + _BLOCK)
        offset += _BLOCK + _rounded(member.data_bytes)
    if offset + 2 * _BLOCK != size:
        raise damaged(f"it has {size} bytes, and should have {offset + 2 * _BLOCK}")
    return manifest, offsets


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def _put_header(fd: int, name: str, size: int) -> None:
    write_all(fd, _header(name, size))


def _pad(fd: int, size: int, data: bytes = b"") -> None:
    write_all(fd, data + bytes(_rounded(size) - size))


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
