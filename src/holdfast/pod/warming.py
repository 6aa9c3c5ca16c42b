"""Running a container that does nothing, in a machine that waits for somebody to want it.

The first container of a machine takes several times as long as the second: an emulated processor translates all of the
code that it has not executed yet, and a real one finds nothing in its caches.  In the pool that is over before anybody
waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.pod.messages import ContainerRequest, Stdio
from holdfast.spec.default import NO_CONFIG, spec_for_image
from holdfast.storage import scratch
from holdfast.storage.plan import LayeredRoot

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.machine.vm import VirtualMachine
    from holdfast.pod.containers import Containers
    from holdfast.wire.aio import Connection

NAME = "warming"
#: More than this adds nothing that can be measured.
_TIMES = 2
_SECONDS = 60.0


async def warm_up(machine: VirtualMachine, containers: Containers, client: Connection, folder: Path) -> None:
    """Runs it on the guest's own root disk, which is an image like others, and leaves nothing of it.

    Args:
        client: hears what a container's start has to say.
        folder: of the pod.

    Raises:
        HoldfastError: the container could not be run, or not be let go of.
    """
    spec: dict[str, Any] = spec_for_image(NO_CONFIG, args=("/usr/bin/busybox", "true"), hostname=NAME).raw
    root = LayeredRoot(((machine.config.guest.root, ""),), scratch.DEFAULT_BYTES)
    for _ in range(_TIMES):
        request = ContainerRequest(NAME, spec, root, stdio=Stdio(detach=True))
        await containers.run(client, request)
        await containers.wait(NAME)
        await containers.forget(NAME)
        (folder / f"{NAME}.log").unlink(missing_ok=True)
        await machine.request("make_ready", {}, _SECONDS)
