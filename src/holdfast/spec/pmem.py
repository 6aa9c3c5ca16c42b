"""How much persistent memory a pod may have for its layers, with hcsshim's names, limits and defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from holdfast.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

COUNT = "io.microsoft.virtualmachine.devices.virtualpmem.maximumcount"
SIZE = "io.microsoft.virtualmachine.devices.virtualpmem.maximumsizebytes"
MOST_DEVICES = 128
DEFAULT_DEVICES = 64
DEFAULT_BYTES = 4 << 30
PAGE = 4096


class PmemLimits(Struct, frozen=True):
    """The most that may be used; with a count of 0 there is no persistent memory at all."""

    count: int = 0
    size_bytes: int = DEFAULT_BYTES


def pmem_limits(annotations: Mapping[str, object]) -> PmemLimits:
    """What a container's annotations ask for.

    Raises:
        InvalidInput: ``pmem-count`` or ``pmem-size``.
    """
    count = _number(annotations, COUNT, 0, "pmem-count")
    limits = PmemLimits(count, _number(annotations, SIZE, DEFAULT_BYTES, "pmem-size"))
    check_limits(limits)
    return limits


def check_limits(limits: PmemLimits) -> None:
    """Checks the numbers.

    Raises:
        InvalidInput: ``pmem-count`` or ``pmem-size``.
    """
    if not 0 <= limits.count <= MOST_DEVICES:
        raise InvalidInput(
            "give persistent memory", subject=f"{limits.count} devices", why=f"a machine has at most {MOST_DEVICES}",
            code="pmem-count",
        )  # fmt: skip
    if limits.size_bytes <= 0 or limits.size_bytes % PAGE:
        raise InvalidInput(
            "give persistent memory", subject=f"{limits.size_bytes} bytes", why=f"no multiple of {PAGE}",
            code="pmem-size",
        )  # fmt: skip


def _number(annotations: Mapping[str, object], name: str, default: int, code: str) -> int:
    text = str(annotations.get(name, default))
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InvalidInput("read annotation", subject=f"{name}={text}", why="not a number", code=code)
    return int(text)
