"""Host directories and files shown in the guest.

The sandbox exports one folder over 9p.  A share is a numbered entry in it: a clone of the host's mount,
made detached, made read-only if it is to be, and published by one ``move_mount``.  The export lives in the
monitor's own mount namespace, so that nothing of it is seen on the host or outlives the monitor.

A single file gets a folder of its own with that one name in it: nothing beside it becomes visible.  When the
host replaces the file (editors and package managers write a new one and rename it), the new one is published
in a second folder, and one ``renameat2`` exchanges the two: at each moment the name is the old file or the
new one.  While the name is gone on the host, or is no regular file, it does not exist in the guest either.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import HoldfastError, InvalidInput, NotFound
from holdfast.linux import syscalls
from holdfast.mounts.unmount import remove_mount_point
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import FLUSH_SECONDS, GUEST_SECONDS, add_causes, while_alive
from holdfast.storage.counted import Counted, HalfMade
from holdfast.storage.follow import Follower
from holdfast.storage.undo import Undo

if TYPE_CHECKING:
    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal


#: How the guest caches a share's data.  ``mmap``: not at all, but for what is mapped; ``none``: nor that, so
#: that there are no writable shared maps; ``loose``: as if nobody else wrote.
CACHE_MODES = ("mmap", "none", "loose")
DEFAULT_CACHE = "mmap"
#: Nothing is executed through a share's mount on the host, and no device opened: QEMU only reads and writes files.
_ATTRIBUTES = syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOSUID


class ShareKey(NamedTuple):
    """What is to be shared, and how; ``device`` and ``inode`` are those that were seen at ``path``."""

    device: int
    inode: int
    path: str
    read_only: bool
    recursive: bool
    cache: str = DEFAULT_CACHE


class Identity(NamedTuple):
    """What makes two shares the same: a directory, the names of it that are shown, and how.

    Attributes:
        mount, device, inode: of the directory, however its path was spelled; of the file, if that has no name.
        names: empty for all; else the file's name in the directory.
        shown: what the guest sees it called; not the same as its name if the path is a link to it.
    """

    mount: int
    device: int
    inode: int
    names: tuple[str, ...]
    shown: str
    read_only: bool
    recursive: bool
    cache: str


class Share(msgspec.Struct, frozen=True):
    """A share: its number in the export and where the guest has it."""

    key: ShareKey
    identity: Identity
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
        self._last = -1
        self._follower = Follower()
        self._refreshing: set[asyncio.Task[None]] = set()
        self._refresh_one = asyncio.Lock()
        self._stale: set[int] = set()
        self._shared: Counted[Identity, Share] = Counted(self._remove)

    async def add(self, key: ShareKey, holder: str, *, file: bool) -> Share:
        """Shows a directory, or one file, in the guest, or counts one more holder.

        Raises:
            InvalidInput: another file is there than the one that was seen.
            HoldfastError: what went wrong; nothing of it is left.
        """
        identity = identify(key, file=file)
        return await self._shared.acquire(identity, holder, lambda: self._add(identity, key))

    async def remove(self, share: Share, holder: str) -> None:
        """Lets go of a share; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self._shared.release(share.identity, holder)

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _add(self, identity: Identity, key: ShareKey) -> Share:
        # Never one that was used before: a guest that caches ("loose") would show an earlier share's files.
        self._last = number = self._last + 1
        row = self._journal.intend(self._pod, "share", key.path, {"number": number, "read_only": key.read_only})
        name = identity.shown
        target = f"/run/mounts/shares/m{number}"
        share = Share(key, identity, number, name, f"{target}/{name}" if name else target, row)
        undo = Undo()
        undo.push("withdraw share", lambda: self._take_back(share))
        try:
            self._publish(share)
            # The guest may have it mounted even when its answer does not come: from here on undoing is removing.
            undo.forget()
            undo.push("remove share", lambda: self._remove(identity, share))
            settings = requests.LCOWMappedDirectory(
                mount_path=target, share_name=str(number), read_only=key.read_only,
                cache="" if key.cache == DEFAULT_CACHE else key.cache,
            )  # fmt: skip
            await self._guest("Add", settings)
            self._journal.hold(row)
        except BaseException as error:
            causes = await undo.unwind()
            add_causes(error, causes)
            if causes:
                raise HalfMade(error, share) from error
            raise
        return share

    def _publish(self, share: Share) -> None:
        entry = f"{self._sandbox.export}/{share.number}"
        fd = open_source(share.key)
        try:
            seen = _identity(fd)
            tree = clone_tree(share.key, fd)
            try:
                _make_entry(entry, share.file, tree)
            finally:
                os.close(tree)
            if share.identity.names:
                self._follow(share, fd, seen)
        finally:
            os.close(fd)

    def _follow(self, share: Share, fd: int, seen: tuple[int, int]) -> None:
        """From now on the entry shows what the file's name stands for, in the directory where that is now.

        The directory stays open, and a link is not followed: whoever can write there (another share's guest,
        perhaps) can choose among the files there, and gets at nothing else.
        """
        home = _home(fd)
        if home is None:
            return
        dir_fd, name = home
        shown: tuple[int, int] | None = seen

        def look() -> None:
            nonlocal shown
            file_fd = _open_file(dir_fd, name)
            try:
                now = _identity(file_fd) if file_fd >= 0 else None
                if now != shown:
                    self._replace(share, file_fd)
                    shown = now
            finally:
                if file_fd >= 0:
                    os.close(file_fd)

        try:
            self._follower.follow(share.number, dir_fd, name, look, lambda: os.close(dir_fd))
        except BaseException:
            os.close(dir_fd)
            raise

    def _replace(self, share: Share, file_fd: int) -> None:
        """Shows another file, or none (-1), in the place of the one that is shown; no moment is between the two."""
        entry, other = f"{self._sandbox.export}/{share.number}", f"{self._sandbox.export}/.{share.number}"
        _clear_entry(other, share.file)
        try:
            tree = clone_tree(share.key, file_fd) if file_fd >= 0 else -1
            try:
                _make_entry(other, share.file, tree)
            finally:
                if tree >= 0:
                    os.close(tree)
            syscalls.renameat2(other, entry, syscalls.RENAME_EXCHANGE)
        finally:
            _clear_entry(other, share.file)
        if share.number not in self._stale:
            self._stale.add(share.number)
            task = asyncio.ensure_future(self._refresh(share))
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _refresh(self, share: Share) -> None:
        """Lets the guest forget what it has in memory of the file that was there before."""
        settings = requests.LCOWMappedDirectory(mount_path=share.guest_path, share_name=str(share.number))
        async with self._refresh_one:  # a file that is replaced all the time does not fill the guest with requests
            self._stale.discard(share.number)
            with contextlib.suppress(HoldfastError):  # it has none if it does not have the share, or does not live
                await self._guest("Update", settings)

    async def _guest(
        self, action: requests.RequestType, settings: requests.LCOWMappedDirectory, seconds: float = GUEST_SECONDS
    ) -> None:
        request = requests.encode(requests.GuestRequest(action, settings))
        await self._sandbox.request("modify", request, seconds)

    def _withdraw(self, number: int, name: str) -> None:
        self._follower.forget(number)
        entry = f"{self._sandbox.export}/{number}"
        if name:
            _clear_entry(entry, name)
        else:
            _detach_tree(entry)
            remove_mount_point(entry)

    async def _remove(self, _identity: Identity, share: Share) -> None:
        self._journal.releasing(share.row)
        target = f"/run/mounts/shares/m{share.number}"
        settings = requests.LCOWMappedDirectory(mount_path=target, share_name=str(share.number))
        await while_alive(self._sandbox, lambda: self._guest("Remove", settings, FLUSH_SECONDS))
        self._take_back(share)

    def _take_back(self, share: Share) -> None:
        """The host's half of a removal; what stays published keeps its number and its line in the journal."""
        self._withdraw(share.number, share.file)
        self._journal.release(share.row)

    def items(self) -> list[tuple[Share, list[str]]]:
        """Every share with its holders, by number."""
        return sorted(((s, holders) for _, s, holders in self._shared.items()), key=lambda item: item[0].number)


