"""Mounting: all of it or nothing.

A mount is made where nobody sees it, gets its flags, is recorded if something must be undone with it, and only then
moved to its place.  Whatever fails undoes what was done before, last first.
"""

from __future__ import annotations

import errno
import os

from holdfast.errors import HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.linux import syscalls as sys_
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import features, helper, idmap, loop, making, overlay, probe, records, request, table
from holdfast.mounts.making import Place, Refused
from holdfast.mounts.release import DEFAULT_FOLDER
from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from holdfast.mounts.model import Mount
    from holdfast.mounts.request import Request


def mount(mount: Mount, root: str | Root | None = None, *, records: str = DEFAULT_FOLDER, userns_fd: int = -1) -> str:
    """Makes one mount.

    Args:
        mount: which; its target is absolute, and no link.
        root: a directory under which the target is resolved instead, its links too, never leading out of it.
        records: folder for the record of what must be undone with the mount; unmounting must name the same.
        userns_fd: user namespace whose maps give the mount other owners; instead of ``uidmap=`` and ``gidmap=``.

    Returns:
        Where it is: what unmounting takes.

    Raises:
        InvalidInput: the mount cannot be right.
        NotFound: there is no such target, source or device.
        Unsupported: this kernel or host cannot do it.
        HoldfastError: the kernel or a mount program refused, in its own words.
    """
    wanted = request.read(mount)
    if root is None and wanted.is_plain_bind and userns_fd < 0:
        return _bind_plainly(mount, wanted)
    step = _Step(mount, wanted, records)
    try:
        with OwnedFd(_open_target(mount, root)) as fd:
            step.place = Place(fd)
            step.run(userns_fd)
            return step.place.path
    except Refused as error:
        raise _explained(mount, error.error, error.log) from error.error
    except OSError as error:
        raise _explained(mount, error, "") from error


def mount_all(mounts: Iterable[Mount], root: str | Root | None = None, *, records: str = DEFAULT_FOLDER) -> list[str]:
    """Makes mounts in order; if one fails, those before it are unmounted again, the last first.

    Args, Raises: as :func:`mount`; the error says which of them it was.

    Returns:
        Where they are.
    """
    from holdfast.mounts import release

    done: list[str] = []
    try:
        for one in mounts:
            done.append(mount(one, root, records=records))
    except BaseException as error:
        left: list[BaseException] = []
        for target in reversed(done):
            try:
                release.unmount(target, records=records)
            except HoldfastError as second:
                left.append(second)
        if isinstance(error, HoldfastError):
            error.what = f"{error.what} (number {len(done) + 1})"
            error.also(*left)
        raise
    return done


def _bind_plainly(mount: Mount, wanted: Request) -> str:
    """One call does it, so there is nothing to hide and nothing to undo."""
    target = mount.target
    try:
        if not target.startswith("/") or os.path.islink(target):
            os.close(_open_target(mount, None))  # says what is wrong with it
        sys_.mount(mount.source, target, "", wanted.flags)
    except OSError as error:
        raise _explained(mount, error, "") from error
    return target


