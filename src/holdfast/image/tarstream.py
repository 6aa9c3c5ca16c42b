"""Headers of a tar stream, read with the standard library's parser and kept on a short leash.

:mod:`tarfile` knows every dialect (ustar, GNU, pax, sparse), but trusts what it reads: a header may ask it to read
gigabytes into memory, or to go backwards for ever (CVE-2025-8194).  So it never sees the file: it sees a
:class:`TarStream`, which goes forward only and hands out a bounded number of header bytes for each entry.  The payload
does not pass through tarfile: :meth:`TarStream.copy` writes it from the chunk it came in.  A damaged header in the
middle, where tarfile ends the archive without a word, is an error here.

Nothing is extracted here; an :class:`Entry` is what the archive *says*.
"""

from __future__ import annotations

import base64
import os
import tarfile
from typing import TYPE_CHECKING, cast

import msgspec

from holdfast.errors import Corrupt, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import IO

# All headers of one entry: names, link targets and xattrs.  Linux allows 64 KiB to one xattr (xattr(7)).
_HEADER_BYTES = 1 << 20
# What the chunks of the payload are written in when they come in bigger ones.
_COPY_BYTES = 1 << 20
_LARGEST_OFFSET = 1 << 62

_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.GNUTYPE_SPARSE: "file",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "directory",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
_XATTR_PREFIXES = ("SCHILY.xattr.", "LIBARCHIVE.xattr.")


class Entry(msgspec.Struct):
    """One entry as the archive describes it, checked to be in range and not more.

    Attributes:
        path: cleaned: relative, no empty, ``.`` or ``..`` components; ``b""`` is the root directory.
        kind: file, hardlink, symlink, directory, char, block or fifo.
        size: bytes of the file when it is written out.
        stored: bytes of payload in the stream.
        sparse: (offset, length) of the pieces that the payload holds, or None if it is the whole file.
        target: of a link; of a hard link cleaned as ``path`` is.
    """

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    stored: int = 0
    sparse: list[tuple[int, int]] | None = None
    target: bytes = b""
    device: int = 0
    xattrs: dict[str, bytes] = {}


class TarStream:
    """A forward-only file made of chunks; what tarfile reads from it is bounded.

    Args:
        chunks: the uncompressed tar in pieces of any size.
        subject: what to name in errors.
    """

    def __init__(self, chunks: Iterator[bytes], subject: str) -> None:
        self._chunks = chunks
        self._subject = subject
        self._piece = memoryview(b"")
        self._at = 0
        self._budget = _HEADER_BYTES
        self._ended = False

    # -- what tarfile calls

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._at or offset > _LARGEST_OFFSET:
            raise _corrupt(self._subject, "an entry's size is not possible")
        self._skip(offset - self._at)
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._budget:
            raise _corrupt(self._subject, f"an entry's headers are larger than {_HEADER_BYTES} bytes")
        self._budget -= size
        out = bytearray()
        while len(out) < size and self._fill():
            take = min(size - len(out), len(self._piece))
            out += self._piece[:take]
            self._advance(take)
        return bytes(out)

    # -- what we call

    def next_entry(self) -> None:
        """A new entry begins: it may use as many header bytes as any."""
        self._budget = _HEADER_BYTES

    def copy(self, fd: int, size: int) -> None:
        """Writes the next ``size`` bytes to ``fd`` where it stands."""
        left = size
        while left:
            if not self._fill():
                raise _corrupt(self._subject, "it ends in the middle of a file")
            written = os.write(fd, self._piece[: min(left, _COPY_BYTES)])
            self._advance(written)
            left -= written

    def drain(self) -> None:
        """Reads to the end, so that all of it has been counted and hashed."""
        while self._fill():
            self._advance(len(self._piece))

    def _skip(self, size: int) -> None:
        while size and self._fill():
            take = min(size, len(self._piece))
            self._advance(take)
            size -= take

    def _advance(self, size: int) -> None:
        self._piece = self._piece[size:]
        self._at += size

    def _fill(self) -> bool:
        while not self._piece and not self._ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
            else:
                self._piece = memoryview(chunk)
        return bool(self._piece)


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header behind the first entry for the end of the archive; this does not."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile)
        except _END:
            raise
        except _HEADER_ERROR as error:
            raise _corrupt("", f"damaged header: {error}") from None


_HEADER_ERROR = tarfile.HeaderError
# The two ways in which an archive may end: a block of zeros, or nothing any more.
_END: tuple[type[Exception], ...] = (
    tarfile.EOFHeaderError,  # type: ignore[attr-defined]
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
)


