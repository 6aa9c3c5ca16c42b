"""The mounts that a process of the machine sees, in more detail than :mod:`holdfast.mounts.table` needs."""

from __future__ import annotations

import os

from holdfast.mounts.table import unescape


class Mounted:
    """One line of mountinfo (proc_pid_mountinfo(5)).

    Attributes:
        root: what of its filesystem is mounted.
    """

    __slots__ = ("device", "fstype", "number", "options", "parent", "root", "target")

    def __init__(self, line: bytes) -> None:
        before, _, after = line.partition(b" - ")
        number, parent, device, root, target, options = before.split(b" ")[:6]
        self.number, self.parent = int(number), int(parent)
        self.device = tuple(map(int, device.split(b":")))
        self.root, self.target = unescape(root), unescape(target)
        self.options = options.decode().split(",")
        self.fstype = after.split(b" ", 1)[0]


def mounted(pid: int | str) -> list[Mounted]:
    """Every mount that a process, or a thread, sees, in the kernel's order."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [Mounted(line) for line in file]


def living(pids: dict[str, int]) -> dict[str, int]:
    """For each process that has not ended, a thread that sees mounts; by name, as the processes are.

    A process whose first thread has ended looks like a zombie, and goes on with the others (pthread_exit(3)).
    """
    found = {}
    for name, pid in pids.items():
        for thread in threads(pid):
            try:
                os.stat(f"/proc/{thread}/ns/mnt")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[name] = thread
            break
    return found


def threads(pid: int) -> list[int]:
    """Of a process; each has a ``/proc/NUMBER`` of its own, which is not listed there.  Empty if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []
