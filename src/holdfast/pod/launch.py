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
import tempfile
from pathlib import Path

import msgspec

from holdfast import trace
from holdfast.errors import InUse, InvalidInput, Unsupported
from holdfast.linux import user_namespaces
from holdfast.machine.config import MOST_CPUS
from holdfast.pod import early, pool
from holdfast.pod.client import Client
from holdfast.pod.messages import PodRequest
from holdfast.storage.journal import Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.pod.snapshot import Snapshot

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
#: sun_path holds 108 bytes (unix(7)); what is left for the state root and the pod's name.
_SOCKET_PATH_BYTES = 107

_TRIES = 5

_START = early.START


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


def launch(request: PodRequest, snapshot: Snapshot | None = None) -> Client:
    """Starts a pod's monitor; returns the first client's connection, on which ``start`` waits for the machine.

    Args:
        snapshot: what it goes on from; its descriptors stay the caller's.

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
    if snapshot is None and (taken := pool.take(request)) is not None:
        trace.mark("pod taken from the pool")
        return taken
    return start_monitor(request, snapshot)


def start_monitor(request: PodRequest, snapshot: Snapshot | None = None) -> Client:
    """Starts the monitor of a pod that has been checked; see :func:`launch`."""
    root = Path(request.root)
    with Journal(root) as journal:
        lock_fd = _reserve(journal, root / "pods" / request.name)
    trace.mark("pod's name and lock")
    try:
        fds = tuple(snapshot.fds) if snapshot is not None else ()
        request = msgspec.structs.replace(request, snapshot=fds)
        connection = (early.take() or early.EarlyMonitor(_START)).tell(msgspec.json.encode(request), [lock_fd, *fds])
        trace.mark("monitor has been told")
        return Client(socket.socket(fileno=connection))
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
        raise _exists(folder.name) from None
    return lock_fd


def check_new(root: Path, name: str) -> None:
    """Says early what :func:`launch` would: for who has much to do before.

    Raises:
        InvalidInput: it is no name for a pod.
        InUse: a pod of this name lives.
    """
    check_name(name)
    if (root / "journal.db").exists():  # a journal is made when it is opened
        with Journal(root) as journal:
            if journal.is_alive(name):
                raise _exists(name)


def _exists(name: str) -> InUse:
    return InUse(
        "start pod", subject=name, why="a pod of this name exists", code="pod-exists",
        hint=f"choose another name, or: holdfast pod remove {name}",
    )  # fmt: skip


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
    if os.geteuid() and (why := user_namespaces.refusal()):
        raise Unsupported(
            "start pod", subject="--isolation namespace", code="no-user-namespaces",
            why=f"without root it takes a user namespace, and this host lets users have none: {why}",
            hint="run it as root, or allow them: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and"
            " kernel.apparmor_restrict_unprivileged_userns",
        )  # fmt: skip
