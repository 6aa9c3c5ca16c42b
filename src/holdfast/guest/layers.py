"""Root filesystems: layers combined by overlay, under a folder for the container's own writes."""

from __future__ import annotations

import os
import stat

from holdfast.errors import InUse, InvalidInput, NotReleased
from holdfast.guest import mounting
from holdfast.guest import settings as settings_of
from holdfast.linux import syscalls
from holdfast.mounts import overlay
from holdfast.mounts.root import remove_tree
from holdfast.mounts.unmount import remove_mount_point, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_PLACES = "/run/mounts/places"
_LINKS = "/run/overlay-links"
#: Root filesystem -> the folder that was made for what is written to it, and goes with it.
_folders: dict[str, str] = {}


def add(settings: dict[str, Any], _children: Children) -> Task:
    """Task: combines layers, the first on top, into a root filesystem."""
    target, scratch = settings_of.path(settings, "ContainerRootPath"), settings_of.text(settings, "ScratchPath")
    layers = settings.get("Layers")
    if not isinstance(layers, list) or not layers:
        raise InvalidInput("combine layers", subject=target, why="no layers")
    paths = [settings_of.path(layer, "Path") for layer in layers if isinstance(layer, dict)]
    if target in _folders:
        raise InUse("combine layers", subject=target, why="an earlier one's folder is there", code="path-in-use")
    with mounting.NewMount(target):
        try:
            if scratch:
                _make_folder(target, scratch)
                _overlay(paths, scratch, target, 0)
            else:
                _overlay(paths, _make_places(target), target, 0)
                _look_like(paths[0], target)
        except BaseException:
            unmount(target)
            _remove_places(target)
            if target in _folders:
                _remove_folder(_folders.pop(target))  # as good as empty
            raise
    return {"path": target}
    yield


def _overlay(layers: list[str], scratch: str, target: str, flags: int) -> None:
    """Mounts the layers, the first on top; by mount(2), since the guest's kernel need not have ``lowerdir+``."""
    above: list[str] = []
    if scratch:
        upper, work = f"{scratch}/upper", f"{scratch}/work"
        os.makedirs(upper, 0o755, exist_ok=True)
        os.makedirs(work, 0o755, exist_ok=True)
        above = [f"upperdir={overlay.escape(upper)}", f"workdir={overlay.escape(work)}"]
    overlay.mount(layers, above, target, _LINKS, lambda data: mounting.mount("overlay", target, "overlay", flags, data))


def _make_places(target: str) -> str:
    """A little memory for mount points, on top of a root filesystem that the container cannot write to.

    The runtime makes those that the image has not got, and only then makes the root read-only.
    """
    places = f"{_PLACES}/{target.strip('/').replace('/', '-')}"
    with mounting.NewMount(places):
        mounting.mount("places", places, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=0755")
    return places


def _look_like(layer: str, target: str) -> None:
    """The root has the owner and mode of the top layer's, not of what lies on that for mount points."""
    status = os.stat(layer)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, stat.S_IMODE(status.st_mode))


def _remove_places(target: str) -> None:
    places = f"{_PLACES}/{target.strip('/').replace('/', '-')}"
    unmount(places)
    remove_mount_point(places)


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes a root filesystem away, with the folder that was made for it; already gone is success."""
    target = settings_of.path(settings, "ContainerRootPath")
    yield from mounting.write_back(target, children)  # else unmounting does, and nothing else goes on meanwhile
    unmount(target)
    _remove_places(target)
    folder = _folders.get(target)
    if folder is not None:
        # It may hold a container's whole output: not in the process that everything else waits for.
        yield from children.call(lambda: _remove_folder(folder))
        del _folders[target]
    remove_mount_point(target)
    return {}


def _make_folder(target: str, scratch: str) -> None:
    """Makes the folder for a root filesystem's changes, on a disk that is not for it alone."""
    if scratch and not os.path.isdir(scratch):
        _folders[target] = scratch
        os.makedirs(scratch, 0o755)


def _remove_folder(folder: str) -> None:
    """Removes all below ``folder`` and itself; what is mounted there is not entered."""
    above, name = os.path.split(folder)
    try:
        above_fd = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        remove_tree(above_fd, os.fsencode(name))
    except OSError as error:
        raise NotReleased("remove scratch folder", subject=folder, why=error, code="scratch-busy") from None
    finally:
        os.close(above_fd)
