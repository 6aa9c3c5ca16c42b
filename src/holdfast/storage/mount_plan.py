"""The part of planning that is about one mount: the disk to attach for it, or the directory to share.

Pure, as all of planning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import InUse, InvalidInput, NotFound, Unsupported
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.spec import disk_options
from holdfast.spec.mounts import CACHE_MODES, OVERLAY
from holdfast.spec.runtime import DISK_TYPES, Mount, clean_path
from holdfast.storage import fork_policy, volumes
from holdfast.storage.disk_formats import needs_parent, plain
from holdfast.storage.steps import AnyStep, MountDisk, ShareDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdfast.storage.survey import Source

#: Types that only a later stage of the plan could resolve.
_NOT_YET = frozenset({"image"})
_BIND_WORDS = frozenset({"bind", "rbind"})


def mount_subject(index: int, mount: Mount) -> str:
    """How errors name a mount."""
    return f"mounts[{index}] {mount.source} at {mount.destination}"


def mount_step(
    index: int,
    mount: Mount,
    sources: dict[str, Source],
    earlier: list[AnyStep],
    ours: Mapping[tuple[int, int], bool] | None = None,
) -> MountDisk | ShareDirectory | None:
    """The step for one mount; None for what the runtime does itself (proc, tmpfs, devpts ...).

    Args:
        earlier: steps of which one may do for this mount, too.
        ours: (device, inode) of disks that the pod has, or is to have by the same plan -> whether writable.
    """
    subject = mount_subject(index, mount)
    if OVERLAY in mount_options.split(mount.options):  # a container's plan has taken it out
        raise Unsupported(
            "plan mount", subject=subject, why="what runs already can have no overlay over a mount",
            code="mount-option", hint="name the mount when the container is started",
        )  # fmt: skip
    fork_policy.check(mount, subject)
    if mount.kind in _NOT_YET:
        raise Unsupported(
            "plan mount", subject=subject, why=f"mounts of type {mount.kind} are not built yet", code="mount-type",
            hint="use type=bind, disk, physical-disk or tmpfs",
        )  # fmt: skip
    if mount.kind not in (*DISK_TYPES, "bind", volumes.KIND):
        return None
    if not mount.source or not mount.destination:
        raise InvalidInput(
            "plan mount", subject=subject, why="it needs a source and a destination", code="mount-incomplete"
        )
    source = sources.get(mount.source)
    if source is None:
        raise InvalidInput("plan mount", subject=subject, why="the source is not an absolute path", code="mount-source")
    check_present(source, subject)
    step: MountDisk | ShareDirectory
    if mount.kind == "bind" and mount.destination.startswith(disk_options.BLOCKDEV):
        raise InvalidInput(
            "plan mount", subject=subject, why="only a disk can be shown as a device", code="blockdev-destination",
            hint="say type=disk or type=physical-disk",
        )  # fmt: skip
    if mount.kind == volumes.KIND:
        step = volumes.mount_step(index, mount, source, ours or {}, subject)
    elif mount.kind == "bind":
        step = _share(index, mount, source, subject)
    else:
        step = _disk(index, mount, source, subject, ours or {})
    # The same thing twice is one step: it is attached once, and mounted where each mount wants it.
    for other in earlier:
        if getattr(other, "path", "") != step.path:  # first of all: there may be hundreds
            continue
        if isinstance(other, MountDisk | ShareDirectory) and msgspec.structs.replace(other, id=step.id) == step:
            return other
    return step


def check_present(source: Source, subject: str) -> None:
    if source.kind == "missing":
        raise NotFound("plan mount", subject=subject, why=source.why, code="source-not-found")
    if source.kind == "dangling link":
        raise NotFound("plan mount", subject=subject, why="the source is a link to nothing", code="source-dangling")
    if source.kind == "unreadable":
        raise InvalidInput("plan mount", subject=subject, why=source.why, code="source-unreadable")


def _share(index: int, mount: Mount, source: Source, subject: str) -> ShareDirectory:
    if source.kind not in ("directory", "file"):
        raise Unsupported(
            "plan mount", subject=subject, why=f"a {source.kind} does not work across a machine's border",
            code="source-kind", hint="share the directory that it is in, and make it inside",
        )  # fmt: skip
    return ShareDirectory(
        f"m{index}", mount.source, source.device, source.inode, mount.read_only, source.kind == "file",
        "rbind" in mount.options or "bind" not in mount.options, _cache_mode(mount, subject),
        fork=disk_options.take(mount.options, subject).fork,
    )  # fmt: skip


def _cache_mode(mount: Mount, subject: str) -> str:
    modes = [option.partition("=")[2] for option in mount.options if option.startswith("cache=")]
    if unknown := [mode for mode in modes if mode not in CACHE_MODES]:
        raise InvalidInput(
            "plan mount", subject=subject, why=f"cache={unknown[0]} is none of {', '.join(CACHE_MODES)}",
            code="cache-mode",
        )  # fmt: skip
    return modes[-1] if modes else "mmap"


def check_shares(steps: Sequence[AnyStep], *, writable: bool) -> None:
    """The pod's, or the container's, policy on shares.

    Raises:
        InvalidInput: one is writable that must not be.
    """
    for step in steps:
        if isinstance(step, ShareDirectory) and not (step.read_only or writable):
            raise InvalidInput(
                "plan container", subject=step.path, why="adding writable shares is denied",
                code="writable-share-denied",
                hint="share it read-only" if step.id != "root" else "make the root filesystem read-only",
            )  # fmt: skip


def _disk(index: int, mount: Mount, source: Source, subject: str, ours: Mapping[tuple[int, int], bool]) -> MountDisk:
    physical = mount.kind == "physical-disk"
    if physical and source.kind != "block device":
        raise InvalidInput(
            "plan mount", subject=subject, why=f"the source is a {source.kind}, not a block device", code="source-kind"
        )
    if source.kind not in ("file", "block device"):
        raise InvalidInput(
            "plan mount", subject=subject, why=f"the source is a {source.kind}, not a disk", code="source-kind"
        )
    if source.mounted and (source.device, source.inode) not in ours:
        raise InUse(
            "plan mount", subject=subject, code="disk-in-use", hint="unmount it, or end that pod first",
            why="the host, or another pod, uses this device, a part of it, or what it is a part of",
        )  # fmt: skip
    wanted = disk_options.take(mount_options.split(mount.options), subject)
    disk_format = _disk_format(source, wanted.disk_format, subject)
    if not source.size_bytes or (source.size_bytes % 512 and disk_format == "raw"):
        raise InvalidInput(
            "plan mount",
            subject=subject,
            why=f"{source.size_bytes} bytes are no whole number of sectors",
            code="disk-size",
        )
    block_dev = mount.destination.startswith(disk_options.BLOCKDEV)
    if block_dev:
        _check_device_path(mount.destination.removeprefix(disk_options.BLOCKDEV), subject)
    # Only of a whole disk, and only in the format that was looked at, is it known what is on it.
    known = disk_format == source.disk_format == "raw" and not wanted.partition and not block_dev
    if known and source.filesystem in ("", "luks", "swap"):
        raise InvalidInput(
            "plan mount", subject=subject, code="no-filesystem",
            why=f"it holds {source.filesystem}, not a filesystem" if source.filesystem else "no known filesystem on it",
            hint="make one with mkfs, or name one of its partitions: partition=1; Holdfast never formats a disk that it"
            " did not make",
        )  # fmt: skip
    filesystem = source.filesystem if known else ""
    read_only = mount.read_only or filesystem in ("erofs", "squashfs", "iso9660")
    fork_policy.check(mount, subject, read_only=read_only, block_device=source.kind == "block device")
    if wanted.access == "group" and not read_only:
        raise InvalidInput(
            "plan mount", subject=subject, why="a disk that several pods may have is read-only in all", code="access",
            hint="add ro",
        )  # fmt: skip
    kept = tuple(option for option in wanted.options if option not in _BIND_WORDS and not _is_access(option))
    return MountDisk(
        f"m{index}", mount.source, source.device, source.inode, read_only, disk_format,
        source.kind == "block device", filesystem, () if block_dev else kept, wanted.partition, block_dev,
        wanted.access, wanted.fork,
    )  # fmt: skip


def _disk_format(source: Source, wanted: str, subject: str) -> str:
    """The format that the file has, or is said to have: any may be read as raw."""
    if wanted == "raw":
        return wanted
    if needs_parent(source.disk_format):
        kind = plain(source.disk_format)
        raise Unsupported(
            "plan mount", subject=subject, why=f"this {kind} image refers to another file, which is not opened",
            code="disk-format", hint="qemu-img convert makes one that stands alone",
        )  # fmt: skip
    if wanted and wanted != source.disk_format:
        raise InvalidInput(
            "plan mount", subject=subject, why=f"it is no {wanted} image but {source.disk_format}", code="disk-format"
        )
    return source.disk_format


def _check_device_path(path: str, subject: str) -> None:
    """Where the container gets the device; empty if no container does."""
    if path and (not path.startswith("/") or clean_path(path) in ("/", "/dev")):
        raise InvalidInput(
            "plan mount", subject=subject, code="blockdev-destination",
            why="after blockdev:// comes the absolute path of the device in the container",
            hint="dst=blockdev:///dev/data",
        )  # fmt: skip


def _is_access(option: str) -> bool:
    return mount_options.is_read_only([option]) or option.lower() in ("ro", "rw", "readonly")


def guest_options(mount: Mount) -> tuple[str, ...]:
    """Options of the bind that the runtime makes from the guest's path to the container's."""
    parsed = mount_options.parse(mount.options)
    if parsed.flags & syscalls.MS_NOSYMFOLLOW:
        raise Unsupported(
            "plan mount", subject=f"{mount.source} at {mount.destination}", why="the runtime ignores nosymfollow",
            code="mount-option", hint="attach it when the container runs: then it holds",
        )  # fmt: skip
    # In the plainest words: of the runtime's other spellings some do nothing, and some something else.
    kept = mount_options.words(parsed)
    bind = "bind" if "bind" in mount.options and "rbind" not in mount.options else "rbind"
    return (bind, "ro" if mount.read_only else "rw", *kept)
