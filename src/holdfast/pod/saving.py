"""Saving a frozen pod: what of it is stored, and what of the host it is told by.

Everything that the pod can write to is stored, with the whole chain of files below it.  What it only reads is not: an
image's layers, disks of the user's, shares.  Of them is recorded what tells them from others, for the machine has parts
of them in its memory, and would go on with a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import holdfast
from holdfast.errors import Exhausted, InvalidInput, NotFound
from holdfast.image import verity
from holdfast.pod import savefile
from holdfast.pod.savefile import Manifest, Needs, Reference
from holdfast.spec.runtime import DISK_TYPES
from holdfast.storage.disk_formats import identity
from holdfast.storage.restore import SavedContainer, SavedMount, canonical_options, saved_pod
from holdfast.storage.survey import filesystem_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.machine.config import MachineConfig
    from holdfast.pod.snapshot import FrozenPod, Snapshot
    from holdfast.storage.frozen import FrozenDisk
    from holdfast.storage.restore import SavedPod
    from holdfast.storage.shares import Share

_ENDS_BYTES = 1 << 20


class NewFile:
    """A file that appears under its name when it is complete, and not at all if that never comes.

    Until then it has no name (open(2), O_TMPFILE), where the filesystem can do that: nothing is left behind, whatever
    is killed.  Elsewhere it has a hidden one beside its own.

    Args:
        path: of a file that is replaced, or not there yet.

    Raises:
        InvalidInput: no file can be made there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._other = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
        self._named = False
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InvalidInput("save pod", subject=path, why="it is there, and is no file", code="not-a-file")
        try:
            self.fd = self._open()
        except OSError as error:
            raise InvalidInput("save pod", subject=path, why=error, code="cannot-write") from None

    def _open(self) -> int:
        try:
            return os.open(self._path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
        fd = os.open(self._other, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._named = True
        return fd

    def publish(self) -> None:
        """From here on it is there, in place of one that was."""
        os.fsync(self.fd)
        folder_fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                if self._named:
                    raise FileExistsError
                self._link(self._path, folder_fd)
            except FileExistsError:
                if not self._named:
                    self._link(self._other, folder_fd)
                    self._named = True
                os.rename(self._other, self._path)
                self._named = False
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)

    def _link(self, path: Path, folder_fd: int) -> None:
        """A folder's descriptor makes Python call linkat(2)."""
        os.link(
            f"/proc/self/fd/{self.fd}", path.name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=True
        )  # fmt: skip

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._other)


def save(snapshot: Snapshot, new: NewFile, data: Path) -> Manifest:
    """Writes a snapshot to a file, and publishes that.

    Args:
        data: the data folder that the pod's layers are in.

    Raises:
        InvalidInput: a disk that it reads is not at its path any more.
        Exhausted: no room for the file.
    """
    try:
        with contents(snapshot, data) as (manifest, sources):
            manifest = savefile.write(new.fd, manifest, sources)
        new.publish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Exhausted("save pod", why=error, code="disk-full") from None
        raise
    return manifest


@contextlib.contextmanager
def contents(snapshot: Snapshot, data: Path) -> Iterator[tuple[Manifest, list[int]]]:
    """The manifest of a snapshot, without digests, and a descriptor of each of its members.

    Raises:
        InvalidInput: see :func:`save`.
    """
    record = snapshot.record()
    references = [
        _reference(record, disk, snapshot, data) for disk in record.storage.disks if disk.attachment.disk.read_only
    ]
    referred = {reference.number for reference in references}
    stored = [f.number for disk in record.storage.disks for f in disk.files if f.number not in referred]
    fds = {
        savefile.RECORD: snapshot.fds[0], savefile.RAM: snapshot.ram_fd, savefile.STATE: snapshot.state_fd,
        **{f"disks/{number}": snapshot.file(number) for number in sorted(stored)},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        sources = []
        for fd in fds.values():
            # Opened anew: copies of a descriptor share a place, and QEMU has one of them.
            sources.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, sources[-1])
        members = tuple(savefile.describe(name, source) for name, source in zip(fds, sources, strict=True))
        yield (
            Manifest(
                savefile.FORMAT_VERSION, holdfast.__version__, record.pod, record.frozen_ns, needs_of(record.machine),
                members, tuple(references), mounts_of(record),
            ),
            sources,
        )  # fmt: skip


def needs_of(machine: MachineConfig) -> Needs:
    """What a machine needs of its host."""
    processor = _processor() if machine.accelerator == "kvm" else ""
    return Needs(
        machine.guest.id, machine.guest.kernel_release, machine.qemu_version, machine.accelerator, processor,
        machine.memory_bytes, machine.cpus, machine.expandable, machine.key,
    )  # fmt: skip