def entries(stream: TarStream, subject: str) -> Iterator[Entry]:
    """The entries in order; before the next is asked for, a file's payload may be taken with ``stream.copy``.

    Raises:
        Corrupt: this is no tar archive, or it is damaged.
        InvalidInput: an entry climbs out of the root, or its name cannot be one.
    """
    try:
        archive = tarfile.TarFile(
            fileobj=cast("IO[bytes]", stream), tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        )
        while (info := archive.next()) is not None:
            # tarfile would remember every entry for ever.
            archive.members.clear()  # type: ignore[attr-defined]
            yield _entry(info, subject)
            stream.next_entry()
    except (tarfile.TarError, ValueError, IndexError, OverflowError, UnicodeError) as error:
        if isinstance(error, tarfile.ReadError) and str(error) == "empty file":
            return
        raise _corrupt(subject, error) from error


def clean(path: bytes, subject: str = "") -> bytes:
    """``path`` without leading slashes and without empty, ``.`` and ``..`` components.

    Raises:
        InvalidInput: it climbs above the root (``archive-escapes``), or holds a NUL byte.
    """
    if b"\0" in path:
        raise InvalidInput("archive has a name with a NUL byte", subject=subject, why=path, code="bad-archive-name")
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not parts:
                raise InvalidInput(
                    "archive names a path outside of it", subject=subject, why=path, code="archive-escapes"
                )
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def _corrupt(subject: str, why: object) -> Corrupt:
    return Corrupt("read tar archive", subject=subject, why=why, code="bad-archive")


def _entry(info: tarfile.TarInfo, subject: str) -> Entry:
    name = info.name.encode("utf-8", "surrogateescape")
    kind = _KINDS.get(info.type)
    if kind is None:
        raise _corrupt(subject, f"{name!r} has unknown type {info.type!r}")
    entry = Entry(
        path=clean(name, subject),
        kind=kind,
        mode=info.mode & 0o7777,
        uid=_within("owner", info.uid, 0xFFFFFFFE, name, subject),
        gid=_within("group", info.gid, 0xFFFFFFFE, name, subject),
        mtime_ns=_mtime_ns(info, name, subject),
        xattrs=_xattrs(info.pax_headers) if len(info.pax_headers) else {},
    )
    if kind == "file":
        _payload(info, entry, subject)
    elif kind in ("hardlink", "symlink"):
        target = info.linkname.encode("utf-8", "surrogateescape")
        if not target or b"\0" in target:
            raise _corrupt(subject, f"{name!r} has a bad target")
        entry.target = clean(target, subject) if kind == "hardlink" else target
    elif kind in ("char", "block"):
        # The kernel's dev_t: 12 bits of major, 20 of minor (kdev_t.h).
        entry.device = os.makedev(
            _within("major", info.devmajor, (1 << 12) - 1, name, subject),
            _within("minor", info.devminor, (1 << 20) - 1, name, subject),
        )
    return entry


def _payload(info: tarfile.TarInfo, entry: Entry, subject: str) -> None:
    entry.size = entry.stored = _within("size", info.size, _LARGEST_OFFSET, entry.path, subject)
    # The stubs have it as bytes.
    pieces = cast("list[tuple[int, int]] | None", info.sparse)
    if pieces is None:
        return
    end = stored = 0
    for offset, length in pieces:
        if length < 0 or offset < end or offset + length > entry.size:
            raise _corrupt(subject, f"{entry.path!r}: bad sparse map")
        end = offset + length
        stored += length
    entry.stored, entry.sparse = stored, pieces


def _within(what: str, value: int, most: int, name: bytes, subject: str) -> int:
    if not 0 <= value <= most:
        raise _corrupt(subject, f"{name!r}: {what} {value} is out of range")
    return value


def _mtime_ns(info: tarfile.TarInfo, name: bytes, subject: str) -> int:
    # tarfile makes a float of the decimal in the pax header, which loses nanoseconds.
    text = info.pax_headers.get("mtime", "")
    if text:
        whole, _, fraction = text.partition(".")
        digits = (fraction + "000000000")[:9]
        if whole.lstrip("-").isdecimal() and digits.isdecimal():
            seconds, part = int(whole), int(digits)
            value = seconds * 10**9 + (-part if whole.startswith("-") else part)
        else:
            raise _corrupt(subject, f"{name!r}: bad time {text!r}")
    else:
        value = int(info.mtime) * 10**9
    if not -(1 << 63) <= value < 1 << 63:
        raise _corrupt(subject, f"{name!r}: time is out of range")
    return value


def _xattrs(headers: Mapping[str, str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for key, value in headers.items():
        for prefix in _XATTR_PREFIXES:
            if key.startswith(prefix):
                raw = value.encode("utf-8", "surrogateescape")
                name = key[len(prefix) :]
                if prefix == "SCHILY.xattr.":
                    found[name] = raw
                else:
                    found.setdefault(name, _base64(raw))
    return found


def _base64(raw: bytes) -> bytes:
    # libarchive leaves the padding out.
    return base64.b64decode(raw + b"=" * (-len(raw) % 4))
