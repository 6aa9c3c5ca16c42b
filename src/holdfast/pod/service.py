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

from holdfast.errors import HoldfastError, InvalidInput, NotReleased, TimedOut, from_exception
from holdfast.linux import syscalls
from holdfast.machine import accelerator, cgroups, guest_image, namespace, ports, template, vm
from holdfast.machine.config import MIN_MEMORY_BYTES, MachineConfig
from holdfast.pod.attach import HotAttach
from holdfast.pod.containers import Containers
from holdfast.pod.messages import ContainerRequest, ExecRequest, PodInfo, PodRequest
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.pci import Functions
from holdfast.storage.pmem import PmemLayers
from holdfast.storage.reconcile import reconcile
from holdfast.wire.aio import Connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.machine.sandbox import PodSandbox

SOCKET = "monitor.sock"
#: Less than this, a process writes to wake its own threads, and the like.
_NOISE_BYTES = 1 << 16
#: How long a guest that writes nothing may take to unmount the user's disks when its pod ends.
_CLEAN_SECONDS = 20.0


def serve(request: bytes, lock_fd: int, client_fd: int, host_pid: int) -> int:
    """Runs the monitor of one pod to its end; returns its exit status."""
    config = msgspec.json.decode(request, type=PodRequest)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(2 if os.environ.get("HOLDFAST_DEBUG") else 3):
        os.dup2(null, fd)
    os.close(null)
    if config.isolation == "vm":
        # QEMU makes files on the host for the guest, as root.  Device nodes and file capabilities made so would be
        # good for everybody on the host who gets at them: what is started from here cannot make any.
        for capability in (syscalls.CAP_MKNOD, syscalls.CAP_SETFCAP):
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
    return asyncio.run(Service(config, lock_fd, host_pid).run(client_fd))


