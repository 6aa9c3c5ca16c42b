"""The disks of volumes: made, checked, grown; and who may do that to one while pods come and go.

What is done to a disk from here is done by a *tenant*: it holds the lease of a writer, as a pod would, and the journal
takes it for one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import Corrupt, Exhausted, HoldfastError, InUse, InvalidInput, NotFound, NotReleased, TimedOut
from holdfast.linux import disk_locks
from holdfast.spec.sizes import parse_size
from holdfast.storage.disk_formats import identity
from holdfast.storage.journal import Journal
from holdfast.storage.scratch import MAX_BYTES, MIN_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILESYSTEM = "ext4"
#: The file is new and sparse: discarding tells mke2fs that it reads as zeros, so that neither it nor the first mount
#: writes inode tables and journal full of them.  Blocks of 4 KiB whatever the size: a small volume may become large.
_MKE2FS = (
    "/sbin/mke2fs", "-q", "-F", "-t", FILESYSTEM, "-b", "4096", "-m", "0",
    "-E", "lazy_itable_init=1,lazy_journal_init=1,discard,root_owner=0:0",
)  # fmt: skip
#: An empty volume is an empty folder: some programs (initdb) refuse one with lost+found.  e2fsck makes it when needed.
_NO_LOST_FOUND = ("/sbin/debugfs", "-w", "-R", "rmdir lost+found")
#: Checking takes minutes for a large, full volume; killed in the middle it would have to be done again.
_TOOL_SECONDS = 3600
#: ext4's superblock: s_feature_incompat, and the bit of it that says that the journal is to be replayed.
_INCOMPAT_OFFSET, _RECOVER = 1024 + 0x60, 0x4
#: Names of tenants begin so; no pod's begins with a dot.
TENANT = ".volume-"
_TRIES = 5


# -- the disk -------------------------------------------------------------------------------------


def whole_blocks(name: str, size: int | str) -> int:
    """The size in bytes that a volume's disk really gets.

    Raises:
        InvalidInput: ``size``, ``volume-size``.
    """
    size_bytes = parse_size(size, subject=name) if isinstance(size, str) else size
    rounded = -(-size_bytes // 4096) * 4096
    if not MIN_BYTES <= rounded <= MAX_BYTES:
        why = f"{size_bytes} bytes; it must be 16M to 16T"
        raise InvalidInput("size volume", subject=name, why=why, code="volume-size")
    return rounded


def format_disk(path: Path, name: str, size_bytes: int) -> None:
    """Makes the disk of a new volume, durable when this returns."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        _tool("format volume", name, _MKE2FS, fd)
        _tool("format volume", name, _NO_LOST_FOUND, fd)
        os.fsync(fd)  # the name must not survive a crash of the host that the contents do not
    finally:
        os.close(fd)


def grow_disk(name: str, size_bytes: int, fd: int, lock_fd: int) -> None:
    """Makes a tenant's disk larger.

    It is checked first, so that nothing has happened to one that is damaged; one that has the size already is done
    anew, for an earlier try may have come only half-way.
    """
    now = os.fstat(fd).st_size
    if size_bytes < now:
        raise too_small(name, size_bytes, now)
    _check(name, fd, lock_fd, "-f")
    os.ftruncate(fd, size_bytes)
    _tool("grow volume", name, ("/sbin/resize2fs",), fd, lock_fd)
    _tool("grow volume", name, _NO_LOST_FOUND, fd, lock_fd)
    os.fsync(fd)


def _check(name: str, fd: int, lock_fd: int, *options: str) -> None:
    """Replays the journal and mends what can be mended without asking; e2fsck(8): then 0 or 1 is its status."""
    status, text = _tool("check volume", name, ("/sbin/e2fsck", "-p", *options), fd, lock_fd, failing=True)
    if status not in (0, 1):
        raise Corrupt(
            "check volume", subject=name, why=text, code="volume-damaged",
            hint="let e2fsck -f ask what to do with its disk; holdfast volume inspect says where that is",
        )  # fmt: skip


