"""What Kubernetes says through annotations and paths, as containerd and CRI-O hand it to a runtime.

The pod's annotations tell a volume's name, type and share, but not its source: where the kubelet keeps it follows
from the pod's uid.  So hints are made in two steps: :func:`volumes_to_find` says where to look, the caller looks,
and :func:`with_sources` puts what was seen into the annotations, for :func:`holdfast.spec.hints.parse_hints`.
"""

from __future__ import annotations

import glob
import posixpath
from typing import TYPE_CHECKING, Literal

import msgspec

from holdfast.errors import InvalidInput, NotFound
from holdfast.spec import hints as mount_hints
from holdfast.spec.annotations import flag
from holdfast.spec.hints import Hint
from holdfast.spec.runtime import Mount, clean_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PODS = "/var/lib/kubelet/pods"
EMPTY_DIR = "kubernetes.io~empty-dir"
#: A pod's shared memory: all its containers have the same.
SHM = "/dev/shm"
SHM_HINT = "holdfast-dev-shm"
#: As much as containerd and docker give it.
SHM_BYTES = 64 << 20

_CONTAINERD = "io.kubernetes.cri."
_CRIO = "io.kubernetes.cri-o."
#: An emptyDir is in no use yet that holds nothing but the file that gVisor keeps a volume's data in.
_FILESTORE = (".gvisor.filestore.", ".holdfast.filestore.")
_FORCE_SHARED = ("dev.gvisor.empty-dir.{}.force-shared", "dev.holdfast.empty-dir.{}.force-shared")


class Role(msgspec.Struct, frozen=True):
    """What a container is to its pod.

    Attributes:
        kind: ``sandbox`` is the first of a pod, and what every container is that no engine says anything about.
        sandbox_id: of the pod; the container's own id if it is the sandbox and nothing is said.
        container, pod, namespace, pod_uid: Kubernetes' names, where known.
    """

    kind: Literal["sandbox", "container"]
    sandbox_id: str
    container: str = ""
    pod: str = ""
    namespace: str = ""
    pod_uid: str = ""


class VolumePath(msgspec.Struct, frozen=True):
    """A path in a volume that the kubelet has made.

    Attributes:
        plugin: as in the path: ``kubernetes.io~empty-dir``.
        inside: what comes after the volume; empty for the volume itself.
    """

    pod_uid: str
    plugin: str
    volume: str
    inside: str = ""


class SeenVolume(msgspec.Struct, frozen=True):
    """What was seen of one volume.

    Attributes:
        paths: all that the pattern of :func:`volumes_to_find` led to.
        names: what is in the first of them.
    """

    paths: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def role(annotations: Mapping[str, str], container_id: str = "") -> Role:
    """What the engine says that the container is; containerd's keys go before CRI-O's.

    Raises:
        InvalidInput: ``container-type`` if it is neither; ``sandbox-id`` if a container is of no sandbox.
    """
    key, kind = _first(annotations, _CONTAINERD + "container-type", _CRIO + "ContainerType")
    id_key, sandbox_id = _first(annotations, _CONTAINERD + "sandbox-id", _CRIO + "SandboxID")
    if kind not in ("", "sandbox", "container"):
        raise InvalidInput(
            "read annotation", subject=f"{key}={kind}", why="neither sandbox nor container", code="container-type"
        )
    if kind == "container" and not sandbox_id:
        raise InvalidInput(
            "read annotation", subject=f"{key}={kind}", why=f"which sandbox it is in is not said: no {id_key}",
            code="sandbox-id",
        )  # fmt: skip
    if sandbox_id and (sandbox_id in (".", "..") or "/" in sandbox_id or "\0" in sandbox_id):
        raise InvalidInput("read annotation", subject=f"{id_key}={sandbox_id}", why="not an id", code="sandbox-id")
    return Role(
        "container" if kind == "container" else "sandbox",
        sandbox_id or container_id,
        annotations.get(_CONTAINERD + "container-name", ""),
        annotations.get(_CONTAINERD + "sandbox-name", ""),
        annotations.get(_CONTAINERD + "sandbox-namespace", ""),
        annotations.get(_CONTAINERD + "sandbox-uid", ""),
    )


