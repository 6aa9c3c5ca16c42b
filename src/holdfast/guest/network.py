"""A network namespace that is made before it is needed.

Each container has one of its own, with nothing in it but its loopback.  The kernel makes the tables of every protocol
for it: of all that a container's start has an emulated processor translate and execute, a tenth.  So the agent of a
machine makes one when the machine boots, and the machine's first container gets it.
"""

from __future__ import annotations

import _socket
import fcntl
import os

from holdfast.errors import GuestFailed
from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATH = "/run/holdfast/network"
_SIOCSIFFLAGS = 0x8914
#: IFF_UP and IFF_RUNNING: netdevice(7).
_UP = 0x1 | 0x40


class SpareNetwork:
    """One network namespace, kept by a mount of it until a container has it."""

    def __init__(self) -> None:
        """Makes it.

        Raises:
            GuestFailed: the kernel refused.
        """
        os.makedirs(os.path.dirname(_PATH), 0o700, exist_ok=True)
        os.close(os.open(_PATH, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        pid = os.fork()
        if not pid:
            _make()
        if os.waitpid(pid, 0)[1]:
            os.unlink(_PATH)
            raise GuestFailed("make network namespace", why="the kernel refuses", code="no-network-namespace")

    def give(self, spec: dict[str, Any]) -> bool:
        """Has a container join it, if it is to have a new one.

        A user namespace owns the network of its processes, so a container with one gets a network from the runtime.
        """
        namespaces = (spec.get("linux") or {}).get("namespaces") or []
        kinds = {namespace.get("type"): namespace for namespace in namespaces}
        if "user" in kinds or "network" not in kinds or kinds["network"].get("path"):
            return False
        kinds["network"]["path"] = _PATH
        return True

    def let_go(self) -> None:
        """The container has it, or it is not needed: it ends with who is in it."""
        syscalls.umount(_PATH, syscalls.MNT_DETACH)
        os.unlink(_PATH)


def _make() -> None:
    """The life of a process that does it."""
    status = 1
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, b"lo".ljust(16, b"\0") + _UP.to_bytes(2, "little") + bytes(22))
        syscalls.mount("/proc/self/ns/net", _PATH, "", syscalls.MS_BIND)
        status = 0
    finally:
        os._exit(status)
