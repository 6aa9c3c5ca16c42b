"""What is asked of a sandbox, whatever the sandbox is: by the storage engine, and by who owns a pod.

A virtual machine implements it with QMP and an agent on virtio-serial, namespaces with loop devices and an agent on a
socket; a fake one, for tests of the engine's logic, passes the same conformance suite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from holdfast.errors import HoldfastError
    from holdfast.wire.aio import Connection

CONTROLLERS = 4
LUNS = 64


class Slot(NamedTuple):
    """A SCSI address: controller 0-3, LUN 0-63."""

    controller: int
    lun: int

    def __str__(self) -> str:
        return f"{self.controller}:{self.lun}"


class Sandbox(Protocol):
    """A running machine: the host's half of devices, and the agent."""

    #: Folder whose sub-folders the guest sees as shares; the sandbox's owner binds them there.
    export: str
    #: Done when the sandbox has died, for whatever reason.
    died: asyncio.Future[None]

    async def plug_disk(self, slot: Slot, disk_fd: int, disk_format: str, read_only: bool, block_device: bool) -> None:
        """Host half of an attach: hands the open disk to the machine and plugs it in; undoes itself when it fails."""

    async def unplug_disk(self, slot: Slot) -> None:
        """Host half of a detach: returns when the device is gone and its file closed; already gone is success."""

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """Makes the raw disk in a slot larger, its file as well."""

    async def plugged(self) -> set[Slot]:
        """The slots that the machine itself says are occupied: the truth to reconcile with."""

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        """Asks the agent."""

    async def close(self) -> None:
        """Ends the machine and frees what it holds; a second call does nothing."""


class PodSandbox(Sandbox, Protocol):
    """A sandbox that containers run in."""

    #: Takes the agent's events: name and parameters.
    on_event: Callable[[str, dict[str, Any]], None]
    #: Set by who is about to end it.
    closing: bool

    @property
    def pid(self) -> int:
        """Id of its process, QEMU or the agent, as the host sees it."""

    @property
    def agent(self) -> Connection:
        """The connection to the agent, for streams."""

    async def occupied(self) -> set[str]:
        """Every place in which something is plugged in, such as ``slot 0:3``, as the kernel or QEMU has it."""

    async def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes read from each disk and written to it, by slot."""

    def last_lines(self) -> str:
        """What the agent, the guest's kernel or QEMU printed last."""

    def describe_death(self) -> HoldfastError:
        """Why it is gone."""