def _open_target(mount: Mount, root: str | Root | None) -> int:
    if root is not None:
        if isinstance(root, Root):
            return root.resolve(os.fsencode(mount.target)).release()
        with Root(root) as opened:
            return opened.resolve(os.fsencode(mount.target)).release()
    if not mount.target.startswith("/"):
        raise InvalidInput("mount", subject=mount.describe(), why="the target is no absolute path", code="bad-target")
    fd = os.open(mount.target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if making.is_link(fd):
        os.close(fd)
        raise InvalidInput(
            "mount", subject=mount.target, why="the target is a symbolic link", code="bad-target",
            hint=f"mount on what it leads to: {os.path.realpath(mount.target)}",
        )  # fmt: skip
    return fd


def _explained(mount: Mount, error: OSError, log: str) -> HoldfastError:
    """What the kernel said, about this mount."""
    missing = ""
    if error.errno == errno.ENOENT:  # of which of the paths?  Only the target can be none of them: below a root
        paths = [mount.source, mount.target]
        if mount.type == "overlay":
            lowers, words = overlay.parse(request.read(mount).data)
            paths += [*lowers, *(overlay.unescape(word.partition("=")[2]) for word in words)]
        missing = next((path for path in paths if path.startswith("/") and not os.path.lexists(path)), mount.target)
    text = f"{os.strerror(error.errno or 0)} (errno {error.errno})"
    if missing:
        text += f": {missing}"
    if log:
        text += f": {log}"
    kind = NotFound if missing else HoldfastError
    return kind("mount", subject=mount.describe(), why=text, code="not-found" if missing else "mount-failed")


class _Step:
    """One mount in the making: what there is to be undone, and the descriptors that keep it."""

    place: Place

    def __init__(self, mount: Mount, wanted: Request, folder: str) -> None:
        self.mount = mount
        self.wanted = wanted
        self.folder = folder
        # Steps: undone when the mount goes, and undone as soon as it is there.
        self.undo: list[dict[str, Any]] = []
        self.until_mounted: list[dict[str, Any]] = []
        self.record: records.Record | None = None
        self.loop: loop.Loop | None = None
        self.source = mount.source
        self.kind = wanted.kind

    def run(self, userns_fd: int) -> None:
        """Does it."""
        if self.wanted.is_change:
            self._change()
            return
        own_userns: OwnedFd | None = None
        try:
            if self.wanted.maps and userns_fd < 0:
                own_userns = idmap.user_namespace(self.wanted.maps)
                userns_fd = own_userns.fileno()
            if self.wanted.loop:
                self._attach_loop()
            self._make(userns_fd)
            if self.record and self.until_mounted:
                self.record.done_with(self.until_mounted)
        except BaseException:
            if self.record:
                self.record.carry_out()
            raise
        finally:
            if self.record:
                self.record.release()
            if self.loop:
                self.loop.close()
            if own_userns:
                own_userns.close()
        records.reached("done")

    def _change(self) -> None:
        """Changes a mount that is there: by mount(2), which says all that there is to say about it."""
        path = f"/proc/self/fd/{self.place.fd.fileno()}"
        flags = self.wanted.flags
        if flags & sys_.MS_REMOUNT:
            if flags & sys_.MS_BIND:
                making.restrict(path, flags)
            else:
                sys_.mount(self.source or "none", path, self.kind or "none", flags, ",".join(self.wanted.data))
        for kind in self.wanted.propagation:
            sys_.mount("none", path, "", kind)

    def _attach_loop(self) -> None:
        self.loop = loop.attach(
            self.source, read_only=bool(self.wanted.flags & sys_.MS_RDONLY), direct_io=self.wanted.direct_io
        )
        self.source = self.loop.device
        self.undo.append(self.loop.undo())
        records.reached("loop attached")

    def _make(self, userns_fd: int) -> None:
        if helper.is_helped(self.kind, self.wanted.data):
            helper.run(self.kind, self.source, self.place.path, self.wanted.words)
            tree, visible = self.place.reopen(), True
        elif self.kind == "bind":
            tree, visible = self._bind()
        else:
            tree, visible = self._filesystem(userns_fd)
        with tree:
            try:
                if userns_fd >= 0 and self.kind != "overlay":
                    whole = bool(self.wanted.flags & sys_.MS_REC)
                    idmap.apply(tree.fileno(), userns_fd, recursive=whole, subject=self.mount.describe())
                if not visible:
                    self._publish(tree.fileno())
                    visible = True
                elif self.record:
                    self._write_record(table.id_of(tree.fileno()))
                records.reached("mounted")
                self._propagate(tree.fileno())
                if self.kind == "bind" and self.wanted.flags & sys_.MS_RDONLY:
                    making.check_read_only(self.place, tree.fileno(), self.wanted)
            except BaseException:
                if visible:
                    making.drop(tree.fileno())
                raise

    def _publish(self, tree_fd: int) -> None:
        if self.undo or self.record:
            self._write_record(table.id_of(tree_fd))
        if making.is_directory(tree_fd) != making.is_directory(self.place.fd.fileno()):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))  # move_mount(2) calls it EINVAL, as much else
        how = sys_.MOVE_MOUNT_F_EMPTY_PATH | sys_.MOVE_MOUNT_T_EMPTY_PATH
        sys_.move_mount(tree_fd, "", self.place.fd.fileno(), "", how)

    def _propagate(self, tree_fd: int) -> None:
        for kind in self.wanted.propagation:
            sys_.mount("none", f"/proc/self/fd/{tree_fd}", "", kind)

    def _write_record(self, mount_id: int = 0) -> None:
        if self.record is None:
            self.record = records.Record(self.folder, self.place.path)
        self.record.mount_id = mount_id
        self.record.undo = self.undo + self.until_mounted
        self.record.write()

    def _bind(self) -> tuple[OwnedFd, bool]:
        has_flags = self.wanted.recursive or self.wanted.flags & request.OF_MOUNT
        if features.OPEN_TREE and (features.MOUNT_SETATTR or not has_flags):
            return making.bind_detached(self.source, self.wanted), False
        return making.bind_visible(self.source, self.place, self.wanted), True

    def _filesystem(self, userns_fd: int) -> tuple[OwnedFd, bool]:
        if not self.kind or self.kind == "auto":
            self.kind = self._found_filesystem()
        lowers, words = overlay.parse(self.wanted.data) if self.kind == "overlay" else ([], list(self.wanted.data))
        if lowers and userns_fd >= 0:
            lowers = self._map_layers(lowers, userns_fd)
        detached = making.is_detached(self.kind, self.source, self.wanted, lowers, words)
        links = ""
        if not detached:
            if overlay.needs_links(lowers, words):
                links = self._until_mounted("links")
            elif self.undo and not self.record:
                self._write_record()  # it will be seen before its number is known
        contents = making.Contents(self.kind, self.source, lowers, words)
        if detached:
            return making.filesystem_detached(contents, self.wanted), False
        return making.filesystem_visible(contents, self.place, self.wanted, links), True

    def _map_layers(self, lowers: list[str], userns_fd: int) -> list[str]:
        if not features.IDMAP:
            raise Unsupported("map owners", subject="overlay", why="the kernel has no mount_setattr(2)", code="idmap")
        folder = self._until_mounted("clones")
        os.mkdir(folder, 0o700)
        mapped = making.mapped_layers(lowers, userns_fd, folder)
        records.reached("layers mapped")
        return mapped

    def _until_mounted(self, kind: str) -> str:
        """The path of a folder that may be made now and is not needed once the mount is there; on record."""
        path = f"{self.folder}/.{kind}-{os.urandom(6).hex()}"
        self.until_mounted.append({kind: path})
        self._write_record()
        return path

    def _found_filesystem(self) -> str:
        fd = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = probe.probe_filesystem(fd)
        finally:
            os.close(fd)
        if found in ("", "luks", "swap"):
            raise InvalidInput(
                "mount", subject=self.mount.describe(), code="no-filesystem",
                why=f"it holds {found}, which cannot be mounted" if found else "no known filesystem on it",
            )  # fmt: skip
        return found
