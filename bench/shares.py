"""Many shares: the bind mounts of one container, and the volumes that the containers of a pod share.

In a machine the figure is what one more mount costs, against the same container without; that of containers in
namespaces, beside ``runc run``, is in :mod:`bench.namespace`.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import holdfast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Report = Callable[..., None]

BINDS = (1, 10, 100, 500)
VOLUMES = 100
_TURNS = 3


def measure(report: Report, folder: Path, data: Path, image: str) -> None:
    """Measures everything.

    Args:
        report: called with each figure's name, value and unit, and what else belongs to it.
        folder: an empty one to work in.
        data: the data folder, with a template.
        image: of containers; it has busybox.
    """
    with holdfast.Pod(root=folder / "state", data=data) as pod:
        plain = _runs(pod, image, [])
        for count in BINDS:
            mounts = [_bind(folder / "sources" / str(number), number) for number in range(count)]
            taken = _runs(pod, image, mounts)
            report(
                f"a container in a machine with {count} bind mounts", _ms(taken), "ms", without=_ms(plain),
                each_ms=(_ms(taken) - _ms(plain)) / count, limit="1 ms each",
            )  # fmt: skip
    for kind, mounts in (
        ("directories of the host", [_bind(folder / "sources" / str(number), number) for number in range(VOLUMES)]),
        ("volumes in memory", [_volume(number) for number in range(VOLUMES)]),
    ):
        shared, alone = ([_two(folder, data, image, listed) for _ in range(_TURNS)] for listed in (mounts, []))
        name = f"2 containers that share {VOLUMES} {kind}, once the machine is up"
        report(name, _ms(shared), "ms", without=_ms(alone), limit=1000)


def _runs(pod: holdfast.Pod, image: str, mounts: list[dict[str, Any]]) -> list[float]:
    """From the request for a container that ends at once to its removal; the first fills caches."""
    taken = []
    for _ in range(_TURNS + 1):
        started = time.perf_counter()
        assert pod.run(image, ["/bin/busybox", "true"], mounts=mounts).status == 0
        taken.append(time.perf_counter() - started)
    return taken[1:]


def _two(folder: Path, data: Path, image: str, mounts: list[dict[str, Any]]) -> float:
    """Two containers of a new pod, until both have started."""
    with holdfast.Pod(root=folder / "state", data=data) as pod:
        started = time.perf_counter()
        for name in ("first", "second"):
            pod.run(image, ["/bin/busybox", "sleep", "1000"], name=name, mounts=mounts, detach=True)
        taken = time.perf_counter() - started
    return taken


def _bind(source: Path, number: int) -> dict[str, Any]:
    source.mkdir(parents=True, exist_ok=True)
    return {"type": "bind", "source": str(source), "destination": f"/m/{number}", "options": ["rbind", "rw"]}


def _volume(number: int) -> dict[str, Any]:
    return {"type": "bind", "source": f"sandbox://volume{number}", "destination": f"/m/{number}", "options": ["rbind"]}


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000
