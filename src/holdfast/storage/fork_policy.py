"""What becomes of a mount in a copy of its pod: which mounts may say what, and which are to be empty there.

The policy is the mount's option ``x-holdfast.fork``.  It is kept with what it is about: with a disk's attachment, and
that of a tmpfs, which the runtime makes, in the container's specification; so copies of copies know it, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.errors import InUse, InvalidInput
from holdfast.mounts import options as mount_options
from holdfast.spec import disk_options
from holdfast.spec.disk_options import BLOCKDEV, PREFIX
from holdfast.spec.runtime import DISK_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.spec.runtime import Mount
    from holdfast.storage.attachments import Disk
    from holdfast.storage.frozen import FrozenStorage

FRESH = "fresh"


# -- for plans: pure ------------------------------------------------------------------------------


def check(
    mount: Mount, subject: str, *, read_only: bool = False, block_device: bool = False, of_pod: bool = False
) -> None:
    """Checks that what a mount says of copies can be done with such a mount.

    Args:
        read_only: whether it is, whatever its options say.
        block_device: whether its source is one.
        of_pod: whether it is a view of something that the pod has for all of its containers.

    Raises:
        InvalidInput: ``mount-option``.
    """
    if not any(PREFIX in option for option in mount.options):  # first of all: there may be hundreds
        return
    fork = disk_options.take(mount_options.split(mount.options), subject).fork
    why, hint = "", "a writable disk image, a named volume or a mount of type=tmpfs can"
    if of_pod and fork not in ("", "copy"):
        why, hint = "all containers of the pod have it, and each copy its own", "leave fork out, or say type=tmpfs"
    elif fork == FRESH and mount.kind == "bind":
        why = "what the host has there is not to be removed in copies"
    elif fork == FRESH and mount.destination.startswith(BLOCKDEV):
        why = "a disk that is not mounted cannot be emptied"
    elif fork == FRESH and (read_only or mount.read_only):
        why = "it is only read, so there is nothing to begin anew with"
    elif fork == FRESH and block_device:
        why = "its copy would be as large as the block device is"
    elif mount.kind == "tmpfs":
        why, hint = _of_memory(mount, fork)
    elif fork and mount.kind not in (*DISK_TYPES, "bind", "volume"):
        why = f"a mount of type {mount.kind} has nothing that is kept"
    if why:
        raise InvalidInput(
            "plan mount", subject=subject, why=f"fork={fork}: {why}", code="mount-option", hint=hint
        )  # fmt: skip


def _of_memory(mount: Mount, fork: str) -> tuple[str, str]:
    if fork in ("share", "deny"):
        return "memory is copied with the machine", "copy, or fresh to have it empty in copies"
    if fork == FRESH and "tmpcopyup" in mount_options.split(mount.options):
        return "what tmpcopyup puts there is not in copies", "leave one of the two out"
    return "", ""


def for_runtime(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification without what is for Holdfast alone: a runtime hands to the kernel what it does not know."""
    mounts = [
        {**mount, "options": [o for o in mount_options.split(mount["options"]) if not o.startswith(PREFIX)]}
        if any(PREFIX in option for option in mount.get("options") or ())
        else mount
        for mount in spec.get("mounts") or ()
    ]
    return {**spec, "mounts": mounts}


# -- for the pod that runs ------------------------------------------------------------------------


def check_same(wanted: Disk, attached: Disk) -> None:
    """Checks that who attaches a disk that is attached already does not want something else of copies.

    Raises:
        InUse: ``fork-policy``.
    """
    if wanted.fork and wanted.in_copies != attached.in_copies:
        raise InUse(
            "mount disk", subject=wanted.path, why=f"the pod has it with fork={attached.in_copies}", code="fork-policy",
            hint="say the same, or nothing",
        )  # fmt: skip


def emptied(storage: FrozenStorage, specs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What is to be empty in a copy: ``{"disks": [path in the guest], "memory": {container: [destination]}}``.

    Args:
        storage: of the pod that is copied, or is a copy.
        specs: of its containers that run.
    """
    fresh = {disk.attachment.key for disk in storage.disks if disk.attachment.disk.fork == FRESH}
    disks = [mount.guest_path for mount in storage.mounts if mount.key.disk in fresh and not mount.key.block_dev]
    memory = {
        name: [mount["destination"] for mount in spec.get("mounts") or () if _is_fresh_memory(mount)]
        for name, spec in specs.items()
    }
    return {"disks": disks, "memory": {name: places for name, places in memory.items() if places}}


def _is_fresh_memory(mount: dict[str, Any]) -> bool:
    options = mount.get("options") or ()
    if mount.get("type") != "tmpfs" or not any(PREFIX in option for option in options):
        return False
    return disk_options.take(mount_options.split(options), mount["destination"]).fork == FRESH