class Service:
    """One pod.  Holds the pod's lock as long as it lives."""

    def __init__(self, config: PodRequest, lock_fd: int, host_pid: int) -> None:
        self._config = config
        self._lock_fd = lock_fd
        self._host_pid = host_pid
        self._folder = Path(config.root) / "pods" / config.name
        self._export = self._folder / "export"
        self._served = self._folder / "served"
        self._journal = Journal(Path(config.root))
        self._created_ns = time.time_ns()
        self._machine: PodSandbox | None = None
        self._machine_config: MachineConfig | None = None
        self._engine: Engine
        self._containers: Containers
        self._attached: HotAttach
        self._pmem: PmemLayers | None = None
        self._guest: dict[str, Any] = {}
        self._ready: asyncio.Future[None]
        self._ending = asyncio.Event()
        self._clients: set[Connection] = set()
        self._methods: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Any]]] = {
            "start": self._start,
            "run": self._run,
            "exec": self._exec,
            "plan": self._plan,
            "kill": self._kill,
            "resize": self._resize,
            "wait": self._wait,
            "attach": self._attach,
            "detach": self._detach,
            "grow": self._grow,
            "storage": self._storage,
            "inspect": self._inspect,
            "verify": self._verify,
            "remove": self._remove,
        }

    async def run(self, client_fd: int) -> int:
        """Serves until the pod ends, then releases everything and forgets the pod."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._ending.set)
        self._ready = loop.create_future()
        self._journal.add_pod(self._config.name, self._host_pid, self._config.isolation)
        # Held open to the very end: asyncio closes its own when the client has said that it is done, and the client
        # takes the end of the connection for the end of the pod.
        os.dup(client_fd)
        first = self._connection()
        await loop.create_connection(lambda: first, sock=socket.socket(fileno=client_fd))
        server = await loop.create_unix_server(self._connection, path=str(self._folder / SOCKET))
        starting = asyncio.ensure_future(self._bring_up(first))
        if self._config.ephemeral:
            first.lost.add_done_callback(lambda _: self._ending.set())
        await self._ending.wait()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        server.close()
        # What is being done for somebody is undone while the machine still lives.
        await asyncio.gather(*(client.stop_serving() for client in list(self._clients)))
        errors = await self._tear_down()
        try:
            self._journal.forget_pod(self._config.name)
        except (HoldfastError, OSError) as error:  # it stays recorded, for gc
            errors.append(error)
        self._journal.close()
        for client in list(self._clients):
            client.event("ended", {"errors": [from_exception(error).as_dict() for error in errors]})
        await asyncio.sleep(0)
        return 1 if errors else 0

    def _connection(self) -> Connection:
        connection = Connection(self._answer)
        self._clients.add(connection)
        connection.lost.add_done_callback(lambda _: self._clients.discard(connection))
        return connection

    async def _answer(self, client: Connection, method: str, params: dict[str, Any]) -> Any:
        handler = self._methods.get(method)
        if handler is None:
            raise InvalidInput("answer request", subject=method, why="unknown", code="unknown-request")
        if method not in ("start", "inspect", "remove"):
            await asyncio.shield(self._ready)
        return await handler(client, params)

    # -- the machine --------------------------------------------------------------------------

    async def _bring_up(self, client: Connection) -> None:
        try:
            self._mount_export()
            self._machine = await self._start_sandbox(lambda text: client.event("say", {"text": text}))
            self._machine.export = str(self._export)
            self._engine = Engine(
                self._machine, self._journal, self._config.name, Path(self._config.data),
                writable_shares=self._config.writable_shares, pmem=self._make_pmem(self._machine),
                functions=self._make_functions(self._machine),
            )  # fmt: skip
            self._containers = Containers(
                self._config.name, self._folder, self._machine, self._engine,
                tmp="auto" if self._config.isolation == "vm" else "rootfs",
            )  # fmt: skip
            self._attached = HotAttach(self._engine, self._machine, self._containers)
            self._machine.died.add_done_callback(lambda _: self._on_death())
            self._ready.set_result(None)
        except Exception as error:
            self._ready.set_exception(from_exception(error))
            self._ready.exception()  # asked for, whether or not somebody waits: no warning about it
            if self._config.ephemeral:
                await self._until_told(client)

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

    def _mount_export(self) -> None:
        """Mounts the folder that shares are bound in, and the view of it that the guest is served.

        The view is read-only and a slave: shares appear in it with their own access, and nothing else can be
        made there.  A guest that could, might put a link where the next share is about to be bound.
        """
        self._export.mkdir(mode=0o700)
        self._served.mkdir(mode=0o700)
        syscalls.mount(
            "holdfast", str(self._export), "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=1m"
        )
        syscalls.mount("none", str(self._export), "", syscalls.MS_PRIVATE)
        syscalls.mount("none", str(self._export), "", syscalls.MS_SHARED)
        syscalls.mount(str(self._export), str(self._served), "", syscalls.MS_BIND)
        syscalls.mount("none", str(self._served), "", syscalls.MS_SLAVE)
        syscalls.mount("none", str(self._served), "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)

    async def _start_sandbox(self, say: Callable[[str], None]) -> PodSandbox:
        """The kind that was asked for, and never the other one."""
        if self._config.isolation == "vm":
            return await self._start_machine(say)
        cgroup = cgroups.of_pod(self._config.root, self._config.name)
        cgroups.remove(cgroup)  # what is left of a pod of this name, whose monitor was killed
        runtime = cgroups.choose_runtime()
        return await namespace.start(
            export=str(self._export), console_log=str(self._folder / "console.log"),
            cgroup=cgroup, runtime=(runtime.path, *runtime.options), hold_fd=self._lock_fd,
        )  # fmt: skip

    async def _start_machine(self, say: Callable[[str], None]) -> vm.VirtualMachine:
        config = self._config
        if config.memory_bytes < MIN_MEMORY_BYTES:
            raise InvalidInput(
                "start machine", subject=f"{config.memory_bytes >> 20}M of memory", code="too-little-memory",
                why="a guest does not boot with so little", hint=f"at least {MIN_MEMORY_BYTES >> 20}M",
            )  # fmt: skip
        data = Path(config.data)
        version = accelerator.cached_qemu_version(data)
        guest = guest_image.find(data) or await _build_guest(data, say)
        verdict = await accelerator.choose(data, guest, version, say)
        expandable = config.ports or bool(config.pmem.count)
        machine = MachineConfig(guest, verdict.accelerator, config.memory_bytes, config.cpus, version, expandable)
        self._machine_config = machine
        console = str(self._folder / "console.log")
        if config.cold:
            ram = self._folder / "ram"
            with open(ram, "wb") as file:
                file.truncate(config.memory_bytes)
            return await vm.start(
                machine, ram_path=str(ram), ram_shared=True, export=str(self._served), console_log=console,
                hold_fd=self._lock_fd,
            )  # fmt: skip
        folder, _ = await template.ensure(data, machine, say)
        # The kernel closes a dead monitor's files before it kills what is in its namespace, so QEMU holds the pod's
        # lock, too: nobody gets a lease on a disk that it can still write to.
        return await template.clone(
            folder, machine, export=str(self._served), console_log=console, hold_fd=self._lock_fd
        )

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
                lost = await self._release_cleanly(machine)
            await machine.close()
            if self._engine.held():
                errors = await self._release_all()
            if errors:  # a release that was under way when the machine ended: with the machine gone it can finish
                errors = await self._release_all()
        if self._pmem is not None:
            self._pmem.close()
        for mounted in (self._served, self._export):
            with contextlib.suppress(OSError):
                syscalls.umount(str(mounted), syscalls.MNT_DETACH)
        return lost + errors

    async def _release_cleanly(self, machine: PodSandbox) -> list[Exception]:
        """Unmounts what could lose writes; returns what could not be, for then something may be lost.

        A guest that neither finishes nor writes anything for a while is ended all the same.
        """

        async def release() -> list[Exception]:
            # What a container kept busy is free when it is gone.
            return await self._release_all() and await self._release_all()

        releasing = asyncio.ensure_future(release())
        written = (-1, -1)
        try:
            while not (await asyncio.wait({releasing}, timeout=_CLEAN_SECONDS))[0]:
                disks = sum([writes for _, writes in (await machine.traffic()).values()])
                now = (disks, _written_by(machine.pid) // _NOISE_BYTES)  # shares are written to by the process itself
                if now == written:
                    raise TimedOut("write back", why=f"the guest has written nothing for {_CLEAN_SECONDS:g} s")
                written = now
            return releasing.result()
        except HoldfastError as error:
            releasing.cancel()
            return [
                NotReleased(
                    "end pod", subject=self._config.name, why=f"its disks were not unmounted: {error}",
                    code="unclean-end", hint="check the disks and shares that it could write to",
                )
            ]  # fmt: skip

    async def _release_all(self) -> list[Exception]:
        """Lets go for all holders side by side; nothing is in the way of the others."""
        holders = self._engine.held()
        results = await asyncio.gather(*map(self._engine.release, holders), return_exceptions=True)
        return [result for result in results if isinstance(result, Exception)]

    # -- requests -----------------------------------------------------------------------------

    async def _start(self, _client: Connection, _params: dict[str, Any]) -> Any:
        await asyncio.shield(self._ready)
        return await self._inspect(_client, {})

    async def _run(self, client: Connection, params: dict[str, Any]) -> Any:
        return await self._containers.run(client, _convert(params, ContainerRequest))

    async def _exec(self, client: Connection, params: dict[str, Any]) -> Any:
        return await self._containers.exec(client, _convert(params, ExecRequest))

    async def _plan(self, _client: Connection, params: dict[str, Any]) -> Any:
        plan = self._containers.plan(_convert(params, ContainerRequest))
        return {"steps": msgspec.to_builtins(plan.steps), "describe": plan.describe()}

    async def _kill(self, _client: Connection, params: dict[str, Any]) -> Any:
        await self._containers.kill(str(params.get("key")), int(params.get("signal", signal.SIGTERM)))

    async def _resize(self, _client: Connection, params: dict[str, Any]) -> Any:
        await self._containers.resize(str(params.get("key")), list(params.get("size", ())))

    async def _wait(self, _client: Connection, params: dict[str, Any]) -> Any:
        return {"code": await self._containers.wait(str(params.get("container")))}

    async def _attach(self, _client: Connection, params: dict[str, Any]) -> Any:
        return await self._attached.attach(dict(params["mount"]), str(params.get("container") or ""))

    async def _detach(self, _client: Connection, params: dict[str, Any]) -> Any:
        await self._attached.detach(str(params["guest_path"]), str(params.get("container") or ""))

    async def _grow(self, _client: Connection, params: dict[str, Any]) -> Any:
        size_bytes = int(params["size_bytes"])
        if "path" in params:
            return {"size_bytes": await self._engine.grow_volume(str(params["path"]), size_bytes)}
        return {"size_bytes": await self._engine.grow_scratch(str(params["container"]), size_bytes)}

    async def _storage(self, _client: Connection, _params: dict[str, Any]) -> Any:
        found = self._engine.describe()
        await self._add_paths(found)
        return found

    async def _add_paths(self, found: dict[str, Any]) -> None:
        """Adds what only others than the engine know: paths in containers, and how much was read and written."""
        paths = [*self._containers.paths(), *self._attached.paths()]
        machine = self._machine
        traffic: dict[str, tuple[int, int]] = {}
        if machine is not None and not machine.died.done():
            with contextlib.suppress(HoldfastError):  # it may die meanwhile: what it held is still to be told
                traffic = await machine.traffic()
        for disk in found["attachments"]:
            disk["container_paths"] = [f"{c}:{where}" for c, path, where in paths if path in disk["guest_paths"]]
            disk["read_bytes"], disk["written_bytes"] = traffic.get(disk["slot"], (0, 0))
        for share in found["shares"]:
            share["container_paths"] = [f"{c}:{where}" for c, path, where in paths if path == share["guest_path"]]

    async def _verify(self, _client: Connection, _params: dict[str, Any]) -> Any:
        """Compares what the journal says with what the machine has: for ``audit``."""
        machine = self._machine
        if machine is None or machine.died.done():
            return {"unknown": [], "missing": []}
        return await reconcile(machine, self._journal, self._config.name)

    async def _inspect(self, _client: Connection, _params: dict[str, Any]) -> Any:
        machine, config = self._machine, self._machine_config
        state, why = "starting", ""
        if machine is not None:
            state = "failed" if machine.died.done() else "running"
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
            containers=self._containers.infos() if machine is not None and self._ready.done() else (),
            why=why, guest=self._guest,
        )  # fmt: skip
        return msgspec.to_builtins(info)

    def _started_from(self) -> str:
        if self._config.isolation != "vm":
            return ""
        return "boot" if self._config.cold else "template"

    async def _remove(self, _client: Connection, _params: dict[str, Any]) -> Any:
        self._ending.set()


def _written_by(pid: int) -> int:
    """Bytes that a process has written, to anything (proc(5), io); 0 if it cannot be known."""
    try:
        with open(f"/proc/{pid}/io") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))
    except OSError:
        return 0


def _convert(params: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput("read request", why=error, code="malformed-request") from None


async def _build_guest(data: Path, say: Callable[[str], None]) -> guest_image.GuestImage:
    """Builds the guest in a thread, whose words reach the loop as the loop's own calls."""
    loop = asyncio.get_running_loop()

    def progress(text: str) -> None:
        loop.call_soon_threadsafe(say, text)

    return await asyncio.to_thread(guest_image.ensure, data, progress=progress)
