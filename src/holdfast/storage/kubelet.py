"""What Kubernetes means by a container's annotations and mounts, from looking at the kubelet's folders.

:mod:`holdfast.spec.kubernetes` has the rules, as functions of text; here is who looks in between.
"""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput
from holdfast.spec import kubernetes
from holdfast.spec.kubernetes import SeenVolume
from holdfast.spec.runtime import spec_from_raw
from holdfast.storage import volume_plan

if TYPE_CHECKING:
    from holdfast.spec.hints import Hint
    from holdfast.spec.runtime import JsonObject


def understand(document: JsonObject, known: tuple[Hint, ...]) -> tuple[JsonObject, tuple[Hint, ...], tuple[Hint, ...]]:
    """A specification as it is meant, the hints of the pod once the container has joined it, and the container's own.

    Without an engine's annotations it stays as it is, and only hints are read.

    Args:
        document: not changed.
        known: the pod's hints so far.

    Raises:
        InvalidInput, NotFound: an annotation is wrong, or contradicts what the pod has, or names no volume.
    """
    spec = spec_from_raw(document, "")
    annotations = {key: str(value) for key, value in spec.annotations.items()}
    names = {hint.name for hint in known}
    patterns = kubernetes.volumes_to_find(annotations)
    seen = {name: _look(pattern) for name, pattern in patterns.items() if name not in names}
    hints, own = volume_plan.pod_hints(kubernetes.with_sources(annotations, seen, known), known)
    mounts = kubernetes.mounts_as_annotated(annotations, spec.mounts)
    role = kubernetes.role(annotations)
    if role.sandbox_id and role.kind == "sandbox" and (shm := kubernetes.shm_hint(mounts, hints)):
        hints, own = (*hints, shm), (*own, shm)
    meant = kubernetes.shm_in_memory(mounts, hints)
    raw = [
        old if new is was else {**old, "type": new.type, "options": list(new.options)}
        for old, was, new in zip(document.get("mounts") or (), spec.mounts, meant, strict=True)
    ]
    return {**document, "mounts": raw}, hints, own


def _look(pattern: str) -> SeenVolume:
    """What there is of a volume.

    Raises:
        InvalidInput: ``source-unreadable``; whether it is empty cannot be seen.
    """
    paths = tuple(sorted(glob.glob(pattern)))
    if not paths or not os.path.isdir(paths[0]):
        return SeenVolume(paths)
    try:
        return SeenVolume(paths, tuple(sorted(os.listdir(paths[0]))))
    except OSError as error:
        raise InvalidInput("find volume", subject=paths[0], why=error, code="source-unreadable") from None
