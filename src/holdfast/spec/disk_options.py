"""What a mount says about a disk beyond the mount itself, among its options.

These options are for Holdfast and begin with ``x-holdfast.``: an option that begins with ``x-`` is never given to a
kernel (mount(8)), so that a specification with them stays one that other tools can read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from holdfast.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "x-holdfast."
#: A destination that begins so is a device, not a folder: the disk is not mounted.
BLOCKDEV = "blockdev://"
#: What people and QEMU call them -> what Holdfast does.
FORMATS = {"raw": "raw", "qcow2": "qcow2", "vhd": "vhd", "vpc": "vhd", "vhdx": "vhdx"}
ACCESS = ("group", "individual")
#: What becomes of a mount in a copy of its pod: each has one of its own, all have the same one, each has an empty one,
#: or there are no copies.
FORK = ("copy", "share", "fresh", "deny")
#: sd(4) has minor numbers for 15 partitions; the kernel gives further ones from another range, up to here.
MOST_PARTITIONS = 256


class DiskOptions(Struct, frozen=True):
    """What :func:`take` found.

    Attributes:
        disk_format: in place of the one that the file's signature says; empty for that.
        partition: from 1; 0 is the whole disk.
        access: ``group``, ``individual``, or empty for what follows from read-only.
        fork: one of :data:`FORK`, or empty for what is safe.
        options: the others, as they were.
    """

    disk_format: str = ""
    partition: int = 0
    access: str = ""
    fork: str = ""
    options: tuple[str, ...] = ()


def take(options: Iterable[str], subject: str) -> DiskOptions:
    """Sorts out what is for Holdfast.

    Raises:
        InvalidInput: ``mount-option``; an unknown one, or a value that is none.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    for option in options:
        if option.startswith(PREFIX):
            name, _, value = option.removeprefix(PREFIX).partition("=")
            check(name, value, subject)
            found[name] = value
        else:
            others.append(option)
    return DiskOptions(
        FORMATS[found["format"]] if "format" in found else "",
        int(found.get("partition", 0)),
        found.get("access", ""),
        found.get("fork", ""),
        tuple(others),
    )


def check(name: str, value: str, subject: str) -> None:
    """Raises if there is no such option, or none of this value.

    Raises:
        InvalidInput: ``mount-option``.
    """
    if name == "format":
        right, expected = value in FORMATS, ", ".join(FORMATS)
    elif name == "access":
        right, expected = value in ACCESS, ", ".join(ACCESS)
    elif name == "fork":
        right, expected = value in FORK, ", ".join(FORK)
    elif name == "partition":
        number = value.isascii() and value.isdecimal() and len(value) < 4
        right, expected = number and 0 < int(value) <= MOST_PARTITIONS, "a number from 1"
    else:
        raise InvalidInput("read mount", subject=subject, why=f"unknown option {PREFIX}{name}", code="mount-option")
    if not right:
        raise InvalidInput(
            "read mount", subject=subject, why=f"{name}={value}: expected {expected}", code="mount-option"
        )
