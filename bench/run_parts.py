"""``holdfast run IMAGE true``, the whole command, by its parts, beside what other programs take for the same.

All run busybox's ``true`` on the same root filesystem, in turns, so that what else the machine does falls on all of
them: ``runc``, ``runsc`` (gVisor), ``ctr`` with a containerd of its own, and ``podman``; one that is not installed, or
does not run here, is left out, and that is said.  The parts are what :mod:`holdfast.trace` has to say of each run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Report = Callable[..., None]

TURNS = 9
_PROGRAM = Path(__file__).resolve().parents[1] / ".venv/bin/holdfast"
_READY_SECONDS = 20.0
#: Part -> the mark at which it ends, in order; a part begins where the one before ends.  Client and monitor start side
#: by side: what is counted as the client's is what the monitor had to wait for.
PARTS = (
    ("client: interpreter", "client", "interpreter"),
    ("client: command line", "client", "command line read"),
    ("client: modules", "client", "modules"),
    ("client: image, specification, plan", "client", "plan"),
    ("client: name and lock", "client", "pod's name and lock"),
    ("monitor: namespaces and fork", "monitor", "namespaces and fork"),
    ("monitor: journal, folder, template", "monitor", "QEMU spawned"),
    ("QEMU: start", "monitor", "QEMU has greeted"),
    ("QEMU: restore", "monitor", "restored"),
    ("guest: first answer", "monitor", "agent has answered"),
    ("guest: made unique", "monitor", "agent has resumed"),
    ("monitor: asked, planned", "monitor", "plan"),
    ("disks: attached and mounted", "monitor", "disks and shares"),
    ("guest: overlay", "monitor", "storage is ready"),
    ("guest: bundle", "monitor", "agent: bundle is made"),
    ("guest: crun", "monitor", "agent: runtime has ended"),
    ("guest: the program, its end", "monitor", "container has ended"),
    ("monitor: machine killed", "monitor", "machine is gone"),
    ("monitor: pod forgotten", "monitor", "pod is forgotten"),
)
_REST = "client: told, ends"


def measure(report: Report, say: Callable[[str], None], folder: Path, data: Path, image: str) -> None:
    """Measures everything.

    Args:
        report: called with each figure's name, value and unit, and what else belongs to it.
        say: called with what is left out.
        folder: an empty one to work in, best on a tmpfs, where state roots mostly are.
        data: the data folder, with a template for the default machine.
        image: of a root filesystem with ``/bin/busybox``.
    """
    bundle = _bundle(folder / "bundle")
    ours = [str(_PROGRAM), "--root", str(folder / "state"), "--data", str(data), "run", image, "/bin/busybox", "true"]
    trace = folder / "trace"
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, prepare in PEERS.items():
            try:
                peers[name] = stack.enter_context(prepare(folder, bundle))
                _timed(peers[name])
            except (OSError, subprocess.SubprocessError, TimeoutError) as error:
                peers.pop(name, None)
                why = getattr(error, "stderr", b"") or str(error).encode()
                say(f"{name} is left out: {why.decode(errors='replace').strip()[-200:]}")
        _timed(ours)
        wholes: list[float] = []
        parts: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(TURNS):
            started_ns = time.monotonic_ns()
            wholes.append(_timed(ours, HOLDFAST_TRACE=str(trace)))
            for part, ms in split(trace.read_text(), started_ns, wholes[-1]).items():
                parts.setdefault(part, []).append(ms)
            trace.unlink()
            for name, argv in peers.items():
                theirs[name].append(_timed(argv))
    medians = {name: statistics.median(samples) for name, samples in theirs.items()}
    whole = statistics.median(wholes)
    ratio = {"ratio": whole / medians["runsc"]} if "runsc" in medians else {}
    report("holdfast run of true, from a template", whole, "ms", limit="2 times runsc run", **ratio)
    for name, ms in medians.items():
        report(f"{name} run of true", ms, "ms")
    for part, samples in parts.items():
        report(f"of holdfast run, {part}", statistics.median(samples), "ms")


def split(text: str, started_ns: int, whole_ms: float) -> dict[str, float]:
    """Milliseconds that each part took, from the trace of one run; together they are the whole.

    A part whose end was not marked, or came before another's that it follows, has no time of its own.
    """
    marks: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        when, process, what = line.split(" ", 2)
        marks.setdefault((process, what), (int(when) - started_ns) / 1e6)
    found, now = {}, 0.0
    for part, process, what in PARTS:
        then = max(now, marks.get((process, what), now))
        found[part], now = then - now, then
    found[_REST] = whole_ms - now
    return found


def _timed(argv: list[str], **environment: str) -> float:
    """Milliseconds of a command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, **environment}, timeout=60)
    return (time.perf_counter() - started) * 1000


# -- the others ---------------------------------------------------------------------------------


def _bundle(folder: Path) -> Path:
    """The bundle that runc would make, with a root filesystem as the image's."""
    (folder / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "rootfs/bin/busybox")
    subprocess.run(["runc", "spec", "--bundle", str(folder)], check=True, capture_output=True)
    document = json.loads((folder / "config.json").read_text())
    document["process"] |= {"terminal": False, "args": ["/bin/busybox", "true"]}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@contextlib.contextmanager
def _runc(folder: Path, bundle: Path) -> Iterator[list[str]]:
    yield ["runc", "--root", str(folder / "runc"), "run", "--bundle", str(bundle), "bench"]


@contextlib.contextmanager
def _runsc(folder: Path, bundle: Path) -> Iterator[list[str]]:
    options = ["--root", str(folder / "runsc"), "--network", "none"]
    yield ["runsc", *options, "run", "--bundle", str(bundle), "bench"]


@contextlib.contextmanager
def _podman(folder: Path, bundle: Path) -> Iterator[list[str]]:
    options = ["--root", str(folder / "podman"), "--runroot", str(folder / "podman-run"), "--storage-driver", "vfs"]
    options += ["--cgroup-manager", "cgroupfs", "--runtime", shutil.which("runc") or "runc"]
    run = ["run", "--rm", "--network", "none", "--log-driver", "none"]
    run += ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]  # its own may be more than we may set
    yield ["podman", *options, *run, "--rootfs", str(bundle / "rootfs"), "/bin/busybox", "true"]


@contextlib.contextmanager
def _containerd(folder: Path, bundle: Path) -> Iterator[list[str]]:
    """``ctr`` and the containerd that it talks to."""
    socket = str(folder / "containerd.sock")
    options = ["--root", str(folder / "containerd"), "--state", str(folder / "containerd-run"), "--address", socket]
    with open(folder / "containerd.log", "wb") as log:
        daemon = subprocess.Popen(["containerd", *options], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        ready = ["ctr", "--address", socket, "version"]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or daemon.poll() is not None:
                raise TimeoutError("containerd does not answer")
            time.sleep(0.05)
        run = ["ctr", "--address", socket, "run", "--rm", "--rootfs", str(bundle / "rootfs"), "bench"]
        yield [*run, "/bin/busybox", "true"]
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


PEERS: dict[str, Any] = {"runc": _runc, "runsc": _runsc, "ctr": _containerd, "podman": _podman}


if __name__ == "__main__":
    import tempfile

    work_data, work_image = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir="/dev/shm") as work:
        measure(lambda *figure, **more: print(*figure, more), print, Path(work), work_data, work_image)
