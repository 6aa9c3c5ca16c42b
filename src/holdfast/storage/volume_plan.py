"""The part of planning that is about volumes of the pod: which mounts are one thing that several containers share.

Pure, as all of planning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import InvalidInput
from holdfast.spec.annotations import EXACT_HINTS, TMP
from holdfast.spec.annotations import flag as annotation_flag
from holdfast.spec.hints import Hint, backing, check_compatible, check_restated, match, parse_hints
from holdfast.spec.tree import TMP_POLICIES, TmpPolicy, container_tree, parse_source, tmp_mount
from holdfast.storage.scratch import DEFAULT_BYTES, MIN_BYTES, whole_blocks
from holdfast.storage.steps import FillVolume, Rewrite, UseVolume

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from holdfast.spec.runtime import Mount, Spec
    from holdfast.spec.tree import Tree


def whole_tree(spec: Spec) -> Tree:
    """All that is mounted in the container, in order; ``/tmp`` only if it is to be in memory whatever the image has.

    Raises:
        InvalidInput: ``annotation``; and see :func:`~holdfast.spec.tree.container_tree`.
    """
    return container_tree(spec.mounts, tmp="tmpfs" if _tmp_policy(spec) == "tmpfs" else "rootfs", image_tmp="empty")


def saved_tree(spec: Spec, default: TmpPolicy = "auto") -> Tree:
    """The same for who knows no image, but that it stays what it is: with the ``/tmp`` that an empty one would get.

    Args:
        default: see :func:`tmp_if_empty`.
    """
    return container_tree(spec.mounts, tmp=_tmp_policy(spec, default), image_tmp="empty")


def tmp_if_empty(spec: Spec, default: TmpPolicy) -> bool:
    """Whether ``/tmp`` is to be in memory if the image has nothing there, at which the guest looks.

    Args:
        default: if no annotation says it.
    """
    return tmp_mount(spec.mounts, _tmp_policy(spec, default), "empty") is not None


def _tmp_policy(spec: Spec, default: TmpPolicy = "auto") -> TmpPolicy:
    text = str(spec.annotations.get(TMP, default))
    policy = next((known for known in TMP_POLICIES if known == text), None)
    if policy is None:
        raise InvalidInput(
            "read annotation", subject=f"{TMP}={text}", why=f"it is none of {', '.join(TMP_POLICIES)}",
            code="annotation",
        )  # fmt: skip
    return policy


def of_the_pod(index: int, mount: Mount) -> UseVolume | None:
    """The step for a mount whose source is something that the pod has, not the host (``sandbox://`` and its like)."""
    source = parse_source(mount.source) if mount.kind == "bind" else None
    if source is None:
        return None
    return UseVolume(f"m{index}", source.volume, source.kind, source.options, source.path)


def pod_hints(annotations: Mapping[str, str], known: tuple[Hint, ...]) -> tuple[tuple[Hint, ...], tuple[Hint, ...]]:
    """The hints of the pod once a container has joined it, and those that the container's annotations say.

    Raises:
        InvalidInput: an annotation is wrong, or contradicts what the pod has.
    """
    found = parse_hints(annotations).hints
    taken = {hint.name for hint in known} | {hint.source for hint in known}
    check_restated(known, [hint for hint in found if hint.name in taken or hint.source in taken])
    return (*known, *(hint for hint in found if hint.name not in taken and hint.source not in taken)), found


def hinted(spec: Spec, mount: Mount, hints: Iterable[Hint]) -> tuple[Hint, str] | None:
    """The hint that makes a mount a shared one, and where below its source the mount begins.

    Raises:
        InvalidInput: the mount wants what the hint does not allow.
    """
    found = match(hints, mount)
    if found is None or not found[0].has_master:
        return None
    exact = annotation_flag(spec.annotations, EXACT_HINTS)
    check_compatible(found[0], mount.options, exact=exact, subject=f"{mount.source} at {mount.destination}")
    return found


def shared_volume(
    index: int, mount: Mount, hint: Hint, sub_path: str, kinds: Mapping[str, str], *, encrypted: bool
) -> UseVolume:
    """The step for a mount whose hint says that it is the pod's own, in memory or on a disk.

    Args:
        kinds: of the volumes that the pod has: where one is kept, its first user has decided.
        encrypted: whether what the container writes to a disk is to be.
    """
    kind = kinds.get(hint.source) or ("disk" if backing(hint, mount) == "disk" else "tmpfs")
    if kind != "disk":
        return UseVolume(f"m{index}", hint.source, kind, hint.master_options, sub_path)
    # Flags hold for each view, which must be as strict as the hint; of the rest, these are what a folder has.
    options = tuple(option for option in hint.master_options if option.partition("=")[0] in ("mode", "uid", "gid"))
    size_bytes = whole_blocks(max(hint.size_bytes or DEFAULT_BYTES, MIN_BYTES))
    return UseVolume(f"m{index}", hint.source, kind, options, sub_path, size_bytes, encrypted)


def shared_directory(mount: Mount, hint: Hint) -> Mount:
    """What is to be shared for a mount whose hint says that it is a directory: that of the hint, as the hint says.

    Over 9p a file is one thing to all containers, for locks and inotify, only where the guest caches it ("loose"):
    else Linux makes a new inode each time one is looked up.  So it is where nobody else writes to it.
    """
    kept = [option for option in hint.options if option != "bind"]
    if hint.exclusive and not any(option.startswith("cache=") for option in kept):
        kept.append("cache=loose")
    return msgspec.structs.replace(mount, source=hint.source, type="bind", options=("rbind", *kept))


def image_volumes(paths: Iterable[str], mounts: Iterable[Mount]) -> list[tuple[FillVolume, Rewrite]]:
    """A step and a mount for each volume of an image in whose place the specification does not mount something."""
    if not paths:
        return []
    from holdfast.mounts.copy_up import plan_volumes

    taken = {mount.target for mount in mounts}
    wanted = [volume.path for volume in plan_volumes(tuple(paths)) if volume.path not in taken]
    steps = [FillVolume(f"volume{number}", path) for number, path in enumerate(wanted)]
    return [(step, Rewrite(-1, step.id, ("rbind", "rw"), step.name)) for step in steps]
