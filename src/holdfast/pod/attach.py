"""Hot attach and detach: storage that a running pod gets, and gives back, by request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.errors import InvalidInput, NotFound
from holdfast.spec.runtime import DISK_TYPES, spec_from_raw
from holdfast.storage.plan import mount_step
from holdfast.storage.survey import survey

if TYPE_CHECKING:
    from holdfast.storage.engine import Engine


class HotAttach:
    """What was attached by request: each by the path that the guest has it at."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holders: dict[str, str] = {}
        self._count = 0

    async def attach(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Attaches what a mount names; returns ``{"guest_path": ...}``.

        Raises:
            InvalidInput: it is no disk and no directory.
        """
        raw = {**raw, "destination": raw.get("destination") or "/"}
        document = {"ociVersion": "1.0.2", "mounts": [raw]}
        mount = spec_from_raw(document, "attach").mounts[0]
        step = mount_step(0, mount, survey((mount,), DISK_TYPES), [])
        if step is None:
            raise InvalidInput("attach", subject=mount.type, why="only disks and host directories can be attached")
        self._count += 1
        holder = f"attach:{self._count}"  # no container can have a colon in its name
        held = await self._engine.prepare(holder, (step,))
        path = held.paths[step.id]
        self._holders[holder] = path
        return {"guest_path": path}

    async def detach(self, guest_path: str) -> None:
        """Lets go of what was attached at a path; can be tried again when it fails.

        Raises:
            NotFound: nothing was attached there by request.
            NotReleased: the guest keeps it busy.
        """
        for holder, path in self._holders.items():
            if path == guest_path:
                await self._engine.release(holder)
                del self._holders[holder]
                return
        raise NotFound("detach", subject=guest_path, why="nothing was attached there", code="not-attached")
