"""What must be undone with a mount, on record before the mount is made.

Unmounting needs only the target.  A loop device, a folder that was made for the mount, clones that an overlay was made
of: they are known from a small file, written and synchronised before the mount can be seen, so that another process,
or the next one after a crash, can finish.

::

    <folder>/                         there only while it has records
        <crc of target>-<random>      one mount, JSON; locked (flock) while the process that makes it is at it
        .<random>                     one being written

A mount without anything to be undone has no record: the kernel's table is the record of it.  What a record says is
checked before it is believed, and every step may be done twice.
"""

from __future__ import annotations

import binascii
import errno
import fcntl
import json
import os
import time

from holdfast.errors import Corrupt, HoldfastError, NotReleased
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import loop, overlay, table
from holdfast.mounts.release import remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_MOST_BYTES = 64 << 10
_VERSION = 1
#: A draft that is older has no writer any more, in seconds.
_DRAFT_S = 60


def reached(point: str) -> None:
    """Called at every point where a crash matters, with its name; does nothing.  Tests put something in its place."""


class Record:
    """One record.

    Attributes:
        path: its file.
        target: where the mount is or will be.
        mount_id: the kernel's number of the mount, or 0 as long as that is not known.
        undo: steps, each ``{kind: what}``; they are done last first.
    """

    __slots__ = ("_boot", "_lock", "_namespace", "mount_id", "path", "target", "undo")

    def __init__(self, folder: str, target: str, name: str = "") -> None:
        self.path = f"{folder}/{name or _crc(target) + '-' + os.urandom(6).hex()}"
        self.target = target
        self.mount_id = 0
        self.undo: list[dict[str, Any]] = []
        self._boot = _boot_id()
        self._namespace = _namespace()
        self._lock: OwnedFd | None = None

    # -- the side of whoever makes the mount

    def write(self) -> None:
        """Writes the record, or what has changed in it, durably; it is locked from then on."""
        folder, name = os.path.split(self.path)
        text = json.dumps(
            {
                "version": _VERSION, "target": _text(self.target), "mount_id": self.mount_id, "boot": self._boot,
                "namespace": self._namespace, "undo": self.undo,
            }
        ).encode()  # fmt: skip
        draft = f"{folder}/.{name}"
        fd = OwnedFd(_create(folder, draft))
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX)
            os.write(fd.fileno(), text)
            os.fsync(fd.fileno())
            os.rename(draft, self.path)
            _sync(folder)
        except BaseException:
            fd.close()
            raise
        if self._lock:
            self._lock.close()
        self._lock = fd
        reached("recorded")

    def done_with(self, steps: list[dict[str, Any]]) -> None:
        """Carries out steps that were needed only until the mount was there; the record goes if it has no others.

        Raises:
            OSError, HoldfastError: one failed.
        """
        for step in reversed(steps):
            for kind, what in step.items():
                self._step(kind, what)
        self.undo = [step for step in self.undo if step not in steps]
        if self.undo:
            self.write()
        else:
            self.remove()

    def release(self) -> None:
        """The mount is there: from now on whoever unmounts it may act on the record."""
        if self._lock:
            self._lock.close()

    # -- the side of whoever unmounts

    def try_lock(self) -> bool:
        """Whether nobody is at it, neither making the mount nor undoing it; then we are."""
        try:
            fd = OwnedFd(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking it may have been replaced or removed.
            same = os.fstat(fd.fileno()).st_ino == os.stat(self.path).st_ino
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            fd.close()
            return False
        self._lock = fd
        return True

    def carry_out(self) -> None:
        """Undoes what the record says, last first, and removes it.  Goes on past errors; then it stays.

        Raises:
            NotReleased: a step failed.
        """
        errors: list[BaseException] = []
        for step in reversed(self.undo):
            for kind, what in step.items():
                try:
                    self._step(kind, what)
                except (OSError, HoldfastError) as error:
                    errors.append(error)
        if errors:
            self.release()
            raise NotReleased(
                "undo mount", subject=self.target, why=errors[0], causes=errors[1:], code="mount-not-undone",
                hint=f"unmount it again to go on from there; what is left is in {self.path}",
            ) from errors[0]  # fmt: skip
        self.remove()

    def _step(self, kind: str, what: Any) -> None:
        if kind == "loop":
            if self.of_this_boot:
                loop.let_go(what["device"], what["file"])
        elif kind == "links":
            overlay.remove_links(what)
        elif kind == "clones":
            _drop(what)
            remove_mount_point(what)
        elif kind == "folder":
            remove_mount_point(what)
        else:
            raise Corrupt("undo mount", subject=self.path, why=f"unknown step {kind!r}", code="bad-record")
        reached(f"undone {kind}")

    def remove(self) -> None:
        """Removes the record, and the folder if it was the last."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:  # somebody else's try was faster
            self.release()
            return
        self.release()
        _remove_if_empty(os.path.dirname(self.path))

    @property
    def of_this_boot(self) -> bool:
        """Whether the kernel that the record speaks of still runs."""
        return self._boot == _boot_id()

    @property
    def is_temporary(self) -> bool:
        """Whether the target itself was made for it."""
        return any("folder" in step for step in self.undo)

    def is_elsewhere(self) -> bool:
        """Whether the mount is in another mount namespace, in which there are processes."""
        return self.of_this_boot and self._namespace != _namespace() and _namespace_lives(self._namespace)

    def is_over(self) -> bool:
        """Whether the mount that it was made for cannot be there any more, as far as this process can know."""
        if not self.of_this_boot:
            return True
        if self._namespace != _namespace():
            return not self.is_elsewhere()
        stack = {entry.number for entry in table.at(self.target)}
        return self.mount_id not in stack if self.mount_id else not stack


def any_in(folder: str) -> bool:
    """Whether there may be records: the folder is there only while it has some."""
    return os.access(folder, os.F_OK)


def of(folder: str, target: str) -> list[Record]:
    """The records of a target: a path as the kernel writes it."""
    prefix = _crc(target) + "-"
    return [record for record in _read(folder, lambda name: name.startswith(prefix)) if record.target == target]


def all_in(folder: str, bad: list[HoldfastError]) -> list[Record]:
    """Every record; ``bad`` gets an error for each that cannot be read."""
    return list(_read(folder, lambda name: not name.startswith("."), bad))


def remove_drafts(folder: str) -> None:
    """Removes what processes were writing when they were killed: nothing that it would have been for was made yet."""
    for name in os.listdir(folder) if any_in(folder) else []:
        path = f"{folder}/{name}"
        if name.startswith(".") and os.path.isfile(path) and time.time() - os.stat(path).st_mtime > _DRAFT_S:
            os.unlink(path)
    if any_in(folder):
        _remove_if_empty(folder)


def settle(folder: str, target: str) -> None:
    """Undoes what belongs to mounts at ``target`` that are not there any more.

    Raises:
        NotReleased: something of one could not be undone; the others were all the same.
        Corrupt: a record cannot be read.
    """
    reached("unmounted")
    errors = _finish(of(folder, target))
    if errors:
        errors[0].causes += tuple(errors[1:])
        raise errors[0]


def settle_within(folder: str, path: str) -> list[HoldfastError]:
    """The same for mounts at ``path`` and below it; what could not be undone is given back."""
    if not any_in(folder):
        return []
    reached("unmounted")
    return _finish([record for record in all_in(folder, []) if table.is_within(record.target, path)])


def _finish(records: list[Record]) -> list[HoldfastError]:
    errors: list[HoldfastError] = []
    for record in records:
        if not record.is_over() or not record.try_lock():
            continue
        try:
            record.carry_out()
        except HoldfastError as error:
            errors.append(error)
        finally:
            record.release()
    return errors


def _read(folder: str, wanted: Callable[[str], bool], bad: list[HoldfastError] | None = None) -> Iterator[Record]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if not wanted(name):
            continue
        try:
            record = _load(folder, name)
        except Corrupt as error:
            if bad is None:
                raise
            bad.append(error)
        else:
            if record:
                yield record


def _load(folder: str, name: str) -> Record | None:
    path = f"{folder}/{name}"
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']!r}")
        record = Record(folder, _path(found["target"]), name)
        record.undo = list(found["undo"])
        record.mount_id = int(found["mount_id"])
        record._boot = str(found["boot"])
        record._namespace = int(found["namespace"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            "read record of a mount", subject=path, why=f"{type(error).__name__}: {error}", code="bad-record",
            hint="remove it once nothing that it names is in use",
        ) from None  # fmt: skip
    return record


def _remove_if_empty(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _drop(target: str) -> None:
    """Takes away a mount of our own making with all below it; nobody else knows of it."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _create(folder: str, path: str) -> int:
    for _ in range(100):  # whoever removes the last record removes the folder, too
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            os.makedirs(folder, 0o700, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _crc(target: str) -> str:
    return f"{binascii.crc32(os.fsencode(target)):08x}"


def _text(path: str) -> str:
    """A path as JSON can hold it: names need not be UTF-8, and surrogates are not."""
    return os.fsencode(path).decode("latin-1")


def _path(text: str) -> str:
    return os.fsdecode(text.encode("latin-1"))


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _namespace() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def _namespace_lives(number: int) -> bool:
    """Whether any process is in a mount namespace; one that none is in went, and its mounts with it."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}/ns/mnt").st_ino == number:
                    return True
            except OSError:  # ended, or not ours to see
                continue
    return False
