"""User namespaces: how a process without privileges gets some, over what it makes for itself (user_namespaces(7)).

Enter one, and this process is root in it: it may make the other kinds of namespaces, and mount in them what the kernel
allows there (overlay, tmpfs, proc, binds; no disks).  Users and groups in it are those that /etc/subuid and
/etc/subgid give the caller, by newuidmap(1) and newgidmap(1); without them there is one: the caller, as root.
"""

from __future__ import annotations

import os

from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

_SUBORDINATE = {"uid": "/etc/subuid", "gid": "/etc/subgid"}
_FOLDERS = ("/usr/bin", "/bin", "/usr/local/bin")
#: As uid_map(5) shows it where no namespace was entered.
_ALL = (0, 0, (1 << 32) - 1)


def inside() -> bool:
    """Whether this process is in a user namespace other than the first: the rights that it has are not the host's."""
    return mapped("uid") != [_ALL]


def rootless() -> bool:
    """Whether this process lacks the rights of the host's root: it is another user, or root of a user namespace."""
    return os.geteuid() != 0 or inside()


def mapped(kind: str) -> list[tuple[int, int, int]]:
    """Ranges of ids that exist here: first one here, first one outside, and how many.

    Args:
        kind: ``uid`` or ``gid``.
    """
    with open(f"/proc/self/{kind}_map") as file:
        rows = [tuple(int(number) for number in line.split()) for line in file]
    return [(inner, outer, count) for inner, outer, count in rows]


def exists(kind: str, number: int) -> bool:
    """Whether an id exists here: a process or a file cannot be given another one."""
    return any(inner <= number < inner + count for inner, _, count in mapped(kind))


def granted(kind: str, names: Iterable[str], path: str = "") -> list[tuple[int, int]]:
    """Ranges of ids that a user has been given besides the own one: the first id, and how many; see subuid(5).

    Args:
        names: the user's name, and the number as text.
        path: another file than the system's.
    """
    names = set(names)
    try:
        with open(path or _SUBORDINATE[kind]) as file:
            rows = [line.strip().split(":") for line in file]
    except OSError:
        return []
    ours = (row for row in rows if len(row) == 3 and row[0] in names and row[1].isdigit() and row[2].isdigit())
    return [(int(first), int(count)) for _, first, count in ours if int(count)]


def refusal() -> str:
    """Why this process can have no user namespace with mounts in it; empty if it can.  Tried in a child.

    Some systems let everybody make one and then allow nothing in it (AppArmor's unprivileged_userns).
    """

    def attempt() -> None:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)

    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        _end(attempt, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        why = file.read().decode("utf-8", "replace")
    os.waitpid(pid, 0)
    return why


def _end(attempt: object, writer: int) -> NoReturn:
    why = b""
    try:
        attempt()  # type: ignore[operator]
    except OSError as error:
        why = f"{error.filename or ''}: {error.strerror or error}".encode()
    except BaseException as error:  # nothing leaves this process but by its end
        why = repr(error).encode()
    os.write(writer, why)
    os._exit(0)


def enter() -> None:
    """Puts this process, and those that it starts from now on, into a new user namespace, as its root.

    Not for a process with threads.

    Raises:
        OSError: the kernel allows none here; see :func:`refusal`.
    """
    # Who writes several ranges is not in the namespace; newuidmap looks whether the caller is the process's user.
    maps = _subordinate_maps()
    uid, gid, pid = os.geteuid(), os.getegid(), os.getpid()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    helper = os.fork() if maps else 0
    if maps and not helper:
        os.close(writer)
        os.read(reader, 1)
        _write_maps(pid, maps)
        os._exit(0)
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
    finally:
        os.close(writer)
        os.close(reader)
        if helper:
            os.waitpid(helper, 0)
    if not mapped("uid"):
        _write("uid_map", f"0 {uid} 1")
    if not mapped("gid"):
        _write("setgroups", "deny")  # else the kernel lets nobody map a group: user_namespaces(7)
        _write("gid_map", f"0 {gid} 1")


def granted_ids() -> tuple[int, int] | None:
    """How many users and how many groups a namespace that :func:`enter` makes would have; None for one of each."""
    maps = _subordinate_maps()
    if not maps:
        return None
    users, groups = (sum(int(count) for count in rows[2::3]) for rows in maps.values())
    return users, groups


def _subordinate_maps() -> dict[str, list[str]]:
    """Program and arguments that give each kind its ids; nothing if one of them is missing."""
    import pwd

    uid = os.getuid()
    try:
        names = (pwd.getpwuid(uid).pw_name, str(uid))
    except KeyError:
        names = (str(uid), str(uid))
    found = {}
    for kind, own in (("uid", uid), ("gid", os.getgid())):
        program = next((f"{at}/new{kind}map" for at in _FOLDERS if os.access(f"{at}/new{kind}map", os.X_OK)), "")
        ranges = granted(kind, names)
        if not program or not ranges:
            return {}
        rows, inner = [0, own, 1], 1
        for first, count in ranges:
            rows += [inner, first, count]
            inner += count
        found[program] = [str(number) for number in rows]
    return found


def _write_maps(pid: int, maps: dict[str, list[str]]) -> None:
    """Runs the programs; they are setuid root, or have the capability.  What one refuses stays empty."""
    for program, rows in maps.items():
        os.waitpid(os.posix_spawn(program, [program, str(pid), *rows], {"PATH": "/usr/bin:/bin"}), 0)


def _write(name: str, text: str) -> None:
    fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
