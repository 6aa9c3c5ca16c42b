"""Root filesystems: layers combined by overlay, under a folder for the container's own writes."""

from __future__ import annotations

from holdfast.errors import InvalidInput
from holdfast.guest import mounting, upper
from holdfast.guest import settings as settings_of
from holdfast.mounts.release import drop, remove_mount_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: For mount points alone, on top of a root filesystem that the container cannot write to: the runtime makes those that
#: the image has not got, and only then makes the root read-only.
_PLACES_SIZE = "1m"


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: combines layers, the first on top, into a root filesystem."""
    target, scratch = settings_of.path(settings, "ContainerRootPath"), settings_of.text(settings, "ScratchPath")
    layers = settings.get("Layers")
    if not isinstance(layers, list) or not layers:
        raise InvalidInput("combine layers", subject=target, why="no layers")
    paths = [settings_of.path(layer, "Path") for layer in layers if isinstance(layer, dict)]
    upper.check_free(target)
    with mounting.NewMount(target):
        try:
            if scratch:
                upper.make(target, scratch)
                upper.mount_overlay(paths, scratch, target)
            else:
                upper.mount_overlay(paths, upper.make_in_memory(target, _PLACES_SIZE), target)
                upper.look_like(paths[0], target)
        except BaseException:
            drop(target)
            upper.give_up(target)
            raise
    return {"path": target}
    yield


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes a root filesystem away, with the folder that was made for it; already gone is success."""
    target = settings_of.path(settings, "ContainerRootPath")
    yield from mounting.write_back(target, children)  # else unmounting does, and nothing else goes on meanwhile
    drop(target)
    yield from upper.remove(target, children)
    remove_mount_point(target)
    return {}
