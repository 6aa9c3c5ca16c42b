"""Templates that hold what runs: a pod saved under a name, as a folder that new pods map their memory from.

::

    <data>/saved/<name>/manifest.json         as in the file of a saved pod: see savefile.py
                        files.json            size, modification time and inode of each of the others
                        record ram state disks/<number>    sparse, and never written to again
                 .<name>.lock, .<name>.new-*  as those of other templates: see machine/template.py

Nothing is copied for a clone: its RAM is a private mapping of ``ram``, so that all clones share what none has written,
and each of its disks has an empty file on top of those here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, Exhausted, HoldfastError, InUse, InvalidInput, NotFound
from holdfast.machine import template
from holdfast.machine.template import Template
from holdfast.pod import restoring, savefile, saving
from holdfast.pod.savefile import MANIFEST, RAM, RECORD, STATE, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdfast.pod.snapshot import Snapshot

_FILES = "files.json"
#: Not what the keys of other templates look like, and not what ``--template`` takes for itself.
_NAME = re.compile(r"(?!none$)(?![0-9a-f]{24}$)[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}")
#: A start holds a template's lock for less than that.
_LOCK_SECONDS = 5.0
_POLL_SECONDS = 0.02

Identity = tuple[int, int, int]


def folder_of(data: Path) -> Path:
    """Where they all are."""
    return data / "saved"


def check_name(name: str) -> str:
    """Returns ``name`` if it can name a template.

    Raises:
        InvalidInput: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "name template", subject=repr(name), code="bad-name",
            why="a name has 1 to 63 letters, digits, '_' and '-', and is neither 'none' nor like a template's key",
        )  # fmt: skip
    return name


def names(data: Path) -> list[str]:
    """Those that there are, of whatever version."""
    folder = folder_of(data)
    return sorted(name for name in os.listdir(folder) if name[0] != ".") if folder.is_dir() else []


# -- making -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def making(data: Path, name: str) -> Iterator[Path]:
    """A folder to make a template in, to be given to :func:`save`; nobody else makes one of that name meanwhile.

    Raises:
        InvalidInput: it is no name for one.
        InUse: there is one of that name, or it is being made.
    """
    check_name(name)
    folder = folder_of(data)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, name, fcntl.LOCK_EX, seconds=0):
        if (folder / name).exists():
            raise InUse(
                "make template", subject=name, why="there is one of that name", code="template-exists",
                hint=f"holdfast template remove {name}",
            )  # fmt: skip
        template.sweep(folder, name)
        with template.new_folder(folder, name) as new:
            yield new


