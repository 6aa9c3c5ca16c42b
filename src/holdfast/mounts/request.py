"""A mount's options, sorted by who acts on them: this library, the mount, the filesystem."""

from __future__ import annotations

from holdfast.errors import InvalidInput, Unsupported
from holdfast.linux import syscalls as sys_
from holdfast.mounts import idmap, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.mounts.model import Mount

_ATIME = sys_.MS_NOATIME | sys_.MS_RELATIME | sys_.MS_STRICTATIME
#: Flags of mount(2) that belong to one mount of a filesystem, and their names in mount_setattr(2).
_ATTRIBUTES = {
    sys_.MS_RDONLY: sys_.MOUNT_ATTR_RDONLY,
    sys_.MS_NOSUID: sys_.MOUNT_ATTR_NOSUID,
    sys_.MS_NODEV: sys_.MOUNT_ATTR_NODEV,
    sys_.MS_NOEXEC: sys_.MOUNT_ATTR_NOEXEC,
    sys_.MS_NOATIME: sys_.MOUNT_ATTR_NOATIME,
    sys_.MS_RELATIME: sys_.MOUNT_ATTR_RELATIME,
    sys_.MS_STRICTATIME: sys_.MOUNT_ATTR_STRICTATIME,
    sys_.MS_NODIRATIME: sys_.MOUNT_ATTR_NODIRATIME,
    sys_.MS_NOSYMFOLLOW: sys_.MOUNT_ATTR_NOSYMFOLLOW,
}
OF_MOUNT = sum(_ATTRIBUTES)
#: Prefixes of types that containerd's mount manager takes off before it mounts; the kernel knows none of them.
_TEMPLATES = ("format", "mkfs", "mkdir")
_MOST_KEPT = 256

_kept: dict[tuple[str, tuple[str, ...]], Request] = {}


class Request:
    """What :func:`read` found.

    Attributes:
        kind: the filesystem's type; ``bind``; empty if it is to be looked at.
        flags: of mount(2).
        recursive: the part of these that holds for all of a bound tree.
        propagation: of mount(2), one call each.
        data: options of the filesystem.
        words: all options, for mount programs; without those of propagation.
        loop: whether the source is a file, to be put behind a loop device.
        direct_io: whether that device does not cache.
        maps: other owners.
        is_plain_bind: whether one call of mount(2) does all of it.
    """

    __slots__ = (
        "data", "direct_io", "flags", "is_plain_bind", "kind", "loop", "maps", "propagation", "recursive", "words",
    )  # fmt: skip

    def __init__(self, kind: str, words: list[str]) -> None:
        for word in words:
            if word.startswith("X-containerd."):
                raise Unsupported(
                    "mount", subject=word, why="an option for containerd's mount manager", code="template"
                )
            if word.startswith("X-mount.idmap"):
                raise Unsupported("mount", subject=word, why="an option of mount(8)", hint="use uidmap= and gidmap=")
        self.maps, words = idmap.take(words)
        parsed = options.parse(words)
        self.loop = "loop" in parsed.data
        self.direct_io = self.loop and "direct-io" in parsed.data
        ours = ("loop", "direct-io") if self.loop else ()
        self.data = tuple(word for word in parsed.data if word not in ours)
        self.words = tuple(word for word in words if word not in (*ours, *options.PROPAGATION_NAMES))
        self.flags = parsed.flags
        self.recursive = parsed.recursive
        self.propagation = parsed.propagation
        self.kind = "bind" if self.flags & sys_.MS_BIND else kind
        if self.kind == "bind":
            self.flags |= sys_.MS_BIND
            # What is said to be read-only is so in all that is seen there, not in its top only.
            if self.flags & sys_.MS_REC:
                self.recursive |= self.flags & sys_.MS_RDONLY
            if self.data:
                raise InvalidInput(
                    "bind", subject=",".join(self.data), why="options of a filesystem: a bind mount makes none",
                    code="mount-option",
                )  # fmt: skip
            if self.loop:
                raise InvalidInput("bind", subject="loop", why="a bind mount has no device", code="mount-option")
        self.is_plain_bind = (
            self.flags in (sys_.MS_BIND, sys_.MS_BIND | sys_.MS_REC) and not self.propagation and not self.maps
        )

    @property
    def is_change(self) -> bool:
        """Whether it changes a mount that is there, instead of making one."""
        return bool(self.flags & sys_.MS_REMOUNT) or (
            self.kind in ("", "none") and bool(self.propagation) and not self.loop
        )


def read(mount: Mount) -> Request:
    """Sorts the options of a mount.

    Raises:
        InvalidInput: options that contradict its type, or cannot be read.
        Unsupported: what only containerd's mount manager or mount(8) does.
    """
    key = mount.type, mount.options
    found = _kept.get(key)
    if found is None:
        head, slash, _ = mount.type.partition("/")
        if slash and head in _TEMPLATES:
            raise Unsupported(
                "mount", subject=mount.type, why="a template for containerd's mount manager", code="template",
            )  # fmt: skip
        found = Request(mount.type, options.split(mount.options))
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = found
    return found


def attributes(flags: int) -> tuple[int, int]:
    """What mount_setattr(2) sets and clears for flags of mount(2): only ever what makes a mount stricter."""
    attr_set = attr_clr = 0
    for flag, attribute in _ATTRIBUTES.items():
        if flags & flag:
            attr_set |= attribute
    if flags & _ATIME:
        attr_clr = sys_.MOUNT_ATTR__ATIME  # one of three: the others must go
    return attr_set, attr_clr
