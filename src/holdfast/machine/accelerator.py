"""Which accelerator really works here.

``/dev/kvm`` that opens proves nothing: on nested hosts a guest can hang at boot, or QEMU abort.  So the
probe boots the guest itself with KVM, within a deadline, once per host, and remembers the verdict with
what it was true of: host kernel, processor, QEMU.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import HoldfastError, InvalidInput, NotFound
from holdfast.machine import vm
from holdfast.machine.config import QEMU, MachineConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.machine.guest_image import GuestImage

#: A guest that boots with KVM at all answers within a second or two.
PROBE_SECONDS = 12.0
_PROBE_MEMORY_BYTES = 256 << 20


class Verdict(msgspec.Struct, frozen=True):
    """``accelerator`` (``kvm`` or ``tcg``), ``why``, and the ``host`` that it was found on."""

    accelerator: str
    why: str
    host: str


def qemu_version() -> str:
    """The first line of ``qemu --version``.

    Raises:
        NotFound: QEMU is not installed.
    """
    try:
        done = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        raise NotFound("find QEMU", subject=QEMU, code="qemu-not-found", hint="apt install qemu-system-x86") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise HoldfastError("ask QEMU for its version", subject=QEMU, why=error) from None
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def cached_qemu_version(data: Path) -> str:
    """:func:`qemu_version`, asked again only when the program's file has changed."""
    try:
        status = os.stat(QEMU)
    except FileNotFoundError:
        raise NotFound("find QEMU", subject=QEMU, code="qemu-not-found", hint="apt install qemu-system-x86") from None
    identity = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    record = data / "qemu-version"
    try:
        known, _, version = record.read_text().partition("\n")
        if known == identity:
            return version
    except OSError:
        pass
    version = qemu_version()
    _replace(record, f"{identity}\n{version}".encode())
    return version


def host_identity(version: str) -> str:
    """What a verdict is true of."""
    model = ""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.uname().release}; {model}; {version}"


async def choose(data: Path, guest: GuestImage, version: str, say: Callable[[str], None]) -> Verdict:
    """The accelerator to use: what ``HOLDFAST_ACCELERATOR`` says, else the remembered verdict, else a probe's.

    Raises:
        InvalidInput: ``HOLDFAST_ACCELERATOR`` is neither ``kvm`` nor ``tcg``.
    """
    asked = os.environ.get("HOLDFAST_ACCELERATOR", "")
    host = host_identity(version)
    if asked:
        if asked not in ("kvm", "tcg"):
            raise InvalidInput("choose accelerator", subject=asked, why="HOLDFAST_ACCELERATOR must be kvm or tcg")
        return Verdict(asked, "HOLDFAST_ACCELERATOR says so", host)
    record = data / "accelerator.json"
    lock_fd = os.open(data / ".accelerator.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        remembered = known(data, host)
        if remembered is not None:
            return remembered
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        remembered = known(data, host)
        if remembered is not None:
            return remembered
        verdict = await _probe(guest, version, host, say)
        _replace(record, msgspec.json.encode(verdict))
        say(f"using {verdict.accelerator.upper()}: {verdict.why}")
        return verdict
    finally:
        os.close(lock_fd)


def known(data: Path, host: str) -> Verdict | None:
    """The remembered verdict, if it is about this host as it is now."""
    try:
        verdict = msgspec.json.decode((data / "accelerator.json").read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError):
        return None
    return verdict if verdict.host == host else None


async def _probe(guest: GuestImage, version: str, host: str, say: Callable[[str], None]) -> Verdict:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Verdict("tcg", f"/dev/kvm cannot be opened: {error.strerror}", host)
    say(f"trying whether a guest boots with KVM (at most {PROBE_SECONDS:g} s, once per host)")
    config = MachineConfig(guest, "kvm", _PROBE_MEMORY_BYTES, 1, version)
    with tempfile.TemporaryDirectory(prefix="holdfast-probe-") as folder:
        ram = os.path.join(folder, "ram")
        with open(ram, "wb") as file:
            file.truncate(config.memory_bytes)
        try:
            machine = await vm.start(
                config, ram_path=ram, ram_shared=True, export=folder, boot_seconds=PROBE_SECONDS,
                console_log=os.path.join(folder, "console.log"),
            )  # fmt: skip
        except HoldfastError as error:
            return Verdict("tcg", f"a guest does not boot with KVM here: {error.why}", host)
        await machine.close()
    return Verdict("kvm", "a guest boots with it", host)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
