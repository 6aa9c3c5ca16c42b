"""The machine that every pod starts as: a kernel, an initial RAM disk and a root disk, built once.

```
<data>/guests/
  .lock             held by whoever builds
  .build-*          being built; whoever gets the lock may delete it
  <id>/             complete, by virtue of its name
    kernel  initrd  root.erofs
    guest.json      what it is, and the host files it was made of
```

The id is the digest of what lies in the guest, so building again from the same files gives the same
id and the same bytes.  Whether the host's files still are what they were is told by their sizes, times
and inodes: a start of a pod must not read 60 MB to find out that nothing changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

import holdfast
from holdfast.errors import Exhausted, HoldfastError, NotFound, TimedOut, Unsupported
from holdfast.machine import closure, guest_root, vmlinux
from holdfast.machine import kernel as kernels
from holdfast.machine.cpio import Archive
from holdfast.machine.guest_root import Input, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    Progress = Callable[[str], None]

#: Changes when the same inputs are to give something else.
VERSION = "1"
PACKAGE = Path(holdfast.__file__).parent
#: The code that decides what a guest is: as much an input as any other file.
_BUILDER = ("closure", "cpio", "guest_image", "guest_root", "kernel", "vmlinux")
_MKFS_OPTIONS = ("-T0", "-U00000000-0000-0000-0000-000000000000", "-x-1", "--all-root")
_MKFS_TIMEOUT_S = 120
_LOCK_TIMEOUT_S = 180
_LOCK_POLL_S = 0.05
_OLDEST_PYTHON = 11


class Host(msgspec.Struct, frozen=True):
    """Where a host keeps what a guest is made of; tests have hosts of their own."""

    boot: Path = kernels.BOOT
    modules: Path = kernels.MODULES
    interpreter: Path | None = None


class Survey(msgspec.Struct, frozen=True):
    """What decides, besides the contents of files, which files a guest is made of."""

    version: str
    #: the kernel that was asked for, or "" for the newest
    kernel: str
    #: every kernel, and list of its modules, that could have been chosen
    kernels: dict[str, Input]
    interpreter: str
    agent: list[str]


class GuestImage(msgspec.Struct, frozen=True):
    """A built guest; the paths are absolute."""

    id: str
    kernel: str
    initrd: str
    root: str
    kernel_release: str
    #: path in the guest
    interpreter: str
    agent_digest: str
    #: loaded at every start, in this order
    modules: list[str]
    inputs: dict[str, Input]
    survey: Survey


def ensure(
    data: Path,
    *,
    kernel: Path | None = None,
    agent: Path = PACKAGE,
    host: Host | None = None,
    progress: Progress | None = None,
) -> GuestImage:
    """The guest for this host as it is now: found, or built."""
    found = find(data, kernel=kernel, agent=agent, host=host)
    return found or build(data, kernel=kernel, agent=agent, host=host, progress=progress)


def find(
    data: Path, *, kernel: Path | None = None, agent: Path = PACKAGE, host: Host | None = None
) -> GuestImage | None:
    """The guest that :func:`build` would give, if it is there; reads no file but the guests' records."""
    host = host or Host()
    survey = _survey(kernel, agent, host)
    for path in sorted((data / "guests").glob("[0-9a-f]*/guest.json")):
        guest = _load(path)
        if guest and guest.survey == survey and all(known.is_still(name) for name, known in guest.inputs.items()):
            return guest
    return None


def load(data: Path, id: str) -> GuestImage | None:
    """The guest of that id, of whatever files it was built, if it is there."""
    return _load(data / "guests" / id / "guest.json") if re.fullmatch("[0-9a-f]{1,64}", id) else None


