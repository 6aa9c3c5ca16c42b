"""The container's own tree: from the mounts of a specification, all that it gets, in the order to mount them.

What every container needs (``/proc``, ``/sys``, ``/dev``, ``/dev/pts``) is put before the rest where the specification
has none; ``/tmp`` becomes a tmpfs by a rule of its own.  The specification's order is kept, with two exceptions: a
mount comes after the one that it is below, which would hide it, and of two at one place only the later is made.

A source in one of the schemes of utility VMs is something that the pod has, not the host::

    sandbox://PATH              a folder that the pod's containers share, and that mounts made in it are seen through
    sandbox-tmp://PATH          one in the pod's memory
    hugepages://2M/PATH         one for huge pages, of 2 MiB, or 1G/PATH: of 1 GiB
    uvm://PATH                  what the guest has at that path
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from holdfast.errors import InvalidInput
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.spec.runtime import DISK_TYPES, Mount, clean_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from holdfast.spec.runtime import JsonObject

TmpPolicy = Literal["auto", "tmpfs", "rootfs"]
#: What was seen at ``/tmp`` in the root filesystem, its links followed there.
ImageTmp = Literal["missing", "empty", "not-empty", "not-a-directory"]
PodSourceKind = Literal["sandbox", "sandbox-tmp", "hugepages", "uvm"]

TMP = "/tmp"
TMP_POLICIES: tuple[TmpPolicy, ...] = ("auto", "tmpfs", "rootfs")
#: Sizes of huge pages on x86-64, as a source names them.
HUGE_PAGES = {"2M": 2 << 20, "1G": 1 << 30}

_SCHEMES: tuple[PodSourceKind, ...] = ("sandbox", "sandbox-tmp", "hugepages", "uvm")
#: Device nodes and links that a runtime makes in /dev: a mount on one would be the end of it.
_RUNTIME_DEVICES = (
    "fd", "stdin", "stdout", "stderr", "null", "zero", "full", "random", "urandom", "ptmx",
)  # fmt: skip
#: What may be at /dev itself; of /dev/pts, and of /dev/shm, which containers of a pod share.
_DEV_TYPES = {
    "/dev": ("tmpfs", "devtmpfs"),
    "/dev/pts": ("devpts",),
    "/dev/shm": ("tmpfs", "bind", "volume", *DISK_TYPES),
}

_QUIET = ("nosuid", "noexec", "nodev")
#: Every container has them; in this order before all others.
MANDATORY = (
    Mount("/proc", "proc", "proc", _QUIET),
    Mount("/sys", "sysfs", "sysfs", (*_QUIET, "ro")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
)


class PodSource(Struct, frozen=True, omit_defaults=True):
    """A source that the pod has.

    Attributes:
        path: below the scheme's folder, clean, without a slash at either end.
        page_size: of huge pages: ``2M`` or ``1G``.
    """

    kind: PodSourceKind
    path: str
    page_size: str = ""

    @property
    def volume(self) -> str:
        """The name of the pod's volume that it is in; huge pages of each size have one."""
        return f"hugepages-{self.page_size}" if self.page_size else self.kind

    @property
    def options(self) -> tuple[str, ...]:
        """How that volume is mounted."""
        return (f"pagesize={self.page_size}",) if self.page_size else ()

    def __str__(self) -> str:
        return f"{self.kind}://{self.page_size}{'/' if self.page_size else ''}{self.path}"


class TreeMount(Struct, frozen=True, omit_defaults=True):
    """One mount of the tree.

    Attributes:
        index: in the specification's ``mounts``; None if it was added.
        mount: as the specification has it.
        pod_source: what its source means, if it is in one of the schemes.
    """

    mount: Mount
    index: int | None = None
    pod_source: PodSource | None = None

    @property
    def target(self) -> str:
        """Clean and absolute; of a disk shown as a device the destination as it is."""
        destination = self.mount.destination
        return destination if destination.startswith(BLOCKDEV) else self.mount.target