def _tool(what: str, name: str, argv: Sequence[str], fd: int, *held: int, failing: bool = False) -> tuple[int, str]:
    """Runs a program of e2fsprogs on an open disk.

    Its session is its own, and it holds ``held``: neither Ctrl-C nor the end of this process stops it half-way, and
    the disk is not free before it has ended.
    """
    argv = [*argv, f"/proc/self/fd/{fd}"]
    try:
        with subprocess.Popen(
            argv, pass_fds=[fd, *held], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "LC_ALL": "C"}, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                text = process.communicate(timeout=_TOOL_SECONDS)[0].strip()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            except BaseException:
                process.wait()
                raise
    except FileNotFoundError:
        hint = "apt install e2fsprogs"
        raise NotFound(what, subject=name, why=f"no {argv[0]}", hint=hint, code="tool-not-found") from None
    except subprocess.TimeoutExpired:
        raise TimedOut(what, subject=name, why=f"{argv[0]} has not ended within {_TOOL_SECONDS} s") from None
    if os.strerror(errno.ENOSPC) in text:
        raise _full(what, name)
    if process.returncode and not failing:
        raise HoldfastError(what, subject=name, why=text or f"{argv[0]}: {process.returncode}", code="volume-failed")
    return process.returncode, text


def replay(root: Path, path: str) -> None:
    """Replays the journal of a volume that was not unmounted: who only reads it would not, and miss what is in there.

    Args:
        root: the state root of the pod that is going to read it.
        path: of the volume's disk.

    Raises:
        InUse: a pod writes to it.
        Corrupt: ``volume-damaged``.
    """
    folder = os.path.dirname(path)
    name = os.path.basename(folder)
    with told("read volume", name):
        # Of several readers one does it, and the others wait for that.
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder_fd, fcntl.LOCK_EX)
            if _needs_replay(path):
                with tenancy(root, path) as (fd, lock_fd):
                    _check(name, fd, lock_fd)
        finally:
            os.close(folder_fd)


def _needs_replay(path: str) -> bool:
    with open(path, "rb") as file:
        raw = os.pread(file.fileno(), 4, _INCOMPAT_OFFSET)
    return len(raw) == 4 and bool(struct.unpack("<I", raw)[0] & _RECOVER)


def same_file(one: str, other: str | Path) -> bool:
    """Whether two paths lead to one file; one that leads nowhere to none."""
    with contextlib.suppress(OSError):
        return one == str(other) or os.path.samefile(one, other)
    return False


# -- a writer that is no pod ----------------------------------------------------------------------


@contextlib.contextmanager
def tenancy(root: Path, path: str) -> Iterator[tuple[int, int]]:
    """A disk, open, with the lease of its only user; yields its descriptor and one to hold as long as it is used.

    The lease is in the name of a folder beside those of pods, with a lock in it: so the journal finds it alive as long
    as this process is, or a child that has the lock, and lets go of what a crash leaves as of a pod's.

    Raises:
        InUse: somebody has it.
        FileNotFoundError: it is gone.
    """
    with Journal(root) as journal:
        name, lock_fd = _tenant(journal)
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            journal.lease(name, *identity(os.fstat(fd)), path, writable=True)
            _lock_whole(fd, path)
            if os.fstat(fd).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            yield fd, lock_fd
        finally:
            if fd >= 0:
                os.close(fd)
            try:
                journal.forget_pod(name)
            finally:
                os.close(lock_fd)


def _tenant(journal: Journal) -> tuple[str, int]:
    """A new name that the journal finds alive as long as the returned descriptor is open anywhere."""
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=TENANT, dir=journal.pods_folder))
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(folder / "lock")):
                    return folder.name, fd
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(fd)
        # A collector has come between making the folder and locking it, and took it for one left behind.
        with contextlib.suppress(NotReleased):
            journal.collect(folder.name)
    raise InUse("use volume", why="its lock was taken again and again", code="volume-in-use", hint="try again")


def _lock_whole(fd: int, path: str) -> None:
    """Pods of other state roots count, too."""
    try:
        disk_locks.claim(fd)
    except BlockingIOError:
        raise InUse(
            "lock volume", subject=path, why="a machine has it open, of a pod of another state root perhaps",
            code="volume-in-use",
        ) from None  # fmt: skip


# -- errors ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def told(what: str, name: str) -> Iterator[None]:
    """What the host's file system refuses, in our words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(what, name) from None
        if error.errno == errno.ENOENT:
            raise NotFound(what, subject=name, why="it has been removed", code="volume-not-found") from None
        if error.errno == errno.EFBIG:
            why = "larger than a file of the host's file system may be"
            raise InvalidInput(what, subject=name, why=why, code="volume-size") from None
        raise HoldfastError(what, subject=name, why=error, code="volume-failed") from None


def too_small(name: str, size_bytes: int, now: int) -> InvalidInput:
    why = f"{size_bytes} bytes are less than the {now} that it has"
    return InvalidInput("grow volume", subject=name, why=why, code="volume-size", hint="a volume does not shrink")


def _full(what: str, name: str) -> Exhausted:
    return Exhausted(what, subject=name, why="the host's disk is full", code="disk-full")
