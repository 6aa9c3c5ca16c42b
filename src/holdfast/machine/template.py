"""Templates: machines that were booted once and saved, for every later pod to start from.

::

    <data>/templates/<key>/ram             guest RAM, sparse; mapped privately by every clone
                           state           device state
                           template.json   what it is, and how to tell that it is whole
                     .<key>.lock           held alone by who builds or removes it, shared by who is starting from it
                     .<key>.new-*          being built or removed; whoever holds the lock alone may delete it

A template appears by one rename, and is never changed afterwards.  A builder that dies leaves only a temporary
folder, which the next builder, or ``gc``, sweeps.  One that does not match its record is not used, and that is said.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import asynccontextmanager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, Exhausted, InUse, NotFound
from holdfast.linux import syscalls
from holdfast.machine import migration, vm
from holdfast.machine.sparse import data_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from holdfast.machine.config import MachineConfig

FORMAT_VERSION = 2
_RECORD = "template.json"
_LOCK_POLL_S = 0.02
_PAGE = 4096
_ZEROS = bytes(_PAGE)
_PUNCH = syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE


class Template(msgspec.Struct, frozen=True):
    """A saved machine.

    Attributes:
        key: of the machine that it is; see :attr:`MachineConfig.key`.
        guest: id of its guest image.
        state_sha256: of the device state, checked before every use.
        ram_identity: size, modification time (ns) and inode of the RAM file: any write changes them.
    """

    version: int
    key: str
    guest: str
    accelerator: str
    memory_bytes: int
    cpus: int
    expandable: bool
    qemu_version: str
    state_sha256: str
    ram_identity: tuple[int, int, int]

    def check(self, folder: Path) -> None:
        """Checks that the files are those that were saved.

        Raises:
            Corrupt: they are not; the error names the file.
        """
        try:
            state = (folder / "state").read_bytes()
            ram = identity(folder / "ram")
        except OSError as error:
            raise _damaged(folder, f"{error.filename}: {error.strerror}") from None
        if hashlib.sha256(state).hexdigest() != self.state_sha256:
            raise _damaged(folder, "its device state has changed since it was saved")
        if ram != self.ram_identity:
            raise _damaged(folder, "its RAM file has changed since it was saved")


class _Version(msgspec.Struct):
    """What every record says, of whatever version."""

    version: int


def _damaged(folder: Path, why: str) -> Corrupt:
    return Corrupt(
        "use template", subject=folder.name, why=why, code="template-damaged",
        hint="it is not used, and built again",
    )  # fmt: skip


def identity(path: Path) -> tuple[int, int, int]:
    """Size, modification time (ns) and inode of a file: any write changes them."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def load(data: Path, key: str) -> tuple[Path, Template]:
    """The template of that key, checked.

    Raises:
        NotFound: there is none.
        Corrupt: it is damaged, or of another version.
    """
    folder = data / "templates" / key
    try:
        text = (folder / _RECORD).read_bytes()
        version = msgspec.json.decode(text, type=_Version).version
        if version != FORMAT_VERSION:
            raise _damaged(folder, f"its format is version {version}, not {FORMAT_VERSION}")
        record = msgspec.json.decode(text, type=Template)
    except FileNotFoundError:
        raise NotFound("find template", subject=key, code="template-not-found") from None
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(folder, str(error)) from None
    if record.key != key:
        raise _damaged(folder, f"it says that it is {record.key}")
    record.check(folder)
    return folder, record


# -- who may do what with it ------------------------------------------------------------------------


def try_lock(templates: Path, key: str, operation: int) -> int:
    """Takes a template's lock if nobody's is in the way; returns its descriptor, else -1.

    Args:
        operation: ``fcntl.LOCK_SH`` or ``LOCK_EX``.
    """
    path = templates / f".{key}.lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:  # it went with its template since it was opened
            pass
        except BlockingIOError:
            os.close(fd)
            return -1
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


async def _lock(templates: Path, key: str, operation: int, wait: bool) -> int:
    while (fd := try_lock(templates, key, operation)) < 0:
        if not wait:
            why = "another process is building or removing it"
            raise InUse("use template", subject=key, why=why, code="template-busy")
        await asyncio.sleep(_LOCK_POLL_S)  # so that who waits can be interrupted
    return fd


@asynccontextmanager
async def held(
    data: Path, config: MachineConfig, say: Callable[[str], None], *, wait: bool = True
) -> AsyncIterator[tuple[Path, Template]]:
    """The template of a machine, built by booting it once if it must be; inside the block nobody removes it.

    Args:
        wait: for another builder; without it, that is an error.

    Raises:
        InUse: ``template-busy``: another process is building or removing it.
        MachineFailed: the machine does not boot.
        Exhausted: no room for its RAM.
    """
    templates = data / "templates"
    templates.mkdir(parents=True, exist_ok=True)
    while True:
        lock_fd = await _lock(templates, config.key, fcntl.LOCK_SH, wait)
        try:
            found = _load_or_say(data, config.key, say)
            if found is not None:
                yield found
                return
        finally:
            os.close(lock_fd)
        lock_fd = await _lock(templates, config.key, fcntl.LOCK_EX, wait)
        try:
            await _replace(data, config, say)
        finally:
            os.close(lock_fd)


async def ensure(data: Path, config: MachineConfig, say: Callable[[str], None]) -> tuple[Path, Template]:
    """The template of a machine, built if it must be; waits for another builder.  See :func:`held`."""
    async with held(data, config, say) as found:
        return found


