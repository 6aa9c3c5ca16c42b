"""Bytes that must hash to what they are called: regions of files, verified, and decompressed in a thread of their own.

A :class:`Region` is a piece of an open file: a blob of a layout folder is a whole file, one of an archive is a piece in
the middle.  :func:`verify` hashes one before anything parses it.  :class:`Unpacked` then decompresses it and hashes the
result while another thread writes files: zlib and sha256 let go of the interpreter lock, so the two overlap.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import queue
import re
import shutil
import subprocess
import threading
import zlib
from typing import TYPE_CHECKING

from holdfast.errors import Corrupt, HoldfastError, InvalidInput, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


class Stopped(HoldfastError):
    """Another part of the same import failed, or it was interrupted; this part gave up."""

    code = "stopped"


class Region:
    """``size`` bytes of an open file from ``offset``; the descriptor belongs to somebody else."""

    __slots__ = ("done", "fd", "name", "offset", "size")

    def __init__(self, fd: int, offset: int, size: int, name: str) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.name = name
        #: How far the latest reader has come, in bytes.
        self.done = 0

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in order, a chunk at a time; a file that is cut short meanwhile just ends early."""
        at, end = self.offset, self.offset + self.size
        while at < end:
            chunk = os.pread(self.fd, min(_CHUNK, end - at), at)
            if not chunk:
                return
            at += len(chunk)
            self.done = at - self.offset
            yield chunk

    def head(self, size: int) -> bytes:
        """The first bytes."""
        return os.pread(self.fd, min(size, self.size), self.offset)


def digest_hex(digest: str) -> str:
    """The hex part of a ``sha256:`` digest.

    Raises:
        InvalidInput: it is none; the text may be anything, a path included.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput("not a sha256 digest", subject=digest[:100], code="bad-digest")
    return digest[7:]


def verify(region: Region, digest: str, size: int | None = None, check: Callable[[], None] | None = None) -> None:
    """Hashes the region.

    Args:
        digest: ``sha256:...`` that it must have.
        size: bytes that it must have, if known.
        check: called after each chunk; raises to stop.

    Raises:
        Corrupt: it is something else.
    """
    digest_hex(digest)
    if size is not None and region.size != size:
        raise Corrupt(
            "verify blob", subject=digest, why=f"{region.size} bytes instead of {size}", code="digest-mismatch",
            hint="the image was cut short or changed; fetch it again",
        )  # fmt: skip
    hasher = hashlib.sha256()
    for chunk in region.chunks():
        hasher.update(chunk)
        if check:
            check()
    expect(digest, hasher.hexdigest(), region.name)


def expect(digest: str, found_hex: str, where: str) -> None:
    """Raises :class:`Corrupt` unless the two are the same."""
    if digest != f"sha256:{found_hex}":
        raise Corrupt(
            "verify blob", subject=digest, why=f"{where} hashes to sha256:{found_hex}", code="digest-mismatch",
            hint="the image was cut short or changed; fetch it again",
        )  # fmt: skip


def compression(region: Region) -> str:
    """``gzip``, ``zstd`` or ``none``, by the first bytes: media types are known to lie about it."""
    head = region.head(4)
    if head.startswith(_GZIP):
        return "gzip"
    return "zstd" if head == _ZSTD else "none"


def unpack(region: Region) -> Iterator[bytes]:
    """The uncompressed bytes of a region, in chunks of bounded size.

    Raises:
        Corrupt: the compressed data are damaged.
        Unsupported: zstd, and nothing on this host can read it.
    """
    kind = compression(region)
    if kind == "gzip":
        return _gunzip(region)
    if kind == "zstd":
        return _unzstd(region)
    return region.chunks()


def _gunzip(region: Region) -> Iterator[bytes]:
    # Parallel compressors and seekable layers write many members one after another (RFC 1952, 2.2).
    member = zlib.decompressobj(wbits=31)
    started = False
    try:
        for chunk in region.chunks():
            data = chunk
            while data:
                if member.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    member, started = zlib.decompressobj(wbits=31), False
                out = member.decompress(data, _CHUNK)
                started = True
                data = member.unused_data if member.eof else member.unconsumed_tail
                if out:
                    yield out
        while not member.eof and (out := member.decompress(member.unconsumed_tail, _CHUNK)):
            yield out
    except zlib.error as error:
        raise Corrupt("decompress blob", subject=region.name, why=error, code="bad-gzip") from error
    if started and not member.eof:
        raise Corrupt("decompress blob", subject=region.name, why="it was cut short", code="bad-gzip")


def _unzstd(region: Region) -> Iterator[bytes]:
    if shutil.which("zstd"):
        return _unzstd_by_tool(region)
    if importlib.util.find_spec("zstandard"):
        return _unzstd_by_module(region)
    raise Unsupported(
        "decompress blob", subject=region.name, why="it is compressed with zstd, which nothing here can read",
        hint="apt-get install zstd", code="no-zstd",
    )  # fmt: skip


def _unzstd_by_module(region: Region) -> Iterator[bytes]:
    import zstandard  # type: ignore[import-not-found, unused-ignore]

    def out() -> Iterator[bytes]:
        # One frame after another: the stream reader would stop at the end of the first.
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        try:
            for chunk in region.chunks():
                data = chunk
                while data:
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
        except zstandard.ZstdError as error:
            raise Corrupt("decompress blob", subject=region.name, why=error, code="bad-zstd") from error
        if not frame.eof:
            raise Corrupt("decompress blob", subject=region.name, why="it was cut short", code="bad-zstd")

    return (piece for piece in out() if piece)


def _unzstd_by_tool(region: Region) -> Iterator[bytes]:
    child = subprocess.Popen(
        ["zstd", "-dcq"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin
    assert child.stdout
    assert child.stderr
    stdin, stdout, stderr = child.stdin, child.stdout, child.stderr

    def feed() -> None:
        try:
            with stdin:
                for chunk in region.chunks():
                    stdin.write(chunk)
        except BrokenPipeError:
            pass

    feeder = threading.Thread(target=feed, name="zstd-feeder", daemon=True)
    feeder.start()
    try:
        while chunk := os.read(stdout.fileno(), _CHUNK):
            yield chunk
        why = stderr.read(4096).decode("utf-8", "replace").strip()
        if child.wait():
            raise Corrupt("decompress blob", subject=region.name, why=why, code="bad-zstd")
    finally:
        child.kill()
        stdout.close()
        stderr.close()
        child.wait()
        feeder.join()


class Unpacked:
    """The uncompressed bytes of a region, made by a second thread a few chunks ahead; a context manager.

    Args:
        region: the blob.
        check: called there for each chunk; raises to stop.
    """

    _AHEAD = 8

    def __init__(self, region: Region, check: Callable[[], None] | None = None) -> None:
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(self._AHEAD)
        self._hasher = hashlib.sha256()
        self._closed = False
        self._check = check
        self._source = unpack(region)
        self._thread = threading.Thread(target=self._run, name="unpack-layer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for chunk in self._source:
                if self._closed:
                    return
                if self._check:
                    self._check()
                self._hasher.update(chunk)
                self._queue.put(chunk)
        except BaseException as error:  # handed to the reader, whatever it is
            last = error
        finally:
            close = getattr(self._source, "close", None)
            if close:
                close()
            self._queue.put(last)

    def __iter__(self) -> Iterator[bytes]:
        while not self._closed:
            item = self._queue.get()
            if isinstance(item, bytes):
                yield item
                continue
            self._closed = True
            if item is not None:
                raise item

    def hexdigest(self) -> str:
        """sha256 of everything; valid once the iterator has ended."""
        self._thread.join()
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._closed = True
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
