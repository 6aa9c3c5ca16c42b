"""Mount points that a root filesystem lacks, where that is a directory of the host's which is written to.

A runtime makes them and leaves them there.  So they are made here before it, and removed when the last container that
has the directory for its root is gone: removing one under a mount would take the mount away from whoever has it, in
whatever mount namespace (rmdir(2) does, since Linux 3.18).
"""

from __future__ import annotations

import fcntl
import os
import stat

from holdfast.linux.fds import OwnedFd
from holdfast.mounts.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Device and inode of a root filesystem -> its users.
_roots: dict[tuple[int, int], UsedRoot] = {}


class UsedRoot:
    """A directory that containers have for their root filesystem.

    Attributes:
        lock: the directory, locked for as long: other pods on this kernel may use it, too.
        users: names of the containers.
        made: the mount points that were made, outermost first.
    """

    def __init__(self, lock: OwnedFd) -> None:
        self.lock = lock
        self.users: set[str] = set()
        self.made: list[bytes] = []


def make(spec: dict[str, Any], name: str) -> None:
    """Makes the mount points of a container; one that cannot be made is the runtime's to complain of."""
    fd = OwnedFd(os.open(spec["root"]["path"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    status = os.fstat(fd.fileno())
    used = _roots.setdefault((status.st_dev, status.st_ino), UsedRoot(fd))
    if used.lock is not fd:
        fd.close()
    fcntl.flock(used.lock.fileno(), fcntl.LOCK_SH)
    used.users.add(name)
    above: list[str] = []
    with Root(used.lock.fileno()) as root:
        for mount in spec.get("mounts") or ():
            path = str(mount.get("destination")).strip("/")
            # What is mounted in a mount has its mount point there.
            if path and not any(path.startswith(f"{other}/") for other in above):
                there = len(used.made)
                try:
                    with place(root, os.fsencode(path), _is_directory(mount), used.made) as point:
                        if len(used.made) > there and mount.get("type") == "tmpfs":
                            os.chmod(f"/proc/self/fd/{point.fileno()}", _mode_of_tmpfs(mount))
                except OSError:
                    continue
            above.append(path)


def _mode_of_tmpfs(mount: dict[str, Any]) -> int:
    """What a tmpfs is to have: runc gives it the mode of the mount point that it finds, whatever its options say."""
    modes = [option.removeprefix("mode=") for option in mount.get("options") or () if option.startswith("mode=")]
    try:
        return int(modes[-1], 8) & 0o7777 if modes else 0o1777
    except ValueError:
        return 0o1777  # the kernel will refuse it


def _is_directory(mount: dict[str, Any]) -> bool:
    binds = mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options") or ())
    return not binds or os.path.isdir(str(mount.get("source")))


def place(root: Root, path: bytes, directory: bool, made: list[bytes]) -> OwnedFd:
    """Opens a mount point, made if it is missing.

    Args:
        made: gets the path of each directory, and of the file, that was made, outermost first.

    Raises:
        OSError: it cannot be made, or is no directory.
    """
    if directory:
        return root.mkdir_all(path, made=made)
    head, name = path.rstrip(b"/").rpartition(b"/")[::2]
    root.mkdir_all(head, made=made).close()
    if not root.exists(path):
        root.create(path, 0o644).close()
        made.append((head.strip(b"/") + b"/" + name).lstrip(b"/"))
    return root.resolve(path)


def remove(name: str) -> None:
    """A container is gone, and with the last one what was made; no error if it had nothing."""
    for key, used in list(_roots.items()):
        used.users.discard(name)
        if used.users:
            continue
        try:
            fcntl.flock(used.lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another pod is there, and may have something mounted on them
            used.made.clear()
        with Root(used.lock.fileno()) as root:
            unmake(root, used.made)
        used.lock.close()
        del _roots[key]


def unmake(root: Root, made: list[bytes]) -> None:
    """Removes what was made to mount on, as far as it is empty; the rest is somebody's by now."""
    for path in reversed(made):
        try:
            status = root.stat(path)
            if stat.S_ISDIR(status.st_mode):
                root.rmdir(path)
            elif stat.S_ISREG(status.st_mode) and not status.st_size:
                root.unlink(path)
        except OSError:
            continue
