"""Guest requests about storage: ``modify`` with a resource type, a request type and settings.

Field names are those of the utility-VM protocol; absent numbers are zero.  Adding undoes itself when it
fails half-way; removing what is already gone is success, so that a host whose second half failed can
simply ask again.
"""

from __future__ import annotations

from holdfast import trace
from holdfast.errors import InvalidInput
from holdfast.guest import disk_mounts, layers, overlays, pci, pmem, shares, volumes
from holdfast.guest import settings as settings_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_HANDLERS = {
    ("MappedVirtualDisk", "Add"): disk_mounts.add,
    ("MappedVirtualDisk", "Update"): disk_mounts.grow,
    ("MappedVirtualDisk", "Remove"): disk_mounts.remove,
    ("SCSIDevice", "Remove"): disk_mounts.eject,
    ("MappedDirectory", "Add"): shares.add,
    ("MappedDirectory", "Update"): shares.refresh,
    ("MappedDirectory", "Remove"): shares.remove,
    ("CombinedLayers", "Add"): layers.add,
    ("CombinedLayers", "Remove"): layers.remove,
    ("OverlaidMount", "Add"): overlays.add,
    ("OverlaidMount", "Remove"): overlays.remove,
    ("VPMemDevice", "Add"): pmem.add,
    ("VPMemDevice", "Remove"): pmem.remove,
    ("VPCIDevice", "Add"): pci.add,
    ("PodVolume", "Add"): volumes.add,
    ("PodVolume", "Remove"): volumes.remove,
    ("ImageVolume", "Add"): volumes.add_image,
    ("ImageVolume", "Remove"): volumes.remove,
}
#: Of these one request may be for many things: its settings are a list then.
_FOR_MANY = {("MappedDirectory", "Add"): shares.add_all, ("MappedDirectory", "Remove"): shares.remove_all}


def modify(request: dict[str, Any], children: Children) -> Task:
    """Task: carries out one modify request; returns ``{"path": guest path}`` or ``{}``; ``{"results": ...}`` for many.

    Raises:
        InvalidInput: the request is malformed, or for nothing that is known here.
    """
    resource = settings_of.text(request, "ResourceType")
    action = settings_of.text(request, "RequestType") or "Add"
    settings = request.get("Settings")
    many = isinstance(settings, list) and len(settings) > 0
    if not many and not isinstance(settings, dict):
        raise InvalidInput("modify guest", subject=resource, why="Settings is not an object")
    handler: Callable[[Any, Children], Task] | None = (_FOR_MANY if many else _HANDLERS).get((resource, action))
    if handler is None:
        raise InvalidInput(
            "modify guest", subject=resource, why=f"unknown resource type, or it knows no {action!r}",
            code="unknown-resource",
        )  # fmt: skip
    trace.mark(f"asked for {action} {resource}")
    answer = yield from handler(settings, children)
    trace.mark(f"has done {action} {resource}")
    return answer
