"""Mount points that a root filesystem lacks, where that is a directory of the host's which is written to.

A runtime makes them and leaves them there.  So they are made before it, known to the journal before that, and removed
when nobody has the directory for a root any more: removing one under a mount would take the mount away from whoever
has it, in whatever mount namespace (rmdir(2) does, since Linux 3.18).

Who has the directory holds a shared lock on it (flock(2)): the kernel drops that, whatever kills a pod, and pods of
other state roots are seen by it, too.  Who gets the lock alone removes what the journal says was made there, by
whichever pod of the state root: its rows outlive the pod, if others have the directory still.  A row has the real
path, and as soon as the thing is made, its inode and birth time, for a filesystem soon uses an inode again.  What is
not that, or has something in it, is somebody's by now and stays; so does all that is on a filesystem without birth
times, where nobody can tell.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import InUse, NotFound
from holdfast.linux.fds import OwnedFd
from holdfast.storage.real_paths import RealPaths, lacking

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from holdfast.storage.journal import HeldRow, Journal
    from holdfast.storage.steps import MakeMountPoints, MountPoint

#: Of their rows in the journal.
KIND = "mount-point"
_LOCK_SECONDS = 10.0
#: If a pod is killed before a row has the inode, the thing is ours if it was made at most this long after the row.
_MAKING_NS = 5 * 10**9
#: Times of files are those of the last tick of the clock (current_time() of the kernel), at 100 Hz or more.
_TICK_NS = 10 * 10**6
#: Why something cannot be removed that is not ours, or not any more.
_SOMEBODYS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL)


class RootKey(NamedTuple):
    """A directory that is a root filesystem, as rows of the journal name it."""

    root: str
    device: int
    inode: int


class UsedRoot:
    """A directory that containers of a pod have for their root filesystem.

    Attributes:
        fd: the directory, locked for as long.
        users: names of the containers.
    """

    def __init__(self, key: RootKey, fd: OwnedFd) -> None:
        self.key = key
        self.fd = fd
        self.users: set[str] = set()


class MountPoints:
    """Those that one pod makes."""

    def __init__(self, journal: Journal, pod: str) -> None:
        self._journal = journal
        self._pod = pod
        self._roots: dict[tuple[int, int], UsedRoot] = {}

    async def make(self, step: MakeMountPoints, container: str) -> None:
        """Makes what is missing, for a container; one that cannot be made is the runtime's to complain of.

        Raises:
            NotFound: ``source-not-found``: the directory is gone, or another one is there.
            InUse: ``root-locked``.
        """
        key = (step.device, step.inode)
        if key not in self._roots:
            used = await _use(step)
            if self._roots.setdefault(key, used) is not used:  # another container was faster
                used.fd.close()
        self._roots[key].users.add(container)
        self._make(self._roots[key], step.points)

    def add(self, container: str, point: MountPoint) -> None:
        """Makes one more, for a container that runs; nothing if its root filesystem is no such directory."""
        for used in self._roots.values():
            if container in used.users:
                self._make(used, [point])

    def _make(self, used: UsedRoot, points: Sequence[MountPoint]) -> None:
        with RealPaths(used.fd.fileno()) as tree:
            missing = lacking(tree, points)
            if not missing:
                return
            rows = [_row(used.key, path) for path in missing]
            ids = self._journal.intend_all(self._pod, KIND, rows)
            made = {}
            for id, (_, detail), (path, point) in zip(ids, rows, missing.items(), strict=True):
                if identity := _made(tree, path, point):
                    made[id] = {**detail, "made": identity}
        self._journal.hold_all(made, made.values())
        self._journal.release_all(id for id in ids if id not in made)

    def release(self, container: str) -> None:
        """A container is gone, and with the last one that has the directory, in whatever pod, what was made there.

        What cannot be removed stays recorded.
        """
        for key, used in list(self._roots.items()):
            used.users.discard(container)
            if not used.users:
                del self._roots[key]
                with used.fd:
                    if _is_alone(used.fd):
                        _remove(self._journal, used.key, used.fd)


# -- what is left: of pods that were killed, or whose root others had still ---------------------------------


def unused(journal: Journal) -> list[HeldRow]:
    """What was made in directories that nobody has now.

    A directory that its path does not lead to any more may be in use still: by a pod that lives and has made something
    there.
    """
    found: list[HeldRow] = []
    for root, rows in _by_root(journal.held(kind=KIND)).items():
        try:
            _lock_alone(root).close()
        except BlockingIOError:
            continue
        except OSError:  # it is not there, or not to be opened
            if _has_pod(journal, rows):
                continue
        found += rows
    return found


def remove_unused(journal: Journal, pod: str | None = None) -> None:
    """Removes it; what cannot be removed stays recorded.

    Args:
        pod: only in directories in which this one has made something; it is being forgotten, and counts as dead.
    """
    for root, rows in _by_root(journal.held(kind=KIND)).items():
        if pod is not None and all(row.pod != pod for row in rows):
            continue
        try:
            fd = _lock_alone(root)
        except (FileNotFoundError, NotADirectoryError):
            if not _has_pod(journal, rows, forgotten=pod):
                journal.release_all(row.id for row in rows)
        except OSError:  # somebody has it, or nobody can tell
            continue
        else:
            with fd:
                _remove(journal, root, fd)


def _has_pod(journal: Journal, rows: Iterable[HeldRow], forgotten: str | None = None) -> bool:
    """Whether a pod lives that any of the rows are of."""
    return any(journal.is_alive(pod) for pod in {row.pod for row in rows} if pod != forgotten)


def _remove(journal: Journal, root: RootKey, fd: OwnedFd) -> None:
    """Removes what was made in a directory that is locked, as far as it is there, empty and ours."""
    rows = [row for row in journal.held(kind=KIND) if _key(row)[1:] == root[1:]]
    rows.sort(key=_path, reverse=True)  # what is in a directory comes before that
    with RealPaths(fd.fileno()) as tree:
        gone = [row.id for row in rows if _removed(tree, row)]
    journal.release_all(gone)


def _made(tree: RealPaths, path: bytes, point: MountPoint) -> tuple[int, int, int] | None:
    """Makes one; returns its device, inode and birth time, or None if that was not to be."""
    try:
        return tree.make(path, point.mode if point.directory else 0o644, directory=point.directory)
    except OSError:
        return None


def _is_ours(detail: dict[str, Any], found: tuple[int, int, int]) -> bool:
    """Whether what is found at a row's path is what was made for it; somebody's, if that cannot be told."""
    device, _, born_ns = found
    if not born_ns:
        return False
    if "made" in detail:
        return bool(list(found) == detail["made"])
    since_ns = born_ns - detail["at_ns"]
    return bool(device == detail["device"] and -_TICK_NS <= since_ns <= _MAKING_NS)


def _removed(tree: RealPaths, row: HeldRow) -> bool:
    """Whether it is done with, removed or somebody's; False if that cannot be told, or done, now."""
    path = _path(row)
    try:
        if _is_ours(row.detail, tree.identity(path)):
            tree.remove_empty(path)
    except OSError as error:
        return error.errno in _SOMEBODYS
    return True


