"""What the mount library costs, beside the system calls themselves in the same run, alternating.

Alone it prints one JSON object a line, as ``machines.py`` does.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

from holdfast.linux import syscalls
from holdfast.mounts import Mount, mount, overlay, unmount, unmount_recursive

if TYPE_CHECKING:
    from collections.abc import Callable

PAIRS, TREES, OVERLAYS, LAYERS, MANY = 2000, 50, 50, 128, 64


def measure(report: Callable[..., None]) -> None:
    """Prints every figure.  Runs in a child, in a mount namespace of its own: nothing of it is seen or left."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_fd)
            with open(write_fd, "w") as out:
                _measure(lambda name, value, unit, **more: print(json.dumps([name, value, unit, more]), file=out))
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    with open(read_fd) as lines:
        for line in lines:
            name, value, unit, more = json.loads(line)
            report(name, value, unit, **more)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the benchmark of mounts failed")


def _measure(report: Callable[..., None]) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    folder = tempfile.mkdtemp(prefix="holdfast-bench-")
    syscalls.mount("none", folder, "tmpfs")
    try:
        _pairs(report, folder)
        _many(report, folder)
        _overlay(report, folder)
    finally:
        syscalls.umount(folder, syscalls.MNT_DETACH)
        os.rmdir(folder)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _beside(count: int, ours: Callable[[], object], floor: Callable[[], object]) -> tuple[float, float]:
    """Medians, in microseconds."""
    samples = [(_timed(ours), _timed(floor)) for _ in range(count)]
    return statistics.median(a for a, _ in samples) * 1e6, statistics.median(b for _, b in samples) * 1e6


def _pairs(report: Callable[..., None], folder: str) -> None:
    source, target, records = f"{folder}/a", f"{folder}/b", f"{folder}/records"
    os.mkdir(source)
    os.mkdir(target)

    def ours(wanted: Mount) -> None:
        mount(wanted, records=records)
        unmount(target, records=records)

    def floor(flags: int) -> None:
        syscalls.mount(source, target, "", syscalls.MS_BIND)
        if flags:
            syscalls.mount("none", target, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | flags)
        syscalls.umount(target)

    for name, options, flags in (("bind", ["bind"], 0), ("read-only bind", ["bind", "ro"], syscalls.MS_RDONLY)):
        wanted = Mount("bind", source, target, options)
        value, least = _beside(PAIRS, lambda wanted=wanted: ours(wanted), lambda flags=flags: floor(flags))  # type: ignore[misc]
        limit = {} if flags else {"limit": "1.3 times the two system calls"}
        report(f"{name} and unmount", value, "us", floor=least, ratio=value / least, **limit)


def _many(report: Callable[..., None], folder: str) -> None:
    """A tree of 64 mounts, made by hand each time, taken away by one call; and one by one."""
    top, source = f"{folder}/top", f"{folder}/a"
    os.mkdir(top)

    def make() -> None:
        syscalls.mount("none", top, "tmpfs")
        for number in range(MANY - 1):
            os.mkdir(f"{top}/{number}")
            syscalls.mount(source, f"{top}/{number}", "", syscalls.MS_BIND)

    def after_making(action: Callable[[], object]) -> float:
        make()
        return _timed(action)

    records = f"{folder}/records"
    actions = {
        "lazy": lambda: unmount_recursive(top, lazy=True, records=records),
        "floor": lambda: syscalls.umount(top, syscalls.MNT_DETACH),
    }
    taken: dict[str, list[float]] = {"lazy": [], "floor": []}
    for number in range(2 * TREES):
        # What the kernel puts off of one is paid by the next: so now this one is first, now that one.
        for name in ("lazy", "floor") if number % 2 else ("floor", "lazy"):
            taken[name].append(after_making(actions[name]))
    one_by_one = [after_making(lambda: unmount_recursive(top, records=records)) for _ in range(TREES)]
    value, least, each = (statistics.median(times) * 1e6 for times in (taken["lazy"], taken["floor"], one_by_one))
    report(f"{MANY} mounts dropped by one call", value, "us", floor=least, ratio=value / least, one_by_one=each)


def _overlay(report: Callable[..., None], folder: str) -> None:
    layers = [f"{folder}/layers/snapshots/{number}/fs" for number in range(LAYERS)]
    upper, work, target, records = (f"{folder}/{name}" for name in ("upper", "work", "merged", "records"))
    for path in (*layers, upper, work, target):
        os.makedirs(path)
    wanted = Mount("overlay", "overlay", target, overlay.options(layers, upper, work))
    # What the calls themselves take: names so short that they fit the page of one mount(2).
    numbers = [str(number) for number in range(LAYERS)]
    os.mkdir(f"{folder}/l")
    for number, layer in zip(numbers, layers, strict=True):
        os.symlink(layer, f"{folder}/l/{number}")
    data = ",".join(overlay.options(numbers, upper, work))

    def ours() -> None:
        mount(wanted, records=records)
        unmount(target, records=records)

    def floor() -> None:
        syscalls.mount("overlay", target, "overlay", 0, data)
        syscalls.umount(target)

    os.chdir(f"{folder}/l")
    value, least = _beside(OVERLAYS, ours, floor)
    os.chdir("/")
    report(f"overlay of {LAYERS} layers and unmount", value, "us", floor=least, ratio=value / least)


def _print(name: str, value: float, unit: str, **more: object) -> None:
    record = {"name": name, "value": value, "unit": unit, **more}
    print(json.dumps({key: round(one, 3) if isinstance(one, float) else one for key, one in record.items()}))


if __name__ == "__main__":
    measure(_print)