def _load_or_say(data: Path, key: str, say: Callable[[str], None]) -> tuple[Path, Template] | None:
    try:
        return load(data, key)
    except NotFound:
        return None
    except Corrupt as error:
        say(str(error))
        return None


# -- building ---------------------------------------------------------------------------------------


async def _replace(data: Path, config: MachineConfig, say: Callable[[str], None]) -> None:
    """Builds the template in place of what is there, unless that is good; for who holds the lock alone."""
    templates = data / "templates"
    if _load_or_say(data, config.key, lambda _text: None) is not None:
        return
    if (templates / config.key).is_dir():  # without a good record it is none, but it is in the way
        discard(templates / config.key)
    sweep(templates, config.key)
    say("booting a machine once, to start every later one from it")
    await _build(templates, config)


async def _build(templates: Path, config: MachineConfig) -> None:
    with new_folder(templates, config.key) as new:
        ram = new / "ram"
        _make_ram(ram, config.memory_bytes)
        (new / "export").mkdir()
        console = str(new / "console.log")
        machine = await vm.start(
            config, ram_path=str(ram), ram_shared=True, export=str(new / "export"), console_log=console
        )
        try:
            await _save(machine, new / "state")
        finally:
            await machine.close()
        (new / "export").rmdir()
        os.unlink(console)
        await asyncio.to_thread(_finish, new, config)
        publish(new, templates / config.key)


async def _save(machine: vm.VirtualMachine, path: Path) -> None:
    state_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        await migration.save(machine.qmp, state_fd)
    finally:
        os.close(state_fd)


def _finish(new: Path, config: MachineConfig) -> None:
    """Makes the files immutable, and writes everything out before the record says that it is whole."""
    _dig_holes(new / "ram")
    os.chmod(new / "ram", 0o400)
    for name in ("ram", "state"):
        sync(new / name)
    record = Template(
        version=FORMAT_VERSION, key=config.key, guest=config.guest.id, accelerator=config.accelerator,
        memory_bytes=config.memory_bytes, cpus=config.cpus, expandable=config.expandable,
        qemu_version=config.qemu_version, state_sha256=hashlib.sha256((new / "state").read_bytes()).hexdigest(),
        ram_identity=identity(new / "ram"),
    )  # fmt: skip
    (new / _RECORD).write_bytes(msgspec.json.encode(record))
    os.chmod(new / _RECORD, 0o400)
    for path in (new / _RECORD, new):
        sync(path)


def _dig_holes(path: Path) -> None:
    """Gives back what holds nothing but zeros: a booted guest has cleared half of what it has written to."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in list(data_of(fd, os.fstat(fd).st_size)):
            # Once for each stretch of zeros, and not for each page.
            for is_zero, pages in groupby(range(start, end, _PAGE), lambda at: os.pread(fd, _PAGE, at) == _ZEROS):
                if is_zero:
                    offsets = list(pages)
                    syscalls.fallocate(fd, _PUNCH, offsets[0], len(offsets) * _PAGE)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    finally:
        os.close(fd)


def publish(new: Path, folder: Path) -> None:
    """From here on it is a template."""
    os.rename(new, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Writes a file, or a folder, out to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_folder(templates: Path, key: str) -> Iterator[Path]:
    """One to make a template in; what has not been published at the end is deleted."""
    new = Path(tempfile.mkdtemp(prefix=f".{key}.new-", dir=templates))
    try:
        yield new
    finally:
        if new.is_dir():
            shutil.rmtree(new)


def discard(folder: Path) -> None:
    """Deletes a template; renamed first, so that half a template never bears a template's name.

    For who holds the lock alone.  Running clones keep their open files and go on.
    """
    doomed = folder.with_name(f".{folder.name}.new-doomed-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(templates: Path, key: str) -> int:
    """Deletes what dead builders of a template left; returns the bytes that it took.  For who holds the lock alone."""
    freed = 0
    for leftover in templates.glob(f".{key}.new-*"):
        freed += disk_usage(leftover)
        shutil.rmtree(leftover)
    return freed


def disk_usage(folder: Path) -> int:
    """What the files of a folder really take: guest RAM that was never written takes no room."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _make_ram(path: Path, size_bytes: int) -> None:
    room = os.statvfs(path.parent)
    if room.f_bavail * room.f_frsize < size_bytes:
        raise Exhausted(
            "save machine", subject=path.parent.parent, code="disk-full",
            why=f"{size_bytes >> 20} MiB needed, {room.f_bavail * room.f_frsize >> 20} MiB free",
        )  # fmt: skip
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


# -- starting from it -------------------------------------------------------------------------------


async def clone(
    folder: Path, config: MachineConfig, *, export: str, console_log: str, hold_fd: int = -1, hostname: str = "holdfast"
) -> vm.VirtualMachine:
    """Starts a machine from a template.

    Raises:
        MachineFailed: QEMU refuses the save, or the clone does not answer.
        GuestFailed: it cannot be made different from other clones.
    """
    state_fd = os.open(folder / "state", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return await vm.start(
            config, ram_path=str(folder / "ram"), ram_shared=False, export=export, console_log=console_log,
            state_fd=state_fd, hold_fd=hold_fd, hostname=hostname,
        )  # fmt: skip
    finally:
        os.close(state_fd)
