"""A QEMU virtual machine: the :class:`~holdfast.machine.sandbox.Sandbox` of a pod."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from holdfast import trace
from holdfast.errors import Exhausted, HoldfastError, MachineFailed, ProtocolError, TimedOut
from holdfast.machine import migration, ports
from holdfast.machine.config import MachineConfig, Wiring, command_line
from holdfast.machine.console import Console
from holdfast.machine.disk_copies import Copies
from holdfast.machine.disks import DiskFile, Disks
from holdfast.machine.frozen import Origin, freeze
from holdfast.machine.process import FIRST_FD, Child
from holdfast.wire.aio import Connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.machine.qmp import Qmp
    from holdfast.machine.sandbox import Slot

#: One that runs already may have much to do, and so may the host.
HELLO_SECONDS = 30.0
BOOT_SECONDS = 90.0
#: The guest may have to write back to shares first.
_FREEZE_SECONDS = 60.0
_READ = os.O_RDONLY | os.O_CLOEXEC


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
        #: What no other guest has: ``hostname``, ``machine_id``, ``boot_id``; empty if it was booted to be saved.
        self.identity: dict[str, str] = {}
        self.disks: Disks
        self._origin: Origin | None = None
        self._no_space: Exhausted | None = None
        self._trace = trace.Remote()

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
        """See :meth:`Sandbox.plug_disk`."""
        await self.disks.plug(slot, [DiskFile(disk_fd, disk_format, block_device)], read_only=read_only)

    async def unplug_disk(self, slot: Slot) -> None:
        """See :meth:`Sandbox.unplug_disk`."""
        await self.disks.unplug(slot)

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """See :meth:`Sandbox.resize_disk`."""
        await self.disks.resize(slot, size_bytes)

    async def plugged(self) -> set[Slot]:
        """See :meth:`Sandbox.plugged`."""
        return await self.disks.plugged()

    async def traffic(self) -> dict[str, tuple[int, int]]:
        """See :meth:`PodSandbox.traffic`."""
        return await self.disks.traffic()

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

    # -- freezing -----------------------------------------------------------------------------

    async def freeze(
        self, overlays: dict[Slot, int], copies: dict[Slot, int], fresh: dict[str, Any], on_stop: Callable[[], None]
    ) -> tuple[Origin, dict[Slot, tuple[DiskFile, ...]]]:
        """The machine's RAM, devices and disks as they are at one moment; the machine goes on, but for that moment.

        Args:
            overlays: for each writable disk an empty file, open for writing, that takes what is written from then on.
            copies: for each that is to go on as it is, an empty file that becomes a copy of it.  All these descriptors
                stay the caller's.
            fresh: what is to be empty in a copy; see the agent's ``freeze``.
            on_stop: called when the guest has said all that it had to say, and stands still.

        Returns:
            What a copy is to be started from, its descriptors the caller's, and the files of those disks, which nobody
            ever writes to again; their descriptors are ours, or those of ``copies``.

        Raises:
            MachineFailed: QEMU refused.  Nothing has changed then.
            InUse: the agent did.
        """
        origin = self._origin
        assert origin is not None, "who boots a machine to keep it starts it from its save"
        copying = Copies(self._qmp, self.disks, copies)

        async def at_stop() -> None:
            on_stop()
            copying.at_stop()
            actions = [*copying.actions(), *(self.disks.overlay_action(slot) for slot in overlays)]
            if actions:
                await self._qmp.execute("transaction", {"actions": actions})
                self.disks.overlaid(overlays)

        try:
            await copying.prepare()
            for slot, fd in overlays.items():
                await self.disks.make_overlay(slot, fd)
            quiet, wake, size = partial(self._quieten, fresh), self._wake, self.config.memory_bytes
            frozen = await freeze(self._qmp, self.pid, origin, size, before=quiet, at_stop=at_stop, after=wake)
            try:
                files = await copying.finish()
            except BaseException:
                frozen.close()
                raise
        finally:
            for slot in overlays:  # those that were not put on top
                await self.disks.drop_overlay(slot)
            await copying.close()
        return frozen, {slot: self.disks.files(slot)[:-1] for slot in overlays} | files

    async def _quieten(self, fresh: dict[str, Any]) -> None:
        """Has the agent finish what it says and listen: see the agent's ``freeze``."""
        await self._agent.request("freeze", fresh, _FREEZE_SECONDS, last=True)

    async def _wake(self) -> None:
        self._agent.go_on()
        await self._agent.request("thaw", {}, HELLO_SECONDS)

    async def make_unique(self, hostname: str) -> None:
        """Gives the guest what no other has, before anything runs in it; one that cannot be made so is not used."""
        params = {"time_ns": time.time_ns(), "entropy": os.urandom(64).hex(), "hostname": hostname}
        params["trace"] = trace.is_on()
        self.identity = await self.request("resume", params, HELLO_SECONDS)
        trace.mark("agent has resumed")

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
        self.disks.close()
        self.forget_origin()

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "trace":
            self._trace.mark(params)
        else:
            self.on_event(name, params)

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

    def keep_origin(self, ram_fd: int, state_fd: int) -> None:
        """What it is started from, to be kept for freezing; the descriptors become ours."""
        self._origin = Origin(ram_fd, state_fd)

    def forget_origin(self) -> None:
        """Closes what it was started from."""
        if self._origin is not None:
            self._origin.close()
            self._origin = None

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
        trace.mark("QEMU spawned")
        self._console = Console(reader, console_log)
        # QEMU needs its time to start; importing its protocol's library meanwhile costs nothing.
        from holdfast.machine.qmp import Qmp

        self._qmp = Qmp(qmp_end, self._on_no_space)
        self.disks = Disks(self._qmp)
        self._agent = Connection(
            on_event=self._on_event,
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
    hostname: str = "",
    ram_fd: int = -1,
    plug: Callable[[VirtualMachine], Awaitable[None]] | None = None,
) -> VirtualMachine:
    """Starts a machine and waits for its agent.

    Args:
        ram_path: file of the guest's RAM, of the right size already.
        ram_shared: boot into the file (to be saved); else changes to it stay private.
        export: folder served over 9p.
        console_log: file for what the guest prints.
        state_fd: saved device state to start from; -1 boots.
        boot_seconds: how long QEMU may take to answer, and then the guest to boot.
        hold_fd: a descriptor that QEMU keeps open besides: a lock that is free only when QEMU, too, is gone.
        hostname: the guest's, with all else that makes one that starts from a state different from others; one that
            boots is there to be saved, and has no use for it.
        ram_fd: the file of the guest's RAM, open, if it has no path.
        plug: plugs in what was plugged in when the state was saved; called before that is loaded.

    Raises:
        MachineFailed: QEMU or the guest failed; carries the console's last lines.
        TimedOut: the agent did not answer in time.
    """
    machine = VirtualMachine(config, export)
    qmp_ours, qmp_theirs = socket.socketpair()
    agent_ours, agent_theirs = socket.socketpair()
    with qmp_theirs, agent_theirs:
        try:
            fds = [qmp_theirs.fileno(), agent_theirs.fileno(), *([hold_fd] if hold_fd >= 0 else [])]
            if ram_fd >= 0:
                ram_path = f"/proc/self/fd/{FIRST_FD + len(fds)}"
                fds.append(ram_fd)
            wiring = Wiring(ram_path, ram_shared, export, FIRST_FD, FIRST_FD + 1, state_fd >= 0)
            if state_fd >= 0:
                machine.keep_origin(os.dup(ram_fd) if ram_fd >= 0 else os.open(ram_path, _READ), os.dup(state_fd))
            await machine.start(wiring, console_log, qmp_ours, agent_ours, fds)
        except BaseException:
            qmp_ours.close()
            agent_ours.close()
            machine.forget_origin()
            raise
    try:
        await machine.qmp.connect(min(HELLO_SECONDS, boot_seconds))
        trace.mark("QEMU has greeted")
        if plug is not None:
            await plug(machine)
        if state_fd >= 0:
            await migration.restore(machine.qmp, state_fd)
            trace.mark("restored")
        await machine.agent.synchronise(HELLO_SECONDS if state_fd >= 0 else boot_seconds)
        trace.mark("agent has answered")
        if state_fd >= 0:
            await machine.make_unique(hostname or "holdfast")
    except TimedOut as error:
        error.why += f"; last on its console: {machine.last_lines()}"
        await asyncio.shield(machine.close())
        raise
    except BaseException:
        await asyncio.shield(machine.close())
        raise
    return machine
