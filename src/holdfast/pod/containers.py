"""The containers of one pod: planned, given their storage, started, connected, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast import trace
from holdfast.errors import HoldfastError, InUse, NotFound
from holdfast.pod import planning
from holdfast.pod.gate import Gate
from holdfast.pod.launch import check_name
from holdfast.pod.messages import ContainerInfo, ContainerRequest, ExecRequest, Stdio
from holdfast.pod.process import Process, pump
from holdfast.pod.snapshot import FrozenContainers
from holdfast.spec.annotations import NO_WRITABLE_SHARES, flag
from holdfast.spec.runtime import spec_from_raw
from holdfast.storage import volume_plan
from holdfast.storage.fork_policy import for_runtime
from holdfast.storage.pci import add_nodes
from holdfast.storage.plan import LayeredRoot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from holdfast.machine.sandbox import PodSandbox
    from holdfast.pod.planning import Asked
    from holdfast.spec.tree import TmpPolicy
    from holdfast.storage.engine import Engine
    from holdfast.storage.restore import SavedContainer
    from holdfast.storage.steps import Plan
    from holdfast.wire.aio import Connection

START_SECONDS = 60.0
#: A signal is never given up because the agent is busy: nobody would send it again.
KILL_SECONDS = 60.0


class Containers:
    """All containers of a pod.

    Args:
        tmp: what becomes of ``/tmp`` if no annotation says it: in a pod without a machine, memory is the host's.
        rootless: the pod has neither a machine nor the rights of the host's root.
        savable: the pod may be saved, so that what its containers mount is to be remembered.
    """

    def __init__(
        self, pod: str, folder: Path, machine: PodSandbox, engine: Engine, *, tmp: TmpPolicy = "auto",
        rootless: bool = False, savable: bool = True, gate: Gate | None = None,
    ) -> None:  # fmt: skip
        self.rootless = rootless
        self._savable = savable
        self._pod = pod
        self._tmp = tmp
        self._last: set[str] = set()
        self._folder = folder
        self._machine = machine
        self._engine = engine
        self._infos: dict[str, ContainerInfo] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self._mounts: dict[str, SavedContainer] = {}
        self._processes: dict[str, Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._execs = 0
        self._gate = gate or Gate()
        #: Called when a container has ended and what it held has been let go of, as far as that went.
        self.on_released: Callable[[str], Awaitable[None]] = _nothing
        machine.on_event = self._on_event

    # -- running ------------------------------------------------------------------------------

    def plan(self, request: ContainerRequest) -> Plan:
        """The plan for a container in this pod as it is now; nothing is touched."""
        return self._plan(self._understand(request))

    def _understand(self, request: ContainerRequest) -> Asked:
        return planning.understand(request, tuple(self._engine.hints))

    def _plan(self, asked: Asked) -> Plan:
        pod = self._engine.snapshot()
        return planning.plan(asked, self._engine.data, pod, without_root=self.rootless, tmp=self._tmp)

    async def run(self, client: Connection, request: ContainerRequest) -> dict[str, Any]:
        """Runs a container; returns when its process has been started.

        Raises:
            HoldfastError: what is wrong; nothing of the container is left.
        """
        async with self._gate.changing():
            return await self._run(client, request)

    async def _run(self, client: Connection, request: ContainerRequest) -> dict[str, Any]:
        name = check_name(request.name, "container")
        if name in self._infos and self._infos[name].state in ("starting", "running"):
            raise InUse("run container", subject=name, why="the pod has one of this name", code="container-exists")
        if self._engine.holds(name):  # an earlier one of this name could not be released then; it must be now
            await self._engine.release(name)
        trace.mark("asked to run")
        asked = self._understand(request)
        plan = self._plan(asked)
        mounts = planning.record(asked, self._tmp) if self._savable else None
        trace.mark("plan")
        self._engine.say_hints(name, plan.hints)  # before others plan
        for text in plan.warnings:
            client.event("say", {"text": text})
        args = tuple(request.spec["process"]["args"])
        self._infos.pop(name, None)  # the newest comes last, even if there has been one of its name
        self._infos[name] = ContainerInfo(name, self._pod, "starting", request.image, args, time.time_ns())
        try:
            held = await self._engine.prepare(name, plan.steps)
            trace.mark("storage is ready")
            try:
                spec = plan.rewritten(held.paths)
                add_nodes(spec, held.nodes)
                self._engine.also_release(name, "container", lambda: self._delete(name))
                pid = await self._start(client, request, spec)
                trace.mark("container has started")
            except BaseException as error:
                await asyncio.shield(self._give_up(name, error))
                raise
        except BaseException:
            del self._infos[name]
            self._engine.unsay_hints(name)
            raise
        self._specs[name] = spec
        if mounts is not None:
            self._mounts[name] = mounts
        if request.ends_pod:
            self._last.add(name)
        self._infos[name] = msgspec.structs.replace(self._infos[name], state="running", pid=pid)
        self._background(self._finish(name))
        return {"pid": pid, "key": name}

    async def _give_up(self, name: str, error: BaseException) -> None:
        """Releases what a failed start has acquired; what cannot be is reported with the failure itself."""
        try:
            await self._engine.release(name)
        except HoldfastError as left:
            if isinstance(error, HoldfastError):
                error.also(left)

    async def _start(self, client: Connection, request: ContainerRequest, spec: dict[str, Any]) -> int:
        params: dict[str, Any] = {"id": request.name, "spec": for_runtime(spec), "user": request.user}
        if isinstance(request.root, LayeredRoot):
            params["root"] = {"mode": request.root.mode, "uid": request.root.uid, "gid": request.root.gid}
        params["tmp"] = volume_plan.tmp_if_empty(spec_from_raw(spec, request.name), self._tmp)
        terminal = bool(spec["process"].get("terminal"))
        return await self._launch(client, "start", request.name, request.stdio, terminal, params)

    async def exec(self, client: Connection, request: ExecRequest) -> dict[str, Any]:
        """Runs a process in a running container; returns when it has been started.

        Raises:
            NotFound: the container is not there or does not run.
        """
        info = self._infos.get(request.container)
        if info is None or info.state != "running":
            why = f"it is {info.state}" if info else "the pod has none of this name"
            raise NotFound("run in container", subject=request.container, why=why, code="container-not-running")
        base = self._specs[request.container]["process"]
        process = {**base, "args": list(request.args), "terminal": request.terminal}
        if request.env:
            names = {entry.partition("=")[0] for entry in request.env}
            process["env"] = [e for e in base.get("env", []) if e.partition("=")[0] not in names] + list(request.env)
        if request.cwd:
            process["cwd"] = request.cwd
        self._execs += 1
        key = f"{request.container}.exec{self._execs}"
        params = {"container": request.container, "key": key, "process": process, "user": request.user}
        async with self._gate.changing():
            pid = await self._launch(client, "exec", key, request.stdio, request.terminal, params)
            self._background(self._end_exec(key))
        return {"pid": pid, "key": key}

    async def _launch(
        self, client: Connection, method: str, key: str, stdio: Stdio, terminal: bool, params: dict[str, Any]
    ) -> int:
        """Opens the streams on both sides, starts the process, and connects them."""
        process = self._process(key, None if stdio.detach else client)
        agent = self._machine.agent
        stdout = agent.open_stream()
        stderr = None if terminal else agent.open_stream()
        stdin = stdout if terminal else agent.open_stream() if stdio.stdin else None
        process.streams = [stream for stream in {stdout, stderr, stdin} if stream is not None]
        params |= {
            "stdout": stdout.channel,
            "stderr": stderr.channel if stderr else 0,
            "stdin": stdin.channel if stdin else 0,
            "size": list(stdio.size),
        }
        self._processes[key] = process
        try:
            answer = await self._machine.request(method, params, START_SECONDS)
            process.connect(stdio, stdout, stderr)
            if process.client is not None and stdin is not None and stdio.stdin:
                self._background(pump(process.client.open_stream(stdio.stdin), stdin))
        except BaseException:
            self._forget(process)
            raise
        pid = answer.get("pid") if isinstance(answer, dict) else None
        return pid if isinstance(pid, int) else 0

    def _process(self, key: str, client: Connection | None) -> Process:
        return Process(key, client, self._folder / f"{key}.log")

    # -- ending -------------------------------------------------------------------------------

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "exit":
            process = self._processes.get(str(params.get("key")))
            code = params.get("code")
            if process is not None and isinstance(code, int) and not process.code.done():
                process.code.set_result(code & 0xFF)
                trace.mark("container has ended")

    async def _ended(self, key: str) -> int:
        """Waits for a process's end and for the last byte of its output; the code is -1 when the machine died."""
        process = self._processes[key]
        await process.code_or(self._machine.died, *([process.client.lost] if process.client is not None else []))
        if not process.code.done() and not self._machine.died.done():  # the client is gone: so is its process
            # Its output is read and thrown away: a process that nobody gives credit to never comes to its end.
            process.discard()
            with contextlib.suppress(HoldfastError):
                await self._machine.request("kill", {"key": key, "signal": 9}, 5)
            await process.code_or(self._machine.died)
        if process.code.done() and (process.client is None or process.client.error is None):
            await process.last_byte()
        return process.code.result() if process.code.done() else -1

    def _forget(self, process: Process) -> None:
        process.close()
        self._processes.pop(process.key, None)

    async def _finish(self, name: str) -> None:
        client = self._processes[name].client
        code = await self._ended(name)
        async with self._gate.changing():
            await self._finished(name, client, code)

    async def _finished(self, name: str, client: Connection | None, code: int) -> None:
        self._forget(self._processes[name])
        why = self._machine.describe_death().why if code < 0 else ""
        state = "failed" if code < 0 else "exited"
        self._infos[name] = msgspec.structs.replace(self._infos[name], state=state, code=code, why=why)
        # Who waits for the end of a container in a pod that goes on finds its storage let go of; a pod that
        # ends with its container lets go of everything at once, and need not be waited for.
        if name not in self._last and not self._machine.closing:
            with contextlib.suppress(HoldfastError):  # what stays is recorded, and tried again when the pod ends
                await self._engine.release(name)
            await self.on_released(name)
        if client is not None:
            client.event("exit", self._exit_event(name, code))
        self._specs.pop(name, None)
        self._mounts.pop(name, None)

    def _exit_event(self, key: str, code: int) -> dict[str, Any]:
        return {"key": key, "code": code, "error": self._machine.describe_death().as_dict() if code < 0 else None}

    async def _end_exec(self, key: str) -> None:
        client = self._processes[key].client
        code = await self._ended(key)
        self._forget(self._processes[key])
        if client is not None:
            client.event("exit", self._exit_event(key, code))

    async def _delete(self, name: str) -> None:
        if not self._machine.died.done():
            await self._machine.request("remove", {"id": name}, START_SECONDS)

    def _background(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def forget(self, name: str) -> None:
        """Lets go of a container that has ended, as if it had never been.

        Raises:
            NotReleased: something of it could not be let go of.
        """
        await self._engine.release(name)
        self._infos.pop(name, None)
        self._specs.pop(name, None)
        self._mounts.pop(name, None)

    # -- copies of the pod --------------------------------------------------------------------

    def freeze(self) -> FrozenContainers:
        """Everything, as data; for who keeps it from changing meanwhile."""
        running = {key: p.code.result() if p.code.done() else -1 for key, p in self._processes.items()}
        mounts = tuple(self._mounts.values())
        return FrozenContainers(self.infos(), dict(self._specs), running, self._execs, mounts)

    def adopt(self, frozen: FrozenContainers, connected: dict[str, list[int]]) -> None:
        """Takes over the containers of another pod, of which this one is a copy.

        What they write goes to this pod's log; who was connected to them still is, to those of the other pod.

        Args:
            connected: processes that the guest has -> their streams, the first for input or 0, the others for output.
                Of others, :meth:`take_ends` is to say how they ended.
        """
        self._execs = frozen.execs
        self._specs = dict(frozen.specs)
        self._mounts = {one.name: one for one in frozen.mounts}
        for info in frozen.infos:
            self._infos[info.name] = msgspec.structs.replace(info, pod=self._pod)
            if self._engine.holds(info.name):
                self._engine.also_release(info.name, "container", partial(self._delete, info.name))
        agent = self._machine.agent
        for key, code in frozen.processes.items():
            process = self._processes[key] = self._process(key, None)
            if code >= 0:
                process.code.set_result(code)
            elif key in connected:
                stdin, *outputs = connected[key] or [0]
                streams = [agent.open_stream(channel) for channel in outputs]
                process.keep(streams)
                # Whoever reads from it waits, as if nobody said anything.
                process.streams = [*streams, *([agent.open_stream(stdin)] if stdin and stdin not in outputs else [])]
            self._background(self._finish(key) if key in self._infos else self._end_exec(key))

    def take_ends(self, ended: dict[str, int]) -> None:
        """What the guest says of processes that ended after the copy was made, and before anybody listened."""
        for key, code in ended.items():
            self._on_event("exit", {"key": key, "code": code})

    # -- asking -------------------------------------------------------------------------------

    def infos(self) -> tuple[ContainerInfo, ...]:
        """Every container that ran in this pod."""
        return tuple(self._infos.values())

    def may_write_to_shares(self, container: str) -> bool:
        """Whether a container's own annotation lets it have writable shares."""
        return not flag(self._specs.get(container, {}).get("annotations") or {}, NO_WRITABLE_SHARES)

    def check_running(self, name: str) -> None:
        """Raises if a container does not run.

        Raises:
            NotFound: it is not there, or not running.
        """
        info = self._infos.get(name)
        process = self._processes.get(name)
        if info is None or info.state != "running" or process is None or process.code.done():
            why = f"it is {info.state}" if info else "the pod has none of this name"
            raise NotFound("find container", subject=name, why=why, code="container-not-running")

    def paths(self) -> list[tuple[str, str, str]]:
        """Container, path in the guest, path in the container, of every mount of those that run."""
        running = [name for name, info in self._infos.items() if info.state == "running"]
        return [
            (name, mount.get("source", ""), mount["destination"])
            for name in running
            for mount in self._specs[name].get("mounts", ())
        ]

    async def kill(self, key: str, number: int) -> None:
        """Sends a signal to a container's or an exec's process."""
        if key not in self._processes:
            raise NotFound("send signal", subject=key, why="it is not running", code="container-not-running")
        await self._machine.request("kill", {"key": key, "signal": number}, KILL_SECONDS)

    async def resize(self, key: str, size: list[int]) -> None:
        """Sets a terminal's rows and columns."""
        if key in self._processes:
            await self._machine.request("resize", {"key": key, "size": size}, 5)

    async def wait(self, name: str) -> int:
        """Waits for a container's end; returns its exit status.

        Raises:
            NotFound: there is none of that name.
        """
        if name not in self._infos:
            raise NotFound("wait for container", subject=name, code="container-not-found")
        process = self._processes.get(name)
        if process is not None:
            await process.code_or(self._machine.died)
            return process.code.result() if process.code.done() else -1
        return self._infos[name].code


async def _nothing(_name: str) -> None:
    """For when nobody wants to know."""
