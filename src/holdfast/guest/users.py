"""Users by name: looked up in the container's own /etc/passwd and /etc/group, as an engine does.

Only the guest sees the root filesystem, so only it can tell who ``nobody`` is.  The files belong to the
image and are not trusted: they are opened under the root, links included, and read to a bounded size.
"""

from __future__ import annotations

import os

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_BYTES = 4 << 20


def apply_user(process: dict[str, Any], user: str, root: str) -> None:
    """Sets ``process.user`` and HOME for ``user``: a name, a number, or ``user:group`` of either.

    Raises:
        InvalidInput: a name that the image does not know.
    """
    if user:
        name, _, group = user.partition(":")
        passwd = _table(root, "etc/passwd")
        groups = _table(root, "etc/group")
        entry = _find(passwd, name)
        if entry is None and not _is_number(name):
            raise InvalidInput("find user", subject=name, why="not in the image's /etc/passwd", code="user-not-found")
        record: dict[str, Any] = {"uid": int(entry[2] if entry else name), "gid": _group_of(entry) if entry else 0}
        if group:
            found = _find(groups, group)
            if found is None and not _is_number(group):
                raise InvalidInput(
                    "find group", subject=group, why="not in the image's /etc/group", code="group-not-found"
                )
            record["gid"] = int(found[2] if found else group)
        elif entry:
            extra = [int(g[2]) for g in groups if len(g) > 3 and entry[0] in g[3].split(",") and _is_number(g[2])]
            record["additionalGids"] = [gid for gid in extra if gid != record["gid"]]
        process["user"] = {**process.get("user", {}), **record}
    _set_home(process, root)


def _set_home(process: dict[str, Any], root: str) -> None:
    env = process.setdefault("env", [])
    if not any(entry.startswith("HOME=") for entry in env):
        entry = _find(_table(root, "etc/passwd"), str(process.get("user", {}).get("uid", 0)))
        env.append(f"HOME={entry[5] if entry and len(entry) > 5 and entry[5] else '/'}")


def _group_of(entry: list[str]) -> int:
    if not _is_number(entry[3]):
        raise InvalidInput(
            "find user", subject=entry[0], why="its group in /etc/passwd is no number", code="bad-passwd"
        )
    return int(entry[3])


def _is_number(text: str) -> bool:
    """``str.isdigit`` alone takes characters that ``int`` does not."""
    return text.isascii() and text.isdigit()


def _find(table: list[list[str]], key: str) -> list[str] | None:
    for entry in table:
        if len(entry) > 3 and _is_number(entry[2]) and key in (entry[0], entry[2]):
            return entry
    return None


def _table(root: str, name: str) -> list[list[str]]:
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
        fd = syscalls.openat2(root_fd, name, os.O_RDONLY | os.O_NONBLOCK, resolve)
    except OSError:
        return []
    finally:
        os.close(root_fd)
    try:
        text = os.read(fd, _MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    finally:
        os.close(fd)
    return [line.split(":") for line in text.splitlines() if line and line[0] != "#"]
