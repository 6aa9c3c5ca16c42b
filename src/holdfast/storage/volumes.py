"""Named volumes: disks of Holdfast's own that pods mount by name, and that outlive them.

::

    <data>/volumes/<name>/disk           raw, sparse, ext4 with a journal; its size is the volume's quota
                         /volume.json    a Record: what the disk itself does not tell
    <data>/volumes/.new-*, .gone-*       volumes on their way in and out

A volume appears and goes by one rename.  Who makes or removes one holds a shared flock(2) on ``volumes``; who gets it
exclusively knows that nobody is at that, and sweeps what the dead have left.

Who may use a volume is settled as for any disk, by leases in the journal; see ``volume_disks`` for who is no pod.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, InUse, InvalidInput, NotFound
from holdfast.mounts import options
from holdfast.spec import disk_options
from holdfast.storage.journal import Journal
from holdfast.storage.steps import MountDisk
from holdfast.storage.volume_disks import (
    FILESYSTEM,
    TENANT,
    format_disk,
    grow_disk,
    same_file,
    tenancy,
    told,
    too_small,
    whole_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from holdfast.spec.runtime import Mount
    from holdfast.storage.survey import Source

#: The type of a mount that names a volume.
KIND = "volume"
DEFAULT_BYTES = 10 << 30
#: podman's rule; and a name is a folder's.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}", re.ASCII)


class Record(msgspec.Struct, frozen=True):
    """``volume.json``."""

    name: str
    created_ns: int
    labels: dict[str, str] = {}
    filesystem: str = FILESYSTEM


class Holder(msgspec.Struct, frozen=True):
    """A pod that has a volume; ``access`` is ``reading`` or ``writing``."""

    pod: str
    access: str


class Volume(msgspec.Struct, frozen=True):
    """A volume as it is now.

    Attributes:
        path: of its disk.
        size_bytes: how large it is; no more can be written to it.
        used_bytes: what its disk takes of the host's.
        holders: live pods that have it.
    """

    name: str
    path: str
    size_bytes: int
    used_bytes: int
    filesystem: str
    created_ns: int
    labels: dict[str, str]
    holders: tuple[Holder, ...]


class Volumes:
    """The volumes of a data folder.

    Args:
        data: the data folder.
        root: the state root whose pods use them.
        online: grows one that a pod writes to: called with the pod, the disk's path and the size in bytes.
    """

    def __init__(self, data: Path, root: Path, online: Callable[[str, str, int], object] | None = None) -> None:
        self._data = data
        self._folder = data / "volumes"
        self._root = root
        self._online = online

    def create(self, name: str, size: int | str = DEFAULT_BYTES, labels: Mapping[str, str] | None = None) -> Volume:
        """Makes an empty volume; a failure leaves nothing.

        Args:
            name: letters, digits, ``_``, ``.`` and ``-``, the first a letter or digit.
            size: in bytes, or text such as ``"10G"``.  The file is sparse: only what is written takes room.

        Raises:
            InvalidInput: ``volume-name``, ``volume-size``, ``size``.
            InUse: ``volume-exists``.
            Exhausted: ``disk-full``; the host's.
            NotFound: ``tool-not-found``.
        """
        target = self._folder / check_name(name)
        size_bytes = whole_blocks(name, size)
        with self._at_work(), told("create volume", name):
            if target.exists():  # renaming is what decides; this is before the work
                raise _exists(name)
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
            try:
                format_disk(new / "disk", name, size_bytes)
                record = Record(name, time.time_ns(), dict(labels or {}))
                with open(new / "volume.json", "wb") as file:
                    file.write(msgspec.json.encode(record))
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(new)
                os.rename(new, target)
            except BaseException as error:
                _discard(new)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _exists(name) from None
                raise
            _sync_folder(self._folder)
        return self.inspect(name)

    def list(self) -> list[Volume]:
        """Every volume, by name.

        Raises:
            Corrupt: ``volume-damaged``; a volume's record is not what was written.
        """
        if not self._folder.is_dir():
            return []
        leases = self._leases()
        names = sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        found = []
        for name in names:
            with contextlib.suppress(NotFound):  # removed meanwhile
                found.append(self._describe(name, leases))
        return found

    def inspect(self, name: str) -> Volume:
        """All about one volume.

        Raises:
            NotFound: ``volume-not-found``.
            Corrupt: ``volume-damaged``; its record is not what was written.
        """
        return self._describe(name, self._leases())

    def remove(self, name: str, *, missing_ok: bool = False) -> None:
        """Removes a volume and what is on it.

        Raises:
            InUse: ``volume-in-use``; a live pod has it.  Nothing overrides that.
            NotFound: ``volume-not-found``, unless ``missing_ok``.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(told("remove volume", name))
            try:
                find(self._data, name)
                stack.enter_context(self._at_work())
                stack.enter_context(self._alone("remove volume", name))
            except NotFound as error:
                if missing_ok and error.code == "volume-not-found":
                    return
                raise
            gone = Path(tempfile.mkdtemp(prefix=".gone-", dir=self._folder))
            os.rename(self._folder / name, gone)  # rename(2) replaces an empty folder
            _sync_folder(self._folder)
            _discard(gone)

    def grow(self, name: str, size: int | str) -> Volume:
        """Makes a volume larger, while a pod writes to it, too; can be tried again when it fails.

        Args:
            size: the whole new size, in bytes, or text such as ``"20G"``.

        Raises:
            InvalidInput: ``volume-size``; it is larger already.
            InUse: ``volume-in-use``; pods read it, and would not see what changes.
            NotFound: ``volume-not-found``, ``tool-not-found``.
            Corrupt: ``volume-damaged``.
        """
        size_bytes = whole_blocks(name, size)
        try:
            with self._alone("grow volume", name) as (fd, lock_fd), told("grow volume", name):
                grow_disk(name, size_bytes, fd, lock_fd)
        except InUse:
            found = self.inspect(name)
            writers = [holder.pod for holder in found.holders if holder.access == "writing"]
            if not writers or self._online is None:
                raise
            if size_bytes < found.size_bytes:
                raise too_small(name, size_bytes, found.size_bytes) from None
            self._online(writers[0], found.path, size_bytes)
        return self.inspect(name)

    # -- who has them -------------------------------------------------------------------------

    def _describe(self, name: str, leases: Sequence[tuple[str, Holder]]) -> Volume:
        path = find(self._data, name)
        try:
            record = msgspec.json.decode((path.parent / "volume.json").read_bytes(), type=Record)
            status = path.stat()
        except (OSError, msgspec.MsgspecError) as error:
            find(self._data, name)  # removed meanwhile
            raise Corrupt(
                "read volume", subject=path.parent / "volume.json", why=error, code="volume-damaged",
                hint="its disk may be whole: --mount type=disk,src=" + str(path),
            ) from None  # fmt: skip
        holders = tuple(holder for held, holder in leases if same_file(held, path))
        return Volume(
            name, str(path), status.st_size, status.st_blocks * 512, record.filesystem, record.created_ns,
            record.labels, holders,
        )  # fmt: skip

    def _leases(self) -> Sequence[tuple[str, Holder]]:
        """Path and holder of every disk that a live pod has; makes no journal."""
        if not (self._root / "journal.db").exists():
            return []
        with Journal(self._root) as journal:
            return [
                (lease["path"], Holder(lease["pod"], "writing" if lease["writable"] else "reading"))
                for lease in journal.leases()
                if not lease["pod"].startswith(TENANT) and journal.is_alive(lease["pod"])
            ]

    @contextlib.contextmanager
    def _alone(self, what: str, name: str) -> Iterator[tuple[int, int]]:
        """The volume's disk, open for writing and nobody else's meanwhile; what :func:`tenancy` yields.

        Raises:
            InUse: somebody has it; all holders are named.
        """
        path = find(self._data, name)
        with contextlib.ExitStack() as stack:
            try:
                found = stack.enter_context(tenancy(self._root, str(path)))
            except InUse as error:
                holders = self._describe(name, self._leases()).holders
                why = ", ".join(f"pod {holder.pod} has it for {holder.access}" for holder in holders)
                raise InUse(
                    what, subject=name, why=why or error.why, code="volume-in-use",
                    hint="end that pod first: holdfast pod remove " + holders[0].pod if holders else "try again",
                ) from None  # fmt: skip
            except FileNotFoundError:
                raise _not_found(name) from None
            yield found

    # -- making and removing ------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Keeps others from sweeping; sweeps first, if nobody else is at work."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in [*self._folder.glob(".new-*"), *self._folder.glob(".gone-*")]:
                    _discard(path)
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)


