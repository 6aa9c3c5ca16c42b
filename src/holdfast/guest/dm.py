"""The kernel's device mapper: devices made of other devices, by ioctl(2) on ``/dev/mapper/control``.

The interface is that of the kernel's ``include/uapi/linux/dm-ioctl.h``.  Making a device is creating it by name,
loading its table, and resuming it; devtmpfs gives it its node ``/dev/dm-<n>``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from holdfast.errors import GuestFailed, InvalidInput, NotReleased, TimedOut, Unsupported
from holdfast.guest.loop import sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.guest.loop import Task

CONTROL = "/dev/mapper/control"
SECTOR = 512
READ_ONLY = 1
DEV_CREATE, DEV_REMOVE, DEV_SUSPEND, TABLE_LOAD = 3, 4, 6, 9
LONGEST_NAME = 127
# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name,
# uuid.
HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
# struct dm_target_spec: sector_start, length, status, next, target_type.
TARGET = struct.Struct("=QQiI16s")
# _IOWR(0xfd, command, struct dm_ioctl)
_IOWR = 3 << 30 | HEADER.size << 16 | 0xFD << 8
_VERSION = (4, 0, 0)
#: What a device that is just coming or going makes the kernel say.
_NOT_YET = (errno.EBUSY, errno.ENOENT, errno.ENXIO, errno.ENODEV)
_CREATE_SECONDS = 0.1
_REMOVE_TRIES, _REMOVE_SECONDS = 10, 0.01


def message(name: str, flags: int = 0, payload: bytes = b"") -> bytearray:
    """A request about the device ``name``; ``payload`` is the one target of its table.

    Raises:
        InvalidInput: the name is none.
    """
    raw = name.encode()
    if not 0 < len(raw) <= LONGEST_NAME or b"/" in raw or b"\0" in raw:
        raise InvalidInput("map device", subject=name, why="not a name of a mapped device")
    size = HEADER.size + len(payload)
    head = HEADER.pack(*_VERSION, size, HEADER.size, 1 if payload else 0, 0, flags, 0, 0, 0, raw, b"")
    return bytearray(head + payload)


def target(kind: str, sectors: int, parameters: str) -> bytes:
    """A table of one target that begins at sector 0."""
    text = parameters.encode() + b"\0"
    text = text.ljust(-(-len(text) // 8) * 8, b"\0")
    return TARGET.pack(0, sectors, 0, TARGET.size + len(text), kind.encode()) + text


def create(name: str, table: bytes, *, read_only: bool) -> Task:
    """Task: makes a device; returns its node.  A device below it that is not quite there yet is waited for.

    Raises:
        GuestFailed: the kernel refused it; nothing of it is left.
        Unsupported: the kernel has no device mapper.
    """
    why: OSError | None = None
    while True:
        try:
            return _create(name, table, READ_ONLY if read_only else 0)
        except OSError as error:
            if error.errno not in _NOT_YET:
                raise GuestFailed("map device", subject=name, why=error, code="mapping-failed") from None
            why = error
        try:
            yield sleep(_CREATE_SECONDS)
        except TimedOut:
            raise GuestFailed("map device", subject=name, why=why, code="mapping-failed") from None


def _create(name: str, table: bytes, flags: int) -> str:
    control = _open()
    try:
        _command(control, DEV_CREATE, message(name))
        try:
            _command(control, TABLE_LOAD, message(name, flags, table))
            answer = _command(control, DEV_SUSPEND, message(name, flags))  # without the flag to suspend it resumes
        except OSError:
            _command(control, DEV_REMOVE, message(name))
            raise
    finally:
        os.close(control)
    return f"/dev/dm-{os.minor(HEADER.unpack_from(answer)[10])}"


def remove(name: str) -> Task:
    """Task: removes a device; that it is not there is success.

    Raises:
        NotReleased: somebody still uses it.
    """
    for _ in range(_REMOVE_TRIES):
        error = remove_now(name)
        if error is None:
            return
        if error.errno != errno.EBUSY:
            raise GuestFailed("unmap device", subject=name, why=error, code="mapping-failed")
        yield sleep(_REMOVE_SECONDS)
    raise NotReleased(
        "unmap device", subject=name, why="the guest still uses it", code="disk-busy",
        hint="end the processes that have files open on it, then try again",
    )  # fmt: skip


def remove_now(name: str) -> OSError | None:
    """Tries once; returns why the device is still there."""
    if not os.path.exists(CONTROL):
        return None
    control = _open()
    try:
        _command(control, DEV_REMOVE, message(name))
    except OSError as error:
        if error.errno != errno.ENXIO:
            return error
    finally:
        os.close(control)
    return None


def _open() -> int:
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unsupported(
            "map device", subject=CONTROL, why="the guest's kernel has no device mapper", code="no-device-mapper",
            hint="build the guest from a kernel that has the module dm_mod",
        ) from None  # fmt: skip


def _command(control: int, command: int, request: bytearray) -> bytearray:
    fcntl.ioctl(control, _IOWR | command, request, True)
    return request
