"""Guest requests about storage: ``modify`` with a resource type, a request type and settings.

Field names are those of the utility-VM protocol; absent numbers are zero.  Adding undoes itself when it
fails half-way; removing what is already gone is success, so that a host whose second half failed can
simply ask again.
"""

from __future__ import annotations

from holdfast.errors import InvalidInput
from holdfast.guest import disk_mounts, layers, pci, pmem, shares, volumes
from holdfast.guest import settings as settings_of

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    ("VPMemDevice", "Add"): pmem.add,
    ("VPMemDevice", "Remove"): pmem.remove,
    ("VPCIDevice", "Add"): pci.add,
    ("PodVolume", "Add"): volumes.add,
    ("PodVolume", "Remove"): volumes.remove,
    ("ImageVolume", "Add"): volumes.add_image,
    ("ImageVolume", "Remove"): volumes.remove,
}


def modify(request: dict[str, Any], children: Children) -> Task:
    """Task: carries out one modify request; returns ``{"path": guest path}`` or ``{}``.

    Raises:
        InvalidInput: the request is malformed, or for nothing that is known here.
    """
    resource = settings_of.text(request, "ResourceType")
    action = settings_of.text(request, "RequestType") or "Add"
    settings = request.get("Settings")
    if not isinstance(settings, dict):
        raise InvalidInput("modify guest", subject=resource, why="Settings is not an object")
    handler = _HANDLERS.get((resource, action))
    if handler is None:
        raise InvalidInput(
            "modify guest", subject=resource, why=f"unknown resource type, or it knows no {action!r}",
            code="unknown-resource",
        )  # fmt: skip
    return (yield from handler(settings, children))
