"""The monitor's service: starts the machine, answers clients, ends the pod."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast import trace
from holdfast.errors import HoldfastError, InUse, InvalidInput, from_exception
from holdfast.linux import priority, syscalls
from holdfast.machine import ports, vm
from holdfast.pod.containers import Containers
from holdfast.pod.ending import release_all, release_cleanly
from holdfast.pod.launch import check_name
from holdfast.pod.messages import PodInfo, PodRequest
from holdfast.pod.running import RunningPod, convert
from holdfast.pod.snapshot import FrozenPod, Snapshot
from holdfast.pod.starting import Place, start
from holdfast.pod.thawing import thaw
from holdfast.pod.warming import warm_up
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal, MachineRow
from holdfast.storage.pci import Functions
from holdfast.storage.pmem import PmemLayers
from holdfast.wire.aio import Connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.machine.config import MachineConfig
    from holdfast.machine.sandbox import PodSandbox

SOCKET = "monitor.sock"


def serve(request: bytes, fds: list[int], client_fd: int, host_pid: int) -> int:
    """Runs the monitor of one pod to its end; returns its exit status.

    Args:
        fds: the pod's lock, and those of the snapshot that it goes on from.
    """
    lock_fd, *snapshot = fds
    config = msgspec.structs.replace(msgspec.json.decode(request, type=PodRequest), snapshot=tuple(snapshot))
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(2 if os.environ.get("HOLDFAST_DEBUG") else 3):
        os.dup2(null, fd)
    os.close(null)
    if config.isolation == "vm":
        # QEMU makes files on the host for the guest, as root.  Device nodes and file capabilities made so would be
        # good for everybody on the host who gets at them: what is started from here cannot make any.
        for capability in (syscalls.CAP_MKNOD, syscalls.CAP_SETFCAP):
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
    if config.pooled:
        priority.lower()
    return asyncio.run(Service(config, lock_fd, host_pid).run(client_fd))


class Service:
    """One pod.  Holds the pod's lock as long as it lives."""

    def __init__(self, config: PodRequest, lock_fd: int, host_pid: int) -> None:
        self._config = config
        self._lock_fd = lock_fd
        self._host_pid = host_pid
        self._place = Place(Path(config.root) / "pods" / config.name)
        self._journal = Journal(Path(config.root))
        self._created_ns = time.time_ns()
        self._machine: PodSandbox | None = None
        self._machine_config: MachineConfig | None = None
        self._booted = False
        self._engine: Engine
        self._pod: RunningPod
        self._pmem: PmemLayers | None = None
        self._guest: dict[str, Any] = {}
        self._ready: asyncio.Future[None]
        #: For a pod that waits to be taken: done when its machine runs, and when somebody has taken it.
        self._warm: asyncio.Future[None]
        self._taken: asyncio.Future[Connection]
        #: Whose end is the pod's.
        self._owner: Connection | None = None
        self._ending = asyncio.Event()
        self._clients: set[Connection] = set()
        self._methods: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Any]]] = {
            "start": self._start,
            "inspect": self._inspect,
            "warm": self._wait_until_warm,
            "take": self._take,
            "remove": self._remove,
        }

    async def run(self, client_fd: int) -> int:
        """Serves until the pod ends, then releases everything and forgets the pod."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._ending.set)
        self._ready, self._warm, self._taken = (loop.create_future() for _ in range(3))
        self._journal.add_pod(self._config.name, self._host_pid, self._config.isolation)
        trace.mark("journal")
        # Held open to the very end: asyncio closes its own when the client has said that it is done, and the client
        # takes the end of the connection for the end of the pod.
        os.dup(client_fd)
        first = self._connection()
        await loop.create_connection(lambda: first, sock=socket.socket(fileno=client_fd))
        server = await loop.create_unix_server(self._connection, path=str(self._place.folder / SOCKET))
        starting = asyncio.ensure_future(self._bring_up(first))
        self._own(first if self._config.ephemeral else None)
        await self._ending.wait()
        trace.mark("pod ends")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        server.close()
        # What is being done for somebody is undone while the machine still lives.
        await asyncio.gather(*(client.stop_serving() for client in list(self._clients)))
        errors = await self._tear_down()
        trace.mark("machine is gone")
        try:
            self._journal.forget_pod(self._config.name)
        except (HoldfastError, OSError) as error:  # it stays recorded, for gc
            errors.append(error)
        self._journal.close()
        trace.mark("pod is forgotten")
        for client in list(self._clients):
            client.event("ended", {"errors": [from_exception(error).as_dict() for error in errors]})
        await asyncio.sleep(0)
        return 1 if errors else 0

    def _own(self, client: Connection | None) -> None:
        """The pod ends with this client from now on, and with no other."""
        self._owner = client
        if client is not None:
            client.lost.add_done_callback(lambda _: self._ending.set() if self._owner is client else None)

    def _connection(self) -> Connection:
        connection = Connection(self._answer)
        self._clients.add(connection)
        connection.lost.add_done_callback(lambda _: self._clients.discard(connection))
        return connection

    async def _answer(self, client: Connection, method: str, params: dict[str, Any]) -> Any:
        handler = self._methods.get(method)
        if handler is None:
            if method not in RunningPod.METHODS:
                raise InvalidInput("answer request", subject=method, why="unknown", code="unknown-request")
            await asyncio.shield(self._ready)
            return await self._pod.answer(method, client, params)
        return await handler(client, params)

    # -- the machine --------------------------------------------------------------------------

    async def _bring_up(self, client: Connection) -> None:
        try:
            self._place.mount()
            trace.mark("folder of shares")
            record = await self._thaw() if self._config.snapshot else None
            if record is None:
                started = await start(
                    self._config, self._place, self._journal, self._lock_fd,
                    lambda text: client.event("say", {"text": text}),
                )  # fmt: skip
                self._machine, self._machine_config, self._booted = started
                self._engine = self._make_engine(self._machine)
                if self._config.pooled:
                    client = await self._wait_for_taker(started.sandbox, client)
            machine = self._machine
            assert machine is not None
            self._pod = RunningPod(
                self._config, self._place.folder, machine, self._engine, self._journal, self._host_pid
            )
            if record is not None:
                await self._pod.take_over(record)
            machine.died.add_done_callback(lambda _: self._on_death())
            self._ready.set_result(None)
        except Exception as error:
            for future in (self._ready, self._warm):
                if not future.done():
                    future.set_exception(from_exception(error))
                    future.exception()  # asked for, whether or not somebody waits: no warning about it
            if self._config.ephemeral:
                await self._until_told(client)

    async def _wait_for_taker(self, machine: PodSandbox, client: Connection) -> Connection:
        """Has the machine ready for who wants one; returns the client that has taken it."""
        assert isinstance(machine, vm.VirtualMachine)
        folder = self._place.folder
        await warm_up(machine, Containers(self._config.name, folder, machine, self._engine), client, folder)
        self._warm.set_result(None)
        client = await self._taken
        self._engine = self._make_engine(machine)  # of another name, and holding nothing
        return client

    async def _thaw(self) -> FrozenPod:
        """Starts the machine from a snapshot."""
        with Snapshot(self._config.snapshot) as snapshot:
            record = await asyncio.to_thread(snapshot.record)
            machine = self._machine_config = record.machine
            name, used = self._config.name, self._config.template or machine.key
            self._journal.add_machine(MachineRow(name, self._config.data, machine.guest.id, used))
            self._machine, self._engine = await thaw(
                snapshot, record, self._make_engine, Path(self._config.data), export=str(self._place.served),
                console_log=self._place.console_log, hold_fd=self._lock_fd, hostname=name,
            )  # fmt: skip
            return record

    def _make_engine(self, machine: PodSandbox) -> Engine:
        machine.export = str(self._place.export)
        return Engine(
            machine, self._journal, self._config.name, Path(self._config.data),
            writable_shares=self._config.writable_shares, pmem=self._make_pmem(machine),
            functions=self._make_functions(machine),
        )  # fmt: skip

    def _make_pmem(self, machine: PodSandbox) -> PmemLayers | None:
        config = self._config
        if not config.pmem.count or not isinstance(machine, vm.VirtualMachine):
            return None
        self._pmem = PmemLayers(
            machine, machine, self._journal, config.name, Path(config.data), config.pmem,
            room_bytes=ports.pmem_room_bytes(config.memory_bytes), stale_code=machine.config.accelerator != "kvm",
        )  # fmt: skip
        return self._pmem

    def _make_functions(self, machine: PodSandbox) -> Functions | None:
        if not isinstance(machine, vm.VirtualMachine) or not machine.config.expandable:
            return None
        return Functions(machine, machine, self._journal, self._config.name)

    async def _until_told(self, client: Connection) -> None:
        """Gives the client the time to read why, then ends the pod."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.shield(client.lost)
        self._ending.set()

    def _on_death(self) -> None:
        if self._config.ephemeral and not self._ending.is_set():
            asyncio.get_running_loop().call_later(0.2, self._ending.set)

    async def _tear_down(self) -> list[Exception]:
        """Lets go of everything: cleanly where data could be lost, at once where it could not."""
        lost: list[Exception] = []
        errors: list[Exception] = []
        machine = self._machine
        if machine is not None:
            machine.closing = True
            if not machine.died.done() and self._engine.has_writable():
                lost = await release_cleanly(self._engine, machine, self._config.name)
            await machine.close()
            if self._engine.held():
                errors = await release_all(self._engine)
            if errors:  # a release that was under way when the machine ended: with the machine gone it can finish
                errors = await release_all(self._engine)
        if self._pmem is not None:
            self._pmem.close()
        self._place.unmount()
        return lost + errors

    # -- requests -----------------------------------------------------------------------------

    async def _start(self, _client: Connection, _params: dict[str, Any]) -> Any:
        await asyncio.shield(self._ready)
        return await self._inspect(_client, {})

    async def _wait_until_warm(self, _client: Connection, _params: dict[str, Any]) -> Any:
        await asyncio.shield(self._warm)

    async def _take(self, client: Connection, params: dict[str, Any]) -> Any:
        """Gives a pod that is ready its name, and an owner: the client, or nobody.

        Raises:
            InUse: ``pool-taken``: it is not ready, or not any more; ``pod-exists``: another has that name.
        """
        request = convert(params["request"], PodRequest)
        machine = self._machine
        if not (self._config.pooled and self._warm.done() and isinstance(machine, vm.VirtualMachine)):
            raise InUse("take pod", subject=self._config.name, why="it is not ready", code="pool-taken")
        check_name(request.name)
        old, self._config = self._config, msgspec.structs.replace(request, pooled=False)
        try:
            self._journal.rename_pod(old.name, request.name)
        except BaseException:
            self._config = old
            raise
        self._place = Place(self._place.folder.with_name(request.name))
        self._created_ns = time.time_ns()
        keeper = self._owner
        self._own(client if request.ephemeral else None)
        if keeper is not None:
            keeper.event("taken", {})  # whoever keeps the pool may make another
        try:
            priority.restore(machine.pid)
            await machine.make_unique(request.name)
        except BaseException:
            self._ending.set()  # it is nobody's
            raise
        self._taken.set_result(client)
        await asyncio.shield(self._ready)

    async def _inspect(self, _client: Connection, _params: dict[str, Any]) -> Any:
        machine, config = self._machine, self._machine_config
        state, why = "starting", ""
        if machine is not None:
            state = "failed" if machine.died.done() else "ready" if self._config.pooled else "running"
            why = machine.describe_death().why if machine.died.done() else ""
            if not self._guest and state == "running":
                self._guest = await machine.request("hello", {}, vm.HELLO_SECONDS)
        elif self._ready.done() and self._ready.exception() is not None:
            state, why = "failed", str(self._ready.exception())
        info = PodInfo(
            name=self._config.name, state=state, isolation=self._config.isolation,
            accelerator=config.accelerator if config else "",
            pid=self._host_pid, qemu_pid=machine.pid if machine else 0,
            memory_bytes=self._config.memory_bytes if self._config.isolation == "vm" else 0,
            cpus=self._config.cpus if self._config.isolation == "vm" else 0,
            started_from=self._started_from(), created_ns=self._created_ns,
            containers=self._pod.containers.infos() if machine is not None and self._ready.done() else (),
            why=why, guest=self._guest,
        )  # fmt: skip
        return msgspec.to_builtins(info)

    def _started_from(self) -> str:
        if self._config.isolation != "vm":
            return ""
        return "boot" if self._booted else "template"

    async def _remove(self, _client: Connection, _params: dict[str, Any]) -> Any:
        self._ending.set()