def _first(annotations: Mapping[str, str], *keys: str) -> tuple[str, str]:
    """The first key that is there, with its value; else the first key."""
    key = next((key for key in keys if annotations.get(key)), keys[0])
    return key, annotations.get(key, "")


def pod_uid(annotations: Mapping[str, str]) -> str:
    """The uid that the kubelet's folder of the pod is named by; empty if nothing says it.

    Older containerd says it only as a part of the folder for logs: ``NAMESPACE_NAME_UID``, still earlier ``UID``.

    Raises:
        InvalidInput: ``pod-uid``; the folder for logs is named otherwise, or the uid cannot be a folder's name.
    """
    key, uid = _CONTAINERD + "sandbox-uid", annotations.get(_CONTAINERD + "sandbox-uid", "")
    if not uid:
        key = _CONTAINERD + "sandbox-log-directory"
        folder = annotations.get(key, "")
        if not folder:
            return ""
        parts = posixpath.basename(folder.rstrip("/")).split("_")
        if len(parts) not in (1, 3):
            why = "the folder's name is neither UID nor NAMESPACE_NAME_UID"
            raise InvalidInput("read annotation", subject=f"{key}={folder}", why=why, code="pod-uid")
        uid = parts[-1]
    if not uid or uid in (".", "..") or "/" in uid or "\0" in uid:
        value = annotations.get(key)
        raise InvalidInput("read annotation", subject=f"{key}={value}", why="names no uid", code="pod-uid")
    return uid


def volume_path(source: str) -> VolumePath | None:
    """What a mount's source tells about a volume of the kubelet's; None if it is something else."""
    path = clean_path(source) if source.startswith("/") else ""
    if not path.startswith(PODS + "/"):
        return None
    parts = path.removeprefix(PODS + "/").split("/")
    if len(parts) < 4 or parts[1] != "volumes":
        return None
    return VolumePath(parts[0], parts[2], parts[3], "/".join(parts[4:]))


def volumes_to_find(annotations: Mapping[str, str]) -> dict[str, str]:
    """The volumes with a hint that lacks its source, and the pattern (glob(7)) of where each must be.

    Empty if nothing says which pod it is: then these are no hints of Kubernetes.

    Raises:
        InvalidInput: ``pod-uid``, ``hint-key``, ``hint-name``.
    """
    found = _fields(annotations)
    names = sorted(name for name, fields in found.items() if "type" in fields and "source" not in fields)
    uid = pod_uid(annotations) if names else ""
    return {name: f"{PODS}/{glob.escape(uid)}/volumes/*/{glob.escape(name)}" for name in names} if uid else {}


def with_sources(
    annotations: Mapping[str, str], seen: Mapping[str, SeenVolume], known: Sequence[Hint] = ()
) -> dict[str, str]:
    """A copy of ``annotations`` in which hints of volumes have their sources, and emptyDirs what they become.

    An emptyDir that is empty is the pod's alone, and becomes a tmpfs, in memory or on disk.  One that is not empty
    was filled, or is going to be, by somebody outside (a CSI driver), and stays the host's directory.

    Args:
        seen: by volume, for all of :func:`volumes_to_find` that are not known.
        known: the pod's hints: what an emptyDir became for the pod's first container it is for all.

    Raises:
        NotFound: ``volume-not-found``.
        InvalidInput: ``volume-ambiguous``; ``annotation`` if it is not clear whether force-shared is.
    """
    filled = dict(annotations)
    fields = _fields(annotations)
    hints = {hint.name: hint for hint in known}
    for name in volumes_to_find(annotations):
        if hint := hints.get(name):
            for field, value in (("source", hint.source), ("type", hint.kind), ("share", hint.share)):
                _set(filled, name, field, value, fields[name]["type"])
            continue
        volume = seen.get(name, SeenVolume())
        prefix = fields[name]["type"]
        key, value = _key(prefix, name, "type"), annotations[_key(prefix, name, "type")]
        if not volume.paths:
            raise NotFound("find volume", subject=name, why=f"{key}={value}: the kubelet has none of that name",
                           code="volume-not-found")  # fmt: skip
        if len(volume.paths) > 1:
            why = f"{key}={value}: it could be any of {', '.join(sorted(volume.paths))}"
            raise InvalidInput("find volume", subject=name, why=why, code="volume-ambiguous")
        filled[_key(prefix, name, "source")] = volume.paths[0]
        path = volume_path(volume.paths[0])
        if path and path.plugin == EMPTY_DIR:
            ours = _is_empty(volume.names) and not any(flag(annotations, key.format(name)) for key in _FORCE_SHARED)
            _set(filled, name, "type", "tmpfs" if ours else "bind", prefix)
            if not ours:
                _set(filled, name, "share", "shared", prefix)
    return filled


