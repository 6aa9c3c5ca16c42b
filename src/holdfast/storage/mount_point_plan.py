"""The part of planning that is about mount points of a root filesystem that is a directory of the host's.

Pure, as all of planning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.mounts import options as mount_options
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.storage.steps import MakeMountPoints, MountPoint, OverlayMount, ShareDirectory, UseVolume

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from holdfast.spec.runtime import Mount
    from holdfast.storage.steps import AnyStep, Rewrite
    from holdfast.storage.survey import Source

_TMPFS_MODE = 0o1777


def make_mount_points(
    root: Source, mounts: Sequence[Mount], rewrites: Iterable[Rewrite], steps: Iterable[AnyStep],
    sources: Mapping[str, Source], *, tmp: bool,
) -> MakeMountPoints:  # fmt: skip
    """The step that makes them.

    Args:
        tmp: whether ``/tmp`` is to be in memory, if the root filesystem has nothing there.
    """
    by_id = {step.id: step for step in steps}
    yields = {rewrite.index: by_id[rewrite.step] for rewrite in rewrites}
    points: list[MountPoint] = []
    above: set[str] = set()
    for index, mount in enumerate(mounts):
        path = mount.target.strip("/")
        if not path or mount.destination.startswith(BLOCKDEV):
            continue
        # What is mounted in a mount has its mount point there.
        if above.isdisjoint(path[:end] for end, character in enumerate(path) if character == "/"):
            step = yields.get(index)
            if isinstance(step, OverlayMount):
                step = by_id[step.below]
            # Of a path of the guest's own only the guest knows what it is.
            if not (isinstance(step, UseVolume) and step.kind == "uvm"):
                points.append(MountPoint(path, _is_directory(step, mount, sources), _mode(mount)))
        above.add(path)
    if tmp:
        points.append(MountPoint("tmp", mode=_TMPFS_MODE))
    return MakeMountPoints("points", root.path, root.device, root.inode, tuple(points))


def _is_directory(step: AnyStep | None, mount: Mount, sources: Mapping[str, Source]) -> bool:
    if not isinstance(step, ShareDirectory):
        return True
    if step.sub_path:
        return mount.source not in sources or sources[mount.source].kind == "directory"
    return not step.file


def _mode(mount: Mount) -> int:
    """What a tmpfs is to have: runc gives it the mode of the mount point that it finds, whatever its options say."""
    if mount.kind != "tmpfs":
        return 0o755
    modes = [word for word in mount_options.split(mount.options) if word.startswith("mode=")]
    try:
        return int(modes[-1].removeprefix("mode="), 8) & 0o7777 if modes else _TMPFS_MODE
    except ValueError:
        return _TMPFS_MODE  # the kernel will refuse it