# -- for pods -------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """Returns ``name`` if it can name a volume.

    Raises:
        InvalidInput: ``volume-name``.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "name volume", subject=repr(name), code="volume-name",
            why="a name has letters, digits, '_', '.' and '-', and starts with a letter or digit",
            hint="volumes without a name are not built: say NAME:/path" if not name else "",
        )  # fmt: skip
    return name


def find(data: Path, name: str) -> Path:
    """The path of a volume's disk.

    Raises:
        NotFound: ``volume-not-found``.
        InvalidInput: ``volume-name``.
    """
    path = data / "volumes" / check_name(name) / "disk"
    if not path.is_file():
        raise _not_found(name)
    return path


def name_of(data: Path, path: str) -> str:
    """The name of the volume whose disk is at ``path``; empty if it is none's."""
    folder, _, file = path.rpartition("/")
    volumes, _, name = folder.rpartition("/")
    return name if file == "disk" and volumes == f"{data}/volumes" and _NAME.fullmatch(name) else ""


def resolve(mounts: Sequence[Mount], data: Path) -> tuple[Mount, ...]:
    """The mounts, those of volumes with the path of the disk in place of the name.

    Raises:
        NotFound: ``volume-not-found``.
        InvalidInput: ``volume-name``.
    """
    return tuple(
        msgspec.structs.replace(mount, source=str(find(data, mount.source))) if mount.kind == KIND else mount
        for mount in mounts
    )


