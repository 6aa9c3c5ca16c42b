"""A saved pod's file as a snapshot again: everything that can be wrong is said before anything is made.

What is made are descriptors of files without names, so that nothing is left if it goes no further.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Exhausted, HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.machine import accelerator, guest_image
from holdfast.machine.config import MachineConfig
from holdfast.machine.sandbox import CONTROLLERS, LUNS
from holdfast.pod import savefile
from holdfast.pod.savefile import RAM, RECORD, STATE, Manifest, Needs, Reference, damaged
from holdfast.pod.saving import is_disk, mark_of, needs_of
from holdfast.pod.snapshot import FrozenPod, Snapshot
from holdfast.storage import scratch
from holdfast.storage.disk_formats import FORMATS, identity, needs_parent, probe_format
from holdfast.storage.export import identify
from holdfast.storage.held import KeptDisk
from holdfast.storage.restore import check_sources
from holdfast.storage.survey import lasting, look

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from holdfast.storage.attachments import DiskKey
    from holdfast.storage.frozen import FrozenDisk, FrozenStorage
    from holdfast.storage.shares import Share

#: Names of containers and of processes in them: files are called after them.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_MOST_DISK_BYTES = 1 << 46


def name_in(path: Path) -> str:
    """Name of the pod that was saved.

    Raises:
        NotFound, InvalidInput, Corrupt: see :func:`restore`.
    """
    with _opened(path) as fd:
        return savefile.read(fd)[0].pod


def restore(path: Path, data: Path, bundles: Mapping[str, str | Path] | None = None) -> Snapshot:
    """The snapshot that was saved; it is the caller's.

    Args:
        data: the data folder that it is to go on in.
        bundles: what containers are to be compared with; see :mod:`holdfast.pod.bundles`.

    Raises:
        NotFound: there is no such file; or something of the host that it needs is missing.
        Corrupt: ``save-damaged``, ``save-version``.
        Unsupported: ``save-needs``: it needs another guest, QEMU, accelerator or processor.
        InvalidInput: something that it needs is another one now.
        Exhausted: no room.
        HoldfastError: see :func:`holdfast.pod.bundles.take`.
    """
    with _opened(path) as fd, contextlib.ExitStack() as stack:
        manifest, offsets = savefile.read(fd)
        made: dict[str, int] = {}

        def copy_in(member: savefile.Member, offset: int) -> None:
            made[member.name] = _empty_file(member.name, data)
            stack.callback(os.close, made[member.name])
            savefile.copy_in(fd, offset, member, made[member.name])

        machine = machine_for(manifest.needs, data)
        copy_in(manifest.members[0], offsets[0])
        record = record_in(made[RECORD])
        if bundles:
            from holdfast.pod.bundles import take

            manifest, record = take(manifest, record, bundles, data)
        check_mounts(manifest, data)
        _check_room(manifest, data)
        fds = open_references(manifest, data, stack)
        for member, offset in zip(manifest.members[1:], offsets[1:], strict=True):
            copy_in(member, offset)
        for name in [member.name for member in manifest.members[3:]]:
            fds[int(name.removeprefix("disks/"))] = made[name]
        return assemble(manifest, record, made[RAM], made[STATE], fds, machine, data)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file's descriptor; an error that names nothing else gets its name."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotFound("open saved pod", subject=path, why=error, code="save-not-found") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput("open saved pod", subject=path, why="it is no file", code="not-a-file")
        yield fd
    except HoldfastError as error:
        error.subject = error.subject or str(path)
        raise
    finally:
        os.close(fd)


def record_in(fd: int) -> FrozenPod:
    """The record in a file, which stays the caller's.

    Raises:
        Corrupt: it is of another version, or damaged.
    """
    with Snapshot([os.dup(fd)]) as parts:
        return parts.record()


def assemble(
    manifest: Manifest, record: FrozenPod, ram_fd: int, state_fd: int, files: dict[int, int], machine: MachineConfig,
    data: Path,
) -> Snapshot:  # fmt: skip
    """A snapshot of the parts; all descriptors stay the caller's.

    Args:
        files: of the disks, by number.

    Raises:
        Corrupt: the record is not of these parts.
    """
    with contextlib.ExitStack() as stack:
        record = _relocated(record, manifest, files, machine, data)
        copies = []
        for fd in (ram_fd, state_fd, *(files[number] for number in sorted(files))):
            copies.append(os.dup(fd))
            stack.callback(os.close, copies[-1])
        snapshot = Snapshot.make(record, copies[0], copies[1], copies[2:])
        stack.pop_all()
        return snapshot


# -- what the host must have ------------------------------------------------------------------------


def machine_for(needs: Needs, data: Path) -> MachineConfig:
    """The saved machine on this host.

    Raises:
        Unsupported: ``save-needs``; it cannot be had here, and the error says what it would take.
    """
    guest = guest_image.load(data, needs.guest)
    if guest is None:
        raise _needs(
            f"guest {needs.guest}", f"kernel {needs.kernel}, which is not in {data}",
            "a guest is built of the host's files as they are: restore it where it was saved",
        )  # fmt: skip
    version = accelerator.cached_qemu_version(data)
    if needs.qemu_version != version:
        raise _needs(needs.qemu_version, f"this is {version}", "install that one")
    verdict = accelerator.known(data, accelerator.host_identity(version))
    if verdict is not None and verdict.accelerator != needs.accelerator:
        raise _needs(needs.accelerator.upper(), f"this host uses {verdict.accelerator.upper()}: {verdict.why}", "")
    machine = MachineConfig(
        guest, needs.accelerator, needs.memory_bytes, needs.cpus, needs.qemu_version, needs.expandable
    )
    now = needs_of(machine)
    if needs.processor != now.processor:
        raise _needs(f"processor {needs.processor}", f"this is {now.processor}", "restore it on a host that has one")
    if needs.key != now.key:
        raise _needs("another Holdfast", "this one makes machines in another way", "restore it with the one it is of")
    return machine


def _needs(what: str, why: str, hint: str) -> HoldfastError:
    return Unsupported("restore pod", why=f"it needs {what}; {why}", code="save-needs", hint=hint)


def check_mounts(manifest: Manifest, data: Path) -> None:
    """Checks that the host has what the pod only reads, and that it is the same as before.

    Raises:
        NotFound: something is missing; the error names it, and who has it where.
        InvalidInput: something is another thing now.
    """
    for reference in manifest.references:
        if reference.diff_id:
            _check_layer(reference, data)
    seen = {
        mount.source: lasting(look(mount.source, as_disk=is_disk(mount)), disk=is_disk(mount))
        for _, mount in manifest.mounts.of_host()
    }
    check_sources(manifest.mounts, seen)
    for reference in manifest.references:
        if not reference.diff_id:
            os.close(_open_reference(reference, data))


def _check_layer(reference: Reference, data: Path) -> None:
    try:
        fd = os.open(_path_of(reference, data), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        fd = -1
    try:
        if fd < 0 or mark_of(fd, layer=True) != reference.mark:
            images = " or ".join(reference.images) or "the image that has it"
            why = f"{data} has {'it not' if fd < 0 else 'another one of that name'}"
            raise NotFound(
                "restore pod", subject=f"layer {reference.diff_id}", why=why, code="layer-not-found",
                hint=f"import {images} again: holdfast image import",
            )  # fmt: skip
    finally:
        if fd >= 0:
            os.close(fd)


def _path_of(reference: Reference, data: Path) -> Path:
    path = PurePosixPath(reference.path)
    if ".." in path.parts or "\0" in reference.path:
        raise damaged(f"a disk at {reference.path!r}")
    return data / path  # an absolute one stays as it is


def _open_reference(reference: Reference, data: Path) -> int:
    path = _path_of(reference, data)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotFound("restore pod", subject=path, why=error, code="restore-source") from None
    try:
        mode = os.fstat(fd).st_mode
        disk = stat.S_ISBLK(mode) if reference.block_device else stat.S_ISREG(mode)
        layer = bool(reference.diff_id) or reference.mark.startswith("verity ")
        size = os.lseek(fd, 0, os.SEEK_END) if disk else -1
        if size != reference.size_bytes or mark_of(fd, layer=layer) != reference.mark:
            why = "it is not the disk that it was when the pod was saved"
            raise InvalidInput("restore pod", subject=path, why=why, code="restore-source")
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_references(manifest: Manifest, data: Path, stack: contextlib.ExitStack) -> dict[int, int]:
    """Descriptors, closed with ``stack``, of what is only read: by number.  It is checked once more."""
    fds: dict[int, int] = {}
    for reference in manifest.references:
        fds[reference.number] = _open_reference(reference, data)
        stack.callback(os.close, fds[reference.number])
    return fds


def _check_room(manifest: Manifest, data: Path) -> None:
    """Of the disk and of memory, before something is filled."""
    (data / "scratch").mkdir(parents=True, exist_ok=True)
    room = os.statvfs(data / "scratch")
    with open("/proc/meminfo") as file:
        memory = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    disks = sum(member.data_bytes for member in manifest.members[3:])
    both = ((disks, room.f_bavail * room.f_frsize, "disk"), (manifest.member(RAM).data_bytes, memory, "memory"))
    for needed, free, what in both:
        if free < needed:
            why = f"{needed >> 20} MiB of {what} needed, {free >> 20} MiB free"
            raise Exhausted("restore pod", why=why, code=f"{what}-full")


def _empty_file(name: str, data: Path) -> int:
    if name in (RECORD, RAM, STATE):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    return scratch.unnamed(data / "scratch")


# -- the record, here -------------------------------------------------------------------------------


def _relocated(
    record: FrozenPod, manifest: Manifest, files: dict[int, int], machine: MachineConfig, data: Path
) -> FrozenPod:
    """The record with the machine, the paths and the identities that things have here.

    Raises:
        Corrupt: it is of other parts, or names what no pod has.
    """
    storage = record.storage
    _check(record, manifest, files)
    paths = {reference.number: str(_path_of(reference, data)) for reference in manifest.references}
    keys: dict[DiskKey, DiskKey] = {}
    disks = []
    for disk in storage.disks:
        number = disk.files[0].number
        device, inode = identity(os.fstat(files[number]))
        old = disk.attachment
        keys[old.key] = key = old.key._replace(device=device, inode=inode)
        found = old.disk
        if old.disk.read_only:
            found = msgspec.structs.replace(found, path=paths[number], device=device, inode=inode)
        attachment = msgspec.structs.replace(old, key=key, disk=found, leased=old.leased and old.disk.read_only)
        disks.append(msgspec.structs.replace(disk, attachment=attachment))
    try:
        storage = _with_keys(storage, keys)
    except KeyError:
        raise damaged("its record has mounts without disks") from None
    shares = tuple((_share_here(share), holders) for share, holders in storage.shares)
    storage = msgspec.structs.replace(storage, disks=tuple(disks), shares=shares)
    return msgspec.structs.replace(record, machine=machine, storage=storage)


def _with_keys(storage: FrozenStorage, keys: dict[DiskKey, DiskKey]) -> FrozenStorage:
    mounts = tuple(msgspec.structs.replace(m, key=m.key._replace(disk=keys[m.key.disk])) for m in storage.mounts)
    holders = tuple(
        msgspec.structs.replace(
            holder,
            kept=tuple(
                msgspec.structs.replace(k, key=k.key._replace(disk=keys[k.key.disk])) if isinstance(k, KeptDisk) else k
                for k in holder.kept
            ),
        )
        for holder in storage.holders
    )
    return msgspec.structs.replace(storage, mounts=mounts, holders=holders)


def _share_here(share: Share) -> Share:
    """It has been checked to be what it was; what it is known by changes with the host's restart."""
    try:
        status = os.stat(share.key.path)
    except OSError as error:
        raise NotFound("restore pod", subject=share.key.path, why=error, code="restore-source") from None
    key = share.key._replace(device=status.st_dev, inode=status.st_ino)
    return msgspec.structs.replace(share, key=key, identity=identify(key, file=bool(share.file)))


