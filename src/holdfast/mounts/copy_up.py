"""Volumes of an image: which there are, and what the image has in them, copied into new ones.

An image names paths (VOLUME) at which every container gets storage of its own, which begins as what the image has
there.  :func:`plan_volumes` cleans and orders the names, :func:`resolve_volumes` looks where they lead in the image,
and :func:`copy_up` fills one volume:

====================================  =====================================================
the image has there                   then
====================================  =====================================================
a directory                           copied, its own attributes too
nothing, or a link to nothing         skipped: the volume stays as it is
a link                                followed, inside the image only
a file, or a path through a file      ``volume-not-directory``
links in a circle                     ``volume-loop``
====================================  =====================================================

Runs in the guest too, so it imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import Exhausted, HoldfastError, InvalidInput, NotReleased, Unsupported
from holdfast.mounts.copy_tree import TreeCopy
from holdfast.mounts.root import Root, remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_TOO_FULL = (errno.ENOSPC, errno.EDQUOT)
# path_resolution(7), and the closing NUL.
_LONGEST_BYTES = 4095
_MOST_LINKS = 40
#: What a new ext4 has in its root.  To a container it would be data: programs refuse to begin there.
_LOST_AND_FOUND = "lost+found"


class Volume:
    """A volume of an image.

    Attributes:
        path: where a container has it: absolute and clean.
        source: path of what to copy, in the image; None: the image cannot have anything there.
        names: what the image calls it; several if they are one place.
    """

    __slots__ = ("names", "path", "source")

    def __init__(self, path: str, source: str | None, names: tuple[str, ...]) -> None:
        self.path = path
        self.source = source
        self.names = names

    def __repr__(self) -> str:
        return f"Volume({self.path!r}, {self.source!r}, {self.names!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Volume) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


class Outcome:
    """What became of one copy.

    Attributes:
        found: whether the image has anything there.
        entries: names made in the volume.
        data_bytes: data copied; holes count nothing.
        dropped: name of an xattr that the volume's file system cannot have -> of how many files.
    """

    __slots__ = ("data_bytes", "dropped", "entries", "found")

    def __init__(self, found: bool, entries: int = 0, data_bytes: int = 0, dropped: dict[str, int] | None = None):
        self.found = found
        self.entries = entries
        self.data_bytes = data_bytes
        self.dropped = dropped or {}

    def __str__(self) -> str:
        if not self.found:
            return "nothing to copy"
        text = f"copied {self.entries} entries, {self.data_bytes} bytes"
        for name, count in sorted(self.dropped.items()):
            text += f"; {name} left out {count} times"
        return text


# -- which


def plan_volumes(paths: Iterable[str], *, windows: bool = False) -> list[Volume]:
    """The volumes that an image's configuration names: parents before what lies in them, then by name.

    ``..`` goes up in the text, as the engines do it; a path that is not absolute starts at the root.  ``C:/x`` is a
    directory named ``C:`` unless it is a Windows image's.  There, the image is drive C and only that.

    Args:
        paths: the keys of ``config.Volumes``.
        windows: whether the image is for Windows.

    Raises:
        InvalidInput: ``bad-path``: no path can be so, or it is the root itself.
    """
    found: dict[str, Volume] = {}
    for name in sorted(paths):
        drive, path = _drive(name) if windows else ("", name)
        path = _clean(name, path)
        place = f"{drive}{path}"
        volume = Volume(place, None if drive else path, (name,))
        known = found.setdefault(place.lower() if windows else place, volume)
        if known is not volume:
            known.names += (name,)
    return _ordered(found.values())


def _drive(name: str) -> tuple[str, str]:
    """The drive, unless it is the image's own, and the path on it."""
    drive, path = (name[:2].upper(), name[2:]) if name[1:2] == ":" else ("C:", name)
    return "" if drive == "C:" else drive, path.replace("\\", "/")


def _clean(name: str, path: str) -> str:
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise _bad_path(name, "not a text that a path can be") from None
    if "\0" in path or size > _LONGEST_BYTES:
        raise _bad_path(name, "longer than a path can be" if size > _LONGEST_BYTES else "contains a NUL byte")
    clean = _without_dots(path.split("/"))
    if clean == "/":
        raise _bad_path(name, "is the root of the container")
    return clean


