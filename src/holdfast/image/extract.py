"""Writes the entries of one layer into a directory, as an overlay's lower directory wants them.

A layer is written by itself, not on top of those below.  What it deletes of theirs becomes what overlayfs understands:
a whiteout ``.wh.x`` a character device 0:0 named ``x``, an opaque marker the xattr ``trusted.overlay.opaque``.  Both
are applied at the end, so that their place in the archive does not matter: the image specification says that they
concern only the layers below, and the same layer may well bring the name again.

Directories that the archive takes for granted ("implied") and hard links to files of a layer below cannot be written
from this layer alone.  They are made and collected here, and :mod:`holdfast.image.lower` fills them in.

Every name is resolved by :class:`~holdfast.mounts.root.Root`, and the one directory worth keeping open is the last.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from holdfast.errors import Corrupt, InvalidInput, Unsupported
from holdfast.image.blobs import Unpacked, expect, verify
from holdfast.image.tarstream import Entry, TarStream, entries
from holdfast.linux.fds import OwnedFd
from holdfast.mounts.root import Root, remove_tree, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from holdfast.image.layout import PlannedLayer

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_OPAQUE_XATTR = "trusted.overlay.opaque"
# What overlayfs itself reads; an image could otherwise redirect its directories to others of the host's choice.
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
# Holes of a layer, all together: they cost the image nothing, but mkfs.erofs reads every byte of them.
_MOST_HOLES_BYTES = 64 << 30
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Extraction:
    """The tree of one layer while it is written.

    Args:
        where: empty directory; becomes the layer's root.
        subject: what to name in errors, the layer's diff ID.

    Attributes:
        implied: directories that were made because something lies in them, and nothing more is known of.
        wanted: target -> names, of hard links to files that this layer does not have.
        whiteouts: paths that the layers below must not show.
        opaque: directories that hide what the layers below have in them.
    """

    def __init__(self, where: str, subject: str) -> None:
        self.root = Root(where)
        self.subject = subject
        self.implied: set[bytes] = set()
        self.wanted: dict[bytes, list[bytes]] = {}
        self.whiteouts: set[bytes] = set()
        self.opaque: set[bytes] = set()
        self._times: dict[bytes, int] = {b"": 0}
        self._holes_bytes = 0
        self._parent_path: bytes | None = None
        self._parent: OwnedFd | None = None

    def write(self, stream: TarStream) -> None:
        """Writes all entries of a stream and reads it to its end.

        Raises:
            Corrupt, InvalidInput, Unsupported: the archive.
            OSError: the file system; ENOSPC for one.
        """
        os.chmod(f"/proc/self/fd/{self.root.fileno()}", 0o755)
        for entry in entries(stream, self.subject):
            if not self._is_marker(entry.path):
                self.add(entry, stream)
        stream.drain()

    def add(self, entry: Entry, stream: TarStream) -> None:
        """Writes one entry; takes the place of what had its name."""
        if not entry.path:
            if entry.kind == "directory":
                self._directory_metadata(self.root.fileno(), entry)
            return
        head, name = split(entry.path)
        parent = self._open_parent(head)
        if entry.kind == "directory":
            self._directory(parent, name, entry)
        elif entry.kind == "file":
            self._file(parent, name, entry, stream)
        elif entry.kind == "hardlink":
            self._hardlink(parent, name, entry)
        else:
            self._special(parent, name, entry)

    def finish(self, *, bottom: bool) -> None:
        """Applies whiteouts and opaque markers, then times of directories.

        Args:
            bottom: there is no layer below; overlayfs would show a whiteout there to whoever lists the directory.
        """
        self._forget_parent()
        for path in sorted(self.whiteouts):
            if bottom or self._under_opaque(path):
                continue
            head, name = split(path)
            parent = self._marked(head)
            if parent is None:
                continue
            with parent:
                try:
                    os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent.fileno())
                    os.utime(name, ns=(0, 0), dir_fd=parent.fileno(), follow_symlinks=False)
                except FileExistsError:
                    # The layer deletes it and brings it anew: a new directory shows nothing of the old one.
                    if stat.S_ISDIR(os.stat(name, dir_fd=parent.fileno(), follow_symlinks=False).st_mode):
                        self.opaque.add(path)
        for path in sorted(self.opaque):
            directory = self._marked(path)
            if directory is not None:
                with directory:
                    os.setxattr(f"/proc/self/fd/{directory.fileno()}", _OPAQUE_XATTR, b"y")
        self.set_times()

    def _marked(self, path: bytes) -> OwnedFd | None:
        """The directory that a marker is about; None if a later entry has put something else in its place."""
        try:
            return self.root.mkdir_all(path)
        except NotADirectoryError:
            return None

    def set_times(self) -> None:
        """Gives directories their times: after everything that is made in them."""
        for path, mtime_ns in self._times.items():
            try:
                with self.root.resolve(path, _DIRECTORY | os.O_NOFOLLOW) as directory:
                    os.utime(f"/proc/self/fd/{directory.fileno()}", ns=(mtime_ns, mtime_ns))
            except (FileNotFoundError, NotADirectoryError):
                continue

    # -- for holdfast.image.lower

    def adopt(self, entry: Entry) -> None:
        """Gives a directory that is there the metadata of ``entry``."""
        with self.root.resolve(entry.path, _DIRECTORY | os.O_NOFOLLOW) as directory:
            self._directory_metadata(directory.fileno(), entry)

    def make_directory(self, path: bytes) -> None:
        """Makes a directory, as one that something lies in."""
        self._open_parent(path)
        self._forget_parent()

    def renamed(self, old: bytes, new: bytes) -> None:
        """What was noted of ``old`` and below it holds for ``new`` from now on."""

        def moved(path: bytes) -> bytes:
            return new + path[len(old) :] if path == old or path.startswith(old + b"/") else path

        self._forget_parent()
        self._times.pop(old, None)
        self.implied.discard(old)
        self._times = {moved(path): value for path, value in self._times.items()}
        self.implied = {moved(path) for path in self.implied}
        self.whiteouts = {moved(path) for path in self.whiteouts}
        self.opaque = {moved(path) for path in self.opaque}
        self.wanted = {moved(path): [moved(name) for name in names] for path, names in self.wanted.items()}

    # -- markers

    def _is_marker(self, path: bytes) -> bool:
        head, _, name = path.rpartition(b"/")
        if not name.startswith(_WHITEOUT):
            return False
        if name == _OPAQUE:
            self.opaque.add(head)
            self._open_parent(head)
        elif not name.startswith(b".wh..wh."):
            # Others of that prefix are bookkeeping of aufs, and mean nothing here.
            victim = name[len(_WHITEOUT) :]
            if victim in (b"", b".", b".."):
                raise InvalidInput(
                    "archive deletes a path outside of it", subject=self.subject, why=path, code="archive-escapes"
                )
            self.whiteouts.add(path[: len(path) - len(name)] + victim)
            self._open_parent(head)
        return True

    def _under_opaque(self, path: bytes) -> bool:
        head = path
        while head:
            head = head.rpartition(b"/")[0]
            if head in self.opaque:
                return True
        return False

    # -- parents

    def _open_parent(self, path: bytes) -> int:
        if path == self._parent_path and self._parent:
            return self._parent.fileno()
        self._forget_parent()
        made: list[bytes] = []
        try:
            self._parent = self.root.mkdir_all(path, 0o755, made)
        except NotADirectoryError:
            self._make_way(path)
            self._parent = self.root.mkdir_all(path, 0o755, made)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._corrupt(f"{path!r}: {error.strerror}") from error
            raise
        for directory in made:
            self.implied.add(directory)
            self._times[directory] = 0
        self._parent_path = path
        return self._parent.fileno()

    def _make_way(self, path: bytes) -> None:
        """Removes the file of this layer where ``path`` now wants a directory: the last entry wins."""
        parts = path.split(b"/")
        for count in range(1, len(parts) + 1):
            here = b"/".join(parts[:count])
            try:
                self.root.resolve(here, _DIRECTORY).close()
            except NotADirectoryError:
                self.root.unlink(here)
                return

    def _forget_parent(self) -> None:
        if self._parent:
            self._parent.close()
        self._parent, self._parent_path = None, None

    def _replace(self, parent: int, name: bytes, path: bytes) -> None:
        """Removes what has the name."""
        keep = os.dup(parent)
        try:
            # The open parent may lie below what goes away.
            self._forget_parent()
            remove_tree(keep, name)
        finally:
            os.close(keep)
        below = path + b"/"
        self._times = {key: value for key, value in self._times.items() if key != path and not key.startswith(below)}
        self.implied = {key for key in self.implied if key != path and not key.startswith(below)}

    # -- kinds

    def _directory(self, parent: int, name: bytes, entry: Entry) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                parent = self._cleared(parent, name, entry.path)
                os.mkdir(name, 0o755, dir_fd=parent)
        with OwnedFd(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)) as directory:
            self._directory_metadata(directory.fileno(), entry)

    def _directory_metadata(self, fd: int, entry: Entry) -> None:
        path = f"/proc/self/fd/{fd}"
        os.chown(path, entry.uid, entry.gid)
        os.chmod(path, entry.mode)
        for stale in os.listxattr(path):
            if stale not in entry.xattrs and stale.startswith(("user.", "trusted.", "security.", "system.posix")):
                os.removexattr(path, stale)
        self._set_xattrs(path, entry)
        self._times[entry.path] = entry.mtime_ns
        self.implied.discard(entry.path)

    def _file(self, parent: int, name: bytes, entry: Entry, stream: TarStream) -> None:
        self._holes_bytes += entry.size - entry.stored
        if self._holes_bytes > _MOST_HOLES_BYTES:
            raise Unsupported(
                "extract layer", subject=self.subject, code="layer-not-possible",
                why=f"its sparse files, up to {entry.path!r}, have {self._holes_bytes} bytes of holes",
            )  # fmt: skip
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        except FileExistsError:
            parent = self._cleared(parent, name, entry.path)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        try:
            if entry.sparse is None:
                stream.copy(fd, entry.size)
            else:
                for offset, length in entry.sparse:
                    os.lseek(fd, offset, os.SEEK_SET)
                    stream.copy(fd, length)
                os.ftruncate(fd, entry.size)
            os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode)
            if entry.xattrs:
                self._set_xattrs(f"/proc/self/fd/{fd}", entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _hardlink(self, parent: int, name: bytes, entry: Entry) -> None:
        if entry.target == entry.path:
            return
        try:
            target_head, target_name = split(entry.target)
            with self.root.resolve(target_head, _DIRECTORY) as source:
                source_fd = source.fileno()
                if stat.S_ISDIR(os.stat(target_name, dir_fd=source_fd, follow_symlinks=False).st_mode):
                    raise self._corrupt(f"{entry.path!r} is a hard link to a directory, {entry.target!r}")
                try:
                    os.link(target_name, name, src_dir_fd=source_fd, dst_dir_fd=parent, follow_symlinks=False)
                except FileExistsError:
                    if _same_file(source_fd, target_name, parent, name):
                        return
                    parent = self._cleared(parent, name, entry.path)
                    os.link(target_name, name, src_dir_fd=source_fd, dst_dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ELOOP:
                why = f"{entry.path!r} is a hard link through links in a circle, {entry.target!r}"
                raise self._corrupt(why) from None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            self.wanted.setdefault(entry.target, []).append(entry.path)

    def _special(self, parent: int, name: bytes, entry: Entry) -> None:
        for attempt in (1, 2):
            try:
                if entry.kind == "symlink":
                    os.symlink(entry.target, name, dir_fd=parent)
                else:
                    kind = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}[entry.kind]
                    os.mknod(name, kind | 0o600, entry.device, dir_fd=parent)
                break
            except FileExistsError:
                if attempt == 2:
                    raise
                parent = self._cleared(parent, name, entry.path)
        os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.kind != "symlink":
            # Not followed either: it is no link, we made it ourselves, and nobody else writes here.
            os.chmod(name, entry.mode, dir_fd=parent)
        if entry.xattrs:
            self._set_xattrs(os.fsdecode(b"/proc/self/fd/%d/%s" % (parent, name)), entry, follow=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _cleared(self, parent: int, name: bytes, path: bytes) -> int:
        self._replace(parent, name, path)
        return self._open_parent(path.rpartition(b"/")[0])

    def _set_xattrs(self, path: str, entry: Entry, *, follow: bool = True) -> None:
        for key, value in entry.xattrs.items():
            if key.startswith(_OVERLAY_XATTRS):
                continue
            try:
                os.setxattr(path, key, value, follow_symlinks=follow)
            except OSError as error:
                # ENOSPC here means that one inode has no room for more, not that the disk is full (setxattr(2)).
                raise Unsupported(
                    "extract layer", subject=self.subject, code="xattr-not-possible",
                    why=f"xattr {key} ({len(value)} bytes) of {entry.path!r}: {error.strerror}",
                ) from error  # fmt: skip

    def _corrupt(self, why: str) -> Corrupt:
        return Corrupt("extract layer", subject=self.subject, why=why, code="bad-archive")

    def close(self) -> None:
        """Closes the directories; the tree stays."""
        self._forget_parent()
        self.root.close()

    def __enter__(self) -> Extraction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def reading(layer: PlannedLayer, check: Callable[[], None]) -> Iterator[TarStream]:
    """The tar of a layer; the block must end well before anything of it is trusted.

    The blob is hashed before it is parsed, the tar while it is: leaving the block reads the rest and compares.

    Args:
        check: called for every chunk, from more than one thread; raises to stop.

    Raises:
        Corrupt: blob or tar are not what their digests say.
    """
    if layer.digest:
        verify(layer.region, layer.digest, check=check)
    with Unpacked(layer.region, check) as unpacked:
        stream = TarStream(iter(unpacked), layer.diff_id)
        yield stream
        stream.drain()
        expect(layer.diff_id, unpacked.hexdigest(), "the uncompressed layer")


def _same_file(one_fd: int, one: bytes, other_fd: int, other: bytes) -> bool:
    return os.path.samestat(
        os.stat(one, dir_fd=one_fd, follow_symlinks=False), os.stat(other, dir_fd=other_fd, follow_symlinks=False)
    )
