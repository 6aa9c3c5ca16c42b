"""Forks of a running pod: how long it stands still, when its copies answer, and what memory each of them takes.

The pause is between QEMU's answers to ``stop`` and to ``cont``, from the monitor's own trace; the gap is the longest
time that a container, which prints without end, was not heard of.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

import holdfast
from holdfast.pod.client import STDERR, STDOUT, Client
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Report = Callable[..., None]

MEMORY_MIB = (256, 512, 1024)
DIRTY_MIB = (0, 64, 256)
CHILDREN = (1, 8, 32)
GROWTH = 50
_TURNS = 3
_GUEST_ANSWERS_SECONDS = 60


def measure(report: Report, folder: Path, data: Path, image: str) -> None:
    """Measures everything.

    Args:
        report: called with each figure's name, value and unit, and what else belongs to it.
        folder: an empty one to work in.
        data: the data folder, with a template.
        image: of containers; it has busybox.
    """
    for memory_mib in MEMORY_MIB:
        for dirty_mib in DIRTY_MIB:
            if dirty_mib < memory_mib * 0.7:
                _pauses(report, folder, data, image, memory_mib, dirty_mib)
    with holdfast.Pod(root=folder / "state", data=data) as pod:
        _idle(pod, image)
        for count in CHILDREN:
            _answers(report, pod, count)
    _growth(report, folder, data, image)


def _pauses(report: Report, folder: Path, data: Path, image: str, memory_mib: int, dirty_mib: int) -> None:
    path = folder / "trace"
    with _traced(path):
        pod = holdfast.Pod(root=folder / "state", data=data, memory=memory_mib << 20)
    gaps = []
    with pod:
        for _ in range(_TURNS):
            # Written to anew before each: else its pages would be those of the fork before.
            with _Printing(pod, image, dirty_mib) as printing:
                pod._snapshot().close()
                gaps.append(printing.longest_gap())
    pauses = _pauses_in(path.read_text().splitlines())
    report(
        f"fork of {memory_mib} MiB, {dirty_mib} written: the pause", statistics.median(pauses) * 1000, "ms",
        worst=max(pauses) * 1000, longest_gap_in_output=statistics.median(gaps) * 1000, limit=50,
    )  # fmt: skip


@contextlib.contextmanager
def _traced(path: Path) -> Iterator[None]:
    path.unlink(missing_ok=True)
    os.environ["HOLDFAST_TRACE"] = str(path)
    try:
        yield
    finally:
        del os.environ["HOLDFAST_TRACE"]


def _pauses_in(lines: list[str]) -> list[float]:
    times: dict[str, list[int]] = {"machine stands still": [], "machine goes on": []}
    for line in lines:
        when, _, what = line.split(" ", 2)
        if what in times:
            times[what].append(int(when))
    return [(b - a) / 1e9 for a, b in zip(*times.values(), strict=True)]


class _Printing:
    """A container that has written to memory and prints without end."""

    def __init__(self, pod: holdfast.Pod, image: str, dirty_mib: int) -> None:
        name = f"c{time.monotonic_ns()}"
        script = (
            f"/bin/busybox dd if=/dev/zero of=/m/file bs=1M count={dirty_mib} 2>/dev/null;"
            " while :; do echo x; /bin/busybox usleep 3000; done"
        )
        mount = {"type": "tmpfs", "source": "tmpfs", "destination": "/m", "options": ["size=100%"]}
        request = container_request(
            name, pod.data, image=image, args=["/bin/busybox", "sh", "-c", script], mounts=[mount],
            stdio=Stdio(0, STDOUT, STDERR),
        )  # fmt: skip
        self._client = Client.connect(pod.root, pod.name)
        self._client.open(STDOUT, STDERR)
        self._key = str(self._client.request("run", msgspec.to_builtins(request))["key"])
        self._times: list[float] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._attend)
        self._thread.start()
        if not self._started.wait(_GUEST_ANSWERS_SECONDS):
            raise TimeoutError("the container prints nothing")
        self._pod = pod

    def _attend(self) -> None:
        self._client.attend(self._key, -1, lambda _channel, _data: self._note())

    def _note(self) -> None:
        self._times.append(time.perf_counter())
        self._started.set()

    def longest_gap(self) -> float:
        """Seconds."""
        seen = len(self._times)
        while len(self._times) < seen + 3:
            time.sleep(0.01)
        return max(b - a for a, b in zip(self._times, self._times[1:], strict=False))

    def __enter__(self) -> _Printing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pod.kill(self._key, 9)
        self._thread.join()
        self._client.close()


def _idle(pod: holdfast.Pod, image: str) -> None:
    pod.run(image, ["/bin/busybox", "sh", "-c", "while :; do /bin/busybox sleep 1000; done"], name="c", detach=True)


def _answers(report: Report, pod: holdfast.Pod, count: int) -> None:
    """From the call until every fork has answered once."""
    started = time.perf_counter()
    pods = pod.fork(count)
    taken = time.perf_counter() - started
    try:
        rest: dict[str, Any] = {}
        if count == 1:
            assert pods[0].exec("c", ["/bin/busybox", "true"]).status == 0
            rest["to_the_end_of_a_process_in_it"] = (time.perf_counter() - started) * 1000
        shared = [_memory(one) for one in pods]
        report(
            f"{count} fork(s), from the call until all have answered", taken * 1000, "ms",
            each=taken * 1000 / count, private_mib_each=statistics.mean(shared), **rest,
        )  # fmt: skip
    finally:
        for one in pods:
            one.close()


def _growth(report: Report, folder: Path, data: Path, image: str) -> None:
    """Clones of a template, one after the other: time and memory of the last against the first."""
    pods: list[holdfast.Pod] = []
    times: list[float] = []
    sizes: list[float] = []
    try:
        for _ in range(GROWTH):
            started = time.perf_counter()
            pods.append(holdfast.Pod(root=folder / "state", data=data))
            times.append(time.perf_counter() - started)
            sizes.append(_memory(pods[-1]))
        tenth = GROWTH // 10
        report(
            f"clone {GROWTH} of {GROWTH} that live at once", statistics.median(times[-tenth:]) * 1000, "ms",
            against_the_first=statistics.median(times[-tenth:]) / statistics.median(times[:tenth]), limit="flat",
        )  # fmt: skip
        last = statistics.mean(_memory(pod) for pod in pods[-tenth:])
        report("its memory: PSS of QEMU and monitor", last, "MiB", when_it_was_new=sizes[-1], of_the_first=sizes[0])
    finally:
        for pod in pods:
            pod.close()


def _memory(pod: holdfast.Pod) -> float:
    """Proportional set size of a pod's processes, in MiB (proc_pid_smaps_rollup(5))."""
    info = pod.inspect()
    return sum(_pss_kib(pid) for pid in (info.pid, info.qemu_pid)) / 1024


def _pss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
