"""Forks of a machine that writes to its memory and its disks as fast as it can: no copy has lost a write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import holdfast
from tests.images import is_clean, make_disk
from tests.vm.forks import Chain, end, forks, python, shell, side_by_side

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 4
WRITERS = ("a", "b")
#: Writes pages of memory and of a file over and over, with numbers that it remembers elsewhere; asked to, it compares.
WRITE = """
import ctypes, os, time
PAGES, FILE_PAGES, SIZE = 4000, 300, 4096
DONTNEED, ADVICE = 4, (14, 15)  # MADV_HUGEPAGE, MADV_NOHUGEPAGE: asm-generic/mman-common.h
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
address = libc.mmap(None, ctypes.c_size_t(PAGES * SIZE), 3, 0x22, -1, 0)
memory = memoryview((ctypes.c_ubyte * (PAGES * SIZE)).from_address(address)).cast("B")
wanted, on_disk = [0] * PAGES, [0] * FILE_PAGES
fd = os.open("/work", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, FILE_PAGES * SIZE)
state = os.getpid() + time.monotonic_ns()

def advise(at, count, what):
    assert libc.madvise(ctypes.c_void_p(address + at * SIZE), ctypes.c_size_t(count * SIZE), what) == 0 or what > 4

def some(below):
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    return (state >> 33) % below

def page(number):
    return number.to_bytes(8, "big") * 512

def check():
    bad = [i for i in range(PAGES) if memory[i * SIZE : i * SIZE + SIZE] != page(wanted[i])]
    worse = [i for i in range(FILE_PAGES) if os.pread(fd, SIZE, i * SIZE) != page(on_disk[i])]
    return f"{len(bad)} of memory, {len(worse)} of the file, {number}"

number = 0
while True:
    number += 1
    i = some(PAGES)
    memory[i * SIZE : i * SIZE + SIZE] = page(number)
    wanted[i] = number
    if number % 7 == 0:
        i = some(FILE_PAGES)
        os.pwrite(fd, page(number), i * SIZE)
        on_disk[i] = number
    if number % 5000 == 0:  # pages that go away, and are there anew
        advise(0, PAGES, ADVICE[number // 5000 % 2])
        at = some(PAGES - 64)
        advise(at, 64, DONTNEED)
        wanted[at : at + 64] = [0] * 64
    if number % 20000 == 0:
        os.fsync(fd)
    if number % 500 == 0 and os.path.exists("/check"):
        with open("/found.new", "w") as file:
            file.write(check())
        os.unlink("/check")
        os.rename("/found.new", "/found")
"""


@pytest.fixture(params=[(1, "256M"), (2, "512M")], ids=["one processor", "two processors"])
def pod(data, state_root, request) -> Iterator[holdfast.Pod]:
    cpus, memory = request.param
    with holdfast.Pod(root=state_root, data=data, cpus=cpus, memory=memory) as pod:
        yield pod


def found(pod: holdfast.Pod, writer: str) -> str:
    """What a writer finds when it compares."""
    return shell(pod, writer, "rm -f /found; > /check; while [ ! -e /found ]; do sleep 0.05; done; cat /found")


@pytest.mark.timeout(400)
def test_every_copy_is_what_the_machine_was(pod, tmp_path):
    for writer in WRITERS:
        python(pod, writer, WRITE)
    numbers = dict.fromkeys(WRITERS, 0)
    for _ in range(ROUNDS // 2 if pod.inspect().cpus == 2 else ROUNDS):
        with forks(pod) as [child]:
            answers = side_by_side(lambda writer, child=child: found(child, writer), WRITERS)
            for writer, answer in zip(WRITERS, answers, strict=True):
                text, _, number = answer.rpartition(", ")
                assert text == "0 of memory, 0 of the file"
                assert int(number) > numbers[writer]
                numbers[writer] = int(number)
    for writer in WRITERS:
        assert found(pod, writer).startswith("0 of memory, 0 of the file")


@pytest.mark.parametrize("pod", [(2, "512M")], ids=["two processors"], indirect=True)
def test_a_filesystem_with_a_journal(pod, tmp_path):
    """A disk of the user's is copied while it is written to: the copy is whole, after its journal or without."""
    disk = make_disk(tmp_path / "disk", "ext4", size="64M")
    script = (
        "i=0; while :; do i=$((i+1)); echo $i > /d/now; mkdir -p /d/$((i%50)); mv /d/now /d/$((i%50))/f$((i%30));"
        " [ $((i%40)) = 0 ] && sync; done"
    )
    pod.run("tests/busybox", ["sh", "-c", script], name="c", detach=True, mounts=[f"type=disk,src={disk},dst=/d"])
    for _ in range(2):
        with forks(pod, 2) as children:
            everybody = children
            side_by_side(lambda one: shell(one, "c", "test $(ls /d | wc -l) -gt 0"), everybody)
            chains = [Chain(one) for one in children]
            try:
                side_by_side(end, everybody)
                for chain in chains:
                    chain.only(1 << 26)
                    assert is_clean(chain.flatten(tmp_path / "flat"))
            finally:
                for chain in chains:
                    chain.close()
    end(pod)
    assert is_clean(disk)
