"""Hot attach and detach: storage that a running pod, or a container in it, gets and gives back by request."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.mounts.options import split
from holdfast.pod.snapshot import FrozenAttached
from holdfast.spec.disk_options import BLOCKDEV, PREFIX
from holdfast.spec.runtime import DISK_TYPES, clean_path, spec_from_raw
from holdfast.storage import rootless, volumes
from holdfast.storage.attachments import GUEST_SECONDS, while_alive
from holdfast.storage.mount_plan import check_shares, mount_step
from holdfast.storage.steps import MountPoint, ShareDirectory
from holdfast.storage.survey import survey

if TYPE_CHECKING:
    from holdfast.machine.sandbox import Sandbox
    from holdfast.pod.containers import Containers
    from holdfast.spec.runtime import Mount
    from holdfast.storage.engine import Engine


class Attached:
    """Something attached: where the guest has it, and where a container does, if one is meant to."""

    def __init__(self, guest_path: str, container: str, destination: str) -> None:
        self.guest_path = guest_path
        self.container = container
        self.destination = destination
        self.leaving = False


class HotAttach:
    """What was attached by request."""

    def __init__(self, engine: Engine, sandbox: Sandbox, containers: Containers) -> None:
        self._engine = engine
        self._sandbox = sandbox
        self._containers = containers
        self._attached: dict[str, Attached] = {}
        self._count = 0
        containers.on_released = self.forget_container

    def freeze(self) -> FrozenAttached:
        """Everything, as data."""
        attached = {holder: (a.guest_path, a.container, a.destination) for holder, a in self._attached.items()}
        return FrozenAttached(attached, self._count)

    def adopt(self, frozen: FrozenAttached) -> None:
        """Takes over what another pod had, of which this one is a copy; the engine holds the storage already."""
        self._count = frozen.count
        for holder, (path, container, destination) in frozen.attached.items():
            self._attached[holder] = Attached(path, container, destination)
            if container:
                self._engine.also_release(holder, "mount in container", partial(self._unbind, holder))

    async def attach(self, raw: dict[str, Any], container: str = "") -> dict[str, Any]:
        """Attaches what a mount names; returns ``{"guest_path": ...}``.

        Args:
            container: a running container that is to have it, too, at the mount's destination.

        Raises:
            InvalidInput: it is no disk and no directory.
            NotFound: the container does not run.
            InUse: something is mounted there in the container.
        """
        if container:
            self._containers.check_running(container)
        elif not raw.get("destination"):
            raw = {**raw, "destination": "/"}
        document = {"ociVersion": "1.0.2", "mounts": [raw]}
        mount = volumes.resolve(spec_from_raw(document, "attach").mounts, self._engine.data)[0]
        sources = survey((mount,), (*DISK_TYPES, volumes.KIND))
        step = mount_step(0, mount, sources, [], self._engine.snapshot().disks)
        if step is None:
            raise InvalidInput("attach", subject=mount.type, why="only disks, volumes and host directories can be")
        if self._containers.rootless:
            rootless.check_steps((step,))
        writable = not container or self._containers.may_write_to_shares(container)
        check_shares((step,), writable=writable and self._engine.snapshot().writable_shares)
        if container:
            _check_destination(mount)
        self._count += 1
        holder = f"attach:{self._count}"  # no container can have a colon in its name
        held = await self._engine.prepare(holder, (step,))
        path = held.paths[step.id]
        self._attached[holder] = Attached(path, container, mount.target if container else "")
        if container:
            try:
                # Before it is done: the guest may have done it even when its answer does not come.
                self._engine.also_release(holder, "mount in container", lambda: self._unbind(holder))
                if not self._is_in_mount(container, mount.target):
                    directory = not (isinstance(step, ShareDirectory) and step.file)
                    self._engine.mount_points.add(container, MountPoint(mount.target, directory))
                await self._bind(holder, container, path, mount)
                self._containers.check_running(container)
            except BaseException as error:
                await asyncio.shield(asyncio.ensure_future(self._give_up(holder, error)))
                raise
        return {"guest_path": path}

    def _is_in_mount(self, container: str, target: str) -> bool:
        """Whether it is below a mount of the container's: the mount point is made in there then, by the guest."""
        mounts = (*self._containers.paths(), *self.paths())
        return any(name == container and target.startswith(f"{clean_path(path)}/") for name, _, path in mounts)

    async def _bind(self, holder: str, container: str, path: str, mount: Mount) -> None:
        options = [option for option in split(mount.options) if not option.startswith(PREFIX)]
        params = {"key": holder, "container": container, "source": path, "destination": mount.target}
        await self._sandbox.request("bind", {**params, "options": options}, GUEST_SECONDS)

    async def _unbind(self, holder: str) -> None:
        await while_alive(self._sandbox, lambda: self._sandbox.request("unbind", {"key": holder}, GUEST_SECONDS))

    async def _give_up(self, holder: str, error: BaseException) -> None:
        try:
            await self._engine.release(holder)
            self._attached.pop(holder, None)
        except HoldfastError as left:
            if isinstance(error, HoldfastError):
                error.also(left)

    async def detach(self, path: str, container: str = "") -> None:
        """Lets go of what was attached at a path of the guest or, if one is named, of a container.

        Can be tried again when it fails.

        Raises:
            NotFound: nothing was attached there by request.
            NotReleased: the guest keeps it busy.
        """
        for holder, one in self._attached.items():
            here = (one.container, one.destination) == (container, clean_path(path)) if container else (
                one.guest_path == path
            )  # fmt: skip
            if here and not one.leaving:  # of two that detach at once, each lets go of one
                one.leaving = True
                try:
                    if one.container:  # first, and alone: as long as this fails, nothing else is touched
                        await self._unbind(holder)
                    await self._engine.release(holder)
                finally:
                    one.leaving = False
                self._attached.pop(holder, None)
                return
        raise NotFound("detach", subject=path, why="nothing was attached there", code="not-attached")

    async def forget_container(self, container: str) -> None:
        """A container has ended, and with it its mounts: lets go of what was attached for it alone."""
        for holder, one in list(self._attached.items()):
            if one.container == container:
                try:
                    await self._engine.release(holder)
                    self._attached.pop(holder, None)
                except HoldfastError:
                    # It stays recorded, and detach or the pod's end tries again; a new container may have the name.
                    one.container = one.destination = ""

    def paths(self) -> list[tuple[str, str, str]]:
        """Container, path in the guest, path in the container."""
        return [(one.container, one.guest_path, one.destination) for one in self._attached.values() if one.container]


def _check_destination(mount: Mount) -> None:
    if mount.destination.startswith(BLOCKDEV):
        raise Unsupported(
            "attach", subject=mount.source, why="a container that runs cannot be given a device", code="hot-device",
            hint="name it when the container is started, or attach it to the pod alone",
        )  # fmt: skip
    if mount.target == "/":
        raise InvalidInput(
            "attach", subject=mount.source, why="no place in the container", code="mount-incomplete",
            hint="say where: dst=/path",
        )  # fmt: skip
