"""Making a mount that nobody sees yet, or, where the kernel has no such thing, one that is seen at once.

Each function gives back a descriptor of the mount's root.  What it made on the way is gone again if it fails.
"""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import HoldfastError, Unsupported
from holdfast.linux import syscalls as sys_
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import features, idmap, options, overlay, records, request, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.mounts.request import Request

#: fsconfig(2): a text holds at most 255 bytes.
_MOST_TEXT = 255
_FS_FLAGS = {
    sys_.MS_RDONLY: "ro",
    sys_.MS_SYNCHRONOUS: "sync",
    sys_.MS_DIRSYNC: "dirsync",
    sys_.MS_LAZYTIME: "lazytime",
    sys_.MS_MANDLOCK: "mand",
}


class Refused(Exception):
    """The kernel refused; with what it said besides its number."""

    def __init__(self, error: OSError, log: str) -> None:
        super().__init__(error, log)
        self.error = error
        self.log = log


class Place:
    """Where a mount goes: an open directory or file, and its path as the kernel writes it."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd
        self.path = os.readlink(f"/proc/self/fd/{fd.fileno()}")

    def reopen(self) -> OwnedFd:
        """What is mounted on top there now.

        By the name in its own parent, and not by the path: somebody may have put a link into that.  The name itself
        cannot be taken from a directory on which something is mounted (EBUSY).

        Raises:
            HoldfastError: nothing is.
        """
        head, name = os.path.split(os.readlink(f"/proc/self/fd/{self.fd.fileno()}"))
        above = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        directory = is_directory(self.fd.fileno())
        with OwnedFd(os.open("..", above, dir_fd=self.fd.fileno()) if directory else os.open(head, above)) as parent:
            fd = OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fileno()))
        if table.id_of(fd.fileno()) == table.id_of(self.fd.fileno()):
            fd.close()
            raise HoldfastError("mount", subject=self.path, why="the place was moved meanwhile", code="mount-failed")
        return fd


def drop(fd: int) -> None:
    """Takes away the mount whose root a descriptor has open, wherever it is; it is gone when that is closed."""
    sys_.umount(f"/proc/self/fd/{fd}", sys_.MNT_DETACH)


# -- bind


def bind_detached(source: str, wanted: Request) -> OwnedFd:
    """A copy of what is at a path, with its flags, nowhere yet."""
    whole = sys_.AT_RECURSIVE if wanted.flags & sys_.MS_REC else 0
    tree = OwnedFd(sys_.open_tree(sys_.AT_FDCWD, source, sys_.OPEN_TREE_CLONE | whole))
    try:
        for flags, reach in ((wanted.recursive, sys_.AT_RECURSIVE), (wanted.flags & ~wanted.recursive, 0)):
            attr_set, attr_clr = request.attributes(flags)
            if attr_set or attr_clr:
                how = sys_.AT_EMPTY_PATH | reach
                sys_.mount_setattr(tree.fileno(), "", how, attr_set=attr_set, attr_clr=attr_clr)
    except BaseException:
        tree.close()
        raise
    return tree


def bind_visible(source: str, place: Place, wanted: Request) -> OwnedFd:
    """The same by mount(2): visible at once, its flags a moment later, one mount after the other."""
    sys_.mount(source, f"/proc/self/fd/{place.fd.fileno()}", "", wanted.flags & (sys_.MS_BIND | sys_.MS_REC))
    tree = place.reopen()
    try:
        if wanted.flags & request.OF_MOUNT:
            restrict(f"/proc/self/fd/{tree.fileno()}", wanted.flags)
        if wanted.recursive:
            for entry in _below(place.path, table.id_of(tree.fileno())):
                restrict(entry.target, wanted.recursive)
    except BaseException:
        drop(tree.fileno())
        tree.close()
        raise
    return tree


def restrict(path: str, flags: int) -> None:
    """Adds flags to those that a mount has.

    A remount replaces all of them, so what it has is said again: in a user namespace the kernel has locked it, and
    refuses with EPERM to take any of it away (mount_namespaces(7)).
    """
    # statvfs(3) has the numbers of mount(2), but for two.
    has = os.statvfs(path).f_flag
    kept = has & (
        sys_.MS_RDONLY | sys_.MS_NOSUID | sys_.MS_NODEV | sys_.MS_NOEXEC | sys_.MS_NOATIME | sys_.MS_NODIRATIME
    )
    kept |= sys_.MS_RELATIME if has & 4096 else 0
    kept |= sys_.MS_NOSYMFOLLOW if has & 8192 else 0
    if not has & (4096 | sys_.MS_NOATIME):
        kept |= sys_.MS_STRICTATIME
    if flags & (sys_.MS_NOATIME | sys_.MS_RELATIME | sys_.MS_STRICTATIME):
        kept &= ~(sys_.MS_NOATIME | sys_.MS_RELATIME | sys_.MS_STRICTATIME)
    sys_.mount("none", path, "", sys_.MS_BIND | sys_.MS_REMOUNT | kept | flags & request.OF_MOUNT)


def check_read_only(place: Place, tree_fd: int, wanted: Request) -> None:
    """Sees for itself that a mount that must be read-only is, with all below it if that was asked.

    Raises:
        HoldfastError: it is not.
    """
    wrong = "" if os.fstatvfs(tree_fd).f_flag & os.ST_RDONLY else place.path
    if not wrong and wanted.recursive & sys_.MS_RDONLY:
        wrong = next((entry.target for entry in _below(place.path, table.id_of(tree_fd)) if not entry.read_only), "")
    if wrong:
        raise HoldfastError("mount read-only", subject=wrong, why="it can be written to", code="not-read-only")


def _below(path: str, number: int) -> list[table.Entry]:
    """The mounts below one: not itself, and not what is stacked under it."""
    tree = {number}
    found = []
    for entry in table.within(path):  # parents come first
        if entry.parent in tree and entry.number != number:
            tree.add(entry.number)
            found.append(entry)
    return found


# -- filesystems


class Contents:
    """What a filesystem is made of: its type, its device or whatever it takes for one, layers, other options."""

    __slots__ = ("kind", "lowers", "source", "words")

    def __init__(self, kind: str, source: str, lowers: Sequence[str], words: Sequence[str]) -> None:
        self.kind = kind
        self.source = source
        self.lowers = lowers
        self.words = words


def filesystem_visible(what: Contents, place: Place, wanted: Request, links: str) -> OwnedFd:
    """A new mount of a filesystem by mount(2), visible at once.

    Args:
        what: the filesystem.
        place: where it goes.
        wanted: flags.
        links: a folder that may be made for overlay, see :func:`overlay.mount`.

    Raises:
        Refused: the kernel did.
        Unsupported: the kernel does not know the filesystem.
    """

    def call(data: str) -> None:
        flags = wanted.flags & (request.OF_MOUNT | options.OF_FILESYSTEM | sys_.MS_SILENT)
        records.reached("calling mount")
        sys_.mount(what.source, f"/proc/self/fd/{place.fd.fileno()}", what.kind, flags, data)

    try:
        overlay.mount(what.lowers, what.words, place.path, links, call)
    except OSError as error:
        raise _refused(what.kind, error, "") from None
    return place.reopen()


def is_detached(kind: str, source: str, wanted: Request, lowers: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a filesystem can be mounted unseen here."""
    texts = [source, *lowers, *(word.partition("=")[2] for word in words)]
    return (
        bool(features.FSOPEN)
        and bool(features.OPEN_TREE)
        and not wanted.flags & sys_.MS_SILENT
        and all(len(os.fsencode(text)) <= _MOST_TEXT for text in texts)
        and (kind != "overlay" or bool(features.LOWERDIR_ADD))
    )


