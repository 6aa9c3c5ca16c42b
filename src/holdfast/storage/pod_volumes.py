"""Volumes that live in the machine: those that containers share, which stay until the pod ends, and those of an image.

The machine makes a shared one when it is wanted first, and shows each container a view of it (guest/volumes.py).
Nothing of them is on the host, so nothing of them can outlive the machine, and the journal need not know them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.errors import GuestFailed, InUse
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import GUEST_SECONDS, while_alive
from holdfast.storage.steps import UseVolume

if TYPE_CHECKING:
    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.steps import FillVolume

#: For copying what an image has: it may be all of a disk.
_COPY_SECONDS = 600.0


class PodVolumes:
    """The volumes of one pod."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._count = 0
        #: Name of a shared volume -> how it was made.
        self._made: dict[str, tuple[str, tuple[str, ...]]] = {}
        #: Those of them that the machine has made for certain.
        self._sure: set[str] = set()
        #: Place in the guest -> (holder, name or path in the image, type).
        self._views: dict[str, tuple[str, str, str]] = {}

    def new_path(self, step: UseVolume | FillVolume, holder: str) -> str:
        """The place of a container's view, which is to be released even if making it fails.

        Raises:
            InUse: ``volume-conflict``: the volume was made in another way.
        """
        if isinstance(step, UseVolume):
            if step.kind == "uvm":
                return f"/{step.sub_path}"
            made = self._made.setdefault(step.name, (step.kind, step.options))
            if made != (step.kind, step.options):
                raise InUse(
                    "use volume", subject=step.name, code="volume-conflict",
                    why=f"the pod has it as {made[0]} with options {','.join(made[1]) or 'none'}",
                )  # fmt: skip
        path = f"/run/mounts/volumes/m{self._count}"
        self._count += 1
        self._views[path] = (holder, step.name, step.kind)
        return path

    async def use(self, step: UseVolume, path: str) -> None:
        """Shows a shared volume at ``path``."""
        settings = requests.PodVolume(path, step.name, step.kind, step.options, step.sub_path)
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

    async def release(self, path: str) -> None:
        """Takes a container's view away; already gone is success.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        kind = self._views[path][2] if path in self._views else "uvm"
        if kind == "image":
            await while_alive(self._sandbox, lambda: self._ask("Remove", requests.ImageVolume(path), "", GUEST_SECONDS))
        elif kind != "uvm":
            settings = requests.PodVolume(path, type=kind)
            await while_alive(self._sandbox, lambda: self._ask("Remove", settings, "", GUEST_SECONDS))
        _, name, _ = self._views.pop(path, ("", "", ""))
        if name not in self._sure and all(of != name for _, of, _ in self._views.values()):
            self._made.pop(name, None)  # nobody has got it

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
                "type": kind,
                "options": list(options),
                "holders": sorted({holder for holder, of, _ in self._views.values() if of == name}),
                "guest_paths": sorted(path for path, (_, of, _) in self._views.items() if of == name),
            }
            for name, (kind, options) in self._made.items()
        ]
        images = [
            {"volume": name, "type": kind, "options": [], "holders": [holder], "guest_paths": [path]}
            for path, (holder, name, kind) in self._views.items()
            if kind == "image"
        ]
        return shared + images
