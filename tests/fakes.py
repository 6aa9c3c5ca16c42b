"""Stand-ins for what tests cannot have: a sandbox in memory, and one that fails where a test wants it to.

:class:`FakeSandbox` behaves as a machine does where the storage engine can tell: it keeps what is plugged in open,
refuses a taken slot, has a mount table, and does not let go of a disk that is mounted.  :class:`Faulty` stands between
the engine and any sandbox, a real one too, and makes steps fail, hang, or lose their answer.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import GuestFailed, HoldfastError, InUse, InvalidInput, MachineFailed, NotReleased, TimedOut
from holdfast.machine.sandbox import CONTROLLERS, LUNS, Slot
from holdfast.spec import guest_requests as requests

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.machine.sandbox import Sandbox


class Plugged(NamedTuple):
    """A disk in a slot of the fake machine; ``fd`` is the machine's own."""

    fd: int
    identity: tuple[int, int]
    disk_format: str
    read_only: bool
    block_device: bool


class Mounted(NamedTuple):
    """An entry of the fake guest's mount table: what is mounted, and what must not go away under it."""

    kind: str
    source: object
    read_only: bool = False
    over: tuple[object, ...] = ()


class FakeSandbox:
    """A machine in memory.

    Attributes:
        disks: what is plugged in, by slot.
        mounts: the guest's mount table, by path.
        devices: slots whose disk the guest's kernel knows.
    """

    def __init__(self, export: str) -> None:
        self.export = export
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.disks: dict[Slot, Plugged] = {}
        self.devices: set[Slot] = set()
        self.mounts: dict[str, Mounted] = {}

    # -- the host's half ----------------------------------------------------------------------

    async def plug_disk(self, slot: Slot, disk_fd: int, disk_format: str, read_only: bool, block_device: bool) -> None:
        """See :class:`Sandbox`."""
        self._check_alive()
        assert 0 <= slot.controller < CONTROLLERS
        assert 0 <= slot.lun < LUNS
        if slot in self.disks:
            raise HoldfastError("plug disk", subject=slot, why="Duplicate nodes with this name")
        status = os.fstat(disk_fd)
        fd = os.dup(disk_fd)
        try:
            await asyncio.sleep(0)
            self._check_alive()
        except BaseException:
            os.close(fd)
            raise
        self.disks[slot] = Plugged(fd, (status.st_dev, status.st_ino), disk_format, read_only, block_device)
        self.devices.add(slot)

    async def unplug_disk(self, slot: Slot) -> None:
        """See :class:`Sandbox`."""
        self._check_alive()
        await asyncio.sleep(0)
        self._check_alive()
        disk = self.disks.pop(slot, None)
        self.devices.discard(slot)
        if disk is not None:
            os.close(disk.fd)

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """See :class:`Sandbox`."""
        self._check_alive()
        os.ftruncate(self.disks[slot].fd, size_bytes)

    async def plugged(self) -> set[Slot]:
        """See :class:`Sandbox`."""
        self._check_alive()
        return set(self.disks)

    async def close(self) -> None:
        """See :class:`Sandbox`."""
        self.die()

    def die(self) -> None:
        """The machine is gone, and with it whatever it held open or mounted."""
        for disk in self.disks.values():
            os.close(disk.fd)
        self.disks.clear()
        self.devices.clear()
        self.mounts.clear()
        if not self.died.done():
            self.died.set_result(None)

    def _check_alive(self) -> None:
        if self.died.done():
            raise MachineFailed("use the machine", why="it has died", code="machine-died")

    # -- the guest ----------------------------------------------------------------------------

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        """See :class:`Sandbox`; only ``modify`` is known."""
        assert seconds > 0
        self._check_alive()
        await asyncio.sleep(0)
        self._check_alive()
        if method != "modify":
            raise InvalidInput("answer request", subject=method, why="unknown", code="unknown-request")
        if isinstance(params["Settings"], list):
            return {"results": [self._one_of_many({**params, "Settings": each}) for each in params["Settings"]]}
        return self._modify(params)

    def _one_of_many(self, params: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._modify(params)
        except HoldfastError as error:
            return {"error": error.as_dict()}

    def _modify(self, params: dict[str, Any]) -> Any:
        request = requests.decode(params)
        handler = getattr(self, f"_{request.request_type.lower()}_{type(request.settings).__name__.lower()}")
        return handler(request.settings)

    def _add_lcowmappedvirtualdisk(self, settings: requests.LCOWMappedVirtualDisk) -> dict[str, str]:
        slot = Slot(settings.controller, settings.lun)
        if slot not in self.devices:
            raise TimedOut("request", why="its deadline passed in the guest")
        head = os.pread(self.disks[slot].fd, 4096, 0)
        if settings.block_dev:
            return self._mount(settings.mount_path, Mounted("device", slot, settings.read_only))
        if not any(head) and not settings.encrypted:
            raise GuestFailed("mount disk", subject=slot, why="no known filesystem on it", code="no-filesystem")
        assert settings.read_only or not self.disks[slot].read_only
        return self._mount(settings.mount_path, Mounted("disk", slot, settings.read_only))

    def _update_lcowmappedvirtualdisk(self, settings: requests.LCOWMappedVirtualDisk) -> dict[str, str]:
        assert settings.mount_path in self.mounts
        return {"path": settings.mount_path}

    def _remove_lcowmappedvirtualdisk(self, settings: requests.LCOWMappedVirtualDisk) -> dict[str, str]:
        self._unmount(settings.mount_path)
        return {}

    def _remove_scsidevice(self, settings: requests.SCSIDevice) -> dict[str, str]:
        slot = Slot(settings.controller, settings.lun)
        self._prove_unused(slot)
        self.devices.discard(slot)
        return {}

    def _add_lcowmappeddirectory(self, settings: requests.LCOWMappedDirectory) -> dict[str, str]:
        if not os.path.lexists(f"{self.export}/{settings.share_name}"):
            raise GuestFailed("bind", subject=settings.mount_path, why="No such file or directory", code="mount-failed")
        return self._mount(settings.mount_path, Mounted("share", settings.share_name, settings.read_only))

    def _update_lcowmappeddirectory(self, settings: requests.LCOWMappedDirectory) -> dict[str, str]:
        assert os.path.dirname(settings.mount_path) in self.mounts
        return {}

    def _remove_lcowmappeddirectory(self, settings: requests.LCOWMappedDirectory) -> dict[str, str]:
        self._unmount(settings.mount_path)
        return {}

    def _add_lcowcombinedlayers(self, settings: requests.LCOWCombinedLayers) -> dict[str, str]:
        below = [layer.path for layer in settings.layers]
        if settings.scratch_path:  # the disk, or a folder on it
            below.append(settings.scratch_path.partition("/scratch/")[0])
        for path in below:
            if path not in self.mounts:
                raise GuestFailed("mount", subject=path, why="No such file or directory", code="mount-failed")
        over = tuple(self.mounts[path].source for path in below)
        root = Mounted("overlay", settings.container_id, not settings.scratch_path, over)
        return self._mount(settings.container_root_path, root)

    def _remove_lcowcombinedlayers(self, settings: requests.LCOWCombinedLayers) -> dict[str, str]:
        self._unmount(settings.container_root_path)
        return {}

    def _add_podvolume(self, settings: requests.PodVolume) -> dict[str, str]:
        return self._mount(settings.mount_path, Mounted("volume", settings.name))

    def _remove_podvolume(self, settings: requests.PodVolume) -> dict[str, str]:
        self._unmount(settings.mount_path)
        return {}

    def _add_imagevolume(self, settings: requests.ImageVolume) -> dict[str, str]:
        if settings.container_root_path not in self.mounts:
            raise GuestFailed("copy", subject=settings.path, why="No such file or directory")
        below = next((m.source for path, m in self.mounts.items() if settings.source.startswith(f"{path}/")), None)
        return self._mount(settings.mount_path, Mounted("volume", settings.path, over=(below,)))

    def _remove_imagevolume(self, settings: requests.ImageVolume) -> dict[str, str]:
        self._unmount(settings.mount_path)
        return {}

    def _mount(self, path: str, mounted: Mounted) -> dict[str, str]:
        if path in self.mounts:
            raise InUse("mount", subject=path, why="something else is mounted there", code="path-in-use")
        self.mounts[path] = mounted
        return {"path": path}

    def _unmount(self, path: str) -> None:
        self.mounts.pop(path, None)

    def _prove_unused(self, slot: Slot) -> None:
        """A mount keeps a disk busy, and so does an overlay above it when the layer's own mount is gone already."""
        if any(slot == mounted.source or slot in mounted.over for mounted in self.mounts.values()):
            raise NotReleased("unmount disk", subject=slot, why="the guest still uses it", code="disk-busy")


class Fault:
    """What shall happen at one step, once.

    Attributes:
        reached: set when the step has come to it.
        proceed: for one that waits: set it to let the step go on.
    """

    def __init__(self, step: str, error: BaseException | None, *, after: bool, waits: bool, always: bool) -> None:
        self.step = step
        self.error = error
        self.after = after
        self.waits = waits
        self.always = always
        self.reached = asyncio.Event()
        self.proceed = asyncio.Event()

    async def happen(self) -> None:
        """Waits, then raises, as it is meant to."""
        self.reached.set()
        if self.waits:
            await self.proceed.wait()
        if self.error is not None:
            raise self.error


class Faulty:
    """Any sandbox, whose steps can be made to fail.

    A step's name is ``plug``, ``unplug``, or what the guest is asked, such as ``Add MappedVirtualDisk``.

    Attributes:
        steps: every step that was begun, in order.
    """

    def __init__(self, inner: Sandbox) -> None:
        self.inner = inner
        self.export = inner.export
        self.died = inner.died
        self.steps: list[str] = []
        self._faults: list[Fault] = []

    def fail(
        self, step: str, error: BaseException | None = None, *, after: bool = False, always: bool = False
    ) -> Fault:
        """The next ``step`` fails: before anything is done, or ``after``, its answer lost; ``always``: every one."""
        return self._add(Fault(step, error or injected(step), after=after, waits=False, always=always))

    def hold(self, step: str, error: BaseException | None = None, *, after: bool = False) -> Fault:
        """The next ``step`` waits for the fault's ``proceed``, then goes on, or fails if there is an ``error``."""
        return self._add(Fault(step, error, after=after, waits=True, always=False))

    def heal(self) -> None:
        """Takes all faults away that have not happened."""
        self._faults.clear()

    @property
    def faults_left(self) -> int:
        """How many faults no step has come to yet."""
        return len(self._faults)

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    async def _run(self, step: str, action: Callable[[], Awaitable[Any]]) -> Any:
        self.steps.append(step)
        fault = next((fault for fault in self._faults if fault.step == step), None)
        if fault is not None and not fault.always:
            self._faults.remove(fault)
        if fault is not None and not fault.after:
            await fault.happen()
        result = await action()
        if fault is not None and fault.after:
            await fault.happen()
        return result

    async def plug_disk(self, slot: Slot, disk_fd: int, disk_format: str, read_only: bool, block_device: bool) -> None:
        """See :class:`Sandbox`.  A failure ``after`` is undone first: to undo itself is what a plug promises."""
        try:
            await self._run("plug", lambda: self.inner.plug_disk(slot, disk_fd, disk_format, read_only, block_device))
        except BaseException:
            if not self.died.done():
                await self.inner.unplug_disk(slot)
            raise

    async def unplug_disk(self, slot: Slot) -> None:
        """See :class:`Sandbox`."""
        await self._run("unplug", lambda: self.inner.unplug_disk(slot))

    async def resize_disk(self, slot: Slot, size_bytes: int) -> None:
        """See :class:`Sandbox`."""
        await self._run("resize", lambda: self.inner.resize_disk(slot, size_bytes))

    async def plugged(self) -> set[Slot]:
        """See :class:`Sandbox`."""
        return await self.inner.plugged()

    async def request(self, method: str, params: dict[str, Any], seconds: float) -> Any:
        """See :class:`Sandbox`."""
        step = f"{params['RequestType']} {params['ResourceType']}" if method == "modify" else method
        return await self._run(step, lambda: self.inner.request(method, params, seconds))

    async def close(self) -> None:
        """See :class:`Sandbox`."""
        await self.inner.close()


def injected(step: str) -> HoldfastError:
    """The error of an injected failure."""
    return HoldfastError(step, why="injected", code="injected")
