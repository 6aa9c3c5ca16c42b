"""A pod's sandbox on the host's own kernel: namespaces, with the same agent as their first process.

For images that are trusted, and hosts without QEMU: what a container can do to the kernel, it does to the host's.  The
agent is PID 1 of a PID namespace and has mount, network, IPC and UTS namespaces of its own.  Disks are loop devices
over the descriptors that a machine would get, and the host tells the agent which is in which slot; shares are bind
mounts.  Whatever ends the agent, the kernel ends every process of the pod and unmounts what it had mounted.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError, InUse, MachineFailed, NotReleased, ProtocolError, TimedOut, Unsupported
from holdfast.linux import disk_locks, syscalls
from holdfast.machine.console import Console
from holdfast.machine.process import FIRST_FD, Child
from holdfast.mounts import loop as loops
from holdfast.wire.aio import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.sandbox import Slot

HELLO_SECONDS = 10.0
_TELL_SECONDS = 10.0
_DETACH_SECONDS = 5.0
#: Nothing tells when a loop device has let go of its file.
_POLL_SECONDS = 0.001
_BLKSSZGET = 0x1268  # <linux/fs.h>
_START = "import sys; sys.path[:] = {path!r}; from holdfast.guest.host import main; main()"


class NamespaceSandbox:
    """One agent in namespaces.

    Use :func:`start`; the object owns the process, the socket pair, the loop devices and the log.
    """

    def __init__(self, export: str) -> None:
        self.export = export
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda _name, _params: None
        self.closing = False
        self._child: Child
        self._agent: Connection
        self._console: Console
        self._watcher: asyncio.Task[None] | None = None
        self._loops: dict[Slot, loops.Loop] = {}

    @property
    def pid(self) -> int:
        """The agent's process id, as the host sees it."""
        return self._child.host_pid

    @property
    def agent(self) -> Connection:
        """The connection to the agent, for streams."""
        return self._agent

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        """Asks the agent.  See :meth:`Connection.request`."""
        return await self._agent.request(method, params, seconds)

    # -- disks --------------------------------------------------------------------------------

    async def plug_disk(self, slot: Slot, disk_fd: int, disk_format: str, read_only: bool, block_device: bool) -> None:
        """See :meth:`Sandbox.plug_disk`.  A block device gets a loop, too: so two pods can read one at their own pace,
        and each knows by itself whether it still uses it.

        Raises:
            Unsupported: ``disk-format``: the kernel reads no such images.
        """
        self._agent.check()
        if disk_format != "raw":
            raise Unsupported(
                "plug disk", subject=os.readlink(f"/proc/self/fd/{disk_fd}"), code="disk-format",
                why=f"the host's kernel reads raw disks only, not {disk_format}",
                hint="qemu-img convert -O raw makes one; --isolation vm takes it as it is",
            )  # fmt: skip
        if slot in self._loops:
            raise MachineFailed("plug disk", subject=slot, why="a disk is in the slot", code="slot-taken")
        loop = self._loops[slot] = _attach(disk_fd, read_only=read_only, block_device=block_device)
        try:
            place = {"controller": slot.controller, "lun": slot.lun, "name": loop.name}
            await self.request("disk", place, _TELL_SECONDS)
        except BaseException as error:
            await asyncio.shield(self._take_back(slot, error))
            raise

    async def _take_back(self, slot: Slot, error: BaseException) -> None:
        try:
            await self.unplug_disk(slot)
        except HoldfastError as left:
            if isinstance(error, HoldfastError):
                error.also(left)

    async def unplug_disk(self, slot: Slot) -> None:
        """See :meth:`Sandbox.unplug_disk`: the slot is free only when the kernel has let go of the loop's file.

        Raises:
            NotReleased: somebody has the device open: another mount namespace, a program of the host.
        """
        loop = self._loops.get(slot)
        if loop is None:
            return
        loop.close()
        if not await _gone([loop]):
            raise NotReleased(
                "detach disk", subject=slot, why=f"something on the host still uses {loop.device}", code="disk-busy",
                hint=f"fuser -v {loop.device} says what; then detach again",
            )  # fmt: skip
        self._loops.pop(slot, None)

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """See :meth:`Sandbox.resize_disk`."""
        self._loops[slot].resize(size_bytes)

    async def plugged(self) -> set[Slot]:
        """See :meth:`Sandbox.plugged`: what the kernel says of our loop devices."""
        return {slot for slot, loop in self._loops.items() if loop.attached}

    async def occupied(self) -> set[str]:
        """See :meth:`PodSandbox.occupied`."""
        return {f"slot {slot}" for slot in await self.plugged()}

    async def traffic(self) -> dict[str, tuple[int, int]]:
        """See :meth:`PodSandbox.traffic`."""
        return {str(slot): loop.traffic() for slot, loop in self._loops.items() if loop.attached}

    # -- life ---------------------------------------------------------------------------------

    def last_lines(self) -> str:
        """What the agent printed last."""
        return self._console.last_lines() or "nothing"

    def describe_death(self) -> HoldfastError:
        """Why the agent is gone: exit status and its last lines, or what it was ended for."""
        status = self._child.exited.result() if self._child.exited.done() else None
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"exited with {status}"
        if isinstance(self._agent.error, ProtocolError):
            how = f"was ended: it broke the protocol ({self._agent.error.why})"
        why = f"the agent {how}; the last that it said: {self.last_lines()}"
        return MachineFailed("use the sandbox", why=why, code="machine-died")

    async def close(self) -> None:
        """Kills everything in the namespaces and frees what is held; a second call does nothing.

        Waits until the disks are not used any more, as long as that goes by itself: they can be used elsewhere then.
        """
        self.closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        await self._child.kill()
        self._fail(MachineFailed("use the sandbox", why="it was closed", code="machine-closed"))
        self._console.close()
        await self._drop_disks()

    async def _drop_disks(self) -> None:
        loops = list(self._loops.values())
        for loop in loops:
            loop.close()
        # The kernel unmounts what a namespace had when its last process is gone, and a moment later.
        await _gone(loops)
        self._loops.clear()

    def _fail(self, error: HoldfastError) -> None:
        self._agent.fail(error)
        if not self.died.done():
            self.died.set_result(None)

    async def _watch(self) -> None:
        await asyncio.shield(self._child.exited)
        error = self.describe_death()
        for loop in self._loops.values():
            loop.close()
        self._fail(error)

    async def start(self, argv: list[str], log: str, agent_end: socket.socket, fds: list[int]) -> None:
        """Spawns the agent; see :func:`start`."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = _spawn(argv, fds, writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._console = Console(reader, log)
        self._agent = Connection(
            on_event=lambda name, params: self.on_event(name, params),
            on_lost=self._child.signal_kill,  # its end says better why: see _watch
        )
        await asyncio.get_running_loop().create_connection(lambda: self._agent, sock=agent_end)
        # An agent that has broken the protocol cannot be controlled any more: it ends.
        self._agent.lost.add_done_callback(lambda _: self._child.signal_kill())
        self._watcher = asyncio.create_task(self._watch())


def _attach(disk_fd: int, *, read_only: bool, block_device: bool) -> loops.Loop:
    """A loop device over an open disk, locked as QEMU would lock it: machines, and pods of other state roots, count.

    Raises:
        InUse: a machine, or a pod of another state root, has the file open in a way that does not go together.
        Unsupported, Exhausted: the host has no loop device for us.
        MachineFailed: the kernel refused it; with its own text.
    """
    path = os.readlink(f"/proc/self/fd/{disk_fd}")
    try:
        disk_locks.share(disk_fd, read_only=read_only)
    except BlockingIOError:
        raise InUse(
            "open disk", subject=path, why="a machine, or a pod of another state root, has it open", code="disk-in-use"
        ) from None
    try:
        # What is read of a file is kept for all pods that read it; of a device, one copy in memory is enough.
        # Partition tables count in the device's own sectors.
        block_bytes = struct.unpack("=I", fcntl.ioctl(disk_fd, _BLKSSZGET, bytes(4)))[0] if block_device else 0
        return loops.attach_fd(
            disk_fd, path, read_only=read_only, direct_io=block_device, partitions=True, block_bytes=block_bytes
        )
    except OSError as error:
        raise MachineFailed("attach disk", subject=path, why=error, code="loop-failed") from None


async def _gone(loops: list[loops.Loop]) -> bool:
    """Waits until the kernel has let go of loop devices; False if it has not after a while."""
    deadline = asyncio.get_running_loop().time() + _DETACH_SECONDS
    while any(loop.attached for loop in loops):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


def _spawn(argv: list[str], fds: list[int], output_fd: int) -> Child:
    """Starts a program as PID 1 of a new PID namespace; this process's other children stay in its own."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWPID)  # only for children: pid_namespaces(7)
        try:
            return Child(argv, fds, output_fd)
        finally:
            syscalls.setns(own, syscalls.CLONE_NEWPID)
    finally:
        os.close(own)


