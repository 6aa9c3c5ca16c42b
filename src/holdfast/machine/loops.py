"""Loop devices: the disks of a sandbox that has the host's own kernel.

A loop device keeps the open file that it was made from, so it needs no name for it, and whatever right goes with the
descriptor (a block device's exclusive claim) lasts as long as the loop.  ``LO_FLAGS_AUTOCLEAR`` ends it with its last
user: when the monitor and everything that has it mounted are gone, so is the loop, whatever killed them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from holdfast.errors import Exhausted, InUse, MachineFailed, Unsupported

# <linux/loop.h>
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_CONFIGURE = 0x4C0A  # Linux 5.8
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY, _AUTOCLEAR, _PARTSCAN, _DIRECT_IO = 1, 4, 8, 16
#: struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encryption type and key size, flags; file
#: name, encryption name and key; two numbers of the old days.
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG = struct.Struct("=2I")  # descriptor, block size; then the info, then 64 reserved bytes
_BLKSSZGET = 0x1268
_CONTROL = "/dev/loop-control"
#: struct flock; see fcntl(2).
_FLOCK = struct.Struct("hhqqi4x")
_DOES, _DENIES = 100, 200
_READS, _WRITES, _RESIZES = 0, 1, 3
_TRIES = 64
_SECTOR = 512


class Loop:
    """A loop device over an open disk.

    Attributes:
        name: as in ``/dev`` and ``/sys/block``: ``loop7``.
    """

    def __init__(self, disk_fd: int, *, read_only: bool) -> None:
        """Makes one.  ``disk_fd`` stays the caller's; a copy of it is kept.

        Raises:
            InUse: a machine, or a pod of another state root, has the file open in a way that does not go together.
            Unsupported: the kernel has no loop devices, or does not let us have any.
            Exhausted: every number that was tried was taken by somebody else meanwhile.
            MachineFailed: the kernel refused it; with its own text.
        """
        self._fd = -1
        self._disk_fd = os.dup(disk_fd)
        try:
            _lock(disk_fd, read_only)
            self.name, self._fd = _attach(disk_fd, read_only)
        except BaseException:
            os.close(self._disk_fd)
            raise
        self._sequence = _read(f"/sys/block/{self.name}/diskseq")
        self._counted = self._counters()

    @property
    def path(self) -> str:
        """Its device node."""
        return f"/dev/{self.name}"

    def resize(self, size_bytes: int) -> None:
        """Makes the file, and the device, so large.

        Raises:
            OSError: the file cannot be made larger.
        """
        os.ftruncate(self._disk_fd, size_bytes)
        fcntl.ioctl(self._fd, _LOOP_SET_CAPACITY)

    def traffic(self) -> tuple[int, int]:
        """Bytes read from it and written to it."""
        now = self._counters()
        return now[0] - self._counted[0], now[1] - self._counted[1]

    def _counters(self) -> tuple[int, int]:
        """What the kernel has counted, for whatever was attached there: Documentation/block/stat.rst."""
        fields = _read(f"/sys/block/{self.name}/stat").split()
        return (int(fields[2]) * _SECTOR, int(fields[6]) * _SECTOR) if len(fields) > 6 else (0, 0)

    def let_go(self) -> None:
        """Asks the kernel to end it, now or with its last user; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)  # AUTOCLEAR: this is the end of one that nobody else uses
            os.close(self._disk_fd)
            self._fd = self._disk_fd = -1

    @property
    def attached(self) -> bool:
        """Whether the device still has our file: asked of sysfs, since opening it would make us a user of it."""
        if not os.path.exists(f"/sys/block/{self.name}/loop/backing_file"):
            return False
        # Another one, perhaps, has the number by now: Linux 5.15 counts what was in a device.
        return _read(f"/sys/block/{self.name}/diskseq") == self._sequence


def _lock(disk_fd: int, read_only: bool) -> None:
    """Locks a file as QEMU does, so that machines, and pods of other state roots, are kept from it, and it from them.

    Each byte from 100 stands for something that an opener does, each from 200 for what it lets nobody else do (QEMU's
    block/file-posix.c).  The locks belong to the open file, which the loop keeps.
    """
    if not stat.S_ISREG(os.fstat(disk_fd).st_mode):
        return
    does = (_READS,) if read_only else (_READS, _WRITES)
    denies = (_WRITES, _RESIZES)
    for byte in (*(_DOES + bit for bit in does), *(_DENIES + bit for bit in denies)):
        try:
            fcntl.fcntl(disk_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):  # fcntl(2): EAGAIN or EACCES
            raise _in_use(disk_fd) from None
    for byte in (*(_DENIES + bit for bit in does), *(_DOES + bit for bit in denies)):
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        if _FLOCK.unpack(fcntl.fcntl(disk_fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
            raise _in_use(disk_fd)


def _in_use(disk_fd: int) -> InUse:
    return InUse(
        "open disk", subject=os.readlink(f"/proc/self/fd/{disk_fd}"), code="disk-in-use",
        why="a machine, or a pod of another state root, has it open",
    )  # fmt: skip


def _attach(disk_fd: int, read_only: bool) -> tuple[str, int]:
    """Finds a free number and takes it; somebody else may be quicker, and then the next is tried."""
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(
            "attach disk", subject=_CONTROL, why=error, code="no-loop-devices",
            hint="modprobe loop, or --isolation vm, which needs none",
        ) from None  # fmt: skip
    try:
        for _ in range(_TRIES):
            name = f"loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            fd = _configure(f"/dev/{name}", disk_fd, read_only)
            if fd >= 0:
                return name, fd
    except OSError as error:
        raise MachineFailed("attach disk", subject=error.filename or _CONTROL, why=error, code="loop-failed") from None
    finally:
        os.close(control)
    raise Exhausted("attach disk", why=f"{_TRIES} loop devices were taken at the moment of use", code="no-free-loop")


def _configure(device: str, disk_fd: int, read_only: bool) -> int:
    """Gives the device its file and returns it open, or -1 if it has another one already."""
    status = os.fstat(disk_fd)
    flags, block_bytes = _AUTOCLEAR | _PARTSCAN, 0
    if read_only:
        flags |= _READ_ONLY
    if stat.S_ISBLK(status.st_mode):
        # What is read of a file is kept for all pods that read it; of a device, one copy in memory is enough.
        flags |= _DIRECT_IO
        # Partition tables count in the device's own sectors.
        block_bytes = struct.unpack("=I", fcntl.ioctl(disk_fd, _BLKSSZGET, bytes(4)))[0]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, b"holdfast", b"", b"", 0, 0)
    fd = os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, _CONFIG.pack(disk_fd, block_bytes) + info + bytes(64))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            return -1
        raise
    return fd


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:  # of an older kernel, or a device that goes
        return ""
