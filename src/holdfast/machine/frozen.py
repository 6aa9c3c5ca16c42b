"""Freezing a running machine: its RAM, devices and disks as they were at one moment, while it goes on.

RAM is a private mapping of a file (of the template), so what the guest has written are QEMU's anonymous pages, and
/proc/PID/pagemap says which these are.  They are copied twice over the template's RAM into a new file without a name:
once while the guest runs, which takes as long as it takes, and once while it is stopped, into pages that are there
already.  Where the kernel knows soft-dirty bits (CONFIG_MEM_SOFT_DIRTY), the second time it is only what was written
since the first.  QEMU's own dirty tracking is not used: under emulation it loses writes (seen in QEMU 7.2).

What results are descriptors: nothing has a name, and so nothing is left behind, whoever dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from holdfast import trace
from holdfast.errors import MachineFailed
from holdfast.machine.savestream import join
from holdfast.machine.sparse import data_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from holdfast.machine.qmp import Qmp

PAGE = 4096
#: Descriptor set of QEMU for what it saves.
_FDSET = 900
_MOST_THREADS = 4
_PIECE_BYTES = 4 << 20
#: Unwritten pages between written ones that are copied along: a call costs as much as copying some.
_GAP = 15
#: Bits of a pagemap entry's last byte (proc_pid_pagemap(5)): present, swapped, of a file; and of the one before.
_PRESENT, _SWAPPED, _OF_FILE, _SOFT_DIRTY = 0x80, 0x40, 0x20, 0x80
_IS_ANONYMOUS = bytes(b & _SWAPPED or (b & (_PRESENT | _OF_FILE)) == _PRESENT for b in range(256)).translate(
    bytes([0, *[1] * 255])
)
_IS_DIRTY = bytes(bool(b & _SOFT_DIRTY) for b in range(256))
_IS_NOT = bytes([1, *[0] * 255])
_RUN = re.compile(b"\x01(?:\x00{0,%d}\x01)*" % _GAP)
_EXACT_RUN = re.compile(b"\x01+")


class Origin(NamedTuple):
    """What a machine was started from: descriptors of the file that its RAM maps privately, and of its device state."""

    ram_fd: int
    state_fd: int

    def close(self) -> None:
        """Closes both."""
        os.close(self.ram_fd)
        os.close(self.state_fd)


class Memory:
    """The RAM of a running QEMU, and a copy of it that becomes exact when the machine is stopped.

    Args:
        pid: QEMU's, as /proc has it.
        origin_fd: the file that its RAM maps privately.
        size_bytes: of its RAM.
    """

    def __init__(self, pid: int, origin_fd: int, size_bytes: int) -> None:
        self._pid = pid
        self._origin_fd = origin_fd
        self._size = size_bytes
        #: Of each page, whether it was copied while the guest ran.
        self._copied = b""
        self._address = _address(pid, origin_fd, size_bytes)
        with contextlib.ExitStack() as stack:
            self._memory_fd = _opened(stack, f"/proc/{pid}/mem")
            self._map_fd = _opened(stack, f"/proc/{pid}/pagemap")
            self.ram_fd = os.memfd_create("ram", os.MFD_CLOEXEC)
            stack.callback(os.close, self.ram_fd)
            os.ftruncate(self.ram_fd, size_bytes)
            mapped = mmap.mmap(self.ram_fd, size_bytes)
            stack.callback(mapped.close)
            self._view = memoryview(mapped)
            stack.callback(self._view.release)
            self._stack = stack.pop_all()

    def copy(self) -> None:
        """Copies everything, while the guest runs."""
        _copy_file(self._origin_fd, self.ram_fd)
        if _has_soft_dirty():
            with open(f"/proc/{self._pid}/clear_refs", "w") as file:
                file.write("4")
        self._copied = self._entries()[7::8].translate(_IS_ANONYMOUS)
        for piece in _pieces(_EXACT_RUN.finditer(self._copied)):
            self._copy_pages(piece)

    def finish(self) -> None:
        """Copies what may have changed since; the guest is stopped."""
        entries = self._entries()
        wanted = anonymous = entries[7::8].translate(_IS_ANONYMOUS)
        if _has_soft_dirty():
            # A page can be dirty and another be anonymous in the same place of the two strings: both bits, or none.
            wanted = _both(wanted, entries[6::8].translate(_IS_DIRTY))
        # Side by side: the machine's processors have nothing else to do.
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
            for _ in threads.map(self._copy_pages, _pieces(_RUN.finditer(wanted))):
                pass  # raises what copying has raised
        # What QEMU has discarded since (madvise(2), MADV_DONTNEED) is the file's again.
        for run in _EXACT_RUN.finditer(_both(self._copied, anonymous.translate(_IS_NOT))):
            os.preadv(self._origin_fd, [self._view[run.start() * PAGE : run.end() * PAGE]], run.start() * PAGE)

    def _entries(self) -> bytes:
        """What the kernel says of every page, 8 bytes for each."""
        count = self._size // PAGE * 8
        entries = os.pread(self._map_fd, count, self._address // PAGE * 8)
        if len(entries) < count:
            raise _gone()
        return entries

    def _copy_pages(self, piece: tuple[int, int]) -> None:
        at, end = piece
        while at < end:
            count = os.preadv(self._memory_fd, [self._view[at:end]], self._address + at)
            if not count:  # so it is when the process has ended (fs/proc/base.c, mem_rw)
                raise _gone()
            at += count

    def take(self) -> int:
        """The copy's descriptor, now the caller's."""
        return os.dup(self.ram_fd)

    def close(self) -> None:
        """Closes everything; the copy lives as long as what :meth:`take` has returned."""
        self._stack.close()


async def freeze(
    qmp: Qmp, pid: int, origin: Origin, size_bytes: int, at_stop: Callable[[], Awaitable[None]],
    before: Callable[[], Awaitable[None]], after: Callable[[], Awaitable[None]],
) -> Origin:  # fmt: skip
    """What a copy of the machine is to be started from; the machine itself goes on.

    Args:
        before: called just before it is stopped.
        at_stop: called while it is stopped: for its disks.
        after: called when it goes on, in any case.

    Raises:
        MachineFailed: QEMU refused.
    """
    memory = await asyncio.to_thread(Memory, pid, origin.ram_fd, size_bytes)
    with contextlib.ExitStack() as stack:
        stack.callback(memory.close)
        devices_fd = os.memfd_create("devices", os.MFD_CLOEXEC)
        stack.callback(os.close, devices_fd)
        await asyncio.to_thread(memory.copy)
        await _give_file(qmp, devices_fd)
        try:
            try:
                await before()
                await _stopped(qmp, memory, at_stop)
            finally:
                await asyncio.shield(asyncio.ensure_future(after()))
        finally:
            await qmp.execute_if_there("remove-fd", {"fdset-id": _FDSET})
        state = join(_read(origin.state_fd), _read(devices_fd))
        state_fd = os.memfd_create("state", os.MFD_CLOEXEC)
        try:
            _write(state_fd, state)
            return Origin(memory.take(), state_fd)
        except BaseException:
            os.close(state_fd)
            raise


async def _stopped(qmp: Qmp, memory: Memory, at_stop: Callable[[], Awaitable[None]]) -> None:
    """Everything that is done while the guest stands still; it goes on afterwards, whatever happens."""
    try:
        await qmp.execute("stop", {})
        trace.mark("machine stands still")
        finishing = asyncio.ensure_future(asyncio.to_thread(memory.finish))
        try:
            await at_stop()
            # live: false, else QEMU gives up its disks, for another machine that goes on with them.
            await qmp.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{_FDSET}", "live": False})
        finally:
            await asyncio.shield(finishing)
    finally:
        await asyncio.shield(asyncio.ensure_future(qmp.execute("cont", {})))
        trace.mark("machine goes on")


async def _give_file(qmp: Qmp, fd: int) -> None:
    """QEMU opens it for writing only, and a descriptor set must have one like that."""
    write_fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        await qmp.add_fd(_FDSET, write_fd)
    finally:
        os.close(write_fd)


def _address(pid: int, fd: int, size_bytes: int) -> int:
    """Where a process has mapped the whole of a file."""
    inode_number = os.fstat(fd).st_ino
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            # The device is not compared: some filesystems (btrfs, overlayfs) say another one here than stat(2) does.
            addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
            if (int(inode), int(offset, 16)) == (inode_number, 0):
                start, end = (int(address, 16) for address in addresses.split("-"))
                if end - start == size_bytes:
                    return start
    raise MachineFailed("freeze machine", why="QEMU has its RAM elsewhere", code="ram-not-found")


def _both(one: bytes, other: bytes) -> bytes:
    """Of strings of zeros and ones, where both have a one."""
    return (int.from_bytes(one, "little") & int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _gone() -> MachineFailed:
    return MachineFailed("freeze machine", why="QEMU has ended meanwhile", code="machine-died")


def _pieces(runs: Iterable[re.Match[bytes]]) -> Iterator[tuple[int, int]]:
    """Start and end of every run of pages, in bytes; long ones in several pieces."""
    for run in runs:
        for start in range(run.start() * PAGE, run.end() * PAGE, _PIECE_BYTES):
            yield start, min(start + _PIECE_BYTES, run.end() * PAGE)


def _copy_file(source_fd: int, target_fd: int) -> None:
    """Copies a sparse file's data; holes stay holes."""
    for start, end in data_of(source_fd, os.fstat(source_fd).st_size):
        os.lseek(target_fd, start, os.SEEK_SET)
        at = start
        while at < end:
            at += os.sendfile(target_fd, source_fd, at, end - at)


@cache
def _has_soft_dirty() -> bool:
    """Whether this kernel tracks written pages: tried on a page of our own."""
    with (
        mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page,
        open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
    ):
        import ctypes

        buffer = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(buffer)
        del buffer
        page[0] = 1
        return bool(os.pread(pagemap.fileno(), 8, address // PAGE * 8)[6] & _SOFT_DIRTY)


def _opened(stack: contextlib.ExitStack, path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
