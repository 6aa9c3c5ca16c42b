"""What this kernel can do, asked once: the table in docs/mounts.md, as code.

A call is there when the kernel refuses nonsense arguments for a better reason than not knowing the call.  ENOSYS is a
kernel without it or a filter that says so; older filters say EPERM, and none of the questions here needs a
privilege that whoever mounts does not have.
"""

from __future__ import annotations

import errno
import os

from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ABSENT = (errno.ENOSYS, errno.EPERM)


class Feature:
    """One thing that a kernel may be able to do.

    Attributes:
        name: what the kernel calls it.
        kernel: the first version of Linux that has it.
        use: what it is used for here.
        fallback: what is done without it.
    """

    __slots__ = ("_found", "_probe", "fallback", "kernel", "name", "use")

    def __init__(self, name: str, kernel: str, use: str, fallback: str, probe: Callable[[], bool]) -> None:
        self.name = name
        self.kernel = kernel
        self.use = use
        self.fallback = fallback
        self._probe = probe
        self._found: bool | None = None

    def __bool__(self) -> bool:
        """Whether it is there; asked the first time only."""
        if self._found is None:
            self._found = self._probe()
        return self._found

    def __repr__(self) -> str:
        return f"Feature({self.name}, {bool(self)})"


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno not in _ABSENT
    return True


def _lowerdir_add() -> bool:
    try:
        fs_fd = syscalls.fsopen("overlay")
    except OSError:
        return False
    try:
        syscalls.fsconfig_string(fs_fd, "lowerdir+", "/")
    except OSError:
        return False
    finally:
        os.close(fs_fd)
    return True


def _unique_ids() -> bool:
    number, _ = syscalls.statx_mount(syscalls.AT_FDCWD, "/", mask=syscalls.STATX_MNT_ID_UNIQUE)
    return bool(number) and _answers(lambda: syscalls.listmount(0)) and _answers(lambda: syscalls.statmount(0))


def _detached_trees() -> bool:
    return _answers(lambda: syscalls.open_tree(-1, "", 0)) and _answers(
        lambda: syscalls.move_mount(-1, "", -1, "", syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    )


OPEN_TREE = Feature(
    "open_tree, move_mount", "5.2", "a bind mount gets its flags before anybody sees it",
    "mount(2), then a remount: the flags come a moment later", _detached_trees,
)  # fmt: skip
FSOPEN = Feature(
    "fsopen, fsconfig, fsmount", "5.2",
    "filesystems are made unseen, options are not bound to one page, the kernel's own words in errors",
    "mount(2): options of at most 4095 bytes",
    lambda: _answers(lambda: syscalls.fsconfig_flag(-1, "ro")) and _answers(lambda: syscalls.fsmount(-1)),
)  # fmt: skip
MOUNT_SETATTR = Feature(
    "mount_setattr", "5.12", "flags of a whole tree at once, such as read-only with sub-mounts",
    "remounts of one mount after the other",
    lambda: _answers(lambda: syscalls.mount_setattr(-1, "", syscalls.AT_EMPTY_PATH)),
)  # fmt: skip
IDMAP = Feature(
    "MOUNT_ATTR_IDMAP", "5.12", "mounts with other owners", "none: refused as unsupported",
    lambda: bool(MOUNT_SETATTR) and bool(OPEN_TREE),
)  # fmt: skip
LOWERDIR_ADD = Feature(
    "overlay's lowerdir+", "6.8", "one option for each layer, whatever their names are",
    "one option for all, by links with numbers for names where it would not fit a page", _lowerdir_add,
)  # fmt: skip
LISTMOUNT = Feature(
    "listmount, statmount", "6.8", "the mounts below a place, without reading those of the whole host",
    "/proc/self/mountinfo", _unique_ids,
)  # fmt: skip

ALL = (OPEN_TREE, FSOPEN, MOUNT_SETATTR, IDMAP, LOWERDIR_ADD, LISTMOUNT)
