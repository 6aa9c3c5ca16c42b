"""What lives in the machine: volumes that containers share, which stay until the pod ends, and what a container has for
itself: volumes of its image, overlays over its mounts.

The machine makes a shared one when it is wanted first, and shows each container a view of it (guest/volumes.py).
Nothing of them is on the host, so nothing of them can outlive the machine, and the journal need not know them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.errors import GuestFailed, InUse
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import FLUSH_SECONDS, GUEST_SECONDS, while_alive
from holdfast.storage.steps import UseVolume

if TYPE_CHECKING:
    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.steps import FillVolume, OverlayMount

#: For copying what an image has: it may be all of a disk.
_COPY_SECONDS = 600.0


class FrozenVolumes(msgspec.Struct, frozen=True):
    """What :class:`PodVolumes` knows, as data; the attributes are its own."""

    count: int
    made: dict[str, UseVolume]
    sure: tuple[str, ...]
    views: dict[str, tuple[str, str, str]]


class PodVolumes:
    """The volumes of one pod."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._count = 0
        #: Name of a shared volume -> how it was made, as the step of a view of all of it.
        self._made: dict[str, UseVolume] = {}
        #: Those of them that the machine has made for certain.
        self._sure: set[str] = set()
        #: Place in the guest -> (holder, name or path in the image, type).
        self._views: dict[str, tuple[str, str, str]] = {}

    def new_path(self, step: UseVolume | FillVolume | OverlayMount, holder: str) -> str:
        """The place of a container's view, which is to be released even if making it fails.

        Raises:
            InUse: ``volume-conflict``: the volume was made in another way.
        """
        if isinstance(step, UseVolume):
            if step.kind == "uvm":
                return f"/{step.sub_path}"
            wanted = msgspec.structs.replace(step, id="", sub_path="")
            made = self._made.setdefault(step.name, wanted)
            if made != wanted:
                kind = f"encrypted {made.kind}" if made.encrypted else made.kind
                raise InUse(
                    "use volume", subject=step.name, code="volume-conflict",
                    why=f"the pod has it as {kind} with options {','.join(made.options) or 'none'}",
                )  # fmt: skip
        path = f"/run/mounts/volumes/m{self._count}"
        self._count += 1
        self._views[path] = (holder, step.name, step.kind)
        return path

    @property
    def kinds(self) -> dict[str, str]:
        """Name of a shared volume -> its type."""
        return {name: made.kind for name, made in self._made.items()}

    async def use(self, step: UseVolume, path: str, disk: str = "") -> None:
        """Shows a shared volume at ``path``.

        Args:
            disk: where the disk is mounted that it is kept on, if it is.
        """
        settings = requests.PodVolume(path, step.name, step.kind, step.options, step.sub_path, disk)
        await self._ask("Add", settings, path, GUEST_SECONDS)
        self._sure.add(step.name)

    async def fill(self, step: FillVolume, path: str, root: str, scratch: str) -> None:
        """Makes a volume of an image at ``path`` and copies into it what the root filesystem has.

        Args:
            root: of the container, in the guest.
            scratch: the folder for its own writes; empty if it has none, and then the volume is in memory.
        """
        source = f"{scratch}/volumes{path.removeprefix('/run/mounts/volumes')}" if scratch else ""
        await self._ask("Add", requests.ImageVolume(path, source, root, step.name), path, _COPY_SECONDS)

    async def cover(self, path: str, below: str, scratch: str) -> None:
        """Puts a writable overlay over a mount, and shows it at ``path``.

        Args:
            below: what lies below, in the guest.
            scratch: as for :meth:`fill`.
        """
        folder = f"{scratch}/overlays{path.removeprefix('/run/mounts/volumes')}" if scratch else ""
        await self._ask("Add", requests.OverlaidMount(path, below, folder), path, _COPY_SECONDS)

    async def release(self, path: str) -> None:
        """Takes a container's view away; already gone is success.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        kind = self._views[path][2] if path in self._views else "uvm"
        settings: requests.Settings = requests.PodVolume(path, type=kind)
        if kind == "image":
            settings = requests.ImageVolume(path)
        elif kind == "overlay":
            settings = requests.OverlaidMount(path)
        if kind != "uvm":
            seconds = FLUSH_SECONDS if kind == "overlay" else GUEST_SECONDS
            await while_alive(self._sandbox, lambda: self._ask("Remove", settings, "", seconds))
        _, name, _ = self._views.pop(path, ("", "", ""))
        if name not in self._sure and all(of != name for _, of, _ in self._views.values()):
            self._made.pop(name, None)  # nobody has got it

    def freeze(self) -> FrozenVolumes:
        """Everything, as data."""
        return FrozenVolumes(self._count, dict(self._made), tuple(self._sure), dict(self._views))

    def adopt(self, frozen: FrozenVolumes) -> None:
        """Takes over what the machine has."""
        self._count, self._made = frozen.count, dict(frozen.made)
        self._sure, self._views = set(frozen.sure), dict(frozen.views)

    async def _ask(self, action: requests.RequestType, settings: requests.Settings, path: str, seconds: float) -> None:
        request = requests.encode(requests.GuestRequest(action, settings))
        answer = await self._sandbox.request("modify", request, seconds)
        if path and (not isinstance(answer, dict) or answer.get("path") != path):
            raise GuestFailed("use volume", subject=path, why="the guest answered with nonsense")

    def describe(self) -> list[dict[str, Any]]:
        """For ``holdfast storage``."""
        shared = [
            {
                "volume": name,
                "type": made.kind,
                "options": list(made.options),
                "holders": sorted({holder for holder, of, _ in self._views.values() if of == name}),
                "guest_paths": sorted(path for path, (_, of, _) in self._views.items() if of == name),
            }
            for name, made in self._made.items()
        ]
        own = [
            {"volume": name, "type": kind, "options": [], "holders": [holder], "guest_paths": [path]}
            for path, (holder, name, kind) in self._views.items()
            if kind in ("image", "overlay")
        ]
        return shared + own
