"""Scratch disks: empty ext4 filesystems for a container's own writes.

Formatting takes time and is the same each time, so each size is formatted once, sparse, and copied.  A
copy is a file without a name (``O_TMPFILE``): when nobody has it open any more it is gone, whatever crashed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from typing import TYPE_CHECKING

from holdfast.errors import Exhausted, HoldfastError, InvalidInput, NotFound, TimedOut
from holdfast.linux import syscalls

if TYPE_CHECKING:
    from pathlib import Path

MIN_BYTES = 16 << 20
MAX_BYTES = 16 << 40
DEFAULT_BYTES = 10 << 30
#: What guest/mapped.py gives the header of an encrypted disk.
LUKS_BYTES = 1 << 20
_MKE2FS = "/sbin/mke2fs"
_MKE2FS_SECONDS = 120
#: No journal: the disk does not outlive its container, so there is nothing to recover.  Inode tables are
#: written when they are used first, which keeps the file, and with it every copy, small.
_OPTIONS = (
    "-q",
    "-F",
    "-t",
    "ext4",
    "-O",
    "^has_journal",
    "-E",
    "lazy_itable_init=1,nodiscard,root_owner=0:0",
    "-m",
    "0",
)


def whole_blocks(size_bytes: int) -> int:
    """The size that a scratch disk really gets.

    Raises:
        InvalidInput: it is out of range.
    """
    rounded = -(-size_bytes // 4096) * 4096
    if not MIN_BYTES <= rounded <= MAX_BYTES:
        raise InvalidInput(
            "make scratch disk", subject=f"{size_bytes} bytes", why="it must be 16M to 16T", code="scratch-size"
        )
    return rounded


def prepare(data: Path, size_bytes: int) -> Path:
    """The formatted file to copy for scratch disks of a size; made if it is not there.

    Raises:
        InvalidInput: the size is out of range.
        NotFound: mke2fs is not installed.
        Exhausted: the host's disk is full.
    """
    size_bytes = whole_blocks(size_bytes)
    folder = data / "scratch"
    path = folder / f"{size_bytes}.ext4"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    fd = unnamed(folder)
    try:
        os.ftruncate(fd, size_bytes)
        done = subprocess.run(
            [_MKE2FS, *_OPTIONS, f"/proc/self/fd/{fd}"], pass_fds=[fd], capture_output=True, text=True,
            env={**os.environ, "LC_ALL": "C"}, timeout=_MKE2FS_SECONDS,
        )  # fmt: skip
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise _full(folder)
        if done.returncode:
            raise HoldfastError("format scratch disk", subject=path, why=done.stderr.strip(), code="scratch-failed")
        os.fsync(fd)  # the name must not survive a crash of the host that the contents do not
        with contextlib.suppress(FileExistsError):  # somebody else was faster, with the same bytes in it
            _give_name(fd, path)
    except FileNotFoundError:
        raise NotFound("find mke2fs", subject=_MKE2FS, hint="apt install e2fsprogs", code="tool-not-found") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(folder) from None
        raise
    except subprocess.TimeoutExpired:
        raise TimedOut("format scratch disk", subject=path, why=f"not done within {_MKE2FS_SECONDS} s") from None
    finally:
        os.close(fd)
    return path


def formatted(data: Path, size_bytes: int) -> int:
    """A new scratch disk of a size; see :func:`prepare` and :func:`copy`."""
    return copy(prepare(data, size_bytes))


def blank(data: Path, size_bytes: int) -> int:
    """A disk of zeros that has room for so much once the guest has encrypted it; the caller owns the descriptor.

    Raises:
        InvalidInput: the size is out of range.
        Exhausted: the host's disk is full.
    """
    folder = data / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    fd = unnamed(folder)
    try:
        os.ftruncate(fd, whole_blocks(size_bytes) + LUKS_BYTES)
    except BaseException:
        os.close(fd)
        raise
    return fd


def copy(prepared: Path) -> int:
    """A new scratch disk: an open file without a name, which the caller owns.

    Raises:
        Exhausted: the host's disk is full.
    """
    source = os.open(prepared, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = unnamed(prepared.parent)
        try:
            _copy_data(source, target)
        except OSError as error:
            os.close(target)
            if error.errno == errno.ENOSPC:
                raise _full(prepared.parent) from None
            raise
        except BaseException:
            os.close(target)
            raise
        return target
    finally:
        os.close(source)


def _copy_data(source: int, target: int) -> None:
    try:
        fcntl.ioctl(target, syscalls.FICLONE, source)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
            raise
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    start = 0
    while True:
        try:
            start = os.lseek(source, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this: lseek(2)
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            count = os.copy_file_range(source, target, end - start, start, start)
            if not count:
                raise OSError(errno.EIO, "the prepared disk became shorter")
            start += count


def unnamed(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(folder) from None
        raise HoldfastError("make scratch disk", subject=folder, why=error, code="scratch-failed") from None


def _give_name(fd: int, path: Path) -> None:
    """Links an unnamed file into a folder (open(2), O_TMPFILE); a folder's descriptor makes Python call linkat(2)."""
    folder_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=True)
    finally:
        os.close(folder_fd)


def _full(folder: Path) -> Exhausted:
    return Exhausted("make scratch disk", subject=folder, why="the host's disk is full", code="disk-full")