def _processor() -> str:
    """The host's processor: with KVM the guest sees that very one, and has chosen its code by it."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


# -- what is only read ------------------------------------------------------------------------------


def _reference(record: FrozenPod, disk: FrozenDisk, snapshot: Snapshot, data: Path) -> Reference:
    (file,) = disk.files
    fd, path = snapshot.file(file.number), Path(disk.attachment.disk.path)
    try:
        same = identity(os.stat(path)) == identity(os.fstat(fd))
    except OSError:
        same = False
    if not same:
        raise InvalidInput(
            "save pod", subject=path, why=f"{_holders(disk)} reads it, and it is not there any more",
            code="source-changed",
        )  # fmt: skip
    layer = disk.attachment.disk.kind == "layer"
    inside = path.is_relative_to(data)
    diff_id = f"sha256:{path.name.partition('.')[0]}" if layer and inside else ""
    images = {i.image for i in record.containers.infos if i.name in disk.holders} if layer else ()
    return Reference(
        file.number, str(path.relative_to(data) if inside else path), file.block_device,
        os.lseek(fd, 0, os.SEEK_END), mark_of(fd, layer=layer), diff_id, tuple(sorted(images)),
    )  # fmt: skip


def _holders(disk: FrozenDisk) -> str:
    return ", ".join(sorted(disk.holders))


def mark_of(fd: int, *, layer: bool) -> str:
    """What tells a disk's contents from others, whatever device and inode it has.

    Of a layer it is the root of its hash tree, which stands for every bit of it.  Of any other disk it is the time at
    which it was last written to, except of a block device, whose node is made anew at every start of the host; and
    what is in its first and last MiB, where filesystems keep what changes with every mount.
    """
    if layer and (tree := verity.read(f"/proc/self/fd/{fd}")):
        return f"verity {tree.root_hash}"
    status, size = os.fstat(fd), os.lseek(fd, 0, os.SEEK_END)
    digest = hashlib.sha256(os.pread(fd, _ENDS_BYTES, 0))
    digest.update(os.pread(fd, _ENDS_BYTES, max(0, size - _ENDS_BYTES)))
    mtime = f"mtime {status.st_mtime_ns} " if stat.S_ISREG(status.st_mode) and not layer else ""
    return f"{mtime}ends {digest.hexdigest()}"


def mounts_of(record: FrozenPod) -> SavedPod:
    """What each container has of the host, for :func:`holdfast.storage.restore.check_sources`.

    A file that is shared alone is followed by its name as long as the pod runs: it may be another one at any time.

    Raises:
        NotFound: a shared directory is not there any more.
    """
    found: dict[str, list[SavedMount]] = {}
    for share, holders in record.storage.shares:
        try:
            device = 0 if share.file else filesystem_of(share.key.path)
        except OSError as error:
            raise NotFound("save pod", subject=share.key.path, why=error, code="source-not-found") from None
        inode = 0 if share.file else share.key.inode
        for holder in holders:
            container, name, options = _place(record, holder, share.guest_path)
            options = canonical_options(options or _options_of(share), "bind")
            found.setdefault(container, []).append(
                SavedMount(name, "bind", "host", options, share.key.path, device, inode)
            )
    for mount in record.storage.mounts:
        disk = next(d.attachment for d in record.storage.disks if d.attachment.key == mount.key.disk)
        if disk.disk.kind == "layer" or not disk.disk.read_only:
            continue
        kind = "physical-disk" if disk.disk.block_device else "virtual-disk"
        for holder in mount.holders:
            container, name, options = _place(record, holder, mount.guest_path)
            saved = SavedMount(name, kind, "host", canonical_options(options, kind), disk.disk.path)
            found.setdefault(container, []).append(msgspec.structs.replace(saved, size_bytes=disk.size_bytes))
    return saved_pod(
        (SavedContainer(container, tuple(mounts)) for container, mounts in found.items()),
        (hint for hint, _ in record.storage.hints),
    )


def _options_of(share: Share) -> tuple[str, ...]:
    recursive = "rbind" if share.key.recursive else "bind"
    return (recursive, "ro") if share.key.read_only else (recursive,)


def _place(record: FrozenPod, holder: str, guest_path: str) -> tuple[str, str, tuple[str, ...]]:
    """Container, place in it, and options of what the guest has at a path; the place in the guest if it has none."""
    spec = record.containers.specs.get(holder)
    if spec is None:
        _, container, destination = record.attached.attached.get(holder, ("", "", ""))
        return container or holder, destination or guest_path, ()
    if str((spec.get("root") or {}).get("path")) == guest_path:
        return holder, "/", ()
    for mount in spec.get("mounts") or ():
        if f"{mount.get('source')}/".startswith(f"{guest_path}/"):
            return holder, str(mount.get("destination")), tuple(mount.get("options") or ())
    return holder, guest_path, ()


def is_disk(mount: SavedMount) -> bool:
    """Whether it is told by its contents, and not by where it is."""
    return mount.kind in DISK_TYPES
