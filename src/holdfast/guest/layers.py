"""Root filesystems: layers combined by overlay, under a folder for the container's own writes."""

from __future__ import annotations

import os

from holdfast.errors import InUse, InvalidInput, NotReleased
from holdfast.guest import mounting
from holdfast.guest import settings as settings_of
from holdfast.linux import syscalls
from holdfast.mounts.root import remove_tree
from holdfast.mounts.unmount import remove_mount_point, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_PAGE = 4096
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
    flags = 0 if scratch else syscalls.MS_RDONLY
    if target in _folders:
        raise InUse("combine layers", subject=target, why="an earlier one's folder is there", code="path-in-use")
    with mounting.NewMount(target):
        try:
            _make_folder(target, scratch)
            if len(paths) == 1 and not scratch:  # overlay needs two layers when nothing is on top
                mounting.bind(paths[0], target, read_only=True)
            else:
                _overlay(paths, scratch, target, flags)
        except BaseException:
            unmount(target)
            if target in _folders:
                _remove_folder(_folders.pop(target))  # as good as empty
            raise
    return {"path": target}
    yield


def _overlay(layers: list[str], scratch: str, target: str, flags: int) -> None:
    """Mounts the layers, the first on top.

    Option data holds one page (mount(2)), so names are relative to the layers' folder.  Where that is still too long,
    they are links with numbers for names: overlayfs follows them, on every kernel, while one option for each layer
    (``lowerdir+``) needs Linux 6.8.
    """
    folder = os.path.commonpath([os.path.dirname(layer) for layer in layers])
    names = [os.path.relpath(layer, folder) for layer in layers]
    above = ""
    if scratch:
        upper, work = f"{scratch}/upper", f"{scratch}/work"
        os.makedirs(upper, 0o755, exist_ok=True)
        os.makedirs(work, 0o755, exist_ok=True)
        above = f",upperdir={_escape(upper)},workdir={_escape(work)}"
    if len(_lower(names) + above) < _PAGE:
        _mount_in(folder, target, flags, _lower(names) + above)
        return
    os.mkdir(_LINKS, 0o700)
    numbers = [str(number) for number in range(len(layers))]
    try:
        for number, layer in zip(numbers, layers, strict=True):
            os.symlink(layer, f"{_LINKS}/{number}")
        _mount_in(_LINKS, target, flags, _lower(numbers) + above)
    finally:
        for number in os.listdir(_LINKS):
            os.unlink(f"{_LINKS}/{number}")
        os.rmdir(_LINKS)


def _lower(names: list[str]) -> str:
    return "lowerdir=" + ":".join(map(_escape, names))


def _mount_in(folder: str, target: str, flags: int, data: str) -> None:
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(folder)
        mounting.mount("overlay", target, "overlay", flags, data)
    finally:
        os.fchdir(here)
        os.close(here)


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def remove(settings: dict[str, Any], children: Children) -> Task:
    """Task: takes a root filesystem away, with the folder that was made for it; already gone is success."""
    target = settings_of.path(settings, "ContainerRootPath")
    unmount(target)
    folder = _folders.get(target)
    if folder is not None:
        # It may hold a container's whole output: not in the process that everything else waits for.
        status = yield from children.call(lambda: _remove_folder(folder))
        if status:
            raise NotReleased("remove scratch folder", subject=folder, why="see the console", code="scratch-busy")
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
    finally:
        os.close(above_fd)