async def start(
    *,
    export: str,
    console_log: str,
    cgroup: str,
    runtime: tuple[str, ...],
    hold_fd: int = -1,
) -> NamespaceSandbox:
    """Makes the namespaces and waits for their agent.

    Args:
        export: folder in which shares are bound: a mount of its own, and shared (mount_namespaces(7)).
        console_log: file for what the agent prints.
        cgroup: the control group that containers' groups go below.
        runtime: the OCI runtime's words; see :func:`~holdfast.machine.cgroups.choose_runtime`.
        hold_fd: a descriptor that the agent keeps open besides: a lock that is free only when it, too, is gone.

    Raises:
        MachineFailed: the agent could not be started; carries what it said.
        TimedOut: it did not answer in time.
    """
    sandbox = NamespaceSandbox(export)
    ours, theirs = socket.socketpair()
    program = _START.format(path=[path for path in sys.path if path])
    argv = [sys.executable, "-I", "-S", "-c", program, str(FIRST_FD), export, cgroup, *runtime]
    with theirs:
        try:
            fds = [theirs.fileno(), *([hold_fd] if hold_fd >= 0 else [])]
            await sandbox.start(argv, console_log, ours, fds)
        except BaseException:
            ours.close()
            raise
    try:
        await sandbox.agent.synchronise(HELLO_SECONDS)
    except TimedOut as error:
        error.why += f"; the last that it said: {sandbox.last_lines()}"
        await asyncio.shield(sandbox.close())
        raise
    except BaseException:
        await asyncio.shield(sandbox.close())
        raise
    return sandbox
