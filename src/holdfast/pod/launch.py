"""Starting a pod: reserve its name, take its lock, start its monitor.

The pod's folder appears by one rename, its lock already held (of two launchers one gets the name); the lock
then goes to the monitor with the connection to its first client.  At no moment is something there that is
neither owned by a living process nor found by ``audit``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from holdfast.errors import InUse, InvalidInput, Unsupported
from holdfast.machine.config import MOST_CPUS
from holdfast.pod.client import Client
from holdfast.pod.messages import PodRequest
from holdfast.storage.journal import Journal

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
#: sun_path holds 108 bytes (unix(7)); what is left for the state root and the pod's name.
_SOCKET_PATH_BYTES = 107

_TRIES = 5

_START = "import sys; sys.path[:] = {path!r}; from holdfast.pod.monitor import main; main()"


def check_name(name: str, what: str = "pod") -> str:
    """Returns ``name`` if it can name a pod or a container.

    Raises:
        InvalidInput: it cannot.
    """
    if not 0 < len(name) <= 64 or name[0] in ".-_" or set(name) - _NAME_CHARACTERS:
        raise InvalidInput(
            f"name {what}", subject=repr(name), code="bad-name",
            why="a name has 1 to 64 letters, digits, '.', '_' and '-', and starts with a letter or digit",
        )  # fmt: skip
    return name


def launch(request: PodRequest) -> Client:
    """Starts a pod's monitor; returns the first client's connection, on which ``start`` waits for the machine.

    Raises:
        InUse: a pod of this name exists.
        InvalidInput: the name, the length of its path, or the machine asked for is not usable.
    """
    check_name(request.name)
    _check_machine(request)
    root = Path(request.root)
    folder = root / "pods" / request.name
    socket_path = folder / "monitor.sock"
    if len(os.fsencode(socket_path)) > _SOCKET_PATH_BYTES:
        raise InvalidInput(
            "start pod", subject=socket_path, why="longer than a socket's path may be", code="path-too-long",
            hint="use a shorter --root or --name",
        )  # fmt: skip
    with Journal(root) as journal:
        lock_fd = _reserve(journal, folder)
    try:
        ours, theirs = socket.socketpair()
        with theirs:
            _spawn(request, lock_fd, theirs.fileno())
        return Client(ours)
    except BaseException:
        with Journal(root) as journal:
            os.close(lock_fd)
            lock_fd = -1
            journal.collect(request.name)  # no, if the monitor has started: then it owns the pod
        raise
    finally:
        if lock_fd >= 0:
            os.close(lock_fd)


def _reserve(journal: Journal, folder: Path) -> int:
    """Makes the pod's folder with its lock held in it from the first moment; returns the lock's descriptor."""
    for attempt in range(_TRIES):
        try:
            return _try_to_reserve(journal, folder)
        except (FileNotFoundError, BlockingIOError):
            # A collector has come between making the new folder and locking it, and took it for one left behind.
            if attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _try_to_reserve(journal: Journal, folder: Path) -> int:
    """It is made under another name and renamed: rename(2) replaces no folder that has something in it."""
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    lock_fd = os.open(new / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.is_dir():
            journal.collect(folder.name)  # if its monitor is dead
        os.rename(new, folder)
    except BaseException as error:
        os.close(lock_fd)
        journal.collect(new.name)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InUse(
            "start pod", subject=folder.name, why="a pod of this name exists", code="pod-exists",
            hint=f"choose another name, or: holdfast pod remove {folder.name}",
        ) from None  # fmt: skip
    return lock_fd


def _check_machine(request: PodRequest) -> None:
    if request.isolation not in ("vm", "namespace"):
        raise Unsupported(
            "start pod", subject=f"isolation {request.isolation}", why="there is no such kind", code="isolation",
            hint="use --isolation vm, or namespace",
        )  # fmt: skip
    if request.isolation == "namespace":
        _check_namespace(request)
    if not 1 <= request.cpus <= MOST_CPUS:
        raise InvalidInput(
            "start pod", subject=f"{request.cpus} processors", why=f"a machine has 1 to {MOST_CPUS}", code="cpus"
        )


def _check_namespace(request: PodRequest) -> None:
    """What only a machine can have is refused, not left out."""
    machine = PodRequest("", "", "")
    refused = (
        (request.memory_bytes != machine.memory_bytes, "--memory", "it has the host's memory"),
        (request.cpus != machine.cpus, "--cpus", "it has the host's processors"),
        (request.cold, "--template", "it is not saved anywhere"),
        (bool(request.pmem.count), "--pmem", "its layers are in the host's page cache anyhow"),
        (request.ports, "--device", "the host's kernel drives the host's devices"),
    )
    for is_asked, option, why in refused:
        if is_asked:
            raise Unsupported(
                "start pod", subject=option, why=f"a pod in namespaces has no machine: {why}",
                code="isolation-unsupported", hint="leave it out, or use --isolation vm",
            )  # fmt: skip
    if os.geteuid():
        raise Unsupported(
            "start pod", subject="--isolation namespace", code="needs-root",
            why="without root there are no loop devices, and the kernel mounts no disks in a user namespace",
            hint="run it as root",
        )  # fmt: skip


def _spawn(request: PodRequest, lock_fd: int, client_fd: int) -> None:
    program = _START.format(path=[path for path in sys.path if path])
    argv = [
        sys.executable, "-I", "-S", "-c", program, msgspec.json.encode(request).decode(), str(lock_fd), str(client_fd),
    ]  # fmt: skip
    process = subprocess.Popen(
        argv, pass_fds=[lock_fd, client_fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("HOLDFAST_DEBUG") else subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    process.wait()  # it forks the monitor and ends at once
