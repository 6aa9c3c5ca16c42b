"""A directory tree that nobody trusts, and the only door into it.

The names and symbolic links under an image's root filesystem, or under a container's, were chosen by whoever
made them.  A :class:`Root` is an open directory; every path given to it is resolved by the kernel with
``openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)``, so that absolute links and ``..`` end inside the tree, as they
do after ``chroot``, even while somebody else renames things.  What makes or removes a name works on the *parent* that
was resolved so, and on one last component that is never followed.

Paths are bytes, relative to the root (a leading ``/`` means the root).  Refusals of the kernel are
:class:`OSError`: a caller needs the errno.  A name that no path can have is :class:`InvalidInput`.

Runs in the guest too, so it imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import stat

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.mounts.removing import remove_tree as remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
# The rest of a path too long for one call: a link there would be resolved against the wrong root, so none is followed.
_RESOLVE_REST = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_SYMLINKS
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# PATH_MAX counts the closing NUL (path_resolution(7)).
_LONGEST = 4095
# The kernel's own MAXSYMLINKS.
_MOST_LINKS = 40


class Root:
    """An open directory that no path can lead out of.

    Args:
        where: path of the directory, or a descriptor of it (duplicated: the caller keeps its own).

    Raises:
        OSError: it cannot be opened, or is no directory.
    """

    __slots__ = ("_fd",)

    def __init__(self, where: str | bytes | int) -> None:
        if isinstance(where, int):
            self._fd = OwnedFd(os.open(b".", _DIRECTORY, dir_fd=where))
        else:
            self._fd = OwnedFd(os.open(where, _DIRECTORY))

    def fileno(self) -> int:
        """Descriptor (O_PATH) of the directory; it stays the Root's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        self._fd.close()

    def __enter__(self) -> Root:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- finding

    def resolve(self, path: bytes, flags: int = os.O_PATH) -> OwnedFd:
        """Opens ``path``, following a link in its last component too, always inside the tree.

        Args:
            path: what to open; ``b""`` and ``b"/"`` are the root itself.
            flags: open(2) flags; O_CLOEXEC is added.

        Raises:
            OSError: as openat2(2); ENOENT also for a link to something outside that does not exist inside.
        """
        rest = _checked(path).strip(b"/") or b"."
        if len(rest) <= _LONGEST:
            return OwnedFd(syscalls.openat2(self.fileno(), rest, flags, _RESOLVE))
        here, how = self.fileno(), _RESOLVE
        held: OwnedFd | None = None
        try:
            while len(rest) > _LONGEST:
                cut = rest.rfind(b"/", 0, _LONGEST)
                if cut < 0:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
                head, rest = rest[:cut], rest[cut:].lstrip(b"/")
                step = OwnedFd(syscalls.openat2(here, head, _DIRECTORY, how))
                if held:
                    held.close()
                held, here, how = step, step.fileno(), _RESOLVE_REST
            return OwnedFd(syscalls.openat2(here, rest, flags, how))
        finally:
            if held:
                held.close()

    def parent(self, path: bytes, *, make: bool = False) -> tuple[OwnedFd, bytes]:
        """The directory that holds ``path`` and the last component, for ``*at`` calls that do not follow it.

        Args:
            path: the path; not the root itself, and not ending in ``.`` or ``..``.
            make: make missing directories on the way (0755).

        Raises:
            InvalidInput: the last component is no name.
            OSError: the parent cannot be resolved.
        """
        head, name = split(path)
        if make:
            return self.mkdir_all(head), name
        return self.resolve(head, _DIRECTORY), name

    def open(self, path: bytes, flags: int = os.O_RDONLY, mode: int = 0o600) -> OwnedFd:
        """Opens or (O_CREAT) makes ``path``; a link in the last component is refused with ELOOP."""
        directory, name = self.parent(path)
        with directory:
            return OwnedFd(os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory.fileno()))

    def stat(self, path: bytes) -> os.stat_result:
        """lstat(2): of a link itself, not of what it leads to."""
        if not path.strip(b"/"):
            return os.stat(self.fileno())
        directory, name = self.parent(path)
        with directory:
            return os.stat(name, dir_fd=directory.fileno(), follow_symlinks=False)

    def exists(self, path: bytes) -> bool:
        """Whether the name exists; a link counts even if it leads nowhere."""
        try:
            self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def readlink(self, path: bytes) -> bytes:
        """readlink(2)."""
        directory, name = self.parent(path)
        with directory:
            return os.readlink(name, dir_fd=directory.fileno())

    def listdir(self, path: bytes = b"") -> list[bytes]:
        """The names in a directory, sorted."""
        with self.resolve(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
            return sorted(os.fsencode(name) for name in os.listdir(directory.fileno()))

    # -- making

    def mkdir(self, path: bytes, mode: int = 0o755) -> None:
        """mkdir(2); the parent must exist."""
        directory, name = self.parent(path)
        with directory:
            os.mkdir(name, mode, dir_fd=directory.fileno())

    def mkdir_all(self, path: bytes, mode: int = 0o755, made: list[bytes] | None = None) -> OwnedFd:
        """Opens the directory ``path`` (O_PATH), making what is missing of it.

        A link on the way that leads to nothing gets its target made, inside the tree.

        Args:
            path: the directory.
            mode: of directories that are made, before the umask.
            made: gets the path of each directory that was made, outermost first.

        Raises:
            OSError: ENOTDIR: something on the way is no directory; ELOOP: links in a circle; and others.
        """
        try:
            return self.resolve(path, _DIRECTORY)
        except FileNotFoundError:
            return self._mkdir_each(path, mode, made, [0])

    def _mkdir_each(self, path: bytes, mode: int, made: list[bytes] | None, links: list[int]) -> OwnedFd:
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        done: list[bytes] = []
        current = self.resolve(b"", _DIRECTORY)
        for part in parts:
            done.append(part)
            here = b"/".join(done)
            try:
                step = self.resolve(here, _DIRECTORY)
            except FileNotFoundError:
                try:
                    step = self._mkdir_step(current, part, here, mode, made, links)
                except BaseException:
                    current.close()
                    raise
            except BaseException:
                current.close()
                raise
            current.close()
            current = step
        return current

    def _mkdir_step(
        self, parent: OwnedFd, name: bytes, path: bytes, mode: int, made: list[bytes] | None, links: list[int]
    ) -> OwnedFd:
        try:
            os.mkdir(name, mode, dir_fd=parent.fileno())
        except FileExistsError:
            # The name exists and leads to nothing: a dangling link, or somebody was faster than we were.
            links[0] += 1
            if links[0] > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
            try:
                target = os.readlink(name, dir_fd=parent.fileno())
            except OSError:
                return self.resolve(path, _DIRECTORY)
            if not target.startswith(b"/"):
                target = path[: -len(name)] + target
            return self._mkdir_each(target, mode, made, links)
        if made is not None:
            made.append(path)
        return OwnedFd(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent.fileno()))

    def create(self, path: bytes, mode: int = 0o600) -> OwnedFd:
        """Makes a regular file that did not exist and opens it for writing."""
        return self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)

    def write(self, path: bytes, data: bytes, mode: int = 0o644) -> None:
        """Makes or empties a regular file and writes ``data``; a link is not followed."""
        with self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as file:
            view = memoryview(data)
            while view:
                view = view[os.write(file.fileno(), view) :]

    def symlink(self, target: bytes, path: bytes) -> None:
        """symlink(2); ``target`` is stored as it is given."""
        directory, name = self.parent(path)
        with directory:
            os.symlink(target, name, dir_fd=directory.fileno())

    def link(self, old: bytes, new: bytes) -> None:
        """link(2): both names inside; a link as ``old`` is not followed."""
        from_fd, from_name = self.parent(old)
        with from_fd:
            to_fd, to_name = self.parent(new)
            with to_fd:
                os.link(
                    from_name, to_name, src_dir_fd=from_fd.fileno(), dst_dir_fd=to_fd.fileno(), follow_symlinks=False
                )

    def mknod(self, path: bytes, mode: int, device: int = 0) -> None:
        """mknod(2)."""
        directory, name = self.parent(path)
        with directory:
            os.mknod(name, mode, device, dir_fd=directory.fileno())

    def rename(self, old: bytes, new: bytes) -> None:
        """rename(2): both names inside."""
        from_fd, from_name = self.parent(old)
        with from_fd:
            to_fd, to_name = self.parent(new)
            with to_fd:
                os.rename(from_name, to_name, src_dir_fd=from_fd.fileno(), dst_dir_fd=to_fd.fileno())

    # -- removing

    def unlink(self, path: bytes) -> None:
        """unlink(2)."""
        directory, name = self.parent(path)
        with directory:
            os.unlink(name, dir_fd=directory.fileno())

    def rmdir(self, path: bytes) -> None:
        """rmdir(2)."""
        directory, name = self.parent(path)
        with directory:
            os.rmdir(name, dir_fd=directory.fileno())

    def remove(self, path: bytes) -> None:
        """Removes one name whatever it is; a directory must be empty."""
        directory, name = self.parent(path)
        with directory:
            if stat.S_ISDIR(os.stat(name, dir_fd=directory.fileno(), follow_symlinks=False).st_mode):
                os.rmdir(name, dir_fd=directory.fileno())
            else:
                os.unlink(name, dir_fd=directory.fileno())

    def remove_tree(self, path: bytes) -> None:
        """Removes ``path`` and all below it; stops with EXDEV at a mount, before it deletes through it."""
        directory, name = self.parent(path)
        with directory:
            remove_tree(directory.fileno(), name)


def split(path: bytes) -> tuple[bytes, bytes]:
    """``path`` as (parent, last component).

    Raises:
        InvalidInput: there is no last component that is a name.
    """
    head, _, name = _checked(path).rstrip(b"/").rpartition(b"/")
    if name in (b"", b".", b".."):
        raise InvalidInput("path has no last component", subject=path, code="bad-path")
    return head, name


def _checked(path: bytes) -> bytes:
    if b"\0" in path:
        raise InvalidInput("path contains a NUL byte", subject=path, code="bad-path")
    return path
