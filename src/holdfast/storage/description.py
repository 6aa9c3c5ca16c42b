"""Everything that a pod holds, for people and programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.storage.volumes import name_of

if TYPE_CHECKING:
    from holdfast.storage.engine import Engine


def describe(engine: Engine) -> dict[str, Any]:
    """Everything the pod holds: attachments by slot, shares by number; for ``holdfast storage``."""
    attachments = [
        {
            "slot": str(a.slot),
            "file": a.disk.path,
            "kind": a.disk.kind,
            "format": a.disk.disk_format,
            "read_only": a.disk.read_only,
            "access": a.access,
            "size_bytes": a.size_bytes,
            "holders": holders,
            "guest_paths": engine.disks.path_of(a),
            "volume": name_of(engine.data, a.disk.path),
        }
        for a, holders in engine.attachments.items()
    ]
    shares = [
        {
            "share": s.number,
            "path": s.key.path,
            "kind": "file" if s.file else "directory",
            "read_only": s.key.read_only,
            "cache": s.key.cache,
            "holders": holders,
            "guest_path": s.guest_path,
        }
        for s, holders in engine.shares.items()
    ]
    pmem = engine.pmem.describe() if engine.pmem is not None else []
    devices = engine.functions.describe() if engine.functions is not None else []
    return {
        "pod": engine.pod, "attachments": attachments, "pmem": pmem, "shares": shares, "devices": devices,
        "volumes": engine.volumes.describe(),
        "free_slots": engine.attachments.free,
    }  # fmt: skip
