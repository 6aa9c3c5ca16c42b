"""Guest requests about storage: ``modify`` with a resource type, a request type and settings.

Field names are those of the utility-VM protocol; absent numbers are zero.  Adding undoes itself when it
fails half-way; removing what is already gone is success, so that a host whose second half failed can
simply ask again.
"""

from __future__ import annotations

import errno
import os

from holdfast.errors import Corrupt, GuestFailed, InUse, InvalidInput, NotReleased, Unsupported
from holdfast.guest import disks, mapped, pci, pmem
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.mounts.probe import NO_REPLAY, probe_filesystem
from holdfast.mounts.root import remove_tree
from holdfast.mounts.unmount import remove_mount_point, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

#: Cache mode -> (9p device, where it is mounted).  All serve the pod's one export, in which every share is a
#: directory named by its number; one for each mode, since Linux mounts a virtio-9p device once (EBUSY).
#: ``mmap``: data always comes from the host, and shared writable maps (SQLite) still work.
_EXPORTS = {
    "mmap": ("holdfast", "/run/mounts/plan9"),
    "none": ("holdfast-none", "/run/mounts/plan9-none"),
    "loose": ("holdfast-loose", "/run/mounts/plan9-loose"),
}
_NINEP_DATA = "trans=virtio,version=9p2000.L,msize=512000,access=client,posixacl,cache="
#: Root filesystem -> the folder that was made for what is written to it, and goes with it.
_folders: dict[str, str] = {}
#: Path of a mounted disk, or of a link to one -> its controller, LUN and partition.
_disks: dict[str, tuple[int, int, int]] = {}


def modify(request: dict[str, Any], children: Children) -> Task:
    """Task: carries out one modify request; returns ``{"path": guest path}`` or ``{}``."""
    resource, action = _text(request, "ResourceType"), _text(request, "RequestType") or "Add"
    settings = request.get("Settings")
    if not isinstance(settings, dict):
        raise InvalidInput("modify guest", subject=resource, why="Settings is not an object")
    # Those that need processes of their own.
    if (resource, action) == ("MappedVirtualDisk", "Add"):
        return (yield from _add_disk(settings, children))
    if (resource, action) == ("MappedVirtualDisk", "Update"):
        return (yield from _grow_disk(settings, children))
    if (resource, action) == ("CombinedLayers", "Remove"):
        return (yield from _remove_layers(settings, children))
    handler = _HANDLERS.get((resource, action))
    if handler is None:
        raise InvalidInput(
            "modify guest", subject=resource, why=f"unknown resource type, or it knows no {action!r}",
            code="unknown-resource",
        )  # fmt: skip
    return (yield from handler(settings))


def _add_disk(settings: dict[str, Any], children: Children) -> Task:
    target = _path(settings, "MountPath")
    place = (_number(settings, "Controller"), _number(settings, "Lun"), _number(settings, "Partition"))
    device = yield from disks.wait_for_disk(*place)
    try:
        device = yield from _map(settings, target, device, place, children)
        answer = _link_device(target, device) if settings.get("BlockDev") else _mount_disk(settings, target, device)
        _disks[target] = place
        return answer
    except BaseException as error:
        mapped.give_up(target)
        if settings.get("VerityInfo") and _is_of_contents(error):
            raise Corrupt(
                "mount disk", subject=device, why=f"it does not hold what its root hash says: {error}",
                hint="import the image again", code="verity-failed",
            ) from None  # fmt: skip
        raise