def filesystem_detached(what: Contents, wanted: Request) -> OwnedFd:
    """A new mount of a filesystem, nowhere yet.

    Raises:
        Refused, Unsupported: as :func:`filesystem_visible`.
    """
    try:
        fs = OwnedFd(sys_.fsopen(what.kind))
    except OSError as error:
        raise _refused(what.kind, error, "") from None
    with fs:
        try:
            if what.source:
                sys_.fsconfig_string(fs.fileno(), "source", what.source)
            for flag, name in _FS_FLAGS.items():
                if wanted.flags & flag:
                    sys_.fsconfig_flag(fs.fileno(), name)
            for layer in what.lowers:
                sys_.fsconfig_string(fs.fileno(), "lowerdir+", layer)
            for word in what.words:
                name, equals, value = word.partition("=")
                if equals:  # SELinux contexts are quoted because of their commas
                    quoted = len(value) > 1 and value[0] == value[-1] == '"'
                    sys_.fsconfig_string(fs.fileno(), name, value[1:-1] if quoted else value)
                else:
                    sys_.fsconfig_flag(fs.fileno(), name)
            sys_.fsconfig_create(fs.fileno())
            return OwnedFd(sys_.fsmount(fs.fileno(), request.attributes(wanted.flags)[0]))
        except OSError as error:
            raise _refused(what.kind, error, _log(fs.fileno())) from None


