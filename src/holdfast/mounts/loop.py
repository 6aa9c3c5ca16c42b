"""Loop devices that let go by themselves: a file as a block device, as long as something is mounted from it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time

from holdfast.errors import Exhausted, HoldfastError
from holdfast.linux.fds import OwnedFd

_LOOP_SET_FD = 0x4C00
_LOOP_CLR_FD = 0x4C01
_LOOP_SET_STATUS64 = 0x4C04
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_DIRECT_IO = 0x4C08
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

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

    __slots__ = ("_fd", "device", "file")

    def __init__(self, device: str, fd: OwnedFd) -> None:
        self.device = device
        self._fd = fd
        info = _status(fd.fileno())
        self.file = (int(info.lo_device), int(info.lo_inode))

    def fileno(self) -> int:
        """The descriptor; it stays this object's."""
        return self._fd.fileno()

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        self._fd.close()

    def undo(self) -> dict[str, object]:
        """The step of a record that lets go of it."""
        return {"loop": {"device": self.device, "file": list(self.file)}}


def attach(path: str, *, read_only: bool = False, direct_io: bool = False) -> Loop:
    """Puts a free loop device before a file.  Linux 5.8 does it in one call; before, others could see it half made.

    Args:
        path: the file.
        read_only: open it and serve it read-only.
        direct_io: do not cache the file a second time.

    Raises:
        OSError: the file cannot be opened, or is no file that a loop device takes.
        Exhausted: there is no free loop device.
    """
    flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if read_only else 0) | (LO_FLAGS_DIRECT_IO if direct_io else 0)
    mode = os.O_RDONLY if read_only else os.O_RDWR
    with (
        OwnedFd(os.open(path, mode | os.O_CLOEXEC)) as file,
        OwnedFd(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control,
    ):
        for attempt in range(_TRIES):
            try:
                device = f"/dev/loop{fcntl.ioctl(control.fileno(), _LOOP_CTL_GET_FREE)}"
            except OSError as error:
                raise Exhausted("attach loop device", subject=path, why=error, code="no-loop-device") from None
            fd = OwnedFd(os.open(device, mode | os.O_CLOEXEC))
            try:
                _configure(fd.fileno(), file.fileno(), os.fsencode(path), flags)
                return Loop(device, fd)
            except OSError as error:
                fd.close()
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"loop device: {os.strerror(error.errno or 0)}", path) from None
            except BaseException:
                fd.close()
                raise
            time.sleep(min(0.001 * attempt, 0.05))
    raise Exhausted("attach loop device", subject=path, why="others take each before we do", code="no-loop-device")


def _configure(fd: int, file_fd: int, name: bytes, flags: int) -> None:
    info = _Info(lo_flags=flags, lo_file_name=name[:63])
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, bytes(_Config(fd=file_fd, info=info)))
        return
    except OSError as error:
        # An old kernel says EINVAL, as this one does of a file that it cannot take: the old way then tells which.
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
    fcntl.ioctl(fd, _LOOP_SET_FD, file_fd)
    try:
        fcntl.ioctl(fd, _LOOP_SET_STATUS64, bytes(info))
        if flags & LO_FLAGS_DIRECT_IO:
            fcntl.ioctl(fd, _LOOP_SET_DIRECT_IO, 1)
    except BaseException:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
        raise


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
