"""What a pod holds when it is frozen, as data, and whether what it holds can be copied.

A copy of the machine has everything at the same addresses, so what is recorded is what the engine knows, not what it
did: disks in their slots, mounts with their holders, and what each holder holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import HoldfastError, InUse, Unsupported
from holdfast.spec.hints import Hint  # noqa: TC001  msgspec reads the types
from holdfast.storage.attachments import Attachment  # noqa: TC001
from holdfast.storage.disk_mounts import MountKey  # noqa: TC001
from holdfast.storage.held import Kept  # noqa: TC001
from holdfast.storage.pod_volumes import FrozenVolumes  # noqa: TC001
from holdfast.storage.shares import Share  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class FrozenFile(NamedTuple):
    """A file of a disk's chain: its place among the descriptors that come with the record."""

    number: int
    disk_format: str
    block_device: bool = False


class FrozenDisk(msgspec.Struct, frozen=True):
    """A disk in a slot.

    Attributes:
        attachment: as the copy is to have it: what it may write to is its own, and needs no lease.
        holders: who has it, and how often.
        files: its chain, the lowest first; nobody writes to them any more, and a copy that may write puts one on top.
    """

    attachment: Attachment
    holders: dict[str, int]
    files: tuple[FrozenFile, ...] = ()


class FrozenMount(msgspec.Struct, frozen=True):
    """A disk that the guest has mounted."""

    key: MountKey
    guest_path: str
    holders: dict[str, int]


class FrozenHolder(msgspec.Struct, frozen=True):
    """What one holder holds."""

    holder: str
    paths: dict[str, str]
    kept: tuple[Kept, ...]


class FrozenStorage(msgspec.Struct, frozen=True):
    """Everything that a pod's engine knows.

    Attributes:
        scratch: those that containers share for their writes: whether encrypted, its place in ``disks``, who has it.
        shares: with those who hold them, and how often.
        last_share: the highest number that one had.
        hints: which mounts the containers share, and who has said so.
    """

    disks: tuple[FrozenDisk, ...]
    mounts: tuple[FrozenMount, ...]
    scratch: tuple[tuple[bool, int, dict[str, int]], ...]
    shares: tuple[tuple[Share, dict[str, int]], ...]
    last_share: int
    volumes: FrozenVolumes
    hints: tuple[tuple[Hint, tuple[str, ...]], ...]
    holders: tuple[FrozenHolder, ...]


def check_disks(attachments: Iterable[tuple[Attachment, Sequence[str]]]) -> None:
    """Checks that each of a pod's disks can be copied.

    Raises:
        Unsupported: one cannot; the error names it, who has it, and why.
    """
    for attachment, holders in attachments:
        disk = attachment.disk
        if disk.fork == "deny" or (disk.fork == "share" and not disk.read_only):
            why = "it was attached with fork=deny" if disk.fork == "deny" else "two pods would write to it"
            raise refused(f"disk {disk.path} of {', '.join(holders)}", why, "attach it read-only, or with fork=copy")
        if disk.block_device and not disk.read_only and attachment.leased:
            raise refused(
                f"block device {disk.path} of {', '.join(holders)}", "its copy would be as large as it is",
                "attach it read-only, or detach it first",
            )  # fmt: skip


def check_shares(shares: Iterable[tuple[Share, Sequence[str]]], covered: frozenset[str]) -> None:
    """Checks that each of a pod's shares can be had by a copy as well.

    Args:
        covered: paths in the guest that lie below an overlay.

    Raises:
        Unsupported: one cannot; the error names it, who has it, and why.
    """
    for share, holders in shares:
        what = f"share {share.key.path} of {', '.join(holders)}"
        if share.guest_path in covered:
            raise refused(what, "an overlay lies on it", "use an image, or a disk")
        if share.key.fork == "deny":
            raise refused(what, "it was shared with fork=deny", "end what has it")
        if not share.key.read_only and share.key.fork != "share":
            raise refused(
                what, "two pods would write to it", "share it read-only, or with fork=share; or attach a disk"
            )  # fmt: skip


def refused(what: str, why: str, hint: str) -> HoldfastError:
    """Why a pod cannot be copied."""
    return Unsupported("freeze pod", subject=what, why=why, code="not-forkable", hint=hint)


def busy(what: str) -> HoldfastError:
    """Why it cannot be copied now."""
    return InUse("freeze pod", subject=what, why="it is being released, or could not be", code="busy", hint="try again")