class Tree(Struct, frozen=True):
    """What :func:`container_tree` found.

    Attributes:
        mounts: in the order in which to make them.
        warnings: what was left out, and why; one sentence each.
    """

    mounts: tuple[TreeMount, ...]
    warnings: tuple[str, ...] = ()

    def raw_mounts(self, raw: Sequence[JsonObject]) -> list[JsonObject]:
        """The list for the document, from the one that the tree was made of; keys that no record knows are kept.

        Of other indexes than ``raw``: what refers to mounts by their index is to be made from this list.
        """
        return [_raw(mount.mount) if mount.index is None else raw[mount.index] for mount in self.mounts]


def container_tree(
    mounts: Iterable[Mount], *, tmp: TmpPolicy = "auto", image_tmp: ImageTmp = "not-empty", tmp_bytes: int = 0
) -> Tree:
    """The tree of a container.

    Args:
        mounts: the specification's.
        tmp, image_tmp, tmp_bytes: see :func:`tmp_mount`.  Without a look at the image, ``/tmp`` is left alone.

    Raises:
        InvalidInput: ``mount-destination``, ``mount-type`` or ``pod-source``, which name the mount;
            ``tmp-not-a-directory``.
    """
    warnings: list[str] = []
    listed = [_tree_mount(index, mount) for index, mount in enumerate(mounts)]
    kept = [mount for mount in listed if not _left_out(mount, warnings)]
    present = {mount.target for mount in kept}
    whole = [TreeMount(mount) for mount in MANDATORY if mount.target not in present] + kept
    added = tmp_mount([mount.mount for mount in kept], tmp, image_tmp, size_bytes=tmp_bytes)
    if added:
        whole.append(TreeMount(added))
    return Tree(tuple(_ordered(_latest(whole, warnings))), tuple(warnings))


def tmp_mount(
    mounts: Iterable[Mount], policy: TmpPolicy, image_tmp: ImageTmp, *, size_bytes: int = 0
) -> Mount | None:  # fmt: skip
    """The tmpfs that a container gets at ``/tmp``, or None.

    Args:
        mounts: the specification's: one at ``/tmp``, however it is spelled, is what the container has there.
        policy: ``auto`` makes one if the image has nothing in ``/tmp`` and nothing is mounted below; ``tmpfs`` hides
            what the image has; ``rootfs`` makes none, so that files can be renamed between ``/tmp`` and the rest.
        image_tmp: what the image has there.
        size_bytes: the most that it holds; 0 for half of the pod's memory, the kernel's default.

    Raises:
        InvalidInput: ``tmp-not-a-directory``; a tmpfs is wanted where a file is.  ``auto`` leaves the file alone.
    """
    targets = [mount.target for mount in mounts if not mount.destination.startswith(BLOCKDEV)]
    if policy == "rootfs" or TMP in targets:
        return None
    if policy == "auto":
        # A mount below needs a mount point, which is in the image's /tmp: so it is not empty, as gVisor sees it.
        if image_tmp not in ("missing", "empty") or any(_is_below(target, TMP) for target in targets):
            return None
    elif image_tmp == "not-a-directory":
        raise InvalidInput(
            "make the container's /tmp", subject=TMP, why="the image has a file there", code="tmp-not-a-directory",
            hint="use the policy auto or rootfs",
        )  # fmt: skip
    size = (f"size={size_bytes}",) if size_bytes else ()
    # Not nodev: that programs can make nodes in /tmp is one of the reasons for it (gVisor's, too).
    return Mount(TMP, "tmpfs", "tmpfs", ("mode=1777", *size))


def check_destination(destination: str, subject: object = "") -> str:
    """The destination, clean and absolute: a relative one begins at the root (runtime-spec 1.2, config.md).

    Raises:
        InvalidInput: ``mount-destination``: it is empty, is the root itself, climbs out of it or holds a NUL.
    """
    why = ""
    if not destination or "\0" in destination:
        why = "holds a NUL" if destination else "is empty"
    elif _climbs_out(destination):
        why = f"{destination!r} leads out of the container's root"
    elif clean_path(destination) == "/":
        why = f"{destination!r} is the root itself"
    if why:
        raise InvalidInput("place mount", subject=subject, why=f"its destination {why}", code="mount-destination")
    return clean_path(destination)


