"""Filling an image's volume, beside ``cp -a`` of the same tree: 5,000 files of 200 MB, some with holes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING

from holdfast.linux import syscalls
from holdfast.mounts.copy_up import copy_up
from holdfast.mounts.root import Root
from holdfast.mounts.unmount import unmount

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLDERS, FILES, ROUNDS = 250, 20, 6
SIZES = (200, 2_000, 8_000, 20_000, 40_000, 60_000, 150_000)


def measure(report: Callable[..., None], folder: Path) -> None:
    """Prints every figure: a copy on one disk, and one from there into memory, as in a machine.

    The disk is a new one, since ext4 takes its time to find free inodes on one that much was removed from.
    """
    disk = folder / "copy-up"
    disk.mkdir()
    with open(folder / "copy-up.ext4", "wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", file.name], check=True)
    subprocess.run(["mount", "-o", "loop", file.name, str(disk)], check=True)
    try:
        _make(disk / "tree")
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir="/dev/shm") as memory:
            for where, name in ((str(disk), "on one disk"), (memory, "from disk into memory")):
                (ours, ours_cpu), (theirs, theirs_cpu) = _compare(disk / "tree", where, keep=where != memory)
                report(
                    f"fill a volume, 5,000 files of 200 MB, {name}", ours * 1000, "ms",
                    cp=theirs * 1000, ratio=ours / theirs, cpu_ratio=ours_cpu / theirs_cpu, limit="1 times cp -a",
                )  # fmt: skip
    finally:
        unmount(str(disk))
        os.unlink(file.name)


def _make(tree: Path) -> None:
    numbers = random.Random(1)  # noqa: S311
    data = numbers.randbytes(1 << 20)
    for folder in range(FOLDERS):
        where = tree / f"d{folder % 25}/s{folder}"
        where.mkdir(parents=True)
        for file in range(FILES):
            start = numbers.randrange(1 << 19)
            with open(where / f"f{file}", "wb") as out:
                out.write(data[start : start + numbers.choice(SIZES)])
                if file == 0:  # a hole in each twentieth
                    out.seek(1 << 20, os.SEEK_CUR)
                    out.write(b"end")
    _sync(str(tree))


def _sync(where: str) -> None:
    """So that what is still to be written is not written during what is measured next."""
    fd = os.open(where, os.O_RDONLY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _compare(tree: Path, where: str, *, keep: bool) -> list[tuple[float, float]]:
    """Medians of seconds and of processor seconds, one and the other in turn, so that both see the same machine.

    Args:
        tree: what is copied.
        where: into this folder.
        keep: remove no copy.
    """
    taken: list[list[tuple[float, float]]] = [[], []]
    for number in range(ROUNDS):
        for who in (number % 2, 1 - number % 2):
            how = (_ours, _cp)[who]
            copy = f"{where}/{how.__name__}{number}"
            started, cpu = time.perf_counter(), _cpu_seconds()
            how(tree, copy)
            taken[who].append((time.perf_counter() - started, _cpu_seconds() - cpu))
            if not keep:
                shutil.rmtree(copy)
            _sync(where)
    return [
        (statistics.median(wall), statistics.median(cpu)) for wall, cpu in (zip(*one, strict=True) for one in taken)
    ]


def _ours(tree: Path, target: str) -> None:
    os.mkdir(target)
    target_fd = os.open(target, os.O_RDONLY)
    try:
        with Root(str(tree.parent)) as root:
            copy_up(root, f"/{tree.name}", target_fd)
    finally:
        os.close(target_fd)


def _cp(tree: Path, target: str) -> None:
    subprocess.run(["cp", "-a", str(tree), target], check=True)
