"""Benchmarks of machines and storage: each figure a median, beside its floor or peer from the same run.

Prints one JSON object a line: {"name", "value", "unit", "floor"?, "ratio"?, "limit"?}; ``limit`` is what the
project promises.  A table for people follows on standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import holdfast
from holdfast.machine import accelerator, guest_image, template, vm
from holdfast.machine.config import MachineConfig
from holdfast.machine.sandbox import Slot
from holdfast.storage.attachments import Disk
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.steps import MountLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bookkeeping, copy_up, fork, mounts, namespace, run_parts, shares

HERE = Path(__file__).resolve().parent
RESULTS: list[dict[str, Any]] = []


def report(name: str, value: float, unit: str, **more: Any) -> None:
    """Prints one result."""
    record = {"name": name, "value": round(value, 3), "unit": unit}
    record |= {key: round(v, 3) if isinstance(v, float) else v for key, v in more.items()}
    RESULTS.append(record)
    print(json.dumps(record), flush=True)


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def ms(seconds: float) -> float:
    return seconds * 1000


def median_ms(samples: list[float]) -> float:
    return ms(statistics.median(samples))


class Bench:
    """A machine to measure, in a folder of its own."""

    def __init__(self, folder: Path, data: Path, config: MachineConfig) -> None:
        self.folder = folder
        self.data = data
        self.config = config
        self.export = folder / "export"
        self.export.mkdir()
        self.console = str(folder / "console.log")

    async def clone(self) -> vm.VirtualMachine:
        where, _ = template.load(self.data, self.config.key)
        return await template.clone(where, self.config, export=str(self.export), console_log=self.console)

    def disks(self, count: int, prefix: str) -> list[str]:
        """Small ext4 images, formatted once and copied."""
        first = self.folder / "disk.ext4"
        if not first.exists():
            subprocess.run(["mke2fs", "-q", "-t", "ext4", str(first), "8M"], check=True, capture_output=True)
        paths = [str(self.folder / f"{prefix}{number}") for number in range(count)]
        for path in paths:
            subprocess.run(["cp", "--sparse=always", str(first), path], check=True)
        return paths

    def layers(self, count: int) -> list[str]:
        """Small layer disks."""
        tree = self.folder / "tree"
        tree.mkdir()
        (tree / "file").write_text("x")
        paths = [str(self.folder / f"layer{number}") for number in range(count)]
        subprocess.run(["mkfs.erofs", "--quiet", paths[0], str(tree)], check=True, stdout=subprocess.DEVNULL)
        for path in paths[1:]:
            subprocess.run(["cp", paths[0], path], check=True)
        return paths


async def boot_and_clone(bench: Bench) -> None:
    """Cold boot to the agent's first answer, and the same from the save."""
    colds = []
    for number in range(3):
        ram = bench.folder / f"ram{number}"
        with open(ram, "wb") as file:
            file.truncate(bench.config.memory_bytes)
        started = time.perf_counter()
        machine = await vm.start(
            bench.config, ram_path=str(ram), ram_shared=True, export=str(bench.export), console_log=bench.console
        )
        await machine.request("ping", {}, 5)
        colds.append(time.perf_counter() - started)
        await machine.close()
        ram.unlink()
    clones = []
    for _ in range(12):
        started = time.perf_counter()
        machine = await bench.clone()
        clones.append(time.perf_counter() - started)
        await machine.close()
    report("cold boot to the agent's first answer", median_ms(colds), "ms")
    report(
        "a pod's machine from the save to the agent's first answer",
        median_ms(clones), "ms", limit=150, times_faster_than_boot=statistics.median(colds) / statistics.median(clones),
    )  # fmt: skip


async def round_trips(bench: Bench) -> None:
    machine = await bench.clone()
    samples = []
    for _ in range(1000):
        started = time.perf_counter()
        await machine.request("ping", {}, 5)
        samples.append(time.perf_counter() - started)
    report("agent round trip", median_ms(samples), "ms", limit=1)
    await machine.close()


