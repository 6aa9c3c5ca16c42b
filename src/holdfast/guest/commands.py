"""Commands that the kernel would refuse, found out before they are started.

The runtime finds a missing file by itself.  What only execve(2) refuses - an interpreter that is not there, a file
of no known format - it finds out when the container runs already, and then all that is left is exit status 1 and a
line among the container's own output.  So the first bytes of the file are looked at here; whatever is not certain
is left to the runtime.
"""

from __future__ import annotations

import errno
import os
import posixpath

from holdfast.errors import CommandNotExecutable, CommandNotFound
from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEAD_BYTES = 256
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS


def check_command(process: dict[str, Any], root: str, mounted: list[str]) -> None:
    """Raises if the process's command certainly cannot be executed.

    Args:
        process: of the specification.
        root: the container's root filesystem, as the agent sees it.
        mounted: where something will be mounted over it, which is not to be seen there yet.

    Raises:
        CommandNotFound: the interpreter that its first line names is not there.
        CommandNotExecutable: it is no program.
    """
    name = str(process["args"][0])
    mounted = [place for place in mounted if not place.startswith(("/proc", "/sys", "/dev"))]  # no programs in there
    if "/" not in name:  # what is searched for along PATH is a program, as a rule
        return
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        head = _head(root_fd, posixpath.join(process.get("cwd") or "/", name), mounted)
        if head is None or head[:4] == b"\x7fELF":
            return
        if head[:2] != b"#!":
            hint = "a script begins with '#!' and the path of what runs it"
            raise CommandNotExecutable("start", subject=name, why="Exec format error: it is no program", hint=hint)
        words = head[2:].partition(b"\n")[0].split()
        interpreter = os.fsdecode(words[0]) if words else ""
        if interpreter.startswith("/") and not mounted and _is_missing(root_fd, interpreter):
            why = f"it is to be run by {interpreter}, which is not there"
            raise CommandNotFound("start", subject=name, why=why, hint="is the interpreter in the image?")
    finally:
        os.close(root_fd)


def _head(root_fd: int, path: str, mounted: list[str]) -> bytes | None:
    """The file's first bytes; None if it is no executable file, or may not be the one that the container will see."""
    try:
        fd = syscalls.openat2(root_fd, path.lstrip("/"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, _RESOLVE)
    except OSError:
        return None
    try:
        real = os.readlink(f"/proc/self/fd/{fd}")
        top = os.readlink(f"/proc/self/fd/{root_fd}")
        inside = "/" + real.removeprefix(top).lstrip("/")
        if any(inside.startswith(posixpath.normpath(place).rstrip("/") + "/") for place in mounted):
            return None
        status = os.fstat(fd)
        if status.st_mode & 0o170000 != 0o100000 or not status.st_mode & 0o111:
            return None
        return os.read(fd, _HEAD_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def _is_missing(root_fd: int, path: str) -> bool:
    try:
        os.close(syscalls.openat2(root_fd, path.lstrip("/"), os.O_PATH | os.O_CLOEXEC, _RESOLVE))
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False