def _refused(kind: str, error: OSError, log: str) -> Exception:
    if error.errno == errno.ENODEV:
        return Unsupported(
            "mount", subject=kind, why="the kernel does not know this filesystem", code="filesystem-unsupported",
            hint="it may be a module that is not installed",
        )  # fmt: skip
    return Refused(error, log)


def _log(fs_fd: int) -> str:
    """What the kernel says about a filesystem that it did not make: lines such as ``e overlay: ...``."""
    lines = []
    for _ in range(8):
        try:
            lines.append(os.read(fs_fd, 1024).decode("utf-8", "replace").strip()[2:])
        except OSError:
            break
    return "; ".join(lines)


# -- layers with other owners


def mapped_layers(lowers: Sequence[str], userns_fd: int, folder: str) -> list[str]:
    """Layers of an overlay with other owners: overlayfs has no mapped mounts, but may be made of them.

    One read-only copy of each directory that holds layers, not one of each layer, in a private tmpfs at ``folder``: one
    unmount takes all of it away.  The overlay keeps what it needs.

    Args:
        lowers: the layers.
        userns_fd: the user namespace.
        folder: an empty directory, the caller's to take away with what is mounted there.

    Returns:
        The layers' new paths.
    """
    sys_.mount("layers", folder, "tmpfs", 0, "mode=0700,size=0")
    sys_.mount("none", folder, "", sys_.MS_PRIVATE)
    copies: dict[str, str] = {}
    found = []
    for layer in lowers:
        path = os.path.realpath(layer)
        home, name = os.path.split(path)
        if table.mount_id(home)[0] != table.mount_id(path)[0]:  # a mount of its own
            home, name = path, ""
        if home not in copies:
            copies[home] = f"{folder}/{len(copies)}"
            os.mkdir(copies[home], 0o700)
            with OwnedFd(sys_.open_tree(sys_.AT_FDCWD, home, sys_.OPEN_TREE_CLONE)) as tree:
                sys_.mount_setattr(tree.fileno(), "", sys_.AT_EMPTY_PATH, attr_set=sys_.MOUNT_ATTR_RDONLY)
                idmap.apply(tree.fileno(), userns_fd, recursive=False, subject=home)
                sys_.move_mount(tree.fileno(), "", sys_.AT_FDCWD, copies[home], sys_.MOVE_MOUNT_F_EMPTY_PATH)
        found.append(f"{copies[home]}/{name}".rstrip("/"))
    return found


def is_directory(fd: int) -> bool:
    """Whether a descriptor (O_PATH) is of a directory."""
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def is_link(fd: int) -> bool:
    """Whether a descriptor (O_PATH) is of a symbolic link."""
    return stat.S_ISLNK(os.fstat(fd).st_mode)
