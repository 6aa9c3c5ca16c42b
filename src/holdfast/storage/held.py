"""What one holder - a container, or one attach - holds, as data: how to let go of it follows from that.

So a pod that goes on from a copy of another's machine can let go of what it never acquired itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from holdfast.storage.attachments import FLUSH_SECONDS
from holdfast.storage.disk_mounts import MountKey  # noqa: TC001  msgspec reads the type
from holdfast.storage.undo import UNDO_SECONDS, Undo

if TYPE_CHECKING:
    import asyncio

    from holdfast.storage.pci import Node

#: To let go of what the guest has to write back first, and then unmounts and ejects.
WRITTEN_SECONDS = FLUSH_SECONDS + UNDO_SECONDS
#: Disks and shares do not depend on each other; QEMU takes 50 ms to let go of a disk, whatever else it does.
SIDE_BY_SIDE = "disks and shares"


class KeptDisk(msgspec.Struct, frozen=True, tag="disk"):
    """A mounted disk; a layer is let go of last."""

    key: MountKey
    layer: bool = False


class KeptShares(msgspec.Struct, frozen=True, tag="shares"):
    """Shares, by number."""

    numbers: tuple[int, ...]


class KeptScratch(msgspec.Struct, frozen=True, tag="scratch"):
    """The file of a scratch disk that containers share."""

    encrypted: bool


class KeptVolume(msgspec.Struct, frozen=True, tag="volume"):
    """A view of a volume.

    Attributes:
        group, seconds: see :meth:`Undo.push`.
        below: what an overlay lies on.
    """

    path: str
    name: str
    group: str = SIDE_BY_SIDE
    seconds: float = UNDO_SECONDS
    below: str = ""


class KeptRoot(msgspec.Struct, frozen=True, tag="root"):
    """A container's root filesystem, and what it lies on."""

    container: str
    path: str
    layers: tuple[str, ...] = ()


Kept = KeptDisk | KeptShares | KeptScratch | KeptVolume | KeptRoot


class Held:
    """What one container, or one attach, holds.

    Attributes:
        paths: id of each step done -> the path that it yielded in the guest.
        nodes: device nodes that came with assigned devices.
        kept: what it holds, in the order of its coming.
        undo, layers: how to let go of all: first of the one, then, though it was acquired side by side, of the other.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.paths: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.kept: list[Kept] = []
        self.undo = Undo()
        self.layers = Undo()
        self.failed = False
        self.work: asyncio.Future[None]
        self.releasing: asyncio.Task[list[Exception]] | None = None
