"""What a restored pod must mount again, as a record that is saved with the pod and compared with when it comes back.

The record is made from a specification alone, by the rules of the container's own tree (:mod:`holdfast.spec.tree`), so
that what is expected of a restore is what was mounted.  It says of every mount where its contents are:

``machine``  in what is saved: memory, a scratch disk, a volume of the pod, a copy of a disk that it writes to
``kernel``   nowhere: ``/proc`` and the like
``host``     on the host, and not in what is saved: at a restore the same thing must be there, or the pod would go on
             with files that are not those which it has open

A host's directory is the same if device and inode are; its path may have changed.  Since the record is to outlive a
restart of the host, where device numbers mean nothing, ``device`` is its filesystem's id
(:func:`holdfast.storage.survey.lasting`).  Of a file that is followed by its name both are 0, and so they are of a
disk, told by its contents: these are the same if their paths are.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from holdfast.errors import InvalidInput, NotFound
from holdfast.linux import syscalls
from holdfast.mounts import options as mount_options
from holdfast.spec import disk_options, hint_options
from holdfast.spec.hints import Hint, match
from holdfast.spec.runtime import DISK_TYPES
from holdfast.storage import volumes
from holdfast.storage.plan import LayeredRoot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from holdfast.spec.tree import Tree, TreeMount
    from holdfast.storage.plan import DirectoryRoot
    from holdfast.storage.survey import Source

ROOT = "/"

Contents = Literal["machine", "kernel", "host"]
_IN_MEMORY = ("tmpfs", "ramfs", "overlay")
_ABSENT = ("missing", "dangling link", "unreadable")
#: What a mount has without being told: relatime is the kernel's default since Linux 2.6.30.
_DEFAULTS = ("relatime",)


class SavedMount(Struct, frozen=True, omit_defaults=True):
    """One mount.

    Attributes:
        name: where it is in the container, ``/`` for its root; unique there.
        kind: ``layers``, ``directory`` (of a root), or as in a specification: ``bind``, ``tmpfs``, ``virtual-disk``...
        options: what holds, in a fixed order and spelling; without what makes no difference.
        source: path on the host, or name of a named volume; empty where the host has no part in it, or a hint says it.
        device, inode: of a directory there; 0 where something else tells what it is.
        size_bytes: of a disk that the pod holds; a specification does not say it.
        volume, sub_path: the volume of the pod that it is in, and where in it.
        layers: diffIDs, top-most first.
    """

    name: str
    kind: str
    contents: Contents
    options: tuple[str, ...] = ()
    source: str = ""
    device: int = 0
    inode: int = 0
    size_bytes: int = 0
    volume: str = ""
    sub_path: str = ""
    layers: tuple[str, ...] = ()


class SavedContainer(Struct, frozen=True, omit_defaults=True):
    """The mounts of one container.

    Attributes:
        mounts: the root first, the others in the order in which they are made.
        hints: those that its annotations say.
    """

    name: str
    mounts: tuple[SavedMount, ...]
    hints: tuple[Hint, ...] = ()


class SavedPod(Struct, frozen=True):
    """The whole record: hints and containers by name.  Of versions there has been one."""

    hints: tuple[Hint, ...] = ()
    containers: tuple[SavedContainer, ...] = ()
    version: int = 1

    def of_host(self) -> Iterator[tuple[str, SavedMount]]:
        """(container, mount) of all that the host must have."""
        for container in self.containers:
            yield from ((container.name, mount) for mount in container.mounts if mount.contents == "host")


def saved_container(
    name: str,
    root: LayeredRoot | DirectoryRoot,
    tree: Tree,
    sources: Mapping[str, Source],
    hints: Sequence[Hint] = (),
    own_hints: Sequence[Hint] = (),
) -> SavedContainer:
    """The mounts that the container has again after a restore.

    Args:
        tree: with a ``/tmp`` in memory if the container gets one where its image has nothing there: the image is the
            same at a restore, or its layers are a difference.
        sources: what a survey saw of the directories and files that it has of the host, by path.
        hints: the pod's, once the container has joined it.
        own_hints: those that its annotations say.

    Raises:
        NotFound: ``source-not-found``; a mount's source has gone from the host, or was not looked at.
    """
    mounts = [_root(root, sources, f"{name}: {ROOT}")]
    mounts += [_mount(mount, sources, hints, f"{name}: {mount.target}") for mount in tree.mounts]
    return SavedContainer(name, tuple(mounts), tuple(own_hints))


def saved_pod(containers: Iterable[SavedContainer], hints: Iterable[Hint] = ()) -> SavedPod:
    """The record of a pod, the same in whatever order its parts are given."""
    by_name = sorted(containers, key=lambda container: container.name)
    return SavedPod(tuple(sorted(hints, key=lambda hint: hint.name)), tuple(by_name))


def check_same(saved: SavedPod, now: SavedPod, subject: object = "") -> None:
    """Raises if what a pod is to be restored with is not what it was saved with.

    Raises:
        InvalidInput: ``restore-differs``; names every difference.
    """
    if found := list(differences(saved, now)):
        hint = "give it the specification that it was saved with; its processes have those mounts"
        raise InvalidInput("restore pod", subject=subject, why="; ".join(found), code="restore-differs", hint=hint)


def differences(saved: SavedPod, now: SavedPod) -> Iterator[str]:
    """Each difference by name.  The order of what does not depend on each other makes none."""
    old, new = ({hint.name: hint for hint in pod.hints} for pod in (saved, now))
    for name in _added_or_gone(old, new):
        yield f"hint {name} {'was not there' if name in new else 'is missing'}"
    for name in sorted(old.keys() & new.keys()):
        yield from (f"hint {name}: {text}" for text in _fields(old[name], new[name], ("options",)))
        before, after = (tuple(sorted(each.options)) for each in (old[name], new[name]))
        if before != after:
            yield f"hint {name}: options was {_shown(before)}, is {_shown(after)}"
    mine, yours = ({one.name: one.mounts for one in pod.containers} for pod in (saved, now))
    for name in _added_or_gone(mine, yours):
        yield f"container {name} {'was not there' if name in yours else 'is missing'}"
    for name in sorted(mine.keys() & yours.keys()):
        yield from (f"container {name}: {text}" for text in _mount_differences(mine[name], yours[name]))


def check_sources(saved: SavedPod, seen: Mapping[str, Source], subject: object = "") -> None:
    """Raises if the host has not got what the pod was saved with.

    Args:
        seen: what a survey sees now, by path.

    Raises:
        NotFound: ``restore-source``; all that is wrong is that things are missing.
        InvalidInput: ``restore-source``; something is another thing now.
    """
    missing, changed = [], []
    for container, mount in saved.of_host():
        where = f"{mount.source}, which container {container} has at {mount.name},"
        source = seen.get(mount.source)
        if source is None or source.kind in _ABSENT:
            why = f": {source.why}" if source and source.why else ""
            missing.append(f"{where} is {source.kind if source else 'missing'}{why}")
        elif (source.device, source.inode) != (mount.device, mount.inode):
            was, is_ = (f"device {d}, inode {i}" for d, i in _identities(mount, source))
            changed.append(f"{where} is another {source.kind} now ({was} before, {is_} now)")
        elif mount.size_bytes != source.size_bytes and mount.kind in DISK_TYPES:
            changed.append(f"{where} has {source.size_bytes} bytes now, {mount.size_bytes} before")
    if changed:
        why = "; ".join(changed + missing)
        raise InvalidInput("restore pod", subject=subject, why=why, code="restore-source")
    if missing:
        raise NotFound("restore pod", subject=subject, why="; ".join(missing), code="restore-source")


def _identities(mount: SavedMount, source: Source) -> tuple[tuple[int, int], tuple[int, int]]:
    return (mount.device, mount.inode), (source.device, source.inode)


def _mount_differences(saved: Sequence[SavedMount], now: Sequence[SavedMount]) -> Iterator[str]:
    old, new = ({mount.name: mount for mount in mounts} for mounts in (saved, now))
    for name in _added_or_gone(old, new):
        yield f"the mount at {name} {'was not there' if name in new else 'is missing'}"
    for name in sorted(old.keys() & new.keys()):
        yield from (f"the mount at {name}: {text}" for text in _one_mount(old[name], new[name]))


def _one_mount(saved: SavedMount, now: SavedMount) -> Iterator[str]:
    yield from _fields(saved, now, ("source", "device", "inode"))
    # Some filesystems have no id (FUSE), and the same inodes as others of their kind.
    moved = saved.source != now.source and not (saved.inode and saved.device)
    if moved or (saved.device, saved.inode) != (now.device, now.inode):
        yield f"source was {_source(saved)}, is {_source(now)}"


def _source(mount: SavedMount) -> str:
    identity = f" (device {mount.device}, inode {mount.inode})" if mount.inode else ""
    return f"{mount.source or 'none'}{identity}"


def _fields(saved: Struct, now: Struct, without: tuple[str, ...]) -> Iterator[str]:
    for field in saved.__struct_fields__:
        before, after = getattr(saved, field), getattr(now, field)
        if before != after and field not in without:
            yield f"{field} was {_shown(before)}, is {_shown(after)}"


def _shown(value: object) -> str:
    return ",".join(value) or "none" if isinstance(value, tuple) else str(value) or "none"


def _added_or_gone(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return sorted(saved.keys() ^ now.keys())


def _root(root: LayeredRoot | DirectoryRoot, sources: Mapping[str, Source], subject: str) -> SavedMount:
    if isinstance(root, LayeredRoot):
        layers = tuple(dict.fromkeys(diff_id or path for path, diff_id in root.layers))
        holds = {"ro": not root.scratch_bytes, "encrypted": root.encrypted, "shared-scratch": root.shared}
        hashes = (f"verity={root.verity[path].root_hash}" for path, _ in root.layers if path in root.verity)
        options = (*(word for word, does in holds.items() if does), *hashes)
        return SavedMount(ROOT, "layers", "machine", options, layers=layers)
    saved = SavedMount(ROOT, "directory", "host", ("ro",) if root.read_only else ())
    return _on_host(saved, root.path, sources, subject)


def _mount(
    tree_mount: TreeMount, sources: Mapping[str, Source], hints: Sequence[Hint], subject: str
) -> SavedMount:  # fmt: skip
    mount, kind = tree_mount.mount, tree_mount.mount.kind
    # Places in the guest that were left to Holdfast have no name of their own.
    name = tree_mount.target if tree_mount.target != disk_options.BLOCKDEV else f"{tree_mount.target} {mount.source}"
    saved = SavedMount(name, kind, "kernel", canonical_options(mount.options, kind))
    if tree_mount.pod_source:
        volume, path = tree_mount.pod_source.volume, tree_mount.pod_source.path
        return msgspec.structs.replace(saved, contents="machine", volume=volume, sub_path=path)
    hinted = match(hints, mount)
    if hinted and hinted[0].has_master:
        where: Contents = "machine" if hinted[0].kind == "tmpfs" else "host"
        return msgspec.structs.replace(saved, contents=where, volume=hinted[0].name, sub_path=hinted[1])
    if kind == "bind":
        return _on_host(msgspec.structs.replace(saved, contents="host"), mount.source, sources, subject)
    if kind in (*DISK_TYPES, volumes.KIND):
        where = "host" if mount.read_only else "machine"
        return msgspec.structs.replace(saved, contents=where, source=mount.source)
    return msgspec.structs.replace(saved, contents="machine" if kind in _IN_MEMORY else "kernel")


def _on_host(saved: SavedMount, path: str, sources: Mapping[str, Source], subject: str) -> SavedMount:
    source = sources.get(path)
    if source is None or source.kind in _ABSENT:
        why = f"its source {path} {f'is {source.kind}' if source else 'was not looked at'}"
        raise NotFound("record mount", subject=subject, why=why, code="source-not-found")
    return msgspec.structs.replace(saved, source=path, device=source.device, inode=source.inode)


def canonical_options(options: Iterable[str], kind: str) -> tuple[str, ...]:
    """What holds of ``options``, so that lists which do the same are equal."""
    return _canonical(tuple(options), kind)


@lru_cache(maxsize=256)  # most mounts of a container have the same
def _canonical(options: tuple[str, ...], kind: str) -> tuple[str, ...]:
    words = mount_options.split(options)
    parsed = mount_options.parse(words)
    holds = ["ro"] if parsed.read_only else []
    if parsed.recursive & syscalls.MS_RDONLY:
        holds.append("rro")
    for name, flag, recursive in _flag_names():
        if flag and parsed.flags & flag == flag and name not in _DEFAULTS:
            holds.append(name)
        if recursive and parsed.recursive & recursive == recursive:
            holds.append(f"r{name}")
    if kind == "bind":
        holds.append("rbind" if "rbind" in words or "bind" not in words else "bind")
    holds += hint_options.unique(word for word in words if word in mount_options.PROPAGATION_NAMES)
    data = {word.partition("=")[0]: _plain(word) if kind == "tmpfs" else word for word in parsed.data}
    ours = {word.partition("=")[0]: word for word in words if word.startswith(disk_options.PREFIX)}
    return (*holds, *(word for _, word in sorted((data | ours).items())))


@cache
def _flag_names() -> tuple[tuple[str, int, int], ...]:
    """Name of each flag, its bit, and its bit where there is a recursive spelling; 0 for what clears one."""
    return tuple(
        (name, mount_options.parse([name]).flags, mount_options.parse([f"r{name}"]).recursive)
        for name in mount_options.FLAG_NAMES
    )


def _plain(word: str) -> str:
    """``size=1m`` as ``size=1048576``; what cannot be read so, as it is: it is the kernel's to judge."""
    try:
        return "".join(hint_options.for_master([word]))
    except InvalidInput:
        return word
