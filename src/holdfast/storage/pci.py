"""Assigned devices: PCI functions of the host that a pod's containers hold, each once for all its holders.

Holdfast takes no device from the host's drivers: it must be bound to vfio-pci, and the error says how.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from holdfast.errors import Exhausted, GuestFailed, InvalidInput, NotFound, Unsupported
from holdfast.machine.ports import PORTS
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import GUEST_SECONDS, add_causes, while_alive
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal

PCI = "/sys/bus/pci/devices"
#: hcsshim's words for what this is, and the short one.
ID_TYPES = ("vpci", "vpci-instance-id", "gpu", "pci")
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_NODE = re.compile(r"/dev/[A-Za-z0-9._-]+(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_MOST_NODES = 64


class FunctionKey(NamedTuple):
    """What makes two functions the same: the address, and which of its virtual functions; 0 is itself."""

    address: str
    function: int = 0

    def __str__(self) -> str:
        return f"{self.address}/{self.function}" if self.function else self.address


class Node(msgspec.Struct, frozen=True):
    """A device node in the guest; ``type`` is ``b`` or ``c``."""

    path: str
    type: str
    major: int
    minor: int


class Assigned(msgspec.Struct, frozen=True):
    """A function behind a port.  ``address`` is the guest's; ``row`` is in the journal."""

    key: FunctionKey
    port: int
    row: int
    address: str = ""
    nodes: tuple[Node, ...] = ()


class PortMachine(Protocol):
    """What is asked of a machine besides what every sandbox does."""

    async def plug_function(self, port: int, options: dict[str, Any]) -> None:
        """Plugs in a function; undoes itself when it fails."""

    async def unplug_function(self, port: int) -> None:
        """Returns when the function is gone; already gone is success."""


def parse_function(text: str, id_type: str = "pci") -> FunctionKey:
    """``0000:01:00.0``, or with ``/2`` behind it the second virtual function of that.

    Raises:
        InvalidInput: it is neither, or the type is not known.
    """
    if id_type not in ID_TYPES:
        raise InvalidInput(
            "assign device", subject=text, why=f"type {id_type!r} is none of {', '.join(ID_TYPES)}", code="device-type"
        )
    address, slash, number = text.partition("/")
    found = _ADDRESS.fullmatch(address.lower())
    if found is None or (slash and not (number.isascii() and number.isdecimal() and int(number) < 1 << 16)):
        raise InvalidInput(
            "assign device",
            subject=text,
            why="no PCI address",
            code="device-id",
            hint="such as 0000:01:00.0; see lspci -D",
        )
    domain, bus, device, function = found.groups()
    return FunctionKey(f"{domain or '0000'}:{bus}:{device}.{function}", int(number or 0))


def vfio_options(key: FunctionKey, sysfs: str = PCI) -> dict[str, Any]:
    """What QEMU is to plug in for a function of this host.

    Raises:
        NotFound: there is none of this address.
        Unsupported: there is no IOMMU, or another driver has it.
    """
    folder = f"{sysfs}/{key.address}"
    if key.function:
        folder += f"/virtfn{key.function - 1}"
    if not os.path.isdir(folder):
        raise NotFound("assign device", subject=key, why="this host has no such PCI function", code="device-not-found")
    address = os.path.basename(os.path.realpath(folder))
    if not os.path.exists(f"{folder}/iommu_group"):
        raise Unsupported(
            "assign device", subject=key, why="this host has no IOMMU in use", code="no-iommu",
            hint="turn it on in the firmware and by intel_iommu=on or amd_iommu=on; holdfast doctor looks again",
        )  # fmt: skip
    driver = os.path.basename(os.path.realpath(f"{folder}/driver")) if os.path.exists(f"{folder}/driver") else ""
    if driver != "vfio-pci":
        raise Unsupported(
            "assign device", subject=key, code="device-not-vfio",
            why=f"driver {driver} has it" if driver else "vfio-pci does not have it",
            hint=f"modprobe vfio-pci && driverctl --nosave set-override {address} vfio-pci",
        )  # fmt: skip
    return {"driver": "vfio-pci", "host": address}


