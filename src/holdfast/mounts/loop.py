"""Loop devices that let go by themselves: a file as a block device, as long as something is mounted from it.

A loop device keeps the open file that it was made from, so it needs no name for it, and whatever right goes with the
descriptor (a lock, a block device's exclusive claim) lasts as long as the loop.  ``LO_FLAGS_AUTOCLEAR`` ends it with
its last user: when everything that has it open or mounted is gone, so is the loop, whatever killed them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time

from holdfast.errors import Exhausted, HoldfastError, Unsupported
from holdfast.linux.fds import OwnedFd

_LOOP_SET_FD = 0x4C00
_LOOP_CLR_FD = 0x4C01
_LOOP_SET_STATUS64 = 0x4C04
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_SET_DIRECT_IO = 0x4C08
_LOOP_SET_BLOCK_SIZE = 0x4C09
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16

_CONTROL = "/dev/loop-control"
_SECTOR = 512

#: Others may take the device that was free a moment ago; under such a race each try waits a little longer.
_TRIES = 99


class _Info(ctypes.Structure):
    """``struct loop_info64`` of linux/loop.h."""

    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * 64),
        ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class _Config(ctypes.Structure):
    """``struct loop_config``."""

    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _Info),
        ("reserved", ctypes.c_uint64 * 8),
    )


class Loop:
    """A loop device that is held open; once it is closed and nothing is mounted from it, the kernel frees it.

    Attributes:
        device: its path.
        file: (device, inode) of what is behind it, in the kernel's numbers.
    """

    __slots__ = ("_counted", "_fd", "_file_fd", "_sequence", "device", "file")

    def __init__(self, device: str, fd: OwnedFd, file_fd: OwnedFd) -> None:
        """Owns both descriptors from now on: the device's, and one of the file behind it."""
        self.device = device
        self._fd = fd
        self._file_fd = file_fd
        info = _status(fd.fileno())
        self.file = (int(info.lo_device), int(info.lo_inode))
        self._sequence = _read(f"{self._sysfs}/diskseq")
        self._counted = self._counters()

    @property
    def name(self) -> str:
        """As in ``/sys/block``: ``loop7``."""
        return os.path.basename(self.device)

    @property
    def _sysfs(self) -> str:
        return f"/sys/block/{self.name}"

    def fileno(self) -> int:
        """The descriptor; it stays this object's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Closes it, which is the end of one that nobody else uses; a second call does nothing."""
        self._fd.close()
        self._file_fd.close()

    def undo(self) -> dict[str, object]:
        """The step of a record that lets go of it."""
        return {"loop": {"device": self.device, "file": list(self.file)}}

    @property
    def attached(self) -> bool:
        """Whether the device still has our file: asked of sysfs, since opening it would make us a user of it."""
        if not os.path.exists(f"{self._sysfs}/loop/backing_file"):
            return False
        # Another one, perhaps, has the number by now: Linux 5.15 counts what was in a device.
        return _read(f"{self._sysfs}/diskseq") == self._sequence

    def resize(self, size_bytes: int) -> None:
        """Makes the file, and the device, so large.

        Raises:
            OSError: the file cannot be made larger.
        """
        os.ftruncate(self._file_fd.fileno(), size_bytes)
        fcntl.ioctl(self._fd.fileno(), _LOOP_SET_CAPACITY)

    def traffic(self) -> tuple[int, int]:
        """Bytes read from it and written to it."""
        now = self._counters()
        return now[0] - self._counted[0], now[1] - self._counted[1]

    def _counters(self) -> tuple[int, int]:
        """What the kernel has counted, for whatever was attached there: Documentation/block/stat.rst."""
        fields = _read(f"{self._sysfs}/stat").split()
        return (int(fields[2]) * _SECTOR, int(fields[6]) * _SECTOR) if len(fields) > 6 else (0, 0)


