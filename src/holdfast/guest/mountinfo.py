"""The mounts that a process of the machine sees, in more detail than :mod:`holdfast.mounts.table` needs."""

from __future__ import annotations

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
    """Every mount that a process sees, in the kernel's order."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [Mounted(line) for line in file]
