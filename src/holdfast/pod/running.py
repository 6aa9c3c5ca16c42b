"""A pod that runs: its containers, what is attached to it, and what clients ask of both."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from holdfast.errors import HoldfastError, InvalidInput, ProtocolError
from holdfast.linux import user_namespaces
from holdfast.machine import vm
from holdfast.pod.attach import HotAttach
from holdfast.pod.containers import Containers
from holdfast.pod.freezer import freeze
from holdfast.pod.gate import Gate
from holdfast.pod.messages import ContainerRequest, ExecRequest
from holdfast.storage import fork_policy
from holdfast.storage.description import describe
from holdfast.storage.growing import grow_scratch, grow_volume
from holdfast.storage.reconcile import reconcile
from holdfast.storage.steps import MountLayer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from holdfast.machine.sandbox import PodSandbox
    from holdfast.pod.messages import PodRequest
    from holdfast.pod.snapshot import FrozenPod, Snapshot
    from holdfast.storage.engine import Engine
    from holdfast.storage.journal import Journal
    from holdfast.wire.aio import Connection

#: For a guest to make the mounts of its shares anew, and to remove all that is in filesystems that are to be empty.
_RENEW_SECONDS = 240.0


class RunningPod:
    """A pod whose machine runs.

    Args:
        folder: the pod's own, for what its processes print.
        host_pid: the monitor's, as its clients see it.
    """

    def __init__(
        self, config: PodRequest, folder: Path, machine: PodSandbox, engine: Engine, journal: Journal, host_pid: int
    ) -> None:
        self._config = config
        self._machine = machine
        self._engine = engine
        self._journal = journal
        self._host_pid = host_pid
        self._gate = Gate()
        #: Snapshots that clients have been given, until they say that they have them, or go.
        self._handed: dict[Connection, Snapshot] = {}
        self.containers = Containers(
            config.name, folder, machine, engine,
            tmp="auto" if config.isolation == "vm" else "rootfs",
            rootless=config.isolation == "namespace" and user_namespaces.inside(),
            savable=config.isolation == "vm", gate=self._gate,
        )  # fmt: skip
        self._attached = HotAttach(engine, machine, self.containers)

    async def take_over(self, record: FrozenPod) -> None:
        """Takes over what runs in the machine."""
        processes = await self._machine.request("processes", {}, vm.HELLO_SECONDS)
        self.containers.adopt(record.containers, _checked(processes, dict[str, list[int]]))
        self._attached.adopt(record.attached)
        fresh = fork_policy.emptied(record.storage, record.containers.specs)
        if record.storage.shares or any(fresh.values()):
            await self._machine.request("renew", {}, _RENEW_SECONDS)
        await self._machine.request("thaw", {}, vm.HELLO_SECONDS)
        answer = await self._machine.request("reconnect", {}, vm.HELLO_SECONDS)
        self.containers.take_ends(_checked(answer, dict[str, dict[str, int]]).get("ended", {}))

    async def answer(self, method: str, client: Connection, params: dict[str, Any]) -> Any:
        """Does what a client asks for by one of :data:`METHODS`, and returns the answer."""
        return await self.METHODS[method](self, client, params)

    async def _run(self, client: Connection, params: dict[str, Any]) -> Any:
        return await self.containers.run(client, convert(params, ContainerRequest))

    async def _exec(self, client: Connection, params: dict[str, Any]) -> Any:
        return await self.containers.exec(client, convert(params, ExecRequest))

    async def _plan(self, _client: Connection, params: dict[str, Any]) -> Any:
        plan = self.containers.plan(convert(params, ContainerRequest))
        return {"steps": msgspec.to_builtins(plan.steps), "describe": plan.describe()}

    async def _kill(self, _client: Connection, params: dict[str, Any]) -> Any:
        await self.containers.kill(str(params.get("key")), int(params.get("signal", signal.SIGTERM)))

    async def _resize(self, _client: Connection, params: dict[str, Any]) -> Any:
        await self.containers.resize(str(params.get("key")), list(params.get("size", ())))

    async def _wait(self, _client: Connection, params: dict[str, Any]) -> Any:
        return {"code": await self.containers.wait(str(params.get("container")))}

    async def _attach(self, _client: Connection, params: dict[str, Any]) -> Any:
        async with self._gate.changing():
            return await self._attached.attach(dict(params["mount"]), str(params.get("container") or ""))

    async def _detach(self, _client: Connection, params: dict[str, Any]) -> Any:
        async with self._gate.changing():
            await self._attached.detach(str(params["guest_path"]), str(params.get("container") or ""))

    async def _grow(self, _client: Connection, params: dict[str, Any]) -> Any:
        size_bytes = int(params["size_bytes"])
        async with self._gate.changing():
            if "path" in params:
                return {"size_bytes": await grow_volume(self._engine, str(params["path"]), size_bytes)}
            return {"size_bytes": await grow_scratch(self._engine, str(params["container"]), size_bytes)}

    async def _hold(self, _client: Connection, params: dict[str, Any]) -> Any:
        """Has an image's layers ready for containers to come, as long as the pod lives."""
        layers = convert(params["layers"], tuple[tuple[str, str], ...])
        steps = tuple(MountLayer(f"layer{i}", path, diff_id) for i, (path, diff_id) in enumerate(dict(layers).items()))
        holder = f"image:{params['image']}"  # no container can have a colon in its name
        async with self._gate.changing():
            if not self._engine.holds(holder):
                await self._engine.prepare(holder, steps)

    async def _freeze(self, client: Connection, _params: dict[str, Any]) -> Any:
        """Hands the client a snapshot: numbers of descriptors, open here until it says that it has copies of them."""
        # Not to be interrupted half-way: the machine stands still meanwhile.
        return await asyncio.shield(asyncio.ensure_future(self._freeze_for(client)))

    async def _freeze_for(self, client: Connection) -> dict[str, Any]:
        async with self._gate.still():
            snapshot = await freeze(self._config, self._machine, self._engine, self.containers, self._attached)
        self._let_go_of(client)
        self._handed[client] = snapshot
        if client.lost.done():
            self._let_go_of(client)
        client.lost.add_done_callback(lambda _: self._let_go_of(client))
        return {"pid": self._host_pid, "fds": list(snapshot.fds)}

    def _let_go_of(self, client: Connection) -> None:
        snapshot = self._handed.pop(client, None)
        if snapshot is not None:
            snapshot.close()

    async def _thawed(self, client: Connection, _params: dict[str, Any]) -> Any:
        self._let_go_of(client)

    async def _storage(self, _client: Connection, _params: dict[str, Any]) -> Any:
        found = describe(self._engine)
        await self._add_paths(found)
        return found

    async def _add_paths(self, found: dict[str, Any]) -> None:
        """Adds what only others than the engine know: paths in containers, and how much was read and written."""
        paths = [*self.containers.paths(), *self._attached.paths()]
        traffic: dict[str, tuple[int, int]] = {}
        if not self._machine.died.done():
            with contextlib.suppress(HoldfastError):  # it may die meanwhile: what it held is still to be told
                traffic = await self._machine.traffic()
        for disk in found["attachments"]:
            disk["container_paths"] = [f"{c}:{where}" for c, path, where in paths if path in disk["guest_paths"]]
            disk["read_bytes"], disk["written_bytes"] = traffic.get(disk["slot"], (0, 0))
        for share in found["shares"]:
            share["container_paths"] = [f"{c}:{where}" for c, path, where in paths if path == share["guest_path"]]

    async def _verify(self, _client: Connection, _params: dict[str, Any]) -> Any:
        """Compares what the journal says with what the machine has: for ``audit``."""
        if self._machine.died.done():
            return {"unknown": [], "missing": []}
        return await reconcile(self._machine, self._journal, self._config.name)

    #: What a client can ask for -> how it is done.
    METHODS: ClassVar[dict[str, Callable[[RunningPod, Connection, dict[str, Any]], Awaitable[Any]]]] = {
        "run": _run,
        "exec": _exec,
        "plan": _plan,
        "kill": _kill,
        "resize": _resize,
        "wait": _wait,
        "attach": _attach,
        "detach": _detach,
        "grow": _grow,
        "hold": _hold,
        "storage": _storage,
        "verify": _verify,
        "freeze": _freeze,
        "thawed": _thawed,
    }


def _checked(answer: Any, kind: Any) -> Any:
    """What a guest has answered, which may be anything."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError("read the guest's answer", why=error) from None


def convert(params: dict[str, Any], kind: Any) -> Any:
    """What a client has asked for, as the type that it must have."""
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput("read request", why=error, code="malformed-request") from None
