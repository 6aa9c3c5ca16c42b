"""Mount points that are made in a container that runs, and go when the mount is taken out.

If the container ends first, they stay where it had them: in its own filesystem, or in another mount of its own.
"""

from __future__ import annotations

import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.linux.fds import OwnedFd
    from holdfast.mounts.root import Root


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