def _discard(folder: Path) -> None:
    """Removes a folder that was a volume's, or was to be one's; what cannot be removed is for the next sweep."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            os.unlink(entry.path)
        os.rmdir(folder)


# -- for plans: pure ------------------------------------------------------------------------------


def written(mounts: Sequence[Mount], sources: Mapping[str, Source]) -> dict[tuple[int, int], bool]:
    """The volumes that a container writes to: (device, inode) -> True."""
    seen = [sources.get(mount.source) for mount in mounts if mount.kind == KIND and not mount.read_only]
    return {(source.device, source.inode): True for source in seen if source is not None}


def mount_step(
    index: int, mount: Mount, source: Source, ours: Mapping[tuple[int, int], bool], subject: str
) -> MountDisk:
    """The step that attaches and mounts a volume.

    It is raw and ext4, whatever a guest has written to the beginning of it: that decides nothing on the host.  Where
    the pod writes to it, a container that only reads gets a read-only view of the same mount.

    Args:
        ours: (device, inode) of disks that the pod has or gets -> whether writable.

    Raises:
        InvalidInput: its disk is no file.
    """
    if source.kind != "file":
        raise InvalidInput("plan mount", subject=subject, why=f"the source is a {source.kind}", code="source-kind")
    read_only = mount.read_only and not ours.get((source.device, source.inode))
    wanted = disk_options.take(options.split(mount.options), subject)
    # Flags are for the view of each container, so that all of them have one mount.
    kept = tuple(option for option in wanted.options if not _is_of_view(option))
    return MountDisk(
        f"m{index}", mount.source, source.device, source.inode, read_only, "raw", filesystem=FILESYSTEM, options=kept,
        fork=wanted.fork,
    )  # fmt: skip


def _is_of_view(option: str) -> bool:
    word = option.lower()
    access = word in ("ro", "rw", "readonly", "bind", "rbind") or options.is_read_only([option])
    return access or word in options.PROPAGATION_NAMES or options.is_flag(option)


# -- errors ---------------------------------------------------------------------------------------


def _exists(name: str) -> InUse:
    hint = "choose another name, or make it larger: holdfast volume grow"
    return InUse("create volume", subject=name, why="there is one of this name", code="volume-exists", hint=hint)


def _not_found(name: str) -> NotFound:
    hint = f"holdfast volume create {name} makes one; holdfast volume list shows which there are"
    return NotFound("find volume", subject=name, why="there is none of this name", code="volume-not-found", hint=hint)


def _sync_folder(folder: Path) -> None:
    from holdfast.image.layers import sync_folder  # with what reads archives: 6 ms of every command

    sync_folder(folder)
