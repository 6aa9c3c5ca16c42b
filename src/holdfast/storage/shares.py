"""Host directories and files shown in the guest.

The sandbox exports one folder over 9p.  A share is a numbered entry in it: a clone of the host's mount,
made detached, made read-only if it is to be, and published by one ``move_mount``.  The export lives in the
monitor's own mount namespace, so that nothing of it is seen on the host or outlives the monitor.

A single file gets a folder of its own with that one name in it: nothing beside it becomes visible.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import InvalidInput, NotFound
from holdfast.linux import syscalls
from holdfast.mounts.unmount import remove_mount_point, unmount
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import GUEST_SECONDS, add_causes, while_alive
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal


class ShareKey(NamedTuple):
    """What makes two shares the same."""

    device: int
    inode: int
    path: str
    read_only: bool
    recursive: bool


class Share(msgspec.Struct, frozen=True):
    """A share: its number in the export and where the guest has it."""

    key: ShareKey
    number: int
    file: str
    guest_path: str
    row: int


class Shares:
    """The shares of one pod."""

    def __init__(self, sandbox: Sandbox, journal: Journal, pod: str) -> None:
        self._sandbox = sandbox
        self._journal = journal
        self._pod = pod
        self._numbers: set[int] = set()
        self._shared: Counted[ShareKey, Share] = Counted(self._remove)

    async def add(self, key: ShareKey, holder: str, *, file: bool) -> Share:
        """Shows a directory, or one file, in the guest, or counts one more holder.

        Raises:
            InvalidInput: another file is there than the one that was seen.
            HoldfastError: what went wrong; nothing of it is left.
        """
        return await self._shared.acquire(key, holder, lambda: self._add(key, file))

    async def remove(self, share: Share, holder: str) -> None:
        """Lets go of a share; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self._shared.release(share.key, holder)

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _add(self, key: ShareKey, file: bool) -> Share:
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        row = self._journal.intend(self._pod, "share", key.path, {"number": number, "read_only": key.read_only})
        self._numbers.add(number)
        name = os.path.basename(key.path) if file else ""
        target = f"/run/mounts/shares/m{number}"
        share = Share(key, number, name, f"{target}/{name}" if name else target, row)
        undo = Undo()
        undo.push("withdraw share", lambda: self._take_back(share))
        try:
            self._publish(key, number, name)
            # The guest may have it mounted even when its answer does not come: from here on undoing is removing.
            undo.forget()
            undo.push("remove share", lambda: self._remove(key, share))
            settings = requests.LCOWMappedDirectory(mount_path=target, share_name=str(number), read_only=key.read_only)
            request = requests.encode(requests.GuestRequest("Add", settings))
            await self._sandbox.request("modify", request, GUEST_SECONDS)
            self._journal.hold(row)
        except BaseException as error:
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes:
                raise HalfMade(error, share) from error
            raise
        return share

    def _publish(self, key: ShareKey, number: int, name: str) -> None:
        entry = f"{self._sandbox.export}/{number}"
        os.mkdir(entry, 0o755)
        target = entry
        if name:
            target = f"{entry}/{name}"
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        tree = clone_tree(key)
        try:
            syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(tree)

    def _withdraw(self, number: int, name: str) -> None:
        entry = f"{self._sandbox.export}/{number}"
        if name:
            unmount(f"{entry}/{name}")
            if os.path.lexists(f"{entry}/{name}"):
                os.unlink(f"{entry}/{name}")
        elif os.path.isdir(entry):
            _detach_tree(entry)
        remove_mount_point(entry)

    async def _remove(self, _key: ShareKey, share: Share) -> None:
        self._journal.releasing(share.row)
        target = f"/run/mounts/shares/m{share.number}"
        settings = requests.LCOWMappedDirectory(mount_path=target, share_name=str(share.number))
        request = requests.encode(requests.GuestRequest("Remove", settings))
        await while_alive(self._sandbox, lambda: self._sandbox.request("modify", request, GUEST_SECONDS))
        self._take_back(share)

    def _take_back(self, share: Share) -> None:
        """The host's half of a removal; what stays published keeps its number and its line in the journal."""
        self._withdraw(share.number, share.file)
        self._numbers.discard(share.number)
        self._journal.release(share.row)

    def items(self) -> list[tuple[Share, list[str]]]:
        """Every share with its holders, by number."""
        return sorted(((s, holders) for _, s, holders in self._shared.items()), key=lambda item: item[0].number)


def clone_tree(key: ShareKey) -> int:
    """A detached copy of the mount at a host path, read-only if the share is; the caller owns the descriptor.

    The path is opened once and everything after goes by that descriptor.

    Raises:
        NotFound: it is gone.
        InvalidInput: something else is there than what was seen.
    """
    try:
        fd = os.open(key.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound("share", subject=key.path, why=error, code="source-not-found") from None
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (key.device, key.inode):
            raise InvalidInput("share", subject=key.path, why="another file is there now", code="source-changed")
        recursive = syscalls.AT_RECURSIVE if key.recursive else 0
        tree = syscalls.open_tree(fd, "", syscalls.AT_EMPTY_PATH | syscalls.OPEN_TREE_CLONE | recursive)
    finally:
        os.close(fd)
    try:
        # Private: what is mounted in the copy later must not show up on the host.
        attributes = syscalls.MOUNT_ATTR_RDONLY if key.read_only else 0
        syscalls.mount_setattr(
            tree, "", syscalls.AT_EMPTY_PATH | recursive, attr_set=attributes, propagation=syscalls.MS_PRIVATE
        )
    except BaseException:
        os.close(tree)
        raise
    return tree


def _detach_tree(target: str) -> None:
    """Drops a share's whole tree with one call: sub-mounts came with it and go with it."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
