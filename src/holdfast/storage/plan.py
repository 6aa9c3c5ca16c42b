"""Planning: a specification and what was seen of its sources become an ordered list of steps.

Pure: nothing is opened, made or asked here.  Every error that can be known from the input is raised here,
before any side effect, and the caller's specification is never changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.errors import Exhausted, InUse, InvalidInput, NotFound, Unsupported
from holdfast.image.records import Verity  # noqa: TC001  msgspec reads the type
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.spec import disk_options
from holdfast.spec.annotations import NO_WRITABLE_SHARES
from holdfast.spec.annotations import flag as annotation_flag
from holdfast.spec.mounts import CACHE_MODES
from holdfast.spec.pmem import pmem_limits
from holdfast.spec.runtime import DISK_TYPES, Mount, Spec, clean_path
from holdfast.storage import volume_plan, volumes
from holdfast.storage.disk_formats import needs_parent, plain
from holdfast.storage.pci import parse_function
from holdfast.storage.scratch import whole_blocks
from holdfast.storage.steps import (
    AnyStep,
    AssignDevice,
    CombineLayers,
    MakeScratch,
    MountDisk,
    MountLayer,
    Plan,
    Rewrite,
    RunContainer,
    ShareDirectory,
    UseVolume,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdfast.spec.hints import Hint
    from holdfast.storage.survey import Source

#: Types that only a later stage of the plan could resolve.
_NOT_YET = frozenset({"image"})
#: OVL_MAX_STACK of fs/overlayfs.
MOST_LAYERS = 500
_BIND_WORDS = frozenset({"bind", "rbind"})


class LayeredRoot(msgspec.Struct, frozen=True, tag="layers"):
    """A root filesystem made of layer disks.

    Attributes:
        layers: (path of the disk, diffID), top-most first.
        scratch_bytes: size of the disk for the container's writes; 0 makes the root read-only.
        mode, uid, gid: of ``/``.
        verity: what each layer is to be checked by, by the path of its disk; empty for not at all.
        encrypted, shared: of the scratch disk; see :class:`~holdfast.storage.steps.MakeScratch`.
        volumes: paths of the image that are to be volumes.
    """

    layers: tuple[tuple[str, str], ...]
    scratch_bytes: int
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    verity: dict[str, Verity] = {}
    encrypted: bool = False
    shared: bool = False
    volumes: tuple[str, ...] = ()


class DirectoryRoot(msgspec.Struct, frozen=True, tag="directory"):
    """A root filesystem that is a directory of the host, served over 9p."""

    path: str
    read_only: bool


class PodSnapshot(msgspec.Struct, frozen=True):
    """What a pod holds at the time of planning.

    Attributes:
        free_slots: SCSI slots left.
        containers: names in use.
        disks: (device, inode) of attached disks -> whether writable.
        holders: the same -> who has them.
        layers: (path, root hash that it is checked by) of attached layers.
        scratch: whether the scratch disks that containers share are encrypted.
        writable_shares: whether the pod may have any.
        hints: which mounts its containers share.
    """

    free_slots: int = 256
    containers: frozenset[str] = frozenset()
    disks: dict[tuple[int, int], bool] = {}
    holders: dict[tuple[int, int], tuple[str, ...]] = {}
    layers: frozenset[tuple[str, str]] = frozenset()
    scratch: frozenset[bool] = frozenset()
    writable_shares: bool = True
    hints: tuple[Hint, ...] = ()


def plan_container(
    name: str,
    raw: dict[str, Any],
    spec: Spec,
    root: LayeredRoot | DirectoryRoot,
    sources: dict[str, Source],
    snapshot: PodSnapshot | None = None,
    hints: tuple[Hint, ...] = (),
) -> Plan:
    """The plan for one container.

    Args:
        raw, spec: the specification, as a document and typed.
        sources: what the survey saw, by path.
        snapshot: the pod that it joins; None is a new one.
        hints: which mounts the pod's containers share: what the pod knows, and what this one says.

    Raises:
        InvalidInput, NotFound, InUse, Unsupported, Exhausted: what is wrong with the input.
    """
    pod = snapshot or PodSnapshot()
    if name in pod.containers:
        raise InUse("run container", subject=name, why="the pod has one of this name", code="container-exists")
    if spec.process is None:
        raise InvalidInput("run container", subject=name, why="its specification has no process", code="spec-invalid")
    steps, root_step = _root_steps(root, sources, pmem=pmem_limits(spec.annotations).count > 0)
    rewrites: list[Rewrite] = []
    ours = {**pod.disks, **volumes.written(spec.mounts, sources)}
    for index, mount in enumerate(spec.mounts):
        step = _step_for(index, mount, sources, steps, ours, volume_plan.hinted(spec, mount, hints))
        if step is not None:
            if step.id == f"m{index}":
                steps.append(step)
            rewrites.append(Rewrite(index, step.id, _guest_options(mount)))
    _check_disks(steps, pod)
    check_shares(
        steps, writable=pod.writable_shares and not annotation_flag(spec.annotations, NO_WRITABLE_SHARES)
    )  # fmt: skip
    if isinstance(root, LayeredRoot):
        for filling, rewrite in volume_plan.image_volumes(root.volumes, spec.mounts):
            steps.append(filling)
            rewrites.append(rewrite)
    steps += _device_steps(spec)
    steps.append(RunContainer("run", spec.process.args))
    return Plan(name, tuple(steps), raw, root_step, tuple(rewrites))


def _step_for(
    index: int,
    mount: Mount,
    sources: dict[str, Source],
    earlier: list[AnyStep],
    ours: Mapping[tuple[int, int], bool],
    hinted: tuple[Hint, str] | None,
) -> MountDisk | ShareDirectory | UseVolume | None:
    if hinted is None:
        return volume_plan.of_the_pod(index, mount) or mount_step(index, mount, sources, earlier, ours)
    hint, sub_path = hinted
    if hint.kind == "tmpfs":
        return volume_plan.shared_volume(index, hint, sub_path)
    if sub_path and mount.source in sources:
        _check_present(sources[mount.source], f"mounts[{index}] {mount.source} at {mount.destination}")
    step = mount_step(index, volume_plan.shared_directory(mount, hint), sources, [])
    return msgspec.structs.replace(step, sub_path=sub_path) if isinstance(step, ShareDirectory) else step


def _device_steps(spec: Spec) -> list[AnyStep]:
    keys = dict.fromkeys(parse_function(device.id, device.id_type or "pci") for device in spec.windows.devices)
    return [AssignDevice(f"device{index}", key.address, key.function) for index, key in enumerate(keys)]


def _root_steps(
    root: LayeredRoot | DirectoryRoot, sources: dict[str, Source], *, pmem: bool
) -> tuple[list[AnyStep], str]:
    if isinstance(root, DirectoryRoot):
        source = sources[root.path]
        if source.kind != "directory":
            raise NotFound("share root filesystem", subject=root.path, why=source.why or f"it is a {source.kind}")
        share = ShareDirectory("root", root.path, source.device, source.inode, root.read_only)
        if not root.read_only:
            return [share], "root"
        # What is missing of the mount points is made above it, not in it.
        return [msgspec.structs.replace(share, id="tree"), CombineLayers("root", ("tree",))], "root"
    if not root.layers:
        raise InvalidInput("plan container", why="its root filesystem has no layers", code="no-layers")
    # A layer that is there twice (empty ones are) hides itself where it is lower, and overlayfs refuses to have both.
    layers = dict.fromkeys(root.layers)
    steps: list[AnyStep] = [
        MountLayer(f"layer{index}", path, diff_id, root.verity.get(path), pmem)
        for index, (path, diff_id) in enumerate(layers)
    ]
    if len(steps) > MOST_LAYERS:
        raise Unsupported(
            "plan container", why=f"{len(steps)} layers: overlayfs combines {MOST_LAYERS} at most",
            code="too-many-layers", hint="flatten the image",
        )  # fmt: skip
    layer_ids = tuple(step.id for step in steps)
    if root.scratch_bytes:
        steps.append(MakeScratch("scratch", whole_blocks(root.scratch_bytes), root.encrypted, root.shared))
    scratch = "scratch" if root.scratch_bytes else ""
    steps.append(CombineLayers("root", layer_ids, scratch, root.mode, root.uid, root.gid))
    return steps, "root"


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
    subject = f"mounts[{index}] {mount.source} at {mount.destination}"
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
    _check_present(source, subject)
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
        if isinstance(other, MountDisk | ShareDirectory) and msgspec.structs.replace(other, id=step.id) == step:
            return other
    return step


def _check_present(source: Source, subject: str) -> None:
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
    if wanted.access == "group" and not read_only:
        raise InvalidInput(
            "plan mount", subject=subject, why="a disk that several pods may have is read-only in all", code="access",
            hint="add ro",
        )  # fmt: skip
    kept = tuple(option for option in wanted.options if option not in _BIND_WORDS and not _is_access(option))
    return MountDisk(
        f"m{index}", mount.source, source.device, source.inode, read_only, disk_format,
        source.kind == "block device", filesystem, () if block_dev else kept, wanted.partition, block_dev,
        wanted.access,
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


def _guest_options(mount: Mount) -> tuple[str, ...]:
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


def _check_disks(steps: list[AnyStep], pod: PodSnapshot) -> None:
    """One writer, and slots enough, before anything is touched."""
    modes: dict[tuple[int, int], bool] = dict(pod.disks.items())
    slots = _slots_needed(steps, pod)
    if slots > pod.free_slots:
        raise Exhausted(
            "plan container", why=f"{slots} disks needed, {pod.free_slots} SCSI slots free", code="no-free-slot",
            hint="a pod holds 256 disks",
        )  # fmt: skip
    for step in steps:
        if not isinstance(step, MountDisk):
            continue
        key = (step.device, step.inode)
        writable = not step.read_only
        if modes.setdefault(key, writable) != writable or (writable and _times(steps, step) > 1):
            holders = ", ".join(pod.holders.get(key, ()))
            raise InUse(
                "plan container", subject=step.path,
                why=f"it would be open for writing and a second time{f'; {holders} has it' if holders else ''}",
                code="disk-in-use", hint="one writer, or any number of readers",
            )  # fmt: skip


def _slots_needed(steps: list[AnyStep], pod: PodSnapshot) -> int:
    """What is attached already, and what several steps attach, takes no slot of its own.

    Nor do layers that are to be in persistent memory: whether one finds no room there is known when it is tried.
    """
    wanted = [step for step in steps if isinstance(step, MountLayer) and not step.pmem]
    layers = {(step.path, step.verity.root_hash if step.verity else "") for step in wanted} - pod.layers
    disks = {(step.device, step.inode) for step in steps if isinstance(step, MountDisk)} - set(pod.disks)
    scratch = [step for step in steps if isinstance(step, MakeScratch)]
    made = sum(not (step.shared and step.encrypted in pod.scratch) for step in scratch)
    return len(layers) + len(disks) + made


def _times(steps: list[AnyStep], disk: MountDisk) -> int:
    """How many steps would use what this one uses: two partitions of a disk are not the same."""
    same = [s for s in steps if isinstance(s, MountDisk) and (s.device, s.inode) == (disk.device, disk.inode)]
    return sum(other.partition == disk.partition or 0 in (other.partition, disk.partition) for other in same)