async def attach(bench: Bench, count: int) -> None:
    """Attach to mounted, one disk after the other, with the same done by hand in the same machine in between.

    By hand: ``add-fd``, ``blockdev-add``, ``device_add``, the guest's wait for the disk and its mount(2); no
    journal, no lease, no counting, no undo.
    """
    machine = await bench.clone()
    with Journal(bench.folder / "state") as journal:
        engine = Engine(machine, journal, "bench", bench.data)
        ours, floor = [], []
        paths = bench.disks(count, "a")
        for number, path in enumerate(paths):
            if number in (0, 1) or number % 10 == 9:
                floor.append(await by_hand(machine, bench.disks(1, "floor")[0]))
            started = time.perf_counter()
            await engine.disks.mount(Disk(path, "disk", read_only=False), f"holder{number}")
            ours.append(time.perf_counter() - started)
        ratio = statistics.median(ours) / statistics.median(floor)
        report(
            "attach to mounted in the guest", median_ms(ours), "ms",
            floor=median_ms(floor), ratio=ratio, limit="1.5 times the floor", disks=count,
        )  # fmt: skip
        tenth = max(1, count // 10)
        flat = statistics.median(ours[-tenth:]) / statistics.median(ours[1 : tenth + 1])
        report("attach: the last tenth of the disks against the first", flat, "times", limit="flat")
        await machine.close()
        for holder in engine.held():
            await engine.release(holder)
        journal.forget_pod("bench")


async def by_hand(machine: vm.VirtualMachine, path: str) -> float:
    """One disk in the last slot, by hand, and away again; returns the seconds of the first half."""
    slot = Slot(3, 63)
    where = {"MountPath": "/run/mounts/hand", "Controller": slot.controller, "Lun": slot.lun}
    fd = os.open(path, os.O_RDWR)
    try:
        started = time.perf_counter()
        await machine.plug_disk(slot, fd, "raw", False, False)
        request = {"ResourceType": "MappedVirtualDisk", "RequestType": "Add", "Settings": where}
        await machine.request("modify", request, 20)
        taken = time.perf_counter() - started
    finally:
        os.close(fd)
    await machine.request("modify", {**request, "RequestType": "Remove"}, 20)
    eject = {"ResourceType": "SCSIDevice", "RequestType": "Remove", "Settings": where}
    await machine.request("modify", eject, 20)
    await machine.unplug_disk(slot)
    return taken


async def layers_at_once(bench: Bench, count: int = 64) -> None:
    """Layers of one container, as the engine attaches them, beside the same one by one."""
    steps = tuple(MountLayer(f"layer{number}", path, "") for number, path in enumerate(bench.layers(count)))
    taken: dict[str, list[float]] = {"one": [], "all": []}
    for _ in range(3):
        for how, batches in (("one", [(step,) for step in steps]), ("all", [steps])):
            machine = await bench.clone()
            with Journal(bench.folder / "state") as journal:
                engine = Engine(machine, journal, "bench", bench.data)
                started = time.perf_counter()
                for number, batch in enumerate(batches):
                    await engine.prepare(f"holder{number}", batch)
                taken[how].append(time.perf_counter() - started)
                await machine.close()
                for holder in engine.held():
                    await engine.release(holder)
                journal.forget_pod("bench")
    one, together = statistics.median(taken["one"]), statistics.median(taken["all"])
    report(f"{count} layers attached and mounted at once", ms(together), "ms", one_by_one=ms(one), gain=one / together)


def containers(bench: Bench, image: str) -> None:
    """A container's first output in a pod that is up, and the whole of ``run``."""
    firsts, wholes, monitors = [], [], []
    for _ in range(7):
        started = time.perf_counter()
        with holdfast.Pod(root=bench.folder / "state", data=bench.data) as pod:
            up = time.perf_counter()
            pod.run(image, ["/bin/busybox", "true"])
            firsts.append(time.perf_counter() - up)
            monitors.append(resident_mib(pod.inspect().pid))
        wholes.append(time.perf_counter() - started)
    report("agent up to a container's end, from an image", median_ms(firsts), "ms", limit=1000)
    report("pod, container, end of the pod", median_ms(wholes), "ms")
    report("monitor, resident", statistics.median(monitors), "MiB", limit=40)


def resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def busybox_image(bench: Bench) -> str:
    """Imports a small image, made here."""
    from holdfast.image.store import ImageStore

    layout, bundle = bench.folder / "layout", bench.folder / "bundle"
    image = f"{layout}:latest"
    run = lambda *argv: subprocess.run(argv, check=True, capture_output=True)  # noqa: E731
    run("umoci", "init", "--layout", str(layout))
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", "--image", image, str(bundle))
    (bundle / "rootfs/bin").mkdir()
    run("cp", "/bin/busybox", str(bundle / "rootfs/bin/busybox"))
    run("umoci", "repack", "--image", image, str(bundle))
    ImageStore(bench.data).import_path(layout, "bench-busybox")
    return "bench-busybox"


def image_import() -> None:
    """Another program measures the import beside ``umoci unpack``."""
    done = subprocess.run(
        [sys.executable, str(HERE / "image_import.py")], stdout=subprocess.PIPE, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            report(
                f"image import, {found['layers']} layer(s)", found["import_median_s"] * 1000, "ms",
                umoci_unpack=found["umoci_unpack_median_s"] * 1000, ratio=found["ratio"], limit="1 times umoci unpack",
            )  # fmt: skip


def table() -> None:
    for record in RESULTS:
        rest = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("name", "value", "unit"))
        say(f"{record.get('name', '')!s:60} {record.get('value', '')!s:>10} {record.get('unit', '')!s:5} {rest}")


async def machines(bench: Bench, disks: int) -> None:
    await boot_and_clone(bench)
    await round_trips(bench)
    await attach(bench, disks)
    await layers_at_once(bench)


def main() -> None:
    data = Path(os.environ.get("HOLDFAST_TEST_DATA") or HERE.parent / ".cache/data")
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        guest = guest_image.ensure(data)
        version = accelerator.cached_qemu_version(data)

        async def prepared() -> MachineConfig:
            verdict = await accelerator.choose(data, guest, version, say)
            config = MachineConfig(guest, verdict.accelerator, qemu_version=version)
            await template.ensure(data, config, say)
            return config

        config = asyncio.run(prepared())
        report("machine", 0, config.accelerator, memory_mib=config.memory_bytes >> 20, cpus=os.cpu_count())
        bench = Bench(Path(folder), data, config)
        asyncio.run(machines(bench, int(os.environ.get("HOLDFAST_BENCH_DISKS", "250"))))
        bookkeeping.measure(report, Path(folder))
        mounts.measure(report)
        copy_up.measure(report, Path(folder))
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir="/run") as state:
            namespace.measure(report, Path(state), data)
        image = busybox_image(bench)
        containers(bench, image)
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir="/run") as state:
            run_parts.measure(report, say, Path(state), data, image)
        shares.measure(report, Path(folder), data, image)
        fork.measure(report, Path(folder), data, image)
        image_import()
    table()


if __name__ == "__main__":
    main()
