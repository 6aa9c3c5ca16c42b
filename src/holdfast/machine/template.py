"""Templates: machines that were booted once and saved, for every later pod to start from.

::

    <data>/templates/<key>/ram             guest RAM, sparse; mapped privately by every clone
                           state           device state
                           template.json   what it is, and how to tell that it is whole

A template appears by one rename, so a builder that dies leaves only a temporary folder, which the next
builder sweeps.  One that does not match its record is not used, and that is said.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, Exhausted, NotFound
from holdfast.machine import migration, vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.machine.config import MachineConfig

FORMAT_VERSION = 1


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
    qemu_version: str
    state_sha256: str
    ram_identity: tuple[int, int, int]

    def check(self, folder: Path) -> None:
        """Checks that the files are those that were saved.

        Raises:
            Corrupt: they are not; the error names the file.
        """
        if self.version != FORMAT_VERSION:
            raise _damaged(folder, f"its format is version {self.version}, not {FORMAT_VERSION}")
        try:
            state = (folder / "state").read_bytes()
            ram = _identity(folder / "ram")
        except OSError as error:
            raise _damaged(folder, f"{error.filename}: {error.strerror}") from None
        if hashlib.sha256(state).hexdigest() != self.state_sha256:
            raise _damaged(folder, "its device state has changed since it was saved")
        if ram != self.ram_identity:
            raise _damaged(folder, "its RAM file has changed since it was saved")


def _damaged(folder: Path, why: str) -> Corrupt:
    return Corrupt(
        "use template", subject=folder.name, why=why, code="template-damaged",
        hint="it is not used, and built again",
    )  # fmt: skip


def _identity(path: Path) -> tuple[int, int, int]:
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
        record = msgspec.json.decode((folder / "template.json").read_bytes(), type=Template)
    except FileNotFoundError:
        raise NotFound("find template", subject=key, code="template-not-found") from None
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(folder, str(error)) from None
    if record.key != key:
        raise _damaged(folder, f"it says that it is {record.key}")
    record.check(folder)
    return folder, record


def list_all(data: Path) -> list[Template]:
    """Every template whose record can be read."""
    found = []
    for path in sorted((data / "templates").glob("[0-9a-f]*/template.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Template))
        except (OSError, msgspec.DecodeError):
            continue
    return found


def remove(data: Path, key: str) -> None:
    """Deletes a template; running clones keep their open files and go on.

    Raises:
        NotFound: there is none.
    """
    folder = data / "templates" / key
    if not folder.is_dir():
        raise NotFound("remove template", subject=key, code="template-not-found")
    _discard(folder)


async def ensure(data: Path, config: MachineConfig, say: Callable[[str], None]) -> tuple[Path, Template]:
    """The template of a machine: loaded, or built by booting it once.

    A second builder of the same template waits for the first.

    Raises:
        MachineFailed: the machine does not boot.
        Exhausted: no room for its RAM.
    """
    try:
        return load(data, config.key)
    except NotFound:
        pass
    except Corrupt as error:
        say(str(error))
    folder = data / "templates"
    folder.mkdir(parents=True, exist_ok=True)
    lock_fd = os.open(folder / f".{config.key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, lock_fd, fcntl.LOCK_EX)
        try:
            return load(data, config.key)
        except NotFound:
            if (folder / config.key).is_dir():  # without a record it is none, but it is in the way
                _discard(folder / config.key)
        except Corrupt:
            _discard(folder / config.key)
        for leftover in folder.glob(f".{config.key}.new-*"):
            shutil.rmtree(leftover)
        say("booting a machine once, to start every later one from it")
        await _build(folder, config)
    finally:
        os.close(lock_fd)
    return load(data, config.key)


async def _build(folder: Path, config: MachineConfig) -> None:
    with _new_folder(folder, config.key) as new:
        ram = new / "ram"
        _make_ram(ram, config.memory_bytes)
        (new / "export").mkdir()
        console = str(new / "console.log")
        machine = await vm.start(
            config, ram_path=str(ram), ram_shared=True, export=str(new / "export"), console_log=console
        )
        try:
            state_fd = os.open(new / "state", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
            try:
                await migration.save(machine.qmp, state_fd)
            finally:
                os.close(state_fd)
        finally:
            await machine.close()
        (new / "export").rmdir()
        os.unlink(console)
        await asyncio.to_thread(_finish, new, config)
        os.rename(new, folder / config.key)


def _finish(new: Path, config: MachineConfig) -> None:
    """Writes everything out before the record says that it is whole."""
    for name in ("ram", "state"):
        fd = os.open(new / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    record = Template(
        version=FORMAT_VERSION, key=config.key, guest=config.guest.id, accelerator=config.accelerator,
        memory_bytes=config.memory_bytes, cpus=config.cpus, qemu_version=config.qemu_version,
        state_sha256=hashlib.sha256((new / "state").read_bytes()).hexdigest(), ram_identity=_identity(new / "ram"),
    )  # fmt: skip
    (new / "template.json").write_bytes(msgspec.json.encode(record))


@contextmanager
def _new_folder(folder: Path, key: str) -> Iterator[Path]:
    new = Path(tempfile.mkdtemp(prefix=f".{key}.new-", dir=folder))
    try:
        yield new
    finally:
        if new.is_dir():
            shutil.rmtree(new)


def _discard(folder: Path) -> None:
    """Removes a template; renamed first, so that half a template never bears a template's name."""
    doomed = folder.with_name(f".{folder.name}.new-doomed-{os.getpid()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


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


async def clone(
    folder: Path, config: MachineConfig, *, export: str, console_log: str, hold_fd: int = -1
) -> vm.VirtualMachine:
    """Starts a machine from a template.

    Raises:
        MachineFailed: QEMU refuses the save, or the clone does not answer.
    """
    state_fd = os.open(folder / "state", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return await vm.start(
            config, ram_path=str(folder / "ram"), ram_shared=False, export=export, console_log=console_log,
            state_fd=state_fd, hold_fd=hold_fd,
        )  # fmt: skip
    finally:
        os.close(state_fd)
