"""The copy of a process's memory on a kernel that tracks written pages: the guest's is one, this host's need not be."""

from __future__ import annotations

import json
from pathlib import Path

import holdfast
from tests.vm.support import HOST_PYTHON, HOST_PYTHON_ENV, HOST_USR, output

SOURCES = Path(holdfast.__file__).parent

#: Copies the memory of a child that writes, several times; says how much was copied while it stood still, and whether
#: the copy was right.
PROGRAM = """
import ctypes, json, mmap, os, signal, sys
sys.path.insert(0, "/src")
from holdfast.machine import frozen
PAGES = 2048
fd = os.memfd_create("origin")
os.ftruncate(fd, PAGES * 4096)
for page in range(0, PAGES, 3):
    os.pwrite(fd, b"origin %d" % page, page * 4096)
reader, writer = os.pipe()
child = os.fork()
if not child:
    memory = mmap.mmap(fd, PAGES * 4096, flags=mmap.MAP_PRIVATE)
    libc = ctypes.CDLL(None)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in range(PAGES // 2):
        memory[page * 4096] = 1
    os.write(writer, b"x")
    state = 1
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        page = (state >> 33) % 64
        memory[page * 4096 : page * 4096 + 8] = state.to_bytes(8, "big")
        memory[(PAGES - 1 - page) * 4096] = state & 0xFF
        if not state >> 33 & 7:
            libc.madvise(ctypes.c_void_p(start + 4096 * page), ctypes.c_size_t(4096), 4)  # MADV_DONTNEED
os.read(reader, 1)
found = []
try:
    for _ in range(10):
        memory = frozen.Memory(child, fd, PAGES * 4096)
        memory.copy()
        os.kill(child, signal.SIGSTOP)
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
        copied, preadv = [0], os.preadv
        def count(from_fd, buffers, offset):
            copied[0] += sum(len(buffer) for buffer in buffers)
            return preadv(from_fd, buffers, offset)
        os.preadv = count
        memory.finish()
        os.preadv = preadv
        with open(f"/proc/{child}/mem", "rb", buffering=0) as file:
            now = os.pread(file.fileno(), PAGES * 4096, frozen._address(child, fd, PAGES * 4096))
        found.append((copied[0] // 4096, now == os.pread(memory.ram_fd, PAGES * 4096, 0)))
        memory.close()
        os.kill(child, signal.SIGCONT)
finally:
    os.kill(child, signal.SIGKILL)
print(json.dumps({"known": frozen._has_soft_dirty(), "found": found}))
"""


def test_only_what_was_written_is_copied_again(pod):
    mounts = [HOST_USR, f"type=bind,src={SOURCES},dst=/src/holdfast,ro"]
    done = pod.run("tests/busybox", [*HOST_PYTHON, "-c", PROGRAM], env=HOST_PYTHON_ENV, mounts=mounts)
    answer = json.loads(output(done))
    assert answer["known"]
    assert all(right for _, right in answer["found"])
    # 128 pages are written at most, and 15 between two of them may be copied along; 1024 were written before.
    assert all(pages < 600 for pages, _ in answer["found"])
