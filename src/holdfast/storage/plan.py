"""Planning: a specification and what was seen of its sources become an ordered list of steps.

Pure: nothing is opened, made or asked here.  Every error that can be known from the input is raised here,
before any side effect, and the caller's specification is never changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.errors import Exhausted, InUse, InvalidInput, NotFound, Unsupported
from holdfast.image.records import Verity  # noqa: TC001  msgspec reads the type
from holdfast.spec.annotations import NO_WRITABLE_SHARES
from holdfast.spec.annotations import flag as annotation_flag
from holdfast.spec.pmem import pmem_limits
from holdfast.storage import fork_policy, overlay_plan, volume_plan, volumes
from holdfast.storage.mount_plan import check_present, check_shares, guest_options, mount_step, mount_subject
from holdfast.storage.mount_point_plan import make_mount_points
from holdfast.storage.pci import parse_function
from holdfast.storage.scratch import whole_blocks
from holdfast.storage.steps import (
    AnyStep,
    AssignDevice,
    CombineLayers,
    MakeScratch,
    MountDisk,
    MountLayer,
    OverlayMount,
    Plan,
    Rewrite,
    RunContainer,
    ShareDirectory,
    UseVolume,
)  # fmt: skip

if TYPE_CHECKING:
    from holdfast.spec.hints import Hint
    from holdfast.spec.runtime import Mount, Spec
    from holdfast.storage.survey import Source

#: OVL_MAX_STACK of fs/overlayfs.
MOST_LAYERS = 500


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
        volumes: name of a volume of its own -> type.
    """

    free_slots: int = 256
    containers: frozenset[str] = frozenset()
    disks: dict[tuple[int, int], bool] = {}
    holders: dict[tuple[int, int], tuple[str, ...]] = {}
    layers: frozenset[tuple[str, str]] = frozenset()
    scratch: frozenset[bool] = frozenset()
    writable_shares: bool = True
    hints: tuple[Hint, ...] = ()
    volumes: dict[str, str] = {}


def plan_container(
    name: str,
    raw: dict[str, Any],
    spec: Spec,
    root: LayeredRoot | DirectoryRoot,
    sources: dict[str, Source],
    snapshot: PodSnapshot | None = None,
    hints: tuple[Hint, ...] = (),
    *,
    tmp: bool = False,
) -> Plan:
    """The plan for one container.

    Args:
        raw, spec: the specification, as a document and typed.
        sources: what the survey saw, by path.
        snapshot: the pod that it joins; None is a new one.
        hints: which mounts the pod's containers share: what the pod knows, and what this one says.
        tmp: whether ``/tmp`` is to be in memory, if the root filesystem has nothing there.

    Raises:
        InvalidInput, NotFound, InUse, Unsupported, Exhausted: what is wrong with the input.
    """
    pod = snapshot or PodSnapshot()
    if name in pod.containers:
        raise InUse("run container", subject=name, why="the pod has one of this name", code="container-exists")
    if spec.process is None:
        raise InvalidInput("run container", subject=name, why="its specification has no process", code="spec-invalid")
    steps, root_step = _root_steps(root, sources, pmem=pmem_limits(spec.annotations).count > 0)
    rewrites = _mount_steps(spec, sources, steps, pod, hints)
    _check_disks(steps, pod)
    check_shares(
        steps, writable=pod.writable_shares and not annotation_flag(spec.annotations, NO_WRITABLE_SHARES)
    )  # fmt: skip
    if isinstance(root, LayeredRoot):
        for filling, rewrite in volume_plan.image_volumes(root.volumes, spec.mounts):
            steps.append(filling)
            rewrites.append(rewrite)
    elif not root.read_only:
        steps.append(make_mount_points(sources[root.path], spec.mounts, rewrites, steps, sources, tmp=tmp))
    steps += _device_steps(spec)
    steps.append(RunContainer("run", spec.process.args))
    return Plan(name, tuple(steps), raw, root_step, tuple(rewrites))


def _mount_steps(
    spec: Spec, sources: dict[str, Source], steps: list[AnyStep], pod: PodSnapshot, hints: tuple[Hint, ...]
) -> list[Rewrite]:
    """Adds to ``steps`` what the mounts take; returns which mounts become paths in the guest."""
    rewrites: list[Rewrite] = []
    over = [overlay_plan.wants(mount, mount_subject(index, mount)) for index, mount in enumerate(spec.mounts)]
    shown = [overlay_plan.upper(mount) for mount in spec.mounts]
    below = [overlay_plan.lower(mount) if o else mount for mount, o in zip(shown, over, strict=True)]
    ours = {**pod.disks, **volumes.written(below, sources)}
    scratch = next((step for step in steps if isinstance(step, MakeScratch)), None)
    for index, mount in enumerate(below):
        step: AnyStep | None
        hinted, own = volume_plan.hinted(spec, mount, hints), volume_plan.of_the_pod(index, mount)
        if hinted or own:
            fork_policy.check(mount, mount_subject(index, mount), of_pod=True)
        if hinted:
            encrypted = scratch is not None and scratch.encrypted
            step = _shared_step(index, mount, *hinted, sources, pod, encrypted=encrypted)
        else:
            step = own or mount_step(index, mount, sources, steps, ours)
        if step is not None and step.id == f"m{index}":
            steps.append(step)
        if over[index]:
            lower = overlay_plan.checked(step, mount_subject(index, mount))
            step = OverlayMount(f"o{index}", lower.id, mount.target, scratch.id if scratch else "")
            steps.append(step)
        if step is not None:
            rewrites.append(Rewrite(index, step.id, guest_options(shown[index])))
    return rewrites


def _shared_step(
    index: int, mount: Mount, hint: Hint, sub_path: str, sources: dict[str, Source], pod: PodSnapshot, *,
    encrypted: bool,
) -> AnyStep | None:  # fmt: skip
    """The step for a mount that the pod's containers share."""
    if hint.kind == "tmpfs":
        return volume_plan.shared_volume(index, mount, hint, sub_path, pod.volumes, encrypted=encrypted)
    if sub_path and mount.source in sources:
        check_present(sources[mount.source], mount_subject(index, mount))
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
    kept = {step.name for step in steps if isinstance(step, UseVolume) and step.kind == "disk"} - set(pod.volumes)
    scratch = [step for step in steps if isinstance(step, MakeScratch)]
    made = sum(not (step.shared and step.encrypted in pod.scratch) for step in scratch)
    return len(layers) + len(disks) + len(kept) + made


def _times(steps: list[AnyStep], disk: MountDisk) -> int:
    """How many steps would use what this one uses: two partitions of a disk are not the same."""
    same = [s for s in steps if isinstance(s, MountDisk) and (s.device, s.inode) == (disk.device, disk.inode)]
    return sum(other.partition == disk.partition or 0 in (other.partition, disk.partition) for other in same)
