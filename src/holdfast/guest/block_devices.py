"""Disks that a container gets as devices: mounts whose destination begins with ``blockdev://``.

Only the guest knows the device's number, so only here such a mount becomes a device of the specification and a rule
of its cgroup.
"""

from __future__ import annotations

import os
import stat

from holdfast.errors import InvalidInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PREFIX = "blockdev://"


def show(spec: dict[str, Any]) -> None:
    """Takes such mounts out of ``spec`` and puts devices in.

    Raises:
        InvalidInput: the source is no block device.
    """
    mounts = spec.get("mounts") or []
    wanted = [mount for mount in mounts if str(mount.get("destination")).startswith(PREFIX)]
    if not wanted:
        return
    spec["mounts"] = [mount for mount in mounts if mount not in wanted]
    linux = spec.setdefault("linux", {})
    resources = linux["resources"] = linux.get("resources") or {}
    linux["devices"], resources["devices"] = list(linux.get("devices") or []), list(resources.get("devices") or [])
    for mount in wanted:
        source, path = str(mount.get("source")), str(mount["destination"])[len(PREFIX) :]
        status = os.stat(source)
        if not stat.S_ISBLK(status.st_mode):
            raise InvalidInput("show device", subject=source, why="it is no block device", code="blockdev-destination")
        if not path:
            continue
        read_only = "ro" in (mount.get("options") or [])
        number = {"type": "b", "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
        linux["devices"].append({"path": path, **number, "fileMode": 0o440 if read_only else 0o660, "uid": 0, "gid": 0})
        resources["devices"].append({"allow": True, **number, "access": "r" if read_only else "rwm"})
