"""What counting costs without a machine: the attachments of a pod on the tests' fake one."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING

from holdfast.storage.attachments import Attachments, Disk
from holdfast.storage.counted import Counted
from holdfast.storage.journal import Journal
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

JOINED, MADE, DURABLE = 20_000, 5_000, 300


def measure(report: Callable[..., None], folder: Path) -> None:
    """Prints every figure."""
    few, many = (asyncio.run(_counted(live)) for live in (1, 10_000))
    report("count one more holder and one less", many[0], "1/s", limit=100_000, with_one_alive=few[0])
    report("count: 10,000 alive against 1", few[0] / many[0], "times", limit="flat")
    report("make a thing that nobody has, and unmake it", many[1], "1/s", with_one_alive=few[1])
    report("make: 10,000 alive against 1", few[1] / many[1], "times", limit="flat")
    joined, durable, threads = asyncio.run(_attachments(folder))
    report("attach a disk that others hold, and release it", joined, "1/s", limit=100_000)
    report("attach a new disk, and release it: journal, lease and fsync", durable, "1/s")
    report("the same from 8 threads at once", threads, "1/s", ratio=threads / durable)


async def _counted(live: int) -> tuple[float, float]:
    """Pairs a second of a joiner, and of who makes and unmakes, beside so many things that are there."""

    async def make() -> int:
        return 1

    async def unmake(_key: int, _value: int) -> None:
        return

    counted: Counted[int, int] = Counted(unmake)
    for key in range(live):
        await counted.acquire(key, "first", make)
    started = time.perf_counter()
    for _ in range(JOINED):
        await counted.acquire(0, "second", make)
        await counted.release(0, "second")
    joined = JOINED / (time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(MADE):
        await counted.acquire(-1, "first", make)
        await counted.release(-1, "first")
    return joined, MADE / (time.perf_counter() - started)


async def _attachments(folder: Path) -> tuple[float, float, float]:
    paths = [folder / f"fake{number}" for number in range(8)]
    for path in paths:
        path.write_bytes(b"x" * 4096)
    with Journal(folder / "bookkeeping") as journal:
        machine = FakeSandbox(str(folder))
        attachments = Attachments(machine, journal, "pod")

        async def pairs(path: Path, holder: str, count: int) -> None:
            disk = Disk(str(path), "disk", read_only=True)
            for _ in range(count):
                await attachments.detach(await attachments.attach(disk, holder), holder)

        started = time.perf_counter()
        await pairs(paths[0], "a", DURABLE)
        durable = DURABLE / (time.perf_counter() - started)
        await attachments.attach(Disk(str(paths[0]), "disk", read_only=True), "a")
        started = time.perf_counter()
        await pairs(paths[0], "b", JOINED)
        joined = JOINED / (time.perf_counter() - started)
        # An engine lives in one event loop: other threads hand it their work, as clients do by their sockets.
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def work(number: int) -> None:
            asyncio.run_coroutine_threadsafe(pairs(paths[number], f"t{number}", DURABLE // 8), loop).result()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]

        def join() -> None:
            for worker in workers:
                worker.join()
            loop.call_soon_threadsafe(done.set)

        started = time.perf_counter()
        for worker in workers:
            worker.start()
        threading.Thread(target=join).start()
        await done.wait()
        threads = DURABLE // 8 * 8 / (time.perf_counter() - started)
        machine.die()
        assert not os.listdir(f"{folder}/bookkeeping/pods")
    return joined, durable, threads