def open_source(key: ShareKey) -> int:
    """What is to be shared, opened (O_PATH) once and for all; the caller owns the descriptor.

    Raises:
        NotFound: it is gone.
        InvalidInput: something else is there than what was seen.
    """
    try:
        fd = os.open(key.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound("share", subject=key.path, why=error, code="source-not-found") from None
    if _identity(fd) != (key.device, key.inode):
        os.close(fd)
        raise InvalidInput("share", subject=key.path, why="another file is there now", code="source-changed")
    return fd


def identify(key: ShareKey, *, file: bool) -> Identity:
    """What makes a share the same as another one.

    Raises:
        NotFound, InvalidInput: see :func:`open_source`.
    """
    fd = open_source(key)
    try:
        shown = os.path.basename(key.path) if file else ""
        names: tuple[str, ...] = ()
        where = _identity(fd)
        mount = _mount_of(fd)
        home = _home(fd) if file else None
        if home is not None:
            dir_fd, name = home
            names, where = (name,), _identity(dir_fd)
            os.close(dir_fd)
        return Identity(mount, *where, names, shown, key.read_only, key.recursive, key.cache)
    finally:
        os.close(fd)


def clone_tree(key: ShareKey, source_fd: int = -1) -> int:
    """A detached copy of the mount at a host path, read-only if the share is; the caller owns the descriptor.

    Args:
        source_fd: what is at the path, if it is open already; stays the caller's.

    Raises:
        NotFound, InvalidInput: see :func:`open_source`.
    """
    fd = open_source(key) if source_fd < 0 else source_fd
    try:
        recursive = syscalls.AT_RECURSIVE if key.recursive else 0
        tree = syscalls.open_tree(fd, "", syscalls.AT_EMPTY_PATH | syscalls.OPEN_TREE_CLONE | recursive)
    finally:
        if fd != source_fd:
            os.close(fd)
    try:
        # Private: what is mounted in the copy later must not show up on the host.
        attributes = _ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if key.read_only else 0)
        syscalls.mount_setattr(
            tree, "", syscalls.AT_EMPTY_PATH | recursive, attr_set=attributes, propagation=syscalls.MS_PRIVATE
        )
    except BaseException:
        os.close(tree)
        raise
    return tree


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _mount_of(fd: int) -> int:
    """The number of the mount that a descriptor was opened through: the same directory may be in several."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _home(file_fd: int) -> tuple[int, str] | None:
    """The directory that an open file is in (the caller's to close) and its name there; None if it has none."""
    folder, name = os.path.split(os.readlink(f"/proc/self/fd/{file_fd}"))
    try:
        dir_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    found = _open_file(dir_fd, name)
    if found >= 0:
        same = _identity(found) == _identity(file_fd)
        os.close(found)
        if same:
            return dir_fd, name
    os.close(dir_fd)
    return None


def _open_file(dir_fd: int, name: str) -> int:
    """The regular file of a name (O_PATH), or -1 if there is none."""
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def _make_entry(entry: str, name: str, tree: int) -> None:
    """Makes an entry of the export and moves a detached mount there: on it, or on ``name`` in it; -1 is none."""
    os.mkdir(entry, 0o755)
    if tree < 0:
        return
    target = entry
    if name:
        target = f"{entry}/{name}"
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def _clear_entry(entry: str, name: str) -> None:
    """Removes an entry that nothing leads to any more, also if the machine has its file open still."""
    if os.path.isdir(entry):
        _detach_tree(f"{entry}/{name}")
        if os.path.lexists(f"{entry}/{name}"):
            os.unlink(f"{entry}/{name}")
        os.rmdir(entry)


def _detach_tree(target: str) -> None:
    """Drops a share's whole tree with one call: sub-mounts came with it and go with it."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
