"""Making a disk larger that is attached and mounted, while it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput, NotFound, Unsupported
from holdfast.spec import guest_requests as requests
from holdfast.storage import scratch as scratch_disks
from holdfast.storage.volume_disks import same_file

if TYPE_CHECKING:
    from holdfast.storage.attachments import Attachment
    from holdfast.storage.engine import Engine


async def grow_scratch(engine: Engine, holder: str, size_bytes: int) -> int:
    """Makes the scratch disk that ``holder`` writes to larger, meanwhile; returns its size.

    Raises:
        NotFound: it has none.
        InvalidInput: the disk is larger already.
        Unsupported: it is encrypted.
    """
    size_bytes = scratch_disks.whole_blocks(size_bytes)
    disks = [a for a, holders in engine.attachments.items() if a.disk.kind == "scratch" and holder in holders]
    if not disks:
        raise NotFound("grow scratch disk", subject=holder, why="it has none", code="no-scratch")
    await _grow(engine, disks[0], size_bytes, f"scratch disk {holder}")
    return size_bytes


async def grow_volume(engine: Engine, path: str, size_bytes: int) -> int:
    """The same for a volume that this pod writes to.

    Args:
        path: of its disk, on the host.

    Raises:
        NotFound: this pod does not, or does not any more.
        InvalidInput: the disk is larger already.
    """
    writable = [a for a, _ in engine.attachments.items() if a.leased and not a.disk.read_only]
    disks = [a for a in writable if same_file(path, a.disk.path) and engine.disks.path_of(a)]
    if not disks:
        raise NotFound("grow volume", subject=path, why="the pod does not write to it", code="not-attached")
    await _grow(engine, disks[0], size_bytes, f"volume {path}")
    return size_bytes


async def _grow(engine: Engine, disk: Attachment, size_bytes: int, what: str) -> None:
    if disk.disk.encrypted:
        raise Unsupported(f"grow {what}", why="it is encrypted", code="grow-unsupported")
    if size_bytes < disk.size_bytes:
        why = f"{size_bytes} bytes are less than the {disk.size_bytes} that it has"
        raise InvalidInput(f"grow {what}", why=why, code="scratch-size")
    await engine.attachments.grow(disk, size_bytes)
    slot, paths = disk.slot, engine.disks.path_of(disk)
    if not paths:  # it has been let go of meanwhile
        raise NotFound(f"grow {what}", why="it is not mounted any more", code="not-attached")
    path = paths[0]
    settings = requests.LCOWMappedVirtualDisk(mount_path=path, lun=slot.lun, controller=slot.controller)
    await engine.ask_guest("Update", settings)
