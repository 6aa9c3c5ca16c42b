"""Mounts with other owners: maps of user and group ids, and the user namespace that carries them to the kernel."""

from __future__ import annotations

import errno
import os
import signal

from holdfast.errors import HoldfastError, InvalidInput, Unsupported
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import features

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: user_namespaces(7): lines that a map may have.
_MOST_LINES = 340
_MOST_ID = (1 << 32) - 1


class Maps:
    """Maps of user and of group ids, as lines of ``/proc/PID/uid_map``: ``(inside, outside, count)``."""

    __slots__ = ("gids", "uids")

    def __init__(self, uids: Sequence[tuple[int, int, int]], gids: Sequence[tuple[int, int, int]]) -> None:
        self.uids = tuple(uids)
        self.gids = tuple(gids)


def take(words: Sequence[str]) -> tuple[Maps | None, list[str]]:
    """Takes ``uidmap=`` and ``gidmap=`` out of options: ``inside:outside:count``, several by commas or repeated.

    Returns:
        The maps, if there are any, and the other options.

    Raises:
        InvalidInput: one of the two is missing, or a map is none.
    """
    found: dict[str, list[tuple[int, int, int]]] = {"uidmap": [], "gidmap": []}
    rest = []
    current = ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in found:
            current = name
            found[name].append(_line(value))
        elif current and not equals and word[:1].isdecimal() and word.count(":") == 2:
            found[current].append(_line(word))  # what followed a comma in the same map
        else:
            current = ""
            rest.append(word)
    if not found["uidmap"] and not found["gidmap"]:
        return None, rest
    for name, lines in found.items():
        if not lines or len(lines) > _MOST_LINES:
            raise InvalidInput(
                "read id map", subject=name, why=f"too many lines ({len(lines)})" if lines else "missing",
                hint="uidmap= and gidmap= go together", code="id-map",
            )  # fmt: skip
    return Maps(found["uidmap"], found["gidmap"]), rest


def _line(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdecimal() and part.isascii() for part in parts):
        inside, outside, count = (int(part) for part in parts)
        if count and max(inside, outside) + count <= _MOST_ID:
            return inside, outside, count
    raise InvalidInput("read id map", subject=text, why="not inside:outside:count", code="id-map")


def user_namespace(maps: Maps) -> OwnedFd:
    """A user namespace with these maps: nobody is in it; it lasts as long as the descriptor, or a mount that uses it.

    A child enters a new one and waits until its maps are written (2-3 ms).  It keeps nothing of ours open meanwhile:
    that could keep somebody's mount busy.

    Raises:
        HoldfastError: the kernel refuses user namespaces, or the maps.
    """
    ready_fd, say_ready_fd = os.pipe2(os.O_CLOEXEC)
    hold_fd, let_go_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _inside(say_ready_fd, hold_fd)
    try:
        os.close(say_ready_fd)
        os.close(hold_fd)
        answer = os.read(ready_fd, 16)
        if answer != b"0":
            code = int(answer or errno.ECHILD)
            raise OSError(code, os.strerror(code))
        for name, lines in (("uid_map", maps.uids), ("gid_map", maps.gids)):
            with OwnedFd(os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)) as file:
                os.write(file.fileno(), "".join(f"{a} {b} {count}\n" for a, b, count in lines).encode())
        return OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise HoldfastError("make user namespace", why=error, code="user-namespace") from None
    finally:
        os.close(ready_fd)
        os.close(let_go_fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _inside(say_ready_fd: int, hold_fd: int) -> None:
    """The child: enters a new user namespace, says so, and waits for its end; never returns."""
    code = 0
    try:
        lowest, highest = sorted((say_ready_fd, hold_fd))
        os.closerange(0, lowest)
        os.closerange(lowest + 1, highest)
        os.closerange(highest + 1, 1 << 20)
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
        except OSError as error:
            code = error.errno or errno.EIO
        os.write(say_ready_fd, str(code).encode())
        os.read(hold_fd, 1)
    finally:
        os._exit(0)


def apply(tree_fd: int, userns_fd: int, *, recursive: bool, subject: str) -> None:
    """Gives a mount that is nowhere yet the owners that a user namespace maps to.

    Raises:
        Unsupported: this kernel, or the filesystem, does not do that.
    """
    if not features.IDMAP:
        raise Unsupported("map owners", subject=subject, why="the kernel has no mount_setattr(2)", code="idmap")
    flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    try:
        syscalls.mount_setattr(tree_fd, "", flags, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns_fd=userns_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Unsupported(
            "map owners", subject=subject, code="idmap",
            why="the filesystem, or one mounted below, has no mapped mounts",
            hint="overlay has none: its layers may have",
        ) from None  # fmt: skip
