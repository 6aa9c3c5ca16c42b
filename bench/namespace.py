"""Containers of pods in namespaces, beside ``runc run`` of the same bundle in the same run.

Of both the whole is measured, from the request to the end of a container that ends at once and to its removal.  The
two take turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import holdfast
from holdfast.machine import cgroups

if TYPE_CHECKING:
    from collections.abc import Callable

    Report = Callable[..., None]

BINDS = (1, 10, 100, 500)


def measure(report: Report, folder: Path, data: Path) -> None:
    """Measures everything.

    Args:
        report: called with each figure's name, value and unit, and what else belongs to it.
        folder: an empty one to work in, best on a tmpfs, as ``/run``, where state roots are, mostly is.
        data: the data folder; bundles alone are run, so it may be empty.
    """
    pods = []
    for _ in range(5):
        started = time.perf_counter()
        with holdfast.Pod(isolation="namespace", root=folder / "state", data=data):
            pods.append(time.perf_counter() - started)
    report("a pod in namespaces, to the agent's first answer", _ms(pods), "ms")
    bundle = _bundle(folder / "bundle")
    with holdfast.Pod(isolation="namespace", root=folder / "state", data=data) as pod:
        _compare(report, "a container in namespaces", pod, bundle, [], 15, "1.5 times runc run")
        for count in BINDS:
            mounts = [_bind(folder / "sources" / str(number), number) for number in range(count)]
            turns = 15 if count <= 10 else 5
            _compare(report, f"the same with {count} bind mounts", pod, bundle, mounts, turns, "1.2 times runc run")


def _compare(
    report: Report, name: str, pod: holdfast.Pod, bundle: Path, mounts: list[dict[str, Any]], turns: int, limit: str
) -> None:
    plain = json.loads((bundle / "config.json").read_text())
    with_mounts = {**plain, "mounts": [*plain["mounts"], *mounts]}
    peer = _peer(bundle, with_mounts)
    ours, theirs = [], []
    for turn in range(turns + 1):
        started = time.perf_counter()
        subprocess.run(peer, check=True, capture_output=True)
        between = time.perf_counter()
        status = pod.run(bundle=bundle, mounts=mounts).status
        if turn:  # the first one fills caches
            theirs.append(between - started)
            ours.append(time.perf_counter() - between)
        assert status == 0
    ratio = statistics.median(ours) / statistics.median(theirs)
    report(name, _ms(ours), "ms", runc_run=_ms(theirs), ratio=ratio, limit=limit)


def _peer(bundle: Path, document: dict[str, Any]) -> list[str]:
    """The command that does the same by itself, in a bundle of its own over the same root filesystem."""
    beside = bundle.with_name("peer")
    beside.mkdir(exist_ok=True)
    root = {"path": str(bundle / "rootfs")}
    (beside / "config.json").write_text(json.dumps({**document, "root": root}))
    runtime = cgroups.choose_runtime()
    state = str(bundle.with_name("runtime"))
    return [runtime.path, *runtime.options, "--root", state, "run", "--bundle", str(beside), "holdfast-bench"]


def _bundle(folder: Path) -> Path:
    programs = folder / "rootfs/bin"
    programs.mkdir(parents=True)
    for name in ("proc", "dev", "m"):
        (folder / "rootfs" / name).mkdir()
    subprocess.run(["cp", "/bin/busybox", programs / "busybox"], check=True)
    document = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["/bin/busybox", "true"], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "uts", "ipc", "network")]},
    }
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def _bind(source: Path, number: int) -> dict[str, Any]:
    source.mkdir(parents=True, exist_ok=True)
    return {"type": "bind", "source": str(source), "destination": f"/m/{number}", "options": ["bind", "rw"]}


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir="/dev/shm") as work:
        measure(lambda *figure, **more: print(*figure, more), Path(work), Path(work) / "data")