def _map(settings: dict[str, Any], target: str, device: str, place: tuple[int, int, int], children: Children) -> Task:
    """Task: what is to be mounted: the device itself, or one above it that checks or decrypts."""
    info: Any = settings.get("VerityInfo")
    encrypted, read_only = settings.get("Encrypted"), settings.get("ReadOnly")
    if not info and not encrypted:
        return device
    why = ""
    if settings.get("BlockDev"):  # hcsshim hands out the raw device then: #2757
        why = "a disk that is not mounted can neither be verified nor encrypted"
    elif info and (encrypted or not read_only or not isinstance(info, dict)):
        why = "only a read-only disk can be verified"
    elif encrypted and (read_only or place[2]):
        why = "only a whole, writable disk can be encrypted"
    if why:
        raise Unsupported("mount disk", subject=target, why=why, code="mapping-unsupported")
    if encrypted:
        return (yield from mapped.encrypted(target, device, children, place))
    return (yield from mapped.verity(target, device, info, place))


def _is_of_contents(error: BaseException) -> bool:
    """What dm-verity says of a block that is not what it was, and of a disk that is too small."""
    return any(getattr(error, "errno", 0) == e or f"(errno {e})" in str(error) for e in (errno.EIO, errno.E2BIG))


def _mount_disk(settings: dict[str, Any], target: str, device: str) -> dict[str, str]:
    read_only = bool(settings.get("ReadOnly"))
    fstype = _filesystem(device, _text(settings, "Filesystem"))
    options = mount_options.parse([str(option) for option in settings.get("Options", ())])
    flags = options.flags | (syscalls.MS_RDONLY if read_only else 0)
    data = list(options.data)
    if flags & syscalls.MS_RDONLY and fstype in NO_REPLAY:
        data.append(NO_REPLAY[fstype])
    made = _make_mount_point(target)
    try:
        _mount(device, target, fstype, flags, ",".join(data))
        _propagate(target, options.propagation)
    except BaseException:
        unmount(target)
        if made:
            remove_mount_point(target)
        raise
    return {"path": target, "device": device, "filesystem": fstype}


def _link_device(target: str, device: str) -> dict[str, str]:
    """Shows a disk that is not mounted: a link to its device, which keeps its place whatever the device is called."""
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    try:
        os.symlink(device, target)
    except FileExistsError:
        raise InUse("link device", subject=target, why="something else is there", code="path-in-use") from None
    return {"path": target, "device": device}


def _propagate(target: str, propagation: tuple[int, ...]) -> None:
    for flag in propagation:
        syscalls.mount("none", target, "", flag)


def _filesystem(device: str, asked: str) -> str:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = probe_filesystem(fd)
    finally:
        os.close(fd)
    if asked and found and asked != found:
        raise GuestFailed("mount disk", subject=device, why=f"it holds {found}, not {asked}", code="wrong-filesystem")
    if found in ("luks", "swap") or not found:
        raise GuestFailed(
            "mount disk", subject=device, code="no-filesystem",
            why=f"it holds {found}, which cannot be mounted" if found else "no known filesystem on it",
            hint="make one with mkfs; Holdfast never formats a disk that it did not make",
        )  # fmt: skip
    return found


#: Filesystem -> the module that has it, where that is called otherwise.
_MODULES = {"iso9660": "isofs"}


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    try:
        try:
            syscalls.mount(source, target, fstype, flags, data)
        except OSError as error:
            if error.errno != errno.ENODEV or not _load_modules(fstype):
                raise
            syscalls.mount(source, target, fstype, flags, data)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise Unsupported(
                "mount", subject=f"{source} as {fstype}", why="the guest's kernel does not know this filesystem",
                code="filesystem-unsupported",
            ) from None  # fmt: skip
        raise GuestFailed("mount", subject=f"{source} as {fstype}", why=error, code="mount-failed") from None


def _load_modules(fstype: str) -> bool:
    """Loads what the root disk has for a filesystem that few pods need; False if it has nothing."""
    from holdfast.guest.launch import HOME, load_modules

    listing = f"{HOME}/modules.d/{_MODULES.get(fstype, fstype)}"
    if not os.path.exists(listing):
        return False
    load_modules(listing)
    return True


