"""Locks on a disk as QEMU has them, so that who opens one without QEMU is kept from it, and keeps others from it.

Each byte from 100 stands for something that an opener does, each from 200 for what it lets nobody else do (QEMU's
block/file-posix.c).  The locks belong to the open file (fcntl(2), open file description locks): they last as long as a
descriptor, or a loop device, has it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct

#: struct flock: kind, from where, start, length, and a process that means nothing here.
_FLOCK = struct.Struct("hhqqi4x")
_DOES, _DENIES = 100, 200
_READS, _WRITES, _RESIZES = 0, 1, 3


def share(fd: int, *, read_only: bool) -> None:
    """Opens a disk among others: any number may read it, or one writes.  A block device is none of QEMU's locks' kind.

    Raises:
        BlockingIOError: others have it open in a way that does not go together.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    does = (_READS,) if read_only else (_READS, _WRITES)
    denies = (_WRITES, _RESIZES)
    for byte in (*(_DOES + bit for bit in does), *(_DENIES + bit for bit in denies)):
        _set(fd, fcntl.F_RDLCK, byte, 1)
    for byte in (*(_DENIES + bit for bit in does), *(_DOES + bit for bit in denies)):
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        if _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
            raise BlockingIOError


def claim(fd: int) -> None:
    """Opens a disk alone: nobody reads it meanwhile either.

    Raises:
        BlockingIOError: somebody has it open.
    """
    _set(fd, fcntl.F_WRLCK, 0, 0)  # a length of 0: to the end, wherever that is


def _set(fd: int, kind: int, start: int, length: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except PermissionError:  # fcntl(2): EACCES or EAGAIN
        raise BlockingIOError from None
