"""Fills in what a layer leaves to the layers below it.

An archive may hold ``tmp/a`` and no ``tmp``: applied on top of the layers below, ``tmp`` keeps the mode it has there;
as an overlay's layer of its own, a ``tmp`` of our invention would hide that one.  The same goes for a hard link to a
file of a layer below, and for ``lib/a`` where ``lib`` is a link to ``usr/lib`` below.  All are rare, and all can be
answered by reading the archives below once more, topmost first.

A disk made so depends on the layers below it, and is kept under a name that says so.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from holdfast.errors import Corrupt
from holdfast.image.extract import Extraction, reading
from holdfast.image.tarstream import Entry, TarStream, entries
from holdfast.mounts.root import split

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.image.layout import PlannedLayer

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
# Links to links, over layers; as many as the kernel follows.
_MOST_ROUNDS = 40


def depends(extraction: Extraction) -> bool:
    """Whether the layer would look different on other layers below."""
    return bool(extraction.implied or extraction.wanted)


def fill(extraction: Extraction, below: list[PlannedLayer], check: Callable[[], None]) -> None:
    """Completes an extraction; call it after ``write`` and before ``finish``.

    Args:
        below: the layers under it, topmost first.
        check: called for every chunk that is read; raises to stop.

    Raises:
        Corrupt: a hard link's file is in no layer.
    """
    known: set[bytes] = set()
    files = {target: target for target in extraction.wanted if not extraction.root.exists(target)}
    for _ in range(_MOST_ROUNDS):
        directories = extraction.implied - known
        if not directories and not files:
            break
        search = _Search(extraction, directories, files)
        for layer in below:
            if not search.pending():
                break
            with reading(layer, check) as stream:
                search.layer(stream, layer.diff_id)
        known |= directories
        files = search.aliases
        for path, target in search.moved:
            _move(extraction, path, target)
    for path in extraction.implied - known:
        _plain(extraction, path)
    _link(extraction)


class _Search:
    """One look through the layers below, topmost first."""

    def __init__(self, extraction: Extraction, directories: set[bytes], files: dict[bytes, bytes]) -> None:
        self.extraction = extraction
        # Directories that are new here have nothing below.
        fresh, opaque = extraction.whiteouts, extraction.opaque
        hidden = {path for path in directories if _under(path, opaque) or _at_or_under(path, fresh)}
        self.directories = directories - hidden
        self.files = dict(files)
        self.aliases: dict[bytes, bytes] = {}
        self.moved: list[tuple[bytes, bytes]] = []
        for path in directories:
            _plain(extraction, path)

    def pending(self) -> bool:
        """Whether anything is still looked for."""
        return bool(self.directories or self.files)

    def layer(self, stream: TarStream, subject: str) -> None:
        """Looks through one layer."""
        found: dict[bytes, Entry] = {}
        written: set[bytes] = set()
        hidden: set[bytes] = set()
        opaque: set[bytes] = set()
        for entry in entries(stream, subject):
            head, _, name = entry.path.rpartition(b"/")
            if name == _OPAQUE:
                opaque.add(head)
            elif name.startswith(_WHITEOUT):
                hidden.add(entry.path[: len(entry.path) - len(name)] + name[len(_WHITEOUT) :])
            elif entry.path in self.directories:
                found[entry.path] = entry
            elif entry.path in self.files:
                written.add(entry.path)
                self._take(entry, self.files[entry.path], stream)
        for path, entry in found.items():
            self._use(path, entry)
        sought = self.directories | set(self.files)
        gone = {path for path in sought if _at_or_under(path, hidden) or _under(path, opaque)}
        self.directories -= set(found) | gone
        for path in written | gone:
            self.files.pop(path, None)

    def _take(self, entry: Entry, name: bytes, stream: TarStream) -> None:
        self.aliases.pop(entry.target, None)
        if entry.kind == "hardlink":
            self.aliases[entry.target] = name
        elif entry.kind != "directory":
            entry.path = name
            self.extraction.add(entry, stream)

    def _use(self, path: bytes, entry: Entry) -> None:
        if entry.kind == "directory":
            self.extraction.adopt(entry)
        elif entry.kind == "symlink":
            head = b"" if entry.target.startswith(b"/") else split(path)[0]
            self.moved.append((path, _lexical(head, entry.target)))


def _lexical(head: bytes, target: bytes) -> bytes:
    parts = head.split(b"/") if head else []
    for part in target.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def _plain(extraction: Extraction, path: bytes) -> None:
    """What a directory gets that nobody describes: not what a set-group-id parent gave it."""
    if extraction.root.exists(path):
        extraction.adopt(Entry(path, "directory", 0o755, 0, 0, 0))
        extraction.implied.add(path)


def _move(extraction: Extraction, path: bytes, target: bytes) -> None:
    """Moves what is in ``path`` to where the link below leads, and leaves the link to show through."""
    root = extraction.root
    if not target or _at_or_under(target, {path}) or not root.exists(path):
        raise Corrupt(
            "extract layer",
            subject=extraction.subject,
            why=f"{path!r} is a link to {target!r} below",
            code="bad-archive",
        )
    work = [(path, target)]
    emptied = []
    while work:
        old, new = work.pop()
        extraction.make_directory(new)
        emptied.append(old)
        for name in root.listdir(old):
            one, other = old + b"/" + name, new + b"/" + name
            if not root.exists(other):
                root.rename(one, other)
            elif stat.S_ISDIR(root.stat(one).st_mode) and stat.S_ISDIR(root.stat(other).st_mode):
                work.append((one, other))
            else:
                root.remove_tree(other)
                root.rename(one, other)
    for old in reversed(emptied):
        root.rmdir(old)
    extraction.renamed(path, target)


def _link(extraction: Extraction) -> None:
    for target, names in extraction.wanted.items():
        for name in names:
            if extraction.root.exists(name):
                continue
            if not extraction.root.exists(target):
                raise Corrupt(
                    "extract layer", subject=extraction.subject, code="bad-archive",
                    why=f"{os.fsdecode(name)!r} is a hard link to {os.fsdecode(target)!r}, which is in no layer",
                )  # fmt: skip
            try:
                extraction.root.link(target, name)
            except (PermissionError, NotADirectoryError, FileNotFoundError) as error:
                # A directory came to be where the target should be, or something else where its parent was.
                raise Corrupt(
                    "extract layer", subject=extraction.subject, code="bad-archive",
                    why=f"{os.fsdecode(name)!r} cannot be a hard link to {os.fsdecode(target)!r}: {error.strerror}",
                ) from None  # fmt: skip


def _under(path: bytes, directories: set[bytes]) -> bool:
    return (
        any(path.startswith(directory + b"/") or not directory for directory in directories) if directories else False
    )


def _at_or_under(path: bytes, directories: set[bytes]) -> bool:
    return path in directories or any(path.startswith(directory + b"/") for directory in directories if directory)