def save(snapshot: Snapshot, new: Path, data: Path, name: str) -> Manifest:
    """Fills the folder, and gives it its name.

    Raises:
        InvalidInput: see :func:`saving.save`.
        Exhausted: no room.
    """
    try:
        with saving.contents(snapshot, data) as (manifest, sources):
            (new / "disks").mkdir()
            members = []
            for member, source in zip(manifest.members, sources, strict=True):
                sha256 = _copy(source, member, new / member.name)
                members.append(msgspec.structs.replace(member, sha256=sha256))
        manifest = msgspec.structs.replace(manifest, members=tuple(members))
        identities = {member.name: template.identity(new / member.name) for member in members}
        for file, content in ((MANIFEST, manifest.encode()), (_FILES, msgspec.json.encode(identities))):
            (new / file).write_bytes(content)
            os.chmod(new / file, 0o400)
            template.sync(new / file)
        template.sync(new / "disks")
        template.sync(new)
        template.publish(new, folder_of(data) / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Exhausted("make template", subject=name, why=error, code="disk-full") from None
        raise
    return manifest


def _copy(source: int, member: savefile.Member, path: Path) -> str:
    """Writes a sparse file, from then on immutable; returns the digest of its data."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        os.ftruncate(fd, member.size_bytes)
        digest = savefile.copy(source, member, fd)
        os.fsync(fd)
        return digest
    finally:
        os.close(fd)


# -- starting from it -------------------------------------------------------------------------------


def load(data: Path, name: str) -> tuple[Path, Manifest]:
    """The template of that name; that its files are those that were saved.

    Raises:
        NotFound: there is none.
        Corrupt: it is damaged, or of another version.
    """
    folder = folder_of(data) / check_name(name)
    try:
        manifest = savefile.decode((folder / MANIFEST).read_bytes())
        identities = msgspec.json.decode((folder / _FILES).read_bytes(), type=dict[str, Identity])
        for member in manifest.members:
            if template.identity(folder / member.name) != identities.get(member.name):
                raise _damaged(name, f"its {member.name} has changed since it was saved")
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_dir():
            raise _damaged(name, f"{error.filename}: {error.strerror}") from None
        raise NotFound(
            "find template", subject=name, code="template-not-found", hint="holdfast template list"
        ) from None  # fmt: skip
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(name, str(error)) from None
    except Corrupt as error:
        raise error if error.subject else _damaged(name, error.why) from None
    return folder, manifest


def _damaged(name: str, why: str) -> Corrupt:
    return Corrupt(
        "use template", subject=name, why=why, code="template-damaged", hint=f"holdfast template remove {name}"
    )  # fmt: skip


def snapshot_of(data: Path, name: str) -> Snapshot:
    """What a new pod starts from; the snapshot is the caller's, and good even when the template is removed.

    Raises:
        NotFound, Corrupt: see :func:`load`.
        Unsupported, NotFound, InvalidInput: see :func:`restoring.restore`.
        InUse: it is being removed.
    """
    check_name(name)
    if not (folder_of(data) / name).is_dir():
        load(data, name)
    with _locked(folder_of(data), name, fcntl.LOCK_SH), contextlib.ExitStack() as stack:
        folder, manifest = load(data, name)
        machine = restoring.machine_for(manifest.needs, data)
        restoring.check_mounts(manifest, data)
        files = restoring.open_references(manifest, data, stack)
        made: dict[str, int] = {}
        for member in manifest.members:
            made[member.name] = os.open(folder / member.name, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, made[member.name])
            if member.name in (RECORD, STATE):
                _check_content(made[member.name], member, name)
            elif member.name != RAM:
                files[int(member.name.removeprefix("disks/"))] = made[member.name]
        try:
            record = restoring.record_in(made[RECORD])
            return restoring.assemble(manifest, record, made[RAM], made[STATE], files, machine, data)
        except Corrupt as error:
            raise _damaged(name, error.why) from None


def _check_content(fd: int, member: savefile.Member, name: str) -> None:
    digest = hashlib.sha256()
    for start, length in member.extents:
        digest.update(os.pread(fd, length, start))
    if digest.hexdigest() != member.sha256:
        raise _damaged(name, f"its {member.name} has changed since it was saved")


def describe(data: Path, name: str) -> tuple[Template | None, str]:
    """What it is, None if that cannot be read; and why no pod can start from it, empty if one can."""
    try:
        folder, manifest = load(data, name)
    except HoldfastError as error:
        return None, error.why
    needs, why = manifest.needs, ""
    record = Template(
        version=manifest.version, key=needs.key, guest=needs.guest, accelerator=needs.accelerator,
        memory_bytes=needs.memory_bytes, cpus=needs.cpus, expandable=needs.expandable, qemu_version=needs.qemu_version,
        state_sha256=manifest.member(STATE).sha256, ram_identity=template.identity(folder / RAM),
    )  # fmt: skip
    try:
        restoring.machine_for(needs, data)
        restoring.check_mounts(manifest, data)
    except HoldfastError as error:
        why = str(error)
    return record, why


def guests(data: Path) -> set[str]:
    """Ids of the guests that templates need."""
    records = (describe(data, name)[0] for name in names(data))
    return {record.guest for record in records if record is not None}


# -- removing ---------------------------------------------------------------------------------------


def remove(data: Path, name: str) -> int:
    """Deletes a template; returns the bytes that it took.  Running clones keep their open files and go on.

    Raises:
        NotFound: there is none.
        InUse: it is being made, or has been started from for too long a time.
    """
    folder = folder_of(data)
    if not (folder / check_name(name)).is_dir():
        raise NotFound("remove template", subject=name, code="template-not-found", hint="holdfast template list")
    with _locked(folder, name, fcntl.LOCK_EX):
        freed = template.sweep(folder, name) + template.disk_usage(folder / name)
        template.discard(folder / name)
        (folder / f".{name}.lock").unlink()
    return freed


def sweep(data: Path) -> Iterator[tuple[str, int]]:
    """Removes what makers left that are dead, and locks of templates that are gone; yields names and bytes."""
    folder = folder_of(data)
    there = names(data)
    for name in sorted({path.name.split(".")[1] for path in folder.glob(".*.*")}):
        lock_fd = template.try_lock(folder, name, fcntl.LOCK_EX)
        if lock_fd < 0:
            continue
        try:
            if freed := template.sweep(folder, name):
                yield name, freed
            if name not in there:
                (folder / f".{name}.lock").unlink()
        finally:
            os.close(lock_fd)


@contextlib.contextmanager
def _locked(folder: Path, name: str, operation: int, *, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while (fd := template.try_lock(folder, name, operation)) < 0:
        if time.monotonic() >= deadline:
            why = "it is being made, removed, or started from"
            raise InUse("use template", subject=name, why=why, code="template-busy")
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        os.close(fd)