def _is_empty(names: Sequence[str]) -> bool:
    return not names or (len(names) == 1 and names[0].startswith(_FILESTORE))


def mounts_as_annotated(annotations: Mapping[str, str], mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """``mounts``, each of a volume with the type that the annotations give the volume.

    The kubelet binds every volume; only the annotation says that an emptyDir is to be in memory
    (see :func:`holdfast.spec.hints.backing`).  Names of volumes are unique in a pod.

    Args:
        annotations: as the engine gave them: :func:`with_sources` changes types.
    """
    types = {
        name: annotations[_key(fields["type"], name, "type")]
        for name, fields in _fields(annotations).items()
        if "type" in fields
    }
    changed = []
    for mount in mounts:
        path = volume_path(mount.source) if mount.kind == "bind" else None
        kind = types.get(path.volume) if path and not path.inside else None
        changed.append(_as_tmpfs(mount) if kind == "tmpfs" else mount)
    return tuple(changed)


def shm_hint(mounts: Iterable[Mount], hints: Iterable[Hint] = (), *, size_bytes: int = SHM_BYTES) -> Hint | None:
    """The hint for ``/dev/shm``, if the pod's first container has one that an engine binds into all of them.

    It becomes one tmpfs, since shm_open(3) wants one, with the mode that everybody may write to.

    Args:
        hints: the pod's, of which none may have its source.
        size_bytes: the most that it holds.
    """
    bound = [mount for mount in mounts if mount.kind == "bind" and mount.target == SHM]
    if not bound or not bound[-1].source.startswith("/"):
        return None
    source = clean_path(bound[-1].source)
    if source == SHM or any(hint.source == source for hint in hints):  # the host's own is no pod's
        return None
    return Hint(SHM_HINT, source, "tmpfs", "pod", ("mode=1777", f"size={size_bytes}"))


def shm_in_memory(mounts: Iterable[Mount], hints: Iterable[Hint]) -> tuple[Mount, ...]:
    """``mounts``, those of the pod's ``/dev/shm`` as what they become: the engine binds it, which would mean a disk."""
    source = next((hint.source for hint in hints if hint.name == SHM_HINT), "")
    return tuple(
        _as_tmpfs(mount) if source and mount.kind == "bind" and clean_path(mount.source) == source else mount
        for mount in mounts
    )


def _as_tmpfs(mount: Mount) -> Mount:
    options = tuple(option for option in mount.options if option not in ("bind", "rbind"))
    return msgspec.structs.replace(mount, type="tmpfs", options=options)


def _fields(annotations: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By name and field of a hint, the prefix that it has; of several the first."""
    found: dict[str, dict[str, str]] = {}
    for key in sorted(annotations):
        if parsed := mount_hints.parse_key(key):
            prefix, name, field = parsed
            found.setdefault(name, {}).setdefault(field, prefix)
    return found


def _key(prefix: str, name: str, field: str) -> str:
    return f"{prefix}{name}{prefix[-1]}{field}"


def _set(annotations: dict[str, str], name: str, field: str, value: str, prefix: str) -> None:
    """Sets a field of a hint under every prefix that has it, at least under ``prefix``."""
    for each in mount_hints.PREFIXES:
        if each == prefix or _key(each, name, field) in annotations:
            annotations[_key(each, name, field)] = value