def build(
    data: Path,
    *,
    kernel: Path | None = None,
    agent: Path = PACKAGE,
    host: Host | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> GuestImage:
    """Build the guest, or wait for another builder and take what it built.

    Args:
        data: the data folder.
        kernel: a kernel of the host; else the newest that can run pods.
        agent: the ``holdfast`` package whose guest parts become the agent.
        host: where kernels, modules and the interpreter are.
        progress: told what is being done.
        force: build even if it is there.

    Raises:
        NotFound: something to build from is not installed; the hint is the command that installs it.
        Unsupported: a kernel or program of this host cannot be used.
    """
    host = host or Host()
    report = progress or _silent
    guests = data / "guests"
    try:
        guests.mkdir(parents=True, exist_ok=True)
        with _locked(guests / ".lock", report):
            for leftover in guests.glob(".build-*"):
                shutil.rmtree(leftover)
            found = None if force else find(data, kernel=kernel, agent=agent, host=host)
            return found or _build(guests, kernel, agent, host, report, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted("build guest", subject=guests, why=error, hint="a guest takes 80 MB") from error
        raise HoldfastError("build guest", subject=error.filename or guests, why=error) from error


def prune(data: Path, keep: Collection[str]) -> list[str]:
    """Delete all guests but those whose ids are in ``keep``; returns the ids of the deleted."""
    guests = data / "guests"
    removed = []
    if not guests.is_dir():
        return []
    with _locked(guests / ".lock", _silent):
        for folder in sorted(guests.glob("[0-9a-f]*")):
            if folder.name not in keep:
                # Renamed first: half a guest must not bear a name that says it is complete.
                doomed = guests / f".build-{folder.name}"
                folder.rename(doomed)
                shutil.rmtree(doomed)
                removed.append(folder.name)
    return removed


def default_interpreter() -> Path:
    """The interpreter that the guest gets: the distribution's, which has few libraries and starts fast."""
    system = Path(os.path.realpath("/usr/bin/python3"))
    others = sorted(Path("/usr/bin").glob("python3.*"), key=_minor_version, reverse=True)
    for path in (system, *others, Path(os.path.realpath(sys.executable))):
        if _minor_version(path) >= _OLDEST_PYTHON:
            return path
    raise NotFound("find interpreter for the guest", why="no Python 3.11 or newer", hint="apt install python3")


def _build(guests: Path, kernel: Path | None, agent: Path, host: Host, report: Progress, force: bool) -> GuestImage:
    survey = _survey(kernel, agent, host)
    chosen, modules = kernels.find(kernel, boot=host.boot, modules=host.modules)
    interpreter = Path(survey.interpreter)
    report(f"guest: collecting files for kernel {chosen.release}")
    root = guest_root.root_tree(interpreter, agent, modules)
    initrd, initrd_inputs = _initrd(f"/usr/bin/{interpreter.name}", modules)
    image = Tree()
    image.file("/kernel", vmlinux.unpack(image.read(chosen.path)))
    image.file("/initrd", initrd)
    for name in _BUILDER:
        image.read(Path(__file__).with_name(f"{name}.py"))
    id = hashlib.sha256(f"{VERSION} {root.digest()} {image.digest()} {_MKFS_OPTIONS}".encode()).hexdigest()[:32]
    target = guests / id
    guest = GuestImage(
        id=id,
        kernel=str(target / "kernel"),
        initrd=str(target / "initrd"),
        root=str(target / "root.erofs"),
        kernel_release=chosen.release,
        interpreter=f"/usr/bin/{interpreter.name}",
        agent_digest=guest_root.agent_digest(agent),
        modules=modules.order(*kernels.STAGE1, *kernels.STAGE2),
        inputs=dict(sorted({**root.inputs, **initrd_inputs, **image.inputs}.items())),
        survey=survey,
    )
    if _is_complete(guest) and not force:
        _record(target, guest)  # the same contents in files with newer times
        return guest
    with tempfile.TemporaryDirectory(prefix=".build-", dir=guests) as name:
        folder = Path(name)
        image.write(folder / "image")
        root.write(folder / "root")
        report("guest: making the root disk")
        _make_erofs(folder / "root", folder / "image/root.erofs")
        _record(folder / "image", guest)
        for path in sorted((folder / "image").iterdir()):
            _sync(path)  # a name must not outlive, in a power failure, what it names
        if target.is_dir():
            target.rename(folder / "replaced")
        (folder / "image").rename(target)
        _sync(guests)
    report(f"guest: {id} is ready")
    return guest


def _initrd(interpreter: str, modules: kernels.ModuleTree) -> tuple[bytes, dict[str, Input]]:
    """The initial RAM disk: busybox, the modules that reach the root disk, and the script that does it."""
    busybox = guest_root.find_program("busybox")
    if closure.loader_of(busybox):
        raise Unsupported("build guest", subject=busybox, why="it is not static", hint="apt install busybox-static")
    tree = Tree()
    script = tree.read(PACKAGE / "guest/init.sh").replace(b"@INTERPRETER@", interpreter.encode())
    archive = Archive()
    archive.device("dev/console", 5, 1)
    for folder in ("proc", "root"):
        archive.folder(folder)
    archive.file("init", script, 0o755)
    archive.file("bin/busybox", tree.read(busybox), 0o755)
    names = guest_root.initrd_modules(modules)
    for name in names:
        tree.read(modules.file(name))
        archive.file(f"modules/{name}.ko", modules.read(name))
    archive.file("stage1", "".join(f"/modules/{name}.ko\n" for name in names).encode())
    return archive.to_bytes(), tree.inputs


def _make_erofs(folder: Path, target: Path) -> None:
    program = guest_root.find_program("mkfs.erofs")
    argv = [str(program), *_MKFS_OPTIONS, str(target), str(folder)]
    try:
        subprocess.run(argv, capture_output=True, check=True, timeout=_MKFS_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise Unsupported("make root disk", subject=target, why=error.stderr.decode(errors="replace")[-800:]) from error
    except subprocess.TimeoutExpired as error:
        raise Unsupported("make root disk", subject=target, why=f"not done in {_MKFS_TIMEOUT_S} s") from error


def _survey(kernel: Path | None, agent: Path, host: Host) -> Survey:
    if kernel:
        seen = [kernel, host.modules / kernels.release_of(kernel) / "modules.dep"]
    else:
        seen = kernels.candidates(host.boot, host.modules)
        seen += [host.modules / kernels.release_by_name(path) / "modules.dep" for path in seen]
    known = {}
    for path in seen:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            known[str(path)] = Input(status.st_size, status.st_mtime_ns, status.st_ino)
    return Survey(
        version=VERSION,
        kernel=str(kernel or ""),
        kernels=known,
        interpreter=str(host.interpreter or default_interpreter()),
        agent=[str(path) for path in guest_root.agent_files(agent).values()],
    )


def _load(path: Path) -> GuestImage | None:
    """The record at ``path``; one of another version, or damaged, is as good as none."""
    try:
        guest = msgspec.json.decode(path.read_bytes(), type=GuestImage)
    except (OSError, msgspec.DecodeError):
        return None
    in_place = guest.kernel == str(path.with_name("kernel"))  # the data folder was not moved
    return guest if in_place and _is_complete(guest) else None


def _is_complete(guest: GuestImage) -> bool:
    return all(os.path.exists(file) for file in (guest.kernel, guest.initrd, guest.root))


def _record(folder: Path, guest: GuestImage) -> None:
    new = folder / "guest.json.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode(guest)))
    new.rename(folder / "guest.json")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold the builders' lock.

    Raises:
        TimedOut: somebody held it longer than any build takes.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while not _try_lock(fd):
            if time.monotonic() > deadline:
                raise TimedOut("build guest", subject=path, why=f"another builder held it for {_LOCK_TIMEOUT_S} s")
            report("guest: waiting for another builder")
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _minor_version(path: Path) -> int:
    match = re.fullmatch(r"python3\.(\d+)", path.name)
    return int(match[1]) if match and path.exists() else -1


def _silent(_message: str) -> None:
    pass
