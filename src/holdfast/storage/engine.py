"""The engine carries out plans, and lets go of what they acquired.

It acquires in the plan's order, remembering each acquisition at once, so that a failure in the middle, or
the container's end, releases all of it in reverse, the layers last.  A release that fails keeps what it
could not let go of; the next try goes on from there.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from holdfast.errors import InUse
from holdfast.spec import guest_requests as requests
from holdfast.storage import freezing
from holdfast.storage.acquisition import Acquisition
from holdfast.storage.attachments import FLUSH_SECONDS, GUEST_SECONDS, Attachments, add_causes, while_alive
from holdfast.storage.counted import Counted
from holdfast.storage.disk_mounts import DiskMounts
from holdfast.storage.held import (
    SIDE_BY_SIDE,
    WRITTEN_SECONDS,
    Held,
    Kept,
    KeptDisk,
    KeptRoot,
    KeptScratch,
    KeptShares,
    KeptVolume,
)  # fmt: skip
from holdfast.storage.mount_points import MountPoints
from holdfast.storage.plan import PodSnapshot
from holdfast.storage.pod_volumes import PodVolumes
from holdfast.storage.shares import Shares
from holdfast.storage.undo import UNDO_SECONDS, not_released

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox
    from holdfast.spec.hints import Hint
    from holdfast.storage.frozen import FrozenStorage
    from holdfast.storage.journal import Journal
    from holdfast.storage.pci import Functions
    from holdfast.storage.pmem import PmemLayers
    from holdfast.storage.steps import AnyStep

_SWEEP_SECONDS = 1.0


class Engine:
    """The storage of one pod.

    Args:
        data: the data folder, for scratch disks.
        writable_shares: whether the pod may have any.
        pmem: for layers that are to be in persistent memory; without it they get SCSI slots.
        functions: for assigned devices.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        journal: Journal,
        pod: str,
        data: Path,
        *,
        writable_shares: bool = True,
        pmem: PmemLayers | None = None,
        functions: Functions | None = None,
    ) -> None:
        self._sandbox = sandbox
        self.journal = journal
        self.pod = pod
        self._data = data
        self._writable_shares = writable_shares
        self.pmem = pmem
        self.functions = functions
        self.attachments = Attachments(sandbox, journal, pod)
        self.disks = DiskMounts(sandbox, self.attachments)
        self.shares = Shares(sandbox, journal, pod)
        self.volumes = PodVolumes(sandbox)
        self.mount_points = MountPoints(journal, pod)
        #: Which mounts the pod's containers share -> those that have said so.
        self.hints: dict[Hint, set[str]] = {}
        #: Files of scratch disks that containers share, by whether they are encrypted.
        self.scratch: Counted[bool, int] = Counted(_close)
        self._held: dict[str, Held] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self.making_disk = asyncio.Lock()

    @property
    def data(self) -> Path:
        """The data folder."""
        return self._data

    def snapshot(self) -> PodSnapshot:
        """What planning must know of the pod."""
        attached = [((a.key.device, a.key.inode), a, tuple(holders)) for a, holders in self.attachments.items()]
        disks = {identity: not attachment.key.read_only for identity, attachment, _ in attached}
        holders = {identity: names for identity, _, names in attached}
        layers = frozenset((a.disk.path, a.key.verity) for a, _ in self.attachments.items() if a.disk.kind == "layer")
        scratch = frozenset(encrypted for encrypted, _, _ in self.scratch.items())
        return PodSnapshot(
            self.attachments.free, frozenset(self._held), disks, holders, layers, scratch, self._writable_shares,
            tuple(self.hints), self.volumes.kinds,
        )  # fmt: skip

    async def prepare(self, holder: str, steps: tuple[AnyStep, ...]) -> Held:
        """Carries out the storage steps of a plan for ``holder``.

        Raises:
            InUse: ``holder`` holds something already.
            HoldfastError: a step failed; everything done before it has been undone, and what could not be is
                among the error's causes.
        """
        earlier = self._held.get(holder)
        if earlier is not None and earlier.failed:
            await self.release(holder)
        if holder in self._held:
            raise InUse("prepare storage", subject=holder, why="it holds some already", code="holder-in-use")
        held = self._held[holder] = Held(holder)
        # A task of its own, so that what it acquires in the moment of a cancellation is released too.
        held.work = asyncio.ensure_future(self._acquire(held, steps))
        try:
            await asyncio.shield(held.work)
        except BaseException as error:
            held.failed = True
            held.work.cancel()
            add_causes(error, await asyncio.shield(self._letting_go(held)))
            raise
        if held.releasing is not None or self._held.get(holder) is not held:
            raise InUse("prepare storage", subject=holder, why="it was released meanwhile", code="released")
        return held

    async def _acquire(self, held: Held, steps: tuple[AnyStep, ...]) -> None:
        await self._sweep()
        await Acquisition(self, held).acquire(steps)

    async def _sweep(self) -> None:
        """Tries again to unmake what earlier failures have left, but waits for that only a moment: it may be stuck."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.ensure_future(self._retry())
        await asyncio.wait({self._sweeping}, timeout=_SWEEP_SECONDS)

    async def _retry(self) -> None:
        for shared in (self.disks, self.shares, self.pmem, self.functions):
            if shared is not None:
                await shared.retry()

    async def _uncombine(self, kept: KeptRoot) -> None:
        settings = requests.LCOWCombinedLayers(container_id=kept.container, container_root_path=kept.path)
        await while_alive(self._sandbox, lambda: self.ask_guest("Remove", settings, FLUSH_SECONDS))

    def keep(self, held: Held, kept: Kept) -> None:
        """Remembers what ``held`` holds from now on, and how to let go of it."""
        held.kept.append(kept)
        holder = held.holder
        match kept:
            case KeptDisk():
                mount = self.disks.shared.value(kept.key)
                assert mount is not None
                undo = held.layers if kept.layer else held.undo
                seconds = UNDO_SECONDS if kept.key.disk.read_only else WRITTEN_SECONDS
                what = f"disk {mount.attachment.disk.path}"
                undo.push(what, lambda: self.disks.unmount(mount, holder), SIDE_BY_SIDE, seconds)
            case KeptShares():
                numbers = frozenset(kept.numbers)
                shares = [share for share, _ in self.shares.items() if share.number in numbers]
                seconds = UNDO_SECONDS if all(share.key.read_only for share in shares) else WRITTEN_SECONDS
                held.undo.push("shares", lambda: self.shares.remove_all(shares, holder), SIDE_BY_SIDE, seconds)
            case KeptScratch():
                release = self.scratch.release
                held.undo.push("the pod's scratch", lambda: release(kept.encrypted, holder), SIDE_BY_SIDE)
            case KeptVolume():
                path = kept.path
                held.undo.push(f"volume {kept.name}", lambda: self.volumes.release(path), kept.group, kept.seconds)
            case KeptRoot():
                held.undo.push("root filesystem", lambda: self._uncombine(kept), seconds=WRITTEN_SECONDS)

    # -- copies of the pod --------------------------------------------------------------------

    def freeze(self) -> FrozenStorage:
        """Everything that is held, as data; for who keeps everything from changing meanwhile.

        Raises:
            Unsupported: something that cannot be copied is held.
            InUse: something is being released, or could not be.
        """
        return freezing.freeze(self)

    async def adopt(self, frozen: FrozenStorage, plug: freezing.Plug) -> None:
        """Takes over what another pod's machine had, of which ours, that does not run yet, is a copy."""
        await freezing.adopt(self, frozen, plug)
        for one in frozen.holders:
            held = self._held[one.holder] = Held(one.holder)
            held.paths = dict(one.paths)
            held.work = asyncio.get_running_loop().create_future()
            held.work.set_result(None)
            for kept in one.kept:
                self.keep(held, kept)

    async def ask_guest(
        self, action: requests.RequestType, settings: requests.Settings, seconds: float = GUEST_SECONDS
    ) -> Any:
        """Asks the guest to change something; see :mod:`holdfast.spec.guest_requests`."""
        request = requests.encode(requests.GuestRequest(action, settings))
        return await self._sandbox.request("modify", request, seconds)

    def say_hints(self, container: str, hints: tuple[Hint, ...]) -> None:
        """From now on the pod knows these, as long as it lives."""
        for hint in hints:
            self.hints.setdefault(hint, set()).add(container)

    def unsay_hints(self, container: str) -> None:
        """A container that has said some did not start."""
        for hint, said_by in list(self.hints.items()):
            said_by.discard(container)
            if not said_by:
                del self.hints[hint]

    def also_release(self, holder: str, what: str, action: Callable[[], Awaitable[object]]) -> None:
        """Adds something to be released before everything that ``holder`` holds so far."""
        self._held[holder].undo.push(what, action)

    def holds(self, holder: str) -> bool:
        """Whether anything is still held for ``holder``."""
        return holder in self._held

    def covered(self) -> frozenset[str]:
        """What in the guest lies below overlays."""
        kept = [one for held in self._held.values() for one in held.kept]
        roots = [path for one in kept if isinstance(one, KeptRoot) for path in one.layers]
        return frozenset([*roots, *(one.below for one in kept if isinstance(one, KeptVolume))])

    def held_by(self, holder: str) -> Held | None:
        """What somebody holds, or has failed to acquire."""
        return self._held.get(holder)

    def holders(self) -> list[Held]:
        """What each holder holds, in the order of their coming."""
        return list(self._held.values())

    def held(self) -> list[str]:
        """Everybody who holds something, in the order of their coming."""
        return list(self._held)

    def has_writable(self) -> bool:
        """Whether something outside the pod could lose writes if the machine were simply killed."""
        disks = any(a.leased and not a.disk.read_only for a, _ in self.attachments.items())
        return disks or any(not share.key.read_only for share, _ in self.shares.items())

    async def release(self, holder: str) -> None:
        """Lets go of everything that ``holder`` holds, in reverse; what is not held is no error.

        Raises:
            NotReleased: something could not be let go of; it stays held, and the next call tries again.
        """
        held = self._held.get(holder)
        if held is None:
            return
        errors = await asyncio.shield(self._letting_go(held))
        if errors:
            raise not_released("release storage", holder, errors)

    def _letting_go(self, held: Held) -> asyncio.Task[list[Exception]]:
        """Who releases at the same time shares the outcome; who gives up waiting for it does not stop it."""
        if held.releasing is None:
            held.releasing = asyncio.ensure_future(self._let_go(held))
        return held.releasing

    async def _let_go(self, held: Held) -> list[Exception]:
        try:
            await asyncio.wait({held.work})
            if self.disks.left and not held.failed:
                await self._sweep()
            errors = [*await held.undo.unwind(), *await held.layers.unwind()]
            if held.failed:  # what was given up while it was made
                await self.scratch.settle()
                await self.disks.settle()
                await self.shares.settle()
                for other in (self.pmem, self.functions):
                    if other is not None:
                        await other.settle()
        finally:
            held.releasing = None
        if held.undo.empty and held.layers.empty:
            del self._held[held.holder]
        return errors


async def _close(_encrypted: bool, fd: int) -> None:
    os.close(fd)
