"""The Python package: run containers in pods, attach storage to them, see what they hold.

::

    import holdfast

    result = holdfast.run("busybox", ["echo", "hello"], mounts=["type=bind,src=/srv,dst=/srv,ro"])
    print(result.stdout, result.status)

    with holdfast.Pod() as pod:
        pod.run("busybox", ["sh", "-c", "echo x > /tmp/y"])
        path = pod.attach("type=disk,src=/tmp/data.img")
        pod.detach(path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.api.monitor import START_SECONDS
from holdfast.api.places import data_folder, state_root
from holdfast.api.pod import Pod, restore
from holdfast.api.process import Result
from holdfast.machine.config import DEFAULT_MEMORY_BYTES
from holdfast.pod.client import Client
from holdfast.storage.volumes import Volumes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["START_SECONDS", "Pod", "Result", "data_folder", "restore", "run", "state_root", "volumes"]


def volumes(*, root: str | Path | None = None, data: str | Path | None = None) -> Volumes:
    """The named volumes of this host: made, listed, grown and removed; see :class:`Volumes`.

    ::

        holdfast.volumes().create("db", "10G")
        pod.run("busybox", ["sh"], mounts=["type=volume,src=db,dst=/var/lib/db"])
    """
    root_path = state_root(root)

    def online(pod: str, path: str, size_bytes: int) -> None:
        with Client.connect(root_path, pod) as client:
            client.request("grow", {"path": path, "size_bytes": size_bytes})

    return Volumes(data_folder(data), root_path, online)


def run(
    image: str = "",
    args: Sequence[str] = (),
    *,
    memory: int | str = DEFAULT_MEMORY_BYTES,
    cpus: int = 1,
    isolation: str = "vm",
    root: str | Path | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> Result:
    """Runs a container in a pod of its own and returns its exit status and output; nothing of it is left.

    Args:
        image, args: what to run; ``options`` are those of :meth:`Pod.run`.
        memory, cpus, isolation: of the pod.

    Raises:
        HoldfastError: it could not be run; the container's own failure is its status.
    """
    pmem, ports = bool(options.get("pmem")), bool(options.get("devices"))
    with Pod(
        memory=memory, cpus=cpus, isolation=isolation, root=root, data=data, pmem=pmem, ports=ports
    ) as pod:  # fmt: skip
        return pod.run(image, args, name=options.pop("name", pod.name), ends_pod=True, **options)