# -- rows, and the lock --------------------------------------------------------------------------------------


def _row(root: RootKey, path: bytes) -> tuple[str, dict[str, Any]]:
    """Subject and detail of a row for what is about to be made."""
    shown = os.path.join(os.fsencode(root.root), path).decode(errors="backslashreplace")
    return shown, {**root._asdict(), "path": os.fsdecode(path), "at_ns": time.time_ns()}


def _key(row: HeldRow) -> RootKey:
    return RootKey(row.detail["root"], row.detail["device"], row.detail["inode"])


def _path(row: HeldRow) -> bytes:
    return os.fsencode(row.detail["path"])


def _by_root(rows: Iterable[HeldRow]) -> dict[RootKey, list[HeldRow]]:
    found: dict[RootKey, list[HeldRow]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    return found


def _open(path: str, identity: tuple[int, int]) -> OwnedFd:
    fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    status = os.fstat(fd.fileno())
    if (status.st_dev, status.st_ino) != identity:
        fd.close()
        raise FileNotFoundError(errno.ENOENT, "another directory is there now", path)
    return fd


def _is_alone(fd: OwnedFd) -> bool:
    """Takes the lock for nobody else; if somebody has it, what we had of it is given back."""
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_alone(root: RootKey) -> OwnedFd:
    """The directory, locked for nobody else; the caller's to close.

    Raises:
        BlockingIOError: somebody has it.
        FileNotFoundError, NotADirectoryError: it is gone, or another one is there.
        OSError: it cannot be opened.
    """
    fd = _open(root.root, (root.device, root.inode))
    if not _is_alone(fd):
        fd.close()
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), root.root)
    return fd


async def _use(step: MakeMountPoints) -> UsedRoot:
    """The directory, locked with others; see :meth:`MountPoints.make`."""
    identity = (step.device, step.inode)
    try:
        fd = _open(step.path, identity)
    except OSError as error:
        raise NotFound("make mount points", subject=step.path, why=error, code="source-not-found") from None
    try:
        # Whoever has it alone is removing what somebody has left, and soon done.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _is_shared(fd):
            if time.monotonic() > deadline:
                raise InUse(
                    "make mount points", subject=step.path, why="another process has locked it (flock)",
                    code="root-locked", hint="lslocks tells which",
                )  # fmt: skip
            await asyncio.sleep(0.01)
    except BaseException:
        fd.close()
        raise
    return UsedRoot(RootKey(os.readlink(f"/proc/self/fd/{fd.fileno()}"), *identity), fd)


def _is_shared(fd: OwnedFd) -> bool:
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
