"""A QEMU virtual machine: the :class:`~holdfast.machine.sandbox.Sandbox` of a pod."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any

from holdfast.errors import Exhausted, HoldfastError, MachineFailed, ProtocolError, TimedOut
from holdfast.machine import migration, ports
from holdfast.machine.config import MachineConfig, Wiring, command_line
from holdfast.machine.console import Console
from holdfast.machine.process import FIRST_FD, Child
from holdfast.machine.sandbox import Slot
from holdfast.wire.aio import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.qmp import Qmp

HELLO_SECONDS = 5.0
BOOT_SECONDS = 90.0
_UNPLUG_SECONDS = 10.0
#: Formats whose drivers QEMU calls otherwise.
_DRIVERS = {"vhd": "vpc"}


class VirtualMachine:
    """One QEMU process with its control channel and its agent.

    Use :func:`start`; the object owns the process, the socket pairs and the console log.
    """

    def __init__(self, config: MachineConfig, export: str) -> None:
        self.config = config
        self.export = export
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda _name, _params: None
        self._child: Child
        self._qmp: Qmp
        self._agent: Connection
        self._console: Console
        self._watcher: asyncio.Task[None] | None = None
        self.closing = False
        self._no_space: Exhausted | None = None

    @property
    def pid(self) -> int:
        """QEMU's process id, as the host sees it."""
        return self._child.host_pid

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        """Asks the agent.  See :meth:`Connection.request`."""
        return await self._agent.request(method, params, seconds)

    @property
    def agent(self) -> Connection:
        """The connection to the agent, for streams."""
        return self._agent

    @property
    def qmp(self) -> Qmp:
        """The connection to QEMU."""
        return self._qmp

    # -- disks --------------------------------------------------------------------------------

    async def plug_disk(self, slot: Slot, disk_fd: int, disk_format: str, read_only: bool, block_device: bool) -> None:
        """See :meth:`Sandbox.plug_disk`.  Ids are deterministic, so that what is plugged in can be asked for."""
        node, device, fdset = _names(slot)
        driver = "host_device" if block_device else "file"
        file = {"driver": driver, "filename": f"/dev/fdset/{fdset}", "read-only": read_only, "discard": "unmap"}
        options: dict[str, Any] = {
            "node-name": node, "driver": _DRIVERS.get(disk_format, disk_format), "read-only": read_only,
            "discard": "unmap", "file": file,
        }  # fmt: skip
        if disk_format == "qcow2":  # never opens another file by itself, whatever the image says
            options["backing"] = None
        await self._qmp.add_fd(fdset, disk_fd)
        try:
            await self._qmp.execute("blockdev-add", options)
            await self._qmp.execute("device_add", {
                "driver": "scsi-hd", "id": device, "bus": f"scsi{slot.controller}.0", "channel": 0, "scsi-id": 0,
                "lun": slot.lun, "drive": node, "serial": device,
                # A full host disk stops the guest before it sees anything (see _on_no_space): told of a failed write,
                # it would drop the page and read back something else later.
                "werror": "enospc", "rerror": "report",
            })  # fmt: skip
        except BaseException as error:
            # Whether an interrupted command ran cannot be known: everything is taken back, in any case.
            await asyncio.shield(self._take_back(slot, error))
            raise

    async def _take_back(self, slot: Slot, error: BaseException) -> None:
        try:
            await self.unplug_disk(slot)
        except HoldfastError as left:
            if isinstance(error, HoldfastError):
                error.causes += (left,)

    async def unplug_disk(self, slot: Slot) -> None:
        """See :meth:`Sandbox.unplug_disk`: the slot is free only when QEMU has said that the device is gone."""
        _, device, _ = _names(slot)
        await self._qmp.delete_device(device, _UNPLUG_SECONDS)
        await self._forget(slot)

    async def _forget(self, slot: Slot) -> None:
        node, _, fdset = _names(slot)
        await self._qmp.execute_if_there("blockdev-del", {"node-name": node})
        await self._qmp.execute_if_there("remove-fd", {"fdset-id": fdset})

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """See :meth:`Sandbox.resize_disk`."""
        await self._qmp.execute("block_resize", {"node-name": _names(slot)[0], "size": size_bytes})

    async def plugged(self) -> set[Slot]:
        """See :meth:`Sandbox.plugged`."""
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True})
        slots = {tuple(name[1:].split("-")) for node in nodes if (name := str(node["node-name"]))[:1] == "d"}
        return {Slot(int(controller), int(lun)) for controller, lun in slots}

    async def occupied(self) -> set[str]:
        """Every place in which something was plugged since the start, as QEMU has it: see :func:`ports.place_of`."""
        found = await self._qmp.execute("qom-list", {"path": "/machine/peripheral"})
        places = {place for one in found if (place := ports.place_of(str(one["name"])))}
        return places | {f"slot {slot}" for slot in await self.plugged()}

    # -- other devices ------------------------------------------------------------------------

    async def plug_pmem(self, number: int, fd: int, size_bytes: int) -> None:
        """See :func:`ports.plug_pmem`."""
        await ports.plug_pmem(self._qmp, number, fd, size_bytes)

    async def plug_function(self, port: int, options: dict[str, Any]) -> None:
        """See :func:`ports.plug_function`."""
        await ports.plug_function(self._qmp, port, options)

    async def unplug_function(self, port: int) -> None:
        """See :func:`ports.unplug_function`."""
        await ports.unplug_function(self._qmp, port)

    async def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that the guest has read from each disk and written to it, by slot."""
        found = await self._qmp.execute("query-blockstats", {})
        return {
            str(name[1:].replace("-", ":")): (int(one["stats"]["rd_bytes"]), int(one["stats"]["wr_bytes"]))
            for one in found
            if (name := str(one.get("node-name", "")))[:1] == "d" and name[1:].replace("-", "").isdecimal()
        }

    def last_lines(self) -> str:
        """What the guest, or QEMU, printed last."""
        return self._console.last_lines() or "nothing"

    # -- life ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """Kills QEMU and frees everything; a second call does nothing."""
        self.closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        await self._child.kill()
        self._fail(MachineFailed("use the machine", why="it was closed", code="machine-closed"))
        await self._qmp.close()
        self._console.close()

    def _on_no_space(self, node: str) -> None:
        """The host's disk is full under a disk of the guest, and QEMU has stopped it: the machine ends, and says why.

        Going on is not possible without losing writes that the guest's programs believe to be done.
        """
        self._no_space = Exhausted(
            "write to disk", subject=node, why="the host's disk is full; the machine was ended", code="disk-full",
            hint="make room, then run it again",
        )  # fmt: skip
        self._child.signal_kill()

    def describe_death(self) -> HoldfastError:
        """Why the machine is gone: exit status and the console's last lines, or what it was ended for."""
        if self._no_space is not None:
            return self._no_space
        status = self._child.exited.result() if self._child.exited.done() else None
        how = "was killed by signal " + str(-status) if status is not None and status < 0 else f"exited with {status}"
        if isinstance(self._agent.error, ProtocolError):
            how = f"was ended: the agent broke the protocol ({self._agent.error.why})"
        why = f"QEMU {how}; last on its console: {self.last_lines()}"
        return MachineFailed("use the machine", why=why, code="machine-died")

    def _fail(self, error: HoldfastError) -> None:
        self._agent.fail(error)
        if not self.died.done():
            self.died.set_result(None)

    async def _watch(self) -> None:
        await asyncio.shield(self._child.exited)
        error = self.describe_death()
        self._qmp.fail(error)
        self._fail(error)

    async def start(self, wiring: Wiring, console_log: str, qmp_end: socket.socket, agent_end: socket.socket,
                    fds: list[int]) -> None:  # fmt: skip
        """Spawns QEMU; see :func:`start`."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = Child(command_line(self.config, wiring, str(uuid.uuid4())), fds, writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._console = Console(reader, console_log)
        # QEMU needs its time to start; importing its protocol's library meanwhile costs nothing.
        from holdfast.machine.qmp import Qmp

        self._qmp = Qmp(qmp_end, self._on_no_space)
        self._agent = Connection(
            on_event=lambda name, params: self.on_event(name, params),
            on_lost=lambda: None,  # only QEMU's end closes it, and _watch says better why
        )
        await asyncio.get_running_loop().create_connection(lambda: self._agent, sock=agent_end)
        # A machine whose agent has broken the protocol cannot be controlled any more: it ends.
        self._agent.lost.add_done_callback(lambda _: self._child.signal_kill())
        self._watcher = asyncio.create_task(self._watch())


async def start(
    config: MachineConfig,
    *,
    ram_path: str,
    ram_shared: bool,
    export: str,
    console_log: str,
    state_fd: int = -1,
    boot_seconds: float = BOOT_SECONDS,
    hold_fd: int = -1,
) -> VirtualMachine:
    """Starts a machine and waits for its agent.

    Args:
        ram_path: file of the guest's RAM, of the right size already.
        ram_shared: boot into the file (to be saved); else changes to it stay private.
        export: folder served over 9p.
        console_log: file for what the guest prints.
        state_fd: saved device state to start from; -1 boots.
        boot_seconds: how long a boot may take.
        hold_fd: a descriptor that QEMU keeps open besides: a lock that is free only when QEMU, too, is gone.

    Raises:
        MachineFailed: QEMU or the guest failed; carries the console's last lines.
        TimedOut: the agent did not answer in time.
    """
    machine = VirtualMachine(config, export)
    qmp_ours, qmp_theirs = socket.socketpair()
    agent_ours, agent_theirs = socket.socketpair()
    with qmp_theirs, agent_theirs:
        wiring = Wiring(ram_path, ram_shared, export, FIRST_FD, FIRST_FD + 1, state_fd >= 0)
        try:
            fds = [qmp_theirs.fileno(), agent_theirs.fileno(), *([hold_fd] if hold_fd >= 0 else [])]
            await machine.start(wiring, console_log, qmp_ours, agent_ours, fds)
        except BaseException:
            qmp_ours.close()
            agent_ours.close()
            raise
    try:
        await machine.qmp.connect(HELLO_SECONDS)
        if state_fd >= 0:
            await migration.restore(machine.qmp, state_fd)
        await _greet(machine, None if state_fd >= 0 else boot_seconds)
    except TimedOut as error:
        error.why += f"; last on its console: {machine.last_lines()}"
        await asyncio.shield(machine.close())
        raise
    except BaseException:
        await asyncio.shield(machine.close())
        raise
    return machine


async def _greet(machine: VirtualMachine, boot_seconds: float | None) -> None:
    await machine.agent.synchronise(boot_seconds or HELLO_SECONDS)
    if boot_seconds is None:
        params = {"time_ns": time.time_ns(), "entropy": os.urandom(64).hex(), "hostname": "holdfast"}
        await machine.request("resume", params, HELLO_SECONDS)


def _names(slot: Slot) -> tuple[str, str, int]:
    """Block node, device id and descriptor set of a slot."""
    name = f"{slot.controller}-{slot.lun}"
    return f"d{name}", f"disk{name}", 1000 + slot.controller * 64 + slot.lun