class Functions:
    """The ports of one pod.

    Args:
        options: what to plug in for a function; tests have devices that QEMU emulates.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        machine: PortMachine,
        journal: Journal,
        pod: str,
        options: Callable[[FunctionKey], dict[str, Any]] = vfio_options,
    ) -> None:
        self._sandbox = sandbox
        self._machine = machine
        self._journal = journal
        self._pod = pod
        self._options = options
        self._taken: set[int] = set()
        self._shared: Counted[FunctionKey, Assigned] = Counted(self._unmake)

    async def assign(self, key: FunctionKey, holder: str) -> Assigned:
        """Plugs a function in, or counts one more holder.

        Raises:
            HoldfastError: what went wrong; nothing of it is left.
        """
        return await self._shared.acquire(key, holder, lambda: self._make(key))

    async def release(self, assigned: Assigned, holder: str) -> None:
        """Lets go of a function; the last holder takes it out.  Can be tried again when it fails.

        Raises:
            NotReleased: the guest did not let go of it in time.
        """
        await self._shared.release(assigned.key, holder)

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _make(self, key: FunctionKey) -> Assigned:
        options = self._options(key)
        port = next((port for port in range(PORTS) if port not in self._taken), None)
        if port is None:
            raise Exhausted("assign device", subject=key, why=f"all {PORTS} ports are taken", code="no-free-port")
        self._taken.add(port)
        try:
            row = self._journal.intend(self._pod, "pci", str(key), {"port": port})
        except BaseException:
            self._taken.discard(port)
            raise
        assigned = Assigned(key, port, row)
        try:
            await self._machine.plug_function(port, options)
            assigned = await self._wait_in_guest(assigned)
        except BaseException as error:
            undo = Undo()
            undo.push("take out device", lambda: self._unmake(key, assigned))
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes:
                raise HalfMade(error, assigned) from error
            raise
        self._journal.hold(row)
        return assigned

    async def _wait_in_guest(self, assigned: Assigned) -> Assigned:
        settings = requests.LCOWMappedVPCIDevice(port=assigned.port)
        request = requests.encode(requests.GuestRequest("Add", settings))
        answer = await self._sandbox.request("modify", request, GUEST_SECONDS)
        try:
            nodes = tuple(msgspec.convert(answer["nodes"], list[Node]))
            address = msgspec.convert(answer["address"], str)
        except (TypeError, KeyError, msgspec.ValidationError):
            nodes, address = (Node("", "", 0, 0),), ""
        if len(nodes) > _MOST_NODES or not all(map(_is_node, nodes)):
            raise GuestFailed("assign device", subject=assigned.key, why="the guest answered with nonsense")
        return msgspec.structs.replace(assigned, address=address, nodes=nodes)

    async def _unmake(self, _key: FunctionKey, assigned: Assigned) -> None:
        self._journal.releasing(assigned.row)
        await while_alive(self._sandbox, lambda: self._machine.unplug_function(assigned.port))
        self._taken.discard(assigned.port)
        self._journal.release(assigned.row)

    def describe(self) -> list[dict[str, Any]]:
        """For ``holdfast storage``."""
        return [
            {
                "device": str(key),
                "port": assigned.port,
                "guest_address": assigned.address,
                "nodes": [node.path for node in assigned.nodes],
                "holders": holders,
            }
            for key, assigned, holders in self._shared.items()
        ]


def _is_node(node: Node) -> bool:
    numbers = 0 <= node.major < 1 << 12 and 0 <= node.minor < 1 << 20
    return node.type in ("b", "c") and numbers and bool(_NODE.fullmatch(node.path)) and ".." not in node.path


def add_nodes(spec: dict[str, Any], nodes: list[Node]) -> None:
    """Gives a container device nodes: made by the runtime, and allowed by its cgroup."""
    if not nodes:
        return
    linux = spec.setdefault("linux", {})
    devices = linux["devices"] = list(linux.get("devices") or ())
    resources = linux["resources"] = dict(linux.get("resources") or {})
    rules = resources["devices"] = list(resources.get("devices") or ())
    for node in nodes:
        numbers = {"type": node.type, "major": node.major, "minor": node.minor}
        devices.append({"path": node.path, **numbers, "fileMode": 0o600, "uid": 0, "gid": 0})
        rules.append({"allow": True, **numbers, "access": "rwm"})