def _without_dots(steps: list[str]) -> str:
    parts: list[str] = []
    for step in steps:
        if step == "..":
            del parts[-1:]
        elif step not in ("", "."):
            parts.append(step)
    return "/" + "/".join(parts)


def _ordered(volumes: Iterable[Volume]) -> list[Volume]:
    return sorted(volumes, key=lambda volume: (volume.path.count("/"), volume.path))


def resolve_volumes(root: Root, volumes: Iterable[Volume]) -> list[Volume]:
    """The same volumes with the paths that they really have in the image: links followed, in order again.

    Names of one place become one volume (two mounts on one directory would leave it to chance which is seen).  What
    is missing stays named by its path below the deepest directory that there is.  This holds as long as the image
    does not change; what is copied is looked up again by :func:`copy_up`.

    Raises:
        InvalidInput: ``volume-not-directory``, ``volume-loop``: as :func:`copy_up`; ``bad-path``: leads to the root.
        HoldfastError: ``volume-copy``: the image cannot be read.
    """
    found: dict[str, Volume] = {}
    for volume in volumes:
        if volume.source is None:
            found[volume.path] = volume
            continue
        try:
            path = _real_path(root, volume.source)
        except OSError as error:
            raise _refused(volume.source, error) from None
        if path == "/":
            raise _bad_path(volume.source, "leads to the root of the container")
        known = found.get(path)
        found[path] = Volume(path, path, (known.names if known else ()) + volume.names)
    return _ordered(found.values())


def _real_path(root: Root, path: str) -> str:
    top = os.readlink(f"/proc/self/fd/{root.fileno()}").rstrip("/")
    missing: list[str] = []
    for _ in range(_MOST_LINKS):
        path, missing = _deepest(root, path, missing)
        try:
            with root.resolve(os.fsencode(path), os.O_PATH | os.O_DIRECTORY) as there:
                real = os.readlink(f"/proc/self/fd/{there.fileno()}")
        except FileNotFoundError:  # a link to nothing: what it names is where the volume will be
            target = os.fsdecode(root.readlink(os.fsencode(path)))
            path = target if target.startswith("/") else f"{path.rpartition('/')[0]}/{target}"
            continue
        if real != top and not real.startswith(top + "/"):
            raise OSError(errno.EBUSY, "the image was moved meanwhile")
        path = _without_dots([*real[len(top) :].split("/"), *missing])
        if ".." not in missing:
            return path
        missing = []  # ".." out of what does not exist may have come to a link
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _deepest(root: Root, path: str, missing: list[str]) -> tuple[str, list[str]]:
    """Moves the last parts of ``path`` to ``missing`` until the rest exists, as a link to nothing if need be."""
    while True:
        try:
            root.resolve(os.fsencode(path), os.O_PATH | os.O_NOFOLLOW).close()
            return path, missing
        except FileNotFoundError:
            if not path:
                raise
            path, _, name = path.rpartition("/")
            missing = [name, *missing]


# -- copying


def copy_up(root: Root | int, path: str, target_fd: int) -> Outcome:
    """Copies what an image has at ``path`` into a volume, which then is like it in every attribute.

    Nothing is followed out of either tree, whoever changes them meanwhile.  If it fails, the volume is empty again; if
    the process is killed, it is not: who keeps volumes must remember which are complete.  Nothing is synced.

    Args:
        root: the image's root filesystem, or a descriptor of it.
        path: the volume's path in it.
        target_fd: the volume's directory (any descriptor of it; the caller keeps it).  It must be empty; a new
            ext4's ``lost+found`` is removed.

    Raises:
        InvalidInput: ``volume-not-directory``, ``volume-loop``, ``bad-path``: what is at the path;
            ``volume-not-empty``: the target.
        Exhausted: ``volume-full``: no room in the volume.
        Unsupported: ``volume-mount``: something is mounted in the tree.
        HoldfastError: ``volume-copy``: anything else; the subject is the file in the image.
    """
    if isinstance(root, int):
        with Root(root) as opened:
            return copy_up(opened, path, target_fd)
    try:
        source = root.resolve(os.fsencode(path), _LIST)
    except FileNotFoundError:
        return Outcome(False)
    except UnicodeEncodeError:
        raise _bad_path(path, "not a text that a path can be") from None
    except OSError as error:
        raise _refused(path, error) from None
    with source, _Target(target_fd, path) as target:
        tree = TreeCopy(source.fileno(), target.fd)
        try:
            tree.run()
        except OSError as error:
            raise _failed(path, tree.where(), error, target.empty()) from None
        except BaseException as error:
            for cause in target.empty():
                error.add_note(str(cause))
            raise
        return Outcome(True, tree.entries, tree.inodes.data_bytes, tree.inodes.dropped)


