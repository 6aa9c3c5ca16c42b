"""From what an engine holds to data, and back in another pod."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from holdfast.machine.sandbox import LUNS
from holdfast.storage.description import describe
from holdfast.storage.fork_policy import FRESH
from holdfast.storage.frozen import (
    FrozenDisk,
    FrozenHolder,
    FrozenMount,
    FrozenStorage,
    busy,
    check_disks,
    check_shares,
    refused,
)
from holdfast.storage.held import KeptDisk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.storage.attachments import Attachment, DiskKey
    from holdfast.storage.engine import Engine
    from holdfast.storage.held import Kept

    #: Plugs a disk into the machine that is to go on with it; returns the descriptor of the lowest of its files.
    Plug = Callable[[FrozenDisk], Awaitable[int]]


def freeze(engine: Engine) -> FrozenStorage:
    """See :meth:`Engine.freeze`."""
    for held in engine.holders():
        if held.failed or held.releasing is not None or not held.work.done():
            raise busy(held.holder)
    kinds = (("a disk", engine.attachments.shared), ("a mount", engine.disks.shared), ("a share", engine.shares))
    for what, kind in kinds:
        if kind.unsettled:
            raise busy(what)
    _check(engine)
    disks, mounts, scratch = engine.attachments.shared, engine.disks.shared, engine.scratch
    shares, last_share = engine.shares.freeze()
    keys = {a.key: _key_of_copy(a) for a, _ in engine.attachments.items()}
    return FrozenStorage(
        disks=tuple(
            FrozenDisk(
                msgspec.structs.replace(a, key=keys[a.key], leased=a.leased and a.disk.read_only), disks.counts(a.key)
            )
            for a, _ in engine.attachments.items()
        ),
        mounts=tuple(
            FrozenMount(key._replace(disk=keys[key.disk]), mount.guest_path, mounts.counts(key))
            for key, mount, _ in mounts.items()
        ),
        scratch=tuple((kind, _file_of(engine, fd), scratch.counts(kind)) for kind, fd, _ in scratch.items()),
        shares=shares,
        last_share=last_share,
        volumes=engine.volumes.freeze(),
        hints=tuple((hint, tuple(sorted(said_by))) for hint, said_by in engine.hints.items()),
        holders=tuple(
            FrozenHolder(held.holder, held.paths, tuple(_kept_in_copy(kept, keys) for kept in held.kept))
            for held in engine.holders()
        ),
    )


def _key_of_copy(attachment: Attachment) -> DiskKey:
    """A copy of a disk of the user's is not that disk: who asks for the file there is not to get the copy."""
    if not attachment.leased or attachment.disk.read_only:
        return attachment.key
    slot = attachment.slot
    return attachment.key._replace(device=0, inode=slot.controller * LUNS + slot.lun + 1)  # no file is on device 0


def _kept_in_copy(kept: Kept, keys: dict[DiskKey, DiskKey]) -> Kept:
    if isinstance(kept, KeptDisk):
        return msgspec.structs.replace(kept, key=kept.key._replace(disk=keys[kept.key.disk]))
    return kept


def _check(engine: Engine) -> None:
    covered = engine.covered()
    check_disks(engine.attachments.items())
    for attachment, holders in engine.attachments.items():
        if attachment.disk.fork == FRESH and covered.intersection(engine.disks.path_of(attachment)):
            what = f"disk {attachment.disk.path} of {', '.join(holders)}"
            raise refused(what, "an overlay lies on it, and in a copy it would be empty", "end what has the overlay")
    check_shares(engine.shares.items(), covered)
    found = describe(engine)
    if found["pmem"] or found["devices"]:
        raise refused("persistent memory and devices of the host", "they cannot be copied", "start the pod without")


def _file_of(engine: Engine, fd: int) -> int:
    """Which of the disks the file of a scratch disk that containers share is: its place in the list."""
    status = os.fstat(fd)
    keys = [(a.key.device, a.key.inode) for a, _ in engine.attachments.items()]
    return keys.index((status.st_dev, status.st_ino))


async def adopt(engine: Engine, frozen: FrozenStorage, plug: Plug) -> None:
    """See :meth:`Engine.adopt`; what each holder holds is the engine's own."""
    lowest: list[int] = []
    for disk in frozen.disks:

        async def plug_it(disk: FrozenDisk = disk) -> None:
            lowest.append(await plug(disk))

        await engine.attachments.adopt(disk.attachment, disk.holders, plug_it)
    for mount in frozen.mounts:
        engine.disks.adopt(mount.key, mount.guest_path, mount.holders)
    for encrypted, place, holders in frozen.scratch:
        engine.scratch.adopt(encrypted, os.dup(lowest[place]), holders)
    engine.shares.adopt(frozen.shares, frozen.last_share)
    engine.volumes.adopt(frozen.volumes)
    for hint, said_by in frozen.hints:
        engine.hints[hint] = set(said_by)