def attach(path: str, *, read_only: bool = False, direct_io: bool = False) -> Loop:
    """Puts a free loop device before a file.

    Args:
        path: the file.
        read_only: open it and serve it read-only.
        direct_io: do not cache the file a second time.

    Raises:
        OSError: the file cannot be opened.
        Others: as :func:`attach_fd`.
    """
    mode = os.O_RDONLY if read_only else os.O_RDWR
    with OwnedFd(os.open(path, mode | os.O_CLOEXEC)) as file:
        return attach_fd(file.fileno(), path, read_only=read_only, direct_io=direct_io)


def attach_fd(
    file_fd: int, path: str, *, read_only: bool, direct_io: bool = False, partitions: bool = False, block_bytes: int = 0
) -> Loop:
    """Puts a free loop device before an open file or block device; a copy of the descriptor is kept.

    Linux 5.8 does it in one call; before, others could see it half made.

    Args:
        path: what the kernel shows as its name, and errors.
        partitions: those on it get devices, too.
        block_bytes: size of its sectors; 0 is the kernel's choice.

    Raises:
        OSError: it is no file that a loop device takes.
        Unsupported: the kernel has no loop devices, or does not let us have any.
        Exhausted: there is no free one.
    """
    flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if read_only else 0) | (LO_FLAGS_DIRECT_IO if direct_io else 0)
    flags |= LO_FLAGS_PARTSCAN if partitions else 0
    with _control() as control:
        for attempt in range(_TRIES):
            try:
                device = f"/dev/loop{fcntl.ioctl(control.fileno(), _LOOP_CTL_GET_FREE)}"
            except OSError as error:
                raise Exhausted("attach loop device", subject=path, why=error, code="no-loop-device") from None
            fd = OwnedFd(os.open(device, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC))
            try:
                _configure(fd.fileno(), file_fd, os.fsencode(path), flags, block_bytes)
                return Loop(device, fd, OwnedFd(os.dup(file_fd)))
            except OSError as error:
                fd.close()
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"loop device: {os.strerror(error.errno or 0)}", path) from None
            except BaseException:
                fd.close()
                raise
            time.sleep(min(0.001 * attempt, 0.05))
    raise Exhausted("attach loop device", subject=path, why="others take each before we do", code="no-loop-device")


def _control() -> OwnedFd:
    try:
        return OwnedFd(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unsupported(
            "attach loop device", subject=_CONTROL, why=error, code="no-loop-devices", hint="modprobe loop, as root"
        ) from None


def _configure(fd: int, file_fd: int, name: bytes, flags: int, block_bytes: int) -> None:
    info = _Info(lo_flags=flags, lo_file_name=name[:63])
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, bytes(_Config(fd=file_fd, block_size=block_bytes, info=info)))
        return
    except OSError as error:
        # An old kernel says EINVAL, as this one does of a file that it cannot take: the old way then tells which.
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
    fcntl.ioctl(fd, _LOOP_SET_FD, file_fd)
    try:
        if block_bytes:
            fcntl.ioctl(fd, _LOOP_SET_BLOCK_SIZE, block_bytes)
        fcntl.ioctl(fd, _LOOP_SET_STATUS64, bytes(info))
        if flags & LO_FLAGS_DIRECT_IO:
            fcntl.ioctl(fd, _LOOP_SET_DIRECT_IO, 1)
    except BaseException:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
        raise


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:  # of an older kernel, or a device that goes
        return ""


def _status(fd: int) -> _Info:
    buffer = bytearray(ctypes.sizeof(_Info))
    fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer)
    return _Info.from_buffer_copy(buffer)


def let_go(device: str, file: object) -> None:
    """Frees a loop device if it still has the file that it was given; not there, or another's by now, is success.

    Args:
        device: its path.
        file: :attr:`Loop.file`.

    Raises:
        HoldfastError: it cannot be freed.
    """
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return
        raise
    try:
        info = _status(fd)
        if isinstance(file, (list, tuple)) and tuple(file) == (info.lo_device, info.lo_inode):
            fcntl.ioctl(fd, _LOOP_CLR_FD)  # somebody else's use of it delays that, and no more
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise HoldfastError("free loop device", subject=device, why=error, code="loop-busy") from None
    finally:
        os.close(fd)