class _Target:
    """The volume's directory while it is filled: nobody but us can enter it, and nothing in it inherits anything."""

    def __init__(self, target_fd: int, path: str) -> None:
        self.fd = os.open(".", _LIST, dir_fd=target_fd)
        try:
            self._refuse_contents(path)
            self._info = os.fstat(self.fd)
            self._acls = self._take_acls()
            os.chmod(self.fd, 0o700)
            os.chown(self.fd, os.geteuid(), os.getegid())
        except BaseException as error:
            os.close(self.fd)
            if isinstance(error, OSError):
                raise _failed(path, "", error, []) from None
            raise

    def __enter__(self) -> _Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def _refuse_contents(self, path: str) -> None:
        names = os.listdir(self.fd)
        if names == [_LOST_AND_FOUND]:
            os.rmdir(_LOST_AND_FOUND, dir_fd=self.fd)
        elif names:
            raise InvalidInput(
                "fill volume", subject=path, why=f"it is not empty: {min(names)}", code="volume-not-empty",
                hint="what an image has is copied into new volumes only",
            )  # fmt: skip

    def _take_acls(self) -> dict[str, bytes]:
        try:
            found = {name: os.getxattr(self.fd, name) for name in os.listxattr(self.fd) if name in _ACLS}
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return {}
        for name in found:
            os.removexattr(self.fd, name)
        return found

    def empty(self) -> list[HoldfastError]:
        """Removes all that is in it, never through a mount, and gives it back its own attributes."""
        causes: list[HoldfastError] = []
        try:
            for name in os.listdir(self.fd):
                self._remove(name, causes)
            os.chown(self.fd, self._info.st_uid, self._info.st_gid)
            os.chmod(self.fd, stat.S_IMODE(self._info.st_mode))
            for name, value in self._acls.items():
                os.setxattr(self.fd, name, value)
        except OSError as error:
            causes.append(NotReleased("empty volume", why=error, code="volume-not-emptied"))
        return causes

    def _remove(self, name: str, causes: list[HoldfastError]) -> None:
        try:
            remove_tree(self.fd, os.fsencode(name))
        except OSError as error:
            causes.append(NotReleased("empty volume", subject=name, why=error, code="volume-not-emptied"))


# -- errors


def _bad_path(path: str, why: str) -> InvalidInput:
    return InvalidInput("use volume", subject=ascii(path), why=why, code="bad-path")


def _refused(path: str, error: OSError) -> HoldfastError:
    """Why there is no directory at the path of a volume."""
    if error.errno == errno.ENOTDIR:
        why = "the image has a file there"
        return InvalidInput("use volume", subject=path, why=why, code="volume-not-directory")
    if error.errno == errno.ELOOP:
        return InvalidInput("use volume", subject=path, why=error, code="volume-loop")
    if error.errno == errno.ENAMETOOLONG:
        return InvalidInput("use volume", subject=path, why=error, code="bad-path")
    return HoldfastError("use volume", subject=path, why=error, code="volume-copy")


def _failed(path: str, where: str, error: OSError, causes: list[HoldfastError]) -> HoldfastError:
    subject = f"{path.rstrip('/')}/{where}" if where else path
    if error.errno in _TOO_FULL:
        hint = "give the volume more room, or the pod more memory if it is in memory"
        return Exhausted("fill volume", subject=subject, why=error, hint=hint, code="volume-full", causes=causes)
    if error.errno == errno.EXDEV:
        why = "something is mounted there"
        return Unsupported("fill volume", subject=subject, why=why, code="volume-mount", causes=causes)
    return HoldfastError("fill volume", subject=subject, why=error, code="volume-copy", causes=causes)