def _check(record: FrozenPod, manifest: Manifest, files: dict[int, int]) -> None:
    storage, stored = record.storage, {int(m.name.removeprefix("disks/")) for m in manifest.members[3:]}
    if record.pod != manifest.pod or record.machine.key != manifest.needs.key:
        raise damaged("its record is of another pod")
    names = [*record.containers.processes, *(info.name for info in record.containers.infos), record.pod]
    for name in names:
        if not _NAME.fullmatch(name):
            raise damaged(f"a container called {name!r}")
    slots = [disk.attachment.slot for disk in storage.disks]
    if len(set(slots)) != len(slots) or not all(0 <= s.controller < CONTROLLERS and 0 <= s.lun < LUNS for s in slots):
        raise damaged("disks in slots that no machine has")
    if [f.number for disk in storage.disks for f in disk.files] != sorted(files):
        raise damaged("its record is of other disks")
    for disk in storage.disks:
        _check_disk(disk, files, stored)
    if not all(0 <= place < len(slots) for _, place, _ in storage.scratch):
        raise damaged("a scratch disk that is not there")
    _check_shares([share for share, _ in storage.shares], manifest)


def _check_disk(disk: FrozenDisk, files: dict[int, int], stored: set[int]) -> None:
    """What may be written to is stored, all of it, and no file of a chain names another one of the host's."""
    attachment, numbers = disk.attachment, [f.number for f in disk.files]
    if not numbers or not 0 <= attachment.size_bytes <= _MOST_DISK_BYTES:
        raise damaged(f"a disk of {attachment.size_bytes} bytes in {len(numbers)} files")
    if any((number in stored) == attachment.disk.read_only for number in numbers):
        raise damaged("a disk of the host's that is to be written to")
    for file in disk.files:
        fd = files[file.number]
        mode = os.fstat(fd).st_mode
        if file.disk_format not in FORMATS or file.block_device != stat.S_ISBLK(mode):
            raise damaged(f"a disk that is {file.disk_format}")
        found = "raw"
        if file.disk_format != "raw":
            found = probe_format(fd, os.lseek(fd, 0, os.SEEK_END))
        if found != file.disk_format:
            why = "needs another file" if needs_parent(found) else f"is {found}, not {file.disk_format}"
            raise damaged(f"a disk that {why}")


def _check_shares(shares: Sequence[Share], manifest: Manifest) -> None:
    """A share that the manifest does not tell of has not been checked."""
    told = {mount.source for _, mount in manifest.mounts.of_host()}
    for share in shares:
        if share.key.path not in told:
            raise damaged(f"a share of {share.key.path} that it does not tell of")