def parse_source(source: str, subject: object = "") -> PodSource | None:
    """What a source in one of the schemes means; None for a path, or anything else.

    Raises:
        InvalidInput: ``pod-source``: no path, one that leads out or holds a NUL, or a size that no huge page has.
    """
    scheme, found, rest = source.partition("://")
    kind = next((known for known in _SCHEMES if known == scheme), None)
    if not found or kind is None:
        return None
    page_size = ""
    if kind == "hugepages":
        page_size, _, rest = rest.lstrip("/").partition("/")
        if page_size not in HUGE_PAGES:
            sizes = " or ".join(HUGE_PAGES)
            raise _bad_source(source, subject, f"{page_size or 'nothing'!r} is no size of huge pages", f"{sizes}")
    if "\0" in rest or _climbs_out(rest):
        raise _bad_source(source, subject, "holds a NUL" if "\0" in rest else "its path leads out of what it is in")
    path = clean_path(rest).lstrip("/")
    if not path:
        example = f"{kind}://{'2M/' if page_size else ''}PATH"
        raise _bad_source(source, subject, "it names no path", example)
    return PodSource(kind, path, page_size)


def _tree_mount(index: int, mount: Mount) -> TreeMount:
    subject = f"mounts[{index}] {mount.source} at {mount.destination}".replace("\0", "\\0")
    if mount.destination.startswith(BLOCKDEV):  # no place in the tree: the plan looks at it
        return TreeMount(mount, index)
    check_destination(mount.destination, subject)
    # gVisor made a sysfs of type none; runc has the kernel refuse it, which names neither the mount nor the cause.
    if mount.kind in ("", "none"):
        why = f"its type is {mount.kind or 'missing'}, and its options say neither bind nor rbind"
        raise InvalidInput("place mount", subject=subject, why=why, code="mount-type")
    return TreeMount(mount, index, parse_source(mount.source, subject) if mount.kind == "bind" else None)


def _raw(mount: Mount) -> JsonObject:
    options = list(mount.options)
    return {"destination": mount.destination, "type": mount.type, "source": mount.source, "options": options}


def _left_out(tree_mount: TreeMount, warnings: list[str]) -> bool:
    """Whether a mount would take from the container the devices that a runtime makes for it."""
    target, kind = tree_mount.target, tree_mount.mount.kind
    why = ""
    if target in _DEV_TYPES and kind not in _DEV_TYPES[target]:
        why = f"{target} is not to be of type {kind}"
    for name in _RUNTIME_DEVICES:
        if target == f"/dev/{name}" or _is_below(target, f"/dev/{name}"):
            why = f"/dev/{name} is made by the runtime"
    if _is_below(target, "/dev/pts"):
        why = "/dev/pts holds terminals alone"
    if why:
        warnings.append(f"left out mounts[{tree_mount.index}] {tree_mount.mount.source} at {target}: {why}")
    return bool(why)


def _latest(mounts: Sequence[TreeMount], warnings: list[str]) -> list[TreeMount]:
    """Without those that a later one at the same place would hide."""
    last = {mount.target: mount for mount in mounts}
    kept = []
    for mount in mounts:
        later = last[mount.target]
        if later is mount or mount.target == BLOCKDEV:  # places that are left to Holdfast are all different
            kept.append(mount)
        else:
            warnings.append(
                f"left out mounts[{mount.index}] {mount.mount.source} at {mount.target}: mounts[{later.index}] is there"
            )
    return kept


def _ordered(mounts: Sequence[TreeMount]) -> Iterator[TreeMount]:
    """As they are, but each after all that it is below."""
    waiting: dict[str, TreeMount] = {mount.target: mount for mount in mounts if mount.target != BLOCKDEV}
    for mount in mounts:
        if mount.target == BLOCKDEV:
            yield mount
            continue
        for target in (*_parents(mount.target), mount.target):
            if found := waiting.pop(target, None):
                yield found


def _parents(target: str) -> Iterator[str]:
    """``/a/b/c`` -> ``/a``, ``/a/b``."""
    end = target.find("/", 1)
    while end > 0 and target.startswith("/"):
        yield target[:end]
        end = target.find("/", end + 1)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder + "/")


def _climbs_out(path: str) -> bool:
    depth = 0
    for part in path.split("/"):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            return True
    return False


def _bad_source(source: str, subject: object, why: str, hint: str = "") -> InvalidInput:
    text = source.replace("\0", "\\0")
    return InvalidInput(
        "read mount source", subject=subject or text, why=f"{text}: {why}", hint=hint, code="pod-source"
    )  # fmt: skip