def _remove_disk(settings: dict[str, Any]) -> Task:
    target = _path(settings, "MountPath")
    place = (_number(settings, "Controller"), _number(settings, "Lun"), _number(settings, "Partition"))
    if os.path.islink(target):
        disks.prove_closed(target)
        os.unlink(target)
        _disks.pop(target, None)
        return {}
    unmount(target)
    yield from mapped.release(target)
    remove_mount_point(target)
    _disks.pop(target, None)
    # Another mount of the same disk uses it rightly; the last one to go, and the eject, find out what is wrong.
    if not any(other[:2] == place[:2] and (other[2] == place[2] or not place[2]) for other in _disks.values()):
        yield from disks.prove_unused(*place)
    return {}


def _grow_disk(settings: dict[str, Any], children: Children) -> Task:
    """Task: makes a mounted ext4 as large as its disk has become."""
    target = _path(settings, "MountPath")
    place = (_number(settings, "Controller"), _number(settings, "Lun"), 0)
    if mapped.is_mapped(target):
        raise Unsupported("grow disk", subject=target, why="it is encrypted or verified", code="grow-unsupported")
    disks.rescan(*place[:2])
    device = yield from disks.wait_for_disk(*place)
    yield from mapped.run("grow disk", children, ["/usr/sbin/resize2fs", device])
    return {"path": target}


def _eject_disk(settings: dict[str, Any]) -> Task:
    yield from disks.eject(_number(settings, "Controller"), _number(settings, "Lun"))
    return {}


def _add_share(settings: dict[str, Any]) -> Task:
    name = _text(settings, "ShareName")
    if not name.isdigit():
        raise InvalidInput("add share", subject=name, why="a share's name is a number")
    target = _path(settings, "MountPath")
    folder = _mount_export(_text(settings, "Cache") or "mmap", bool(settings.get("NoSuid")))
    made = _make_mount_point(target)
    try:
        _bind(f"{folder}/{name}", target, bool(settings.get("ReadOnly")))
    except BaseException:
        unmount(target)
        if made:
            remove_mount_point(target)
        raise
    return {"path": target}
    yield


def _mount_export(cache: str, no_suid: bool) -> str:
    """Where the export is mounted with a cache mode; mounts it for the first share that wants that."""
    if cache not in _EXPORTS:
        raise InvalidInput("add share", subject=cache, why="unknown cache mode", code="cache-mode")
    tag, folder = _EXPORTS[cache]
    if not os.path.ismount(folder):
        os.makedirs(folder, exist_ok=True)
        _mount(tag, folder, "9p", syscalls.MS_NOSUID if no_suid else 0, _NINEP_DATA + cache)
    return folder


