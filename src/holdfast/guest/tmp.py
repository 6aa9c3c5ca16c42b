"""A container's ``/tmp`` in memory where its image has nothing there: gVisor's rule."""

from __future__ import annotations

import os

from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def add_tmp(spec: dict[str, Any]) -> None:
    """Adds the mount, unless the root filesystem has something in ``/tmp``, or a file in its place.

    Only the guest can look: the host does not have the image's layers mounted.
    """
    try:
        with Root(spec["root"]["path"]) as root, root.resolve(b"tmp", os.O_RDONLY | os.O_DIRECTORY) as folder:
            if os.listdir(folder.fileno()):
                return
    except FileNotFoundError:
        pass
    except OSError:  # a file, a link in a circle
        return
    mounts = spec["mounts"] = list(spec.get("mounts") or ())
    mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
