"""Sizes as people write them: ``256M``, ``1.5G``, ``10GiB``, ``65536``.

Every suffix is binary, ``GB`` as well as ``GiB``: so podman and docker read them.
"""

from __future__ import annotations

import re

from holdfast.errors import InvalidInput

_UNITS = "bkmgtp"
_LARGEST = 2**63 - 1


def parse_size(text: str, *, subject: str = "") -> int:
    """Bytes, at least one.

    Args:
        text: a number, perhaps with a fraction, and a unit: B, K, M, G, T or P, perhaps followed by B or iB.
        subject: what the size is for, for the error; usually an option's name.

    Raises:
        InvalidInput: ``size``.
    """
    found = re.fullmatch(r"(\d{1,20})(?:\.(\d{1,20}))? ?(?:([kmgtp])i?)?b?", text.strip().lower(), re.ASCII)
    if not found:
        raise _wrong(text, subject, "is not a size such as 256M, 1.5G, 10GiB or a number of bytes")
    whole, fraction, unit = found.group(1), found.group(2) or "", found.group(3) or "b"
    size: int = int(whole + fraction) * 1024 ** _UNITS.index(unit) // 10 ** len(fraction)
    if not 0 < size <= _LARGEST:
        raise _wrong(text, subject, "is too small" if size <= 0 else "is too large")
    return size


def _wrong(text: str, subject: str, why: str) -> InvalidInput:
    return InvalidInput("read size", subject=subject or text, why=f"{text!r} {why}", code="size")
