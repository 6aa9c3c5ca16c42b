"""A copy of another process's memory, as it is when that stands still, whatever it did before."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import MachineFailed
from holdfast.machine import frozen
from holdfast.machine.frozen import Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 4096
SIZE = PAGES * frozen.PAGE

#: Maps the file privately, and writes for ever; the first line says that it has begun.  Stopped, it is as a guest is.
WRITER = """
import ctypes, mmap, os, sys
fd, how = int(sys.argv[1]), sys.argv[2]
PAGES = os.fstat(fd).st_size // 4096
memory = mmap.mmap(fd, PAGES * 4096, flags=mmap.MAP_PRIVATE)
libc = ctypes.CDLL(None, use_errno=True)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def advise(at, count, what):
    libc.madvise(ctypes.c_void_p(start + at * 4096), ctypes.c_size_t(count * 4096), what)
if how == "merged":
    advise(0, PAGES, 12)  # MADV_MERGEABLE
if how == "huge":
    advise(0, PAGES, 14)  # MADV_HUGEPAGE
state = 1
for number in range(1 << 40):
    state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    at = (state >> 33) % PAGES
    if number == 100:
        print(number, flush=True)
    if how == "read" and number % 3:
        memory[at * 4096]
        continue
    memory[at * 4096 : at * 4096 + 4096] = number.to_bytes(8, "big") * 512
    if how == "zapped" and number % 50 == 0:
        advise(at, min(7, PAGES - at), 4)  # MADV_DONTNEED: they are the file's again
    if how == "cold" and number % 50 == 0:
        advise(at, min(7, PAGES - at), 21)  # MADV_PAGEOUT
"""


class Writer:
    """A process whose memory is written to, and the file below it."""

    def __init__(self, how: str) -> None:
        self.fd = os.memfd_create("origin")
        os.ftruncate(self.fd, SIZE)
        for page in range(0, PAGES, 3):  # the rest are holes
            os.pwrite(self.fd, b"origin %d " % page, page * frozen.PAGE)
        argv = [sys.executable, "-c", WRITER, str(self.fd), how]
        self.process = subprocess.Popen(argv, pass_fds=[self.fd], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"100\n"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def memory(self) -> bytes:
        """All of it, by another way."""
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), SIZE, frozen._address(self.process.pid, self.fd, SIZE))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.fd)


@pytest.fixture(params=["written", "read", "zapped", "cold", "merged", "huge"])
def writer(request) -> Iterator[Writer]:
    with contextlib.closing(Writer(request.param)) as writer:
        yield writer


def test_the_copy_is_exact(writer):
    """Again and again, each a copy of its own; the file below is what it was."""
    before = os.pread(writer.fd, SIZE, 0)
    for _ in range(4):
        with contextlib.closing(Memory(writer.process.pid, writer.fd, SIZE)) as memory:
            memory.copy()
            writer.stop()
            memory.finish()
            copy_fd = memory.take()
            wanted = writer.memory()
            writer.go_on()
        found = os.pread(copy_fd, SIZE, 0)
        os.close(copy_fd)
        different = [p for p in range(PAGES) if found[p * 4096 : p * 4096 + 4096] != wanted[p * 4096 : p * 4096 + 4096]]
        assert different == []
        assert os.pread(writer.fd, SIZE, 0) == before


def test_what_nobody_wrote_to_takes_no_memory():
    fd = os.memfd_create("origin")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x", 8 << 20)
    with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[0] = 1
        with contextlib.closing(Memory(os.getpid(), fd, SIZE)) as memory:
            memory.copy()
            memory.finish()
            assert os.pread(memory.ram_fd, 1, 0) == b"\1"
            assert os.pread(memory.ram_fd, 1, 8 << 20) == b"x"
            assert os.fstat(memory.ram_fd).st_blocks * 512 <= 16 << 12
    os.close(fd)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_process_that_ends(when):
    """Is an error, and at once: nothing waits for bytes that never come."""
    with contextlib.closing(Writer("written")) as writer:
        with contextlib.closing(Memory(writer.process.pid, writer.fd, SIZE)) as memory:
            if when == "between":
                memory.copy()
            writer.process.kill()
            writer.process.wait()
            with pytest.raises(MachineFailed) as caught:
                memory.copy() if when == "before" else memory.finish()
        assert caught.value.code == "machine-died"


def test_a_process_that_has_it_elsewhere():
    fd = os.memfd_create("origin")
    os.ftruncate(fd, SIZE)
    with pytest.raises(MachineFailed) as caught:
        Memory(os.getpid(), fd, SIZE)
    assert caught.value.code == "ram-not-found"
    os.close(fd)