def _bind(source: str, target: str, read_only: bool) -> None:
    try:
        syscalls.mount(source, target, "", syscalls.MS_BIND)
        if read_only:  # MS_BIND ignores MS_RDONLY the first time: mount(2)
            syscalls.mount("none", target, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    except OSError as error:
        raise GuestFailed("bind", subject=f"{source} at {target}", why=error, code="mount-failed") from None


def _refresh_share(settings: dict[str, Any]) -> Task:
    """Forgets what is cached of a file that the host has put in another one's place.

    Reads ask the host each time; pages that were mapped stay as long as somebody holds the file, and a container
    that has it mounted does.
    """
    try:
        fd = os.open(_path(settings, "MountPath"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # the new one is gone, too, or cannot be read
        return {}
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return {}
    yield


def _write_back(target: str) -> None:
    """What the guest has cached goes to the host before a share does: the 9p mount behind it stays, and writes late."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # the host has lost it (a stale NFS handle): nothing can be written there any more
        return
    try:
        syscalls.syncfs(fd)
    except OSError as error:  # said once: the next try goes on
        raise NotReleased("write back share", subject=target, why=error, code="share-not-written") from None
    finally:
        os.close(fd)


def _remove_share(settings: dict[str, Any]) -> Task:
    target = _path(settings, "MountPath")
    if os.path.ismount(target):
        _write_back(target)
    unmount(target)
    remove_mount_point(target)
    # The last share takes the 9p mounts with it: QEMU does not save a machine while one is mounted.
    if settings.get("Last"):
        for _, folder in _EXPORTS.values():
            unmount(folder)
    return {}
    yield


def _add_layers(settings: dict[str, Any]) -> Task:
    target, scratch = _path(settings, "ContainerRootPath"), _text(settings, "ScratchPath")
    layers = settings.get("Layers")
    if not isinstance(layers, list) or not layers:
        raise InvalidInput("combine layers", subject=target, why="no layers")
    paths = [_path(layer, "Path") for layer in layers if isinstance(layer, dict)]
    flags = 0 if scratch else syscalls.MS_RDONLY
    if target in _folders:
        raise InUse("combine layers", subject=target, why="an earlier one's folder is there", code="path-in-use")
    made = _make_mount_point(target)
    try:
        _make_folder(target, scratch)
        if len(paths) == 1 and not scratch:  # overlay needs two layers when nothing is on top
            _bind(paths[0], target, read_only=True)
        else:
            _overlay(paths, scratch, target, flags)
    except BaseException:
        unmount(target)
        if target in _folders:
            _remove_folder(_folders.pop(target))  # as good as empty
        if made:
            remove_mount_point(target)
        raise
    return {"path": target}
    yield


def _overlay(layers: list[str], scratch: str, target: str, flags: int) -> None:
    """Mounts the layers, the first on top.  Option data holds one page, so names are relative to the layers' folder."""
    folder = os.path.commonpath([os.path.dirname(layer) for layer in layers])
    lower = ":".join(_escape(os.path.relpath(layer, folder)) for layer in layers)
    data = f"lowerdir={lower}"
    if scratch:
        upper, work = f"{scratch}/upper", f"{scratch}/work"
        os.makedirs(upper, 0o755, exist_ok=True)
        os.makedirs(work, 0o755, exist_ok=True)
        data += f",upperdir={_escape(upper)},workdir={_escape(work)}"
    if len(data) >= 4096:
        raise Unsupported(
            "combine layers", subject=target, why=f"{len(layers)} layers need more than one page of options"
        )
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(folder)
        _mount("overlay", target, "overlay", flags, data)
    finally:
        os.fchdir(here)
        os.close(here)


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _remove_layers(settings: dict[str, Any], children: Children) -> Task:
    target = _path(settings, "ContainerRootPath")
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


_HANDLERS = {
    ("MappedVirtualDisk", "Remove"): _remove_disk,
    ("SCSIDevice", "Remove"): _eject_disk,
    ("MappedDirectory", "Add"): _add_share,
    ("MappedDirectory", "Update"): _refresh_share,
    ("MappedDirectory", "Remove"): _remove_share,
    ("CombinedLayers", "Add"): _add_layers,
    ("VPMemDevice", "Add"): pmem.add,
    ("VPMemDevice", "Remove"): pmem.remove,
    ("VPCIDevice", "Add"): pci.add,
}


def _make_mount_point(target: str) -> bool:
    """Makes ``target``; False when it was there.

    Raises:
        InUse: something is mounted there already, or a link to a device is there.
    """
    if os.path.ismount(target) or os.path.islink(target):
        raise InUse("mount", subject=target, why="something else is mounted there", code="path-in-use")
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    try:
        os.mkdir(target, 0o755)
    except FileExistsError:
        return False
    return True


def _text(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key, "")
    if not isinstance(value, str):
        raise InvalidInput("read request", subject=key, why="not a string")
    return value


def _path(settings: dict[str, Any], key: str) -> str:
    value = _text(settings, key)
    if not value.startswith("/") or "/../" in value + "/" or "\0" in value:
        raise InvalidInput("read request", subject=key, why=f"not an absolute, clean path: {value!r}")
    return value


def _number(settings: dict[str, Any], key: str) -> int:
    value = settings.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput("read request", subject=key, why="not a number")
    return value
