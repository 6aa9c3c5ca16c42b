"""What a client asks of a monitor, and what it answers: records that cross the pod's socket."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.machine.config import DEFAULT_MEMORY_BYTES
from holdfast.spec.pmem import PmemLimits
from holdfast.storage.plan import DirectoryRoot, LayeredRoot  # noqa: TC001  msgspec reads the types when it decodes


class PodRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pod to start.

    Attributes:
        root, data: the state root and the data folder.
        isolation: ``vm`` or ``namespace``: a machine, or the host's own kernel.  The latter knows none of ``cold``,
            ``pmem``, ``ports`` and the machine's sizes.
        ephemeral: the pod ends with the client that started it.
        cold: boot a machine of its own instead of starting from a template.
        writable_shares: whether containers may get shares of the host that they can write to.
        pmem: how much persistent memory there may be for layers.
        ports: whether there are places for assigned devices.
        snapshot: what it goes on from, if it is a copy of another pod: the monitor's numbers of the descriptors; see
            :class:`~holdfast.pod.snapshot.Snapshot`.
        template: name of the template that the snapshot is of, if it is of one.
        pooled: its machine starts, and waits until somebody wants a pod; see :mod:`holdfast.pod.pool`.
    """

    name: str
    root: str
    data: str
    isolation: str = "vm"
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    cpus: int = 1
    ephemeral: bool = False
    cold: bool = False
    writable_shares: bool = True
    pmem: PmemLimits = PmemLimits()
    ports: bool = False
    snapshot: tuple[int, ...] = ()
    template: str = ""
    pooled: bool = False


class Stdio(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a process's stdio reaches the client: numbers of streams on its connection, 0 for none.

    Attributes:
        size: rows and columns of the terminal.
        detach: output goes to the pod's log instead, and the process outlives the client.
    """

    stdin: int = 0
    stdout: int = 0
    stderr: int = 0
    size: tuple[int, int] = (24, 80)
    detach: bool = False


class ContainerRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A container to run.

    Attributes:
        spec: the runtime-spec document.
        user: a user that only the image's own files can resolve; empty when the spec has it.
        image: for ``ps``.
        ends_pod: the pod ends with this container, so its end need not wait for what the pod's end releases anyway.
    """

    name: str
    spec: dict[str, Any]
    root: LayeredRoot | DirectoryRoot
    user: str = ""
    image: str = ""
    stdio: Stdio = Stdio()
    ends_pod: bool = False


class ExecRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A process to run in a running container.

    Attributes:
        args, env, cwd, user: over those of the container's own process; empty keeps them.
    """

    container: str
    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: str = ""
    terminal: bool = False
    stdio: Stdio = Stdio()


class ContainerInfo(msgspec.Struct, frozen=True):
    """A container as ``ps`` and ``inspect`` show it.

    Attributes:
        state: ``starting``, ``running``, ``exited`` or ``failed``.
        pid: in the guest.
        code: exit status; -1 while there is none.
        why: what made it fail.
    """

    name: str
    pod: str
    state: str
    image: str
    args: tuple[str, ...]
    started_ns: int
    pid: int = 0
    code: int = -1
    why: str = ""


class PodInfo(msgspec.Struct, frozen=True):
    """A pod as ``ps`` and ``inspect`` show it.

    Attributes:
        state: ``starting``, ``ready`` (for who wants a pod), ``running`` or ``failed``.
        pid: the monitor's, on the host.
        qemu_pid: QEMU's; of a pod in namespaces, the agent's.
        memory_bytes, cpus: the machine's; 0 if it has none.
        started_from: ``template`` or ``boot``; empty if there is no machine.
    """

    name: str
    state: str
    isolation: str
    accelerator: str
    pid: int
    qemu_pid: int
    memory_bytes: int
    cpus: int
    started_from: str
    created_ns: int
    containers: tuple[ContainerInfo, ...] = ()
    why: str = ""
    guest: dict[str, Any] = {}
