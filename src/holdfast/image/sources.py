"""What a user hands in, opened: a layout folder, or an archive of one, or a ``docker save`` archive.

All become a :class:`Source`: names of files, each a :class:`~holdfast.image.blobs.Region`.  An archive is read once for
the places of its members and never unpacked; one that is compressed as a whole is first uncompressed into an unnamed
file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import Corrupt, InvalidInput, NotFound
from holdfast.image.blobs import Region, compression, unpack
from holdfast.image.tarstream import TarStream, entries
from holdfast.mounts.root import Root

if TYPE_CHECKING:
    from types import TracebackType

_HINT = "give an OCI layout folder, an archive of one, or the output of `docker save` or `podman save`"
_MOST_MEMBERS = 100_000
_MOST_LINKS = 8


class Source:
    """Files of an image by name; owns what it opened."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._fds: list[int] = []

    def find(self, name: str) -> Region | None:
        """The file of that name, relative to the layout; None if there is none."""
        raise NotImplementedError

    def region(self, name: str) -> Region:
        """The same.

        Raises:
            Corrupt: it is missing.
        """
        found = self.find(name)
        if found is None:
            raise Corrupt("read image", subject=self.subject, why=f"{name} is missing", code="incomplete-image")
        return found

    def close(self) -> None:
        """Closes every file."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FolderSource(Source):
    """A folder; links in it lead nowhere but inside it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._root = Root(os.fsencode(path))
        self._found: dict[str, Region] = {}

    def find(self, name: str) -> Region | None:
        if name in self._found:
            return self._found[name]
        try:
            # O_NONBLOCK: a FIFO in its place must not hang us.
            fd = self._root.resolve(os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK).release()
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._fds.append(fd)
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            raise Corrupt("read image", subject=self.subject, why=f"{name} is not a regular file", code="bad-layout")
        self._found[name] = Region(fd, 0, os.fstat(fd).st_size, name)
        return self._found[name]

    def close(self) -> None:
        super().close()
        self._root.close()


class ArchiveSource(Source):
    """An archive.

    Args:
        path: the archive.
        scratch: folder on a file system with room for the uncompressed archive, if it is compressed.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        super().__init__(str(path))
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(self._fd)
        try:
            whole = Region(self._fd, 0, os.fstat(self._fd).st_size, str(path))
            if compression(whole) != "none":
                self._fd = self._uncompress(whole, scratch)
                whole = Region(self._fd, 0, os.fstat(self._fd).st_size, str(path))
            self._index(whole)
        except BaseException:
            self.close()
            raise

    def _uncompress(self, whole: Region, scratch: Path) -> int:
        with tempfile.TemporaryFile(dir=scratch) as unnamed:
            fd = os.dup(unnamed.fileno())
        self._fds.append(fd)
        for chunk in unpack(whole):
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
        return fd

    def _index(self, whole: Region) -> None:
        # Payloads are skipped over, not read.
        stream = _Seeking(whole)
        for count, entry in enumerate(entries(stream, self.subject)):
            if count > _MOST_MEMBERS:
                raise Corrupt("read image", subject=self.subject, why="it has too many members", code="bad-archive")
            name = os.fsdecode(entry.path)
            self._members.pop(name, None)
            self._links.pop(name, None)
            if entry.kind == "file" and entry.sparse is None:
                if stream.tell() + entry.size > whole.size:
                    raise Corrupt("read image", subject=self.subject, why="it was cut short", code="bad-archive")
                self._members[name] = (stream.tell(), entry.size)
            elif entry.kind == "symlink":
                self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), os.fsdecode(entry.target)))
            elif entry.kind == "hardlink":
                self._links[name] = os.fsdecode(entry.target)

    def find(self, name: str) -> Region | None:
        name = os.path.normpath(name)
        for _ in range(_MOST_LINKS):
            if name in self._members:
                return Region(self._fd, *self._members[name], name)
            if name not in self._links:
                return None
            name = self._links[name]
        return None


class _Seeking(TarStream):
    """A tar stream over a file that skips payloads by arithmetic instead of reading them."""

    def __init__(self, whole: Region) -> None:
        super().__init__(iter(()), whole.name)
        self._whole = whole

    def _skip(self, size: int) -> None:
        self._at += size

    def _fill(self) -> bool:
        self._piece = memoryview(os.pread(self._whole.fd, 4096, self._at)) if not self._piece else self._piece
        return bool(self._piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._piece = memoryview(b"")
        return super().seek(offset, whence)


def open_source(path: str | Path, scratch: Path) -> tuple[Source, str]:
    """Opens ``path`` or, if there is none of that name, ``path:tag``.

    Returns:
        The source, and the tag (empty if none was given).

    Raises:
        NotFound, InvalidInput: there is nothing, or nothing that can be an image.
    """
    text, tag = os.fspath(path), ""
    if not os.path.exists(text):
        # A tag may be a whole reference, with a colon of its own.
        for at in (at for at, letter in enumerate(text) if letter == ":"):
            if os.path.exists(text[:at]):
                text, tag = text[:at], text[at + 1 :]
                break
        else:
            raise NotFound(
                "find image to import", subject=text, why="no such file or folder", hint=_HINT, code="source-not-found"
            )
    where = Path(text)
    if where.is_dir():
        return FolderSource(where), tag
    if not where.is_file():
        raise InvalidInput(
            "read image", subject=text, why="neither a folder nor a regular file", hint=_HINT, code="bad-layout"
        )
    return ArchiveSource(where, scratch), tag


def scratch_folder(data: Path) -> Path:
    """Where an unnamed file may be made: the data folder, or what will hold it."""
    return next(folder for folder in (data, *data.absolute().parents) if folder.is_dir())
