"""The bundles that a saved pod is restored with: each must ask for the mounts that its container was saved with.

A container's processes go on with the mounts that they have, so nothing of a bundle is mounted.  What it may change is
where a directory of the host is found: it is known again, and the restored pod looks for it at the bundle's path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import InvalidInput, NotFound, Unsupported
from holdfast.pod import planning
from holdfast.pod.requests import container_request
from holdfast.storage.restore import check_same, saved_pod

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from holdfast.pod.savefile import Manifest
    from holdfast.pod.snapshot import FrozenContainers, FrozenPod
    from holdfast.spec.hints import Hint
    from holdfast.storage.restore import SavedContainer


def take(
    manifest: Manifest, record: FrozenPod, bundles: Mapping[str, str | Path], data: Path
) -> tuple[Manifest, FrozenPod]:
    """What was saved, with the paths that bundles give to directories of the host; nothing is touched.

    Raises:
        InvalidInput: ``restore-differs``: a bundle asks for other mounts; container, mount and field are named.
            ``bundle-container``, ``bundle-twice``; or a bundle is wrong in itself.
        NotFound: no such container runs in what was saved; or a bundle, or a source of it, is not there.
        Unsupported: ``save-no-mounts``: what was saved does not say what its containers mounted.
    """
    saved = {one.name: one for one in record.containers.mounts}
    folders = _of_containers(bundles, record.containers, record.pod)
    for name in folders:
        if name not in saved:
            raise Unsupported(
                "restore pod", subject=f"{record.pod}/{name}", code="save-no-mounts",
                why="this save has no record of its mounts that a bundle could be compared with",
                hint="an earlier Holdfast started the container: restore it without --bundle",
            )  # fmt: skip
    before = [saved[name] for name in folders]
    said = _hints(before)
    # What others have said, too, is known before: as at a start, a bundle must not contradict it.
    known = tuple(
        hint for hint, said_by in record.storage.hints if hint not in said or set(said_by) - folders.keys()
    )  # fmt: skip
    now: dict[str, SavedContainer] = {}
    for name, folder in folders.items():
        asked = planning.understand(container_request(name, data, bundle=folder), known)
        now[name], known = planning.record(asked), asked.hints
    check_same(saved_pod(before, said), saved_pod(now.values(), _hints(now.values())), record.pod)
    return _moved(manifest, record, now, _paths(before, now))


def _hints(containers: Iterable[SavedContainer]) -> set[Hint]:
    return {hint for one in containers for hint in one.hints}


def _of_containers(
    bundles: Mapping[str, str | Path], containers: FrozenContainers, pod: str
) -> dict[str, str | Path]:  # fmt: skip
    """The bundles by container, in the order in which those were started.

    Raises:
        InvalidInput, NotFound: a container has none, or two.
    """
    running = [info.name for info in containers.infos if info.name in containers.specs]
    there = f"{pod} was saved with {', '.join(running) or 'none that runs'}"
    found: dict[str, str | Path] = {}
    for name, folder in bundles.items():
        if not name and len(running) != 1:
            raise InvalidInput(
                "restore pod", subject=f"bundle {folder}", why=f"which container is it of? {there}",
                code="bundle-container", hint="--bundle CONTAINER=DIR",
            )  # fmt: skip
        name = name or running[0]
        if name not in running:
            raise NotFound("restore pod", subject=f"{pod}/{name}", why=there, code="container-not-running")
        if name in found:
            why = f"it has two bundles: {found[name]} and {folder}"
            raise InvalidInput("restore pod", subject=f"{pod}/{name}", why=why, code="bundle-twice")
        found[name] = folder
    return {name: found[name] for name in running if name in found}


def _paths(before: Iterable[SavedContainer], now: Mapping[str, SavedContainer]) -> dict[str, str]:
    """Old and new path of directories of the host; both are the same thing, or this would be a difference."""
    paths: dict[str, str] = {}
    for one in before:
        new = {mount.name: mount.source for mount in now[one.name].mounts}
        paths.update((mount.source, new[mount.name]) for mount in one.mounts if mount.inode)
    return paths


def _moved(
    manifest: Manifest, record: FrozenPod, now: Mapping[str, SavedContainer], paths: Mapping[str, str]
) -> tuple[Manifest, FrozenPod]:
    replace = msgspec.structs.replace
    of_host = tuple(
        replace(one, mounts=tuple(replace(m, source=paths.get(m.source, m.source)) for m in one.mounts))
        for one in manifest.mounts.containers
    )
    shares = tuple(
        (replace(share, key=share.key._replace(path=paths.get(share.key.path, share.key.path))), holders)
        for share, holders in record.storage.shares
    )
    mounts = tuple(now.get(one.name, one) for one in record.containers.mounts)
    return replace(manifest, mounts=replace(manifest.mounts, containers=of_host)), replace(
        record,
        storage=replace(record.storage, shares=shares),
        containers=replace(record.containers, mounts=mounts),
    )
