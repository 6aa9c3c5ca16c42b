"""What a pod in namespaces can have when nobody in it is the host's root: the rest is refused before it is tried.

The kernel lets a user namespace mount overlays, tmpfs, proc and binds; filesystems on disks it does not, nor are there
loop devices to attach, or control groups to make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from holdfast.errors import Unsupported
from holdfast.storage.steps import MakeScratch, MountDisk, MountLayer, UseVolume

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.storage.steps import AnyStep

CODE = "rootless-unsupported"
_AS_ROOT = "run it as root, or use --isolation vm, which reads disks in its guest"
_UNPACKED = "unpack the image (umoci unpack --rootless) and use --rootfs DIR; or run it as root, or with --isolation vm"


def check_steps(steps: Iterable[AnyStep]) -> None:
    """Refuses the steps that take the host's root.

    Raises:
        Unsupported: ``rootless-unsupported``.
    """
    for step in steps:
        match step:
            case MountLayer():
                name = step.diff_id.removeprefix("sha256:")[:12] or step.path
                _refuse(f"layer {name}", "layers of images are disks, and only the host's root mounts disks", _UNPACKED)
            case MakeScratch():
                _refuse("scratch disk", "only the host's root attaches and mounts disks", _UNPACKED)
            case MountDisk():
                _refuse(step.path, "only the host's root attaches and mounts disks", _AS_ROOT)
            case UseVolume(kind="disk"):
                _refuse(step.name, "only the host's root attaches and mounts disks", _AS_ROOT)
            case UseVolume(kind="hugepages"):
                _refuse(step.name, "only the host's root mounts hugetlbfs", _AS_ROOT)
            case UseVolume(kind="disk"):
                why = "only the host's root attaches and mounts disks"
                _refuse(step.name, why, "have it in memory: mount it with type=tmpfs, not bind")


def check_limits(document: dict[str, Any]) -> None:
    """Refuses limits that nobody would keep.  Rules for devices are kept by the user namespace: it can make none.

    Raises:
        Unsupported: ``rootless-unsupported``.
    """
    for name, value in ((document.get("linux") or {}).get("resources") or {}).items():
        if name != "devices" and value:
            _refuse(
                f"linux.resources.{name}", "limits are control groups, which only the host's root makes",
                "leave it out, run it as root, or use --isolation vm",
            )  # fmt: skip


def _refuse(subject: str, why: str, hint: str) -> NoReturn:
    raise Unsupported("plan container", subject=subject, why=f"without root {why}", code=CODE, hint=hint)
