"""A monitor's process, before it is told which pod it is of.

Most of the time that a monitor needs to start, its interpreter reads modules, and for that it need not know anything.
So a command that is likely to need one starts it first of all (:func:`expect`), and does what it has to do itself
meanwhile.  Until it is told, the process has done nothing but read files; it ends when the other end of its socket is
closed, whoever is killed.  Nothing is imported here that takes time.
"""

from __future__ import annotations

import _socket  # socket takes 5 ms
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: The socket's number in the monitor.
SOCKET_FD = 3
START = (
    "import os, sys; os.chdir('/'); os.closerange(4, 1 << 20); sys.path[:] = {path!r}; "
    "sys.modules['typing_extensions'] = None; "  # msgspec takes what typing has: 10 ms less
    "from holdfast.pod.monitor import main; main()"
)
#: Of one message; the kernel's limit is 253 (unix(7), SCM_RIGHTS).
_MOST_FDS = 200
_LENGTH_BYTES = 8
#: How the names of pods begin that are ready; see :mod:`holdfast.pod.pool`.
POOL = ".pool-"

_expected: EarlyMonitor | None = None


class EarlyMonitor:
    """A monitor that waits.  Owns its process, and the socket to it until that is taken by :meth:`tell`."""

    def __init__(self, start: str = START) -> None:
        self._socket, theirs = _socket.socketpair()
        program = start.format(path=[path for path in sys.path if path])
        null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
        actions = [null, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, theirs.fileno(), SOCKET_FD)]
        if not os.environ.get("HOLDFAST_DEBUG"):
            actions.append((os.POSIX_SPAWN_DUP2, 0, 2))
        try:
            # A session of its own: the keys of the caller's terminal are not for it.
            argv = [sys.executable, "-I", "-S", "-c", program]
            self._pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def tell(self, request: bytes, fds: Sequence[int]) -> int:
        """Says what to do; returns the descriptor of the first client's connection, which is the caller's.

        Args:
            request: a ``PodRequest``.
            fds: what goes to the monitor: the pod's lock, and those of a snapshot.  They stay the caller's.

        Raises:
            MachineFailed: the process has died.
        """
        head = len(request).to_bytes(_LENGTH_BYTES, "little") + len(fds).to_bytes(_LENGTH_BYTES, "little")
        try:
            self._socket.sendall(head)
            for start in range(0, len(fds), _MOST_FDS):
                rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds[start : start + _MOST_FDS])
                self._socket.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            self._socket.sendall(request)
            os.waitpid(self._pid, 0)  # it forks the monitor and ends at once
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError | ConnectionResetError):
                from holdfast.errors import MachineFailed

                raise MachineFailed("start pod", why="its monitor has died", code="monitor-died") from None
            raise
        return self._socket.detach()

    def close(self) -> None:
        """Ends one that has not been told anything."""
        self._socket.close()
        os.kill(self._pid, 9)  # reaped below, so the number is still its own
        os.waitpid(self._pid, 0)


def receive(fd: int) -> tuple[bytes, list[int]]:
    """What :meth:`EarlyMonitor.tell` has said, for the process itself; empty if nobody is there who might."""
    sock = _socket.socket(fileno=fd)
    try:
        head = _read(sock, 2 * _LENGTH_BYTES)
        if not head:
            return b"", []
        length, count = (int.from_bytes(part, "little") for part in (head[:_LENGTH_BYTES], head[_LENGTH_BYTES:]))
        fds: list[int] = []
        while len(fds) < count:
            room = _socket.CMSG_SPACE(4 * _MOST_FDS)
            data, control, flags, _address = sock.recvmsg(1, room, _socket.MSG_CMSG_CLOEXEC)
            for _level, _kind, rights in control:
                fds += (int.from_bytes(rights[i : i + 4], sys.byteorder) for i in range(0, len(rights), 4))
            if not data or flags & _socket.MSG_CTRUNC:  # no room for more descriptors (getrlimit(2), RLIMIT_NOFILE)
                return b"", []
        return _read(sock, length), fds
    finally:
        sock.detach()


def _read(sock: _socket.socket, count: int) -> bytes:
    """So many bytes; nothing if the sender has died meanwhile."""
    found = b""
    while len(found) < count:
        part = sock.recv(count - len(found))
        if not part:
            return b""
        found += part
    return found


def expect() -> None:
    """Starts a monitor that is likely to be needed; :func:`forget` must follow."""
    global _expected
    if _expected is None:
        _expected = EarlyMonitor()


def take() -> EarlyMonitor | None:
    """The one that was expected, if there is one; it is the caller's now."""
    global _expected
    found, _expected = _expected, None
    return found


def forget() -> None:
    """Ends the one that was expected, if nobody has taken it."""
    found = take()
    if found is not None:
        found.close()
