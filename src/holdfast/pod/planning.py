"""From what is asked for to the plan of a container, and to the record of its mounts that is saved with its pod."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from holdfast.spec.checks import check
from holdfast.spec.hints import match
from holdfast.spec.runtime import DISK_TYPES, spec_from_raw
from holdfast.storage import kubelet, rootless, volume_plan, volumes
from holdfast.storage.plan import DirectoryRoot, plan_container
from holdfast.storage.restore import saved_container
from holdfast.storage.survey import lasting, look, survey

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.pod.messages import ContainerRequest
    from holdfast.spec.hints import Hint
    from holdfast.spec.runtime import Spec
    from holdfast.spec.tree import TmpPolicy
    from holdfast.storage.plan import LayeredRoot, PodSnapshot
    from holdfast.storage.restore import SavedContainer
    from holdfast.storage.steps import Plan


class Asked(NamedTuple):
    """A container that is asked for, its specification as it is meant in the pod that it joins.

    Attributes:
        document, spec: the specification, with everything that is mounted in the container, but for a ``/tmp`` about
            which the image decides.
        hints: the pod's, once the container has joined it.
        own_hints: those that the container says itself.
        warnings: what of the specification is left out, and why.
    """

    name: str
    root: LayeredRoot | DirectoryRoot
    document: dict[str, Any]
    spec: Spec
    hints: tuple[Hint, ...]
    own_hints: tuple[Hint, ...]
    warnings: tuple[str, ...]


def understand(request: ContainerRequest, known: tuple[Hint, ...] = ()) -> Asked:
    """What is asked for.

    Args:
        known: the pod's hints so far.

    Raises:
        InvalidInput, NotFound, Unsupported: the specification is wrong in itself, or contradicts the pod's hints.
    """
    spec = spec_from_raw(request.spec, request.name)
    check(spec, request.name)
    tree = volume_plan.whole_tree(spec)
    document = {**request.spec, "mounts": tree.raw_mounts(request.spec.get("mounts") or [])}
    document, hints, own = kubelet.understand(document, known)
    spec = spec_from_raw(document, request.name)
    return Asked(request.name, request.root, document, spec, hints, own, tree.warnings)


def plan(
    asked: Asked, data: Path, pod: PodSnapshot | None = None, *, without_root: bool = False, tmp: TmpPolicy = "auto"
) -> Plan:
    """The plan for a container: its sources looked at, its steps ordered.

    Args:
        pod: what it joins; None is a new one.
        without_root: what takes the host's root is refused.
        tmp: what becomes of ``/tmp`` if no annotation says it.

    Raises:
        HoldfastError: what is wrong with the specification, or missing.
    """
    spec = msgspec.structs.replace(asked.spec, mounts=volumes.resolve(asked.spec.mounts, data))
    sources = survey(spec.mounts, (*DISK_TYPES, volumes.KIND))
    if isinstance(asked.root, DirectoryRoot):
        sources[asked.root.path] = look(asked.root.path)
    for hint in asked.hints:
        if hint.kind == "bind" and any(match((hint,), mount) for mount in spec.mounts):
            sources[hint.source] = look(hint.source)
    in_memory = volume_plan.tmp_if_empty(spec, tmp)
    made = plan_container(asked.name, asked.document, spec, asked.root, sources, pod, asked.hints, tmp=in_memory)
    if without_root:
        rootless.check_steps(made.steps)
        rootless.check_limits(asked.document)
    return msgspec.structs.replace(made, hints=asked.own_hints, warnings=asked.warnings)


def record(asked: Asked, tmp: TmpPolicy = "auto") -> SavedContainer:
    """The container's mounts, to be saved with its pod and compared with when that is restored.

    Args:
        tmp: what becomes of ``/tmp`` if no annotation says it.

    Raises:
        NotFound: ``source-not-found``; the source of one is not there.
    """
    tree = volume_plan.saved_tree(asked.spec, tmp)
    seen = survey(asked.spec.mounts, ())
    if isinstance(asked.root, DirectoryRoot):
        seen[asked.root.path] = look(asked.root.path)
    sources = {path: lasting(source) for path, source in seen.items()}
    return saved_container(asked.name, asked.root, tree, sources, asked.hints, asked.own_hints)
