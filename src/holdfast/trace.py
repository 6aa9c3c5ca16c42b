"""A timeline across processes, to see where the time of a command goes: nothing unless ``HOLDFAST_TRACE`` names a file.

Each line is ``<CLOCK_MONOTONIC, ns> <process> <what has just been done>``; processes append to one file.  The guest has
another clock and no such file: its agent sends its marks, and the monitor writes them in the host's time.  Imported by
the agent too, so it imports nothing that takes time.
"""

from __future__ import annotations

import os
from time import monotonic_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Takes (when, in ns of this machine's monotonic clock; what).  None: nobody wants to know.
_sink: Callable[[int, str], None] | None = None


def open_trace(process: str) -> None:
    """Has the marks of this process written, if the environment asks for it.

    Raises:
        OSError: the file cannot be opened.
    """
    path = os.environ.get("HOLDFAST_TRACE")
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        send_to(lambda when, what: _write(fd, f"{when} {process} {what}\n"))


def send_to(sink: Callable[[int, str], None]) -> None:
    """Has the marks of this process given to ``sink``."""
    global _sink
    _sink = sink


def is_on() -> bool:
    """Whether marks go anywhere."""
    return _sink is not None


def mark(what: str, when: int = 0) -> None:
    """Says that something has just been done, or that it was ``when``."""
    if _sink is not None:
        _sink(when or monotonic_ns(), what)


class Remote:
    """Writes the marks of a machine whose clock differs, and whose words are not trusted."""

    def __init__(self) -> None:
        self._behind_ns: int | None = None

    def mark(self, params: dict[str, Any]) -> None:
        """Takes a mark as its sender's :func:`send_to` has made it; the quickest so far tells how the clocks differ."""
        when, what = params.get("when"), params.get("what")
        if _sink is not None and isinstance(when, int) and isinstance(what, str):
            behind = monotonic_ns() - when
            self._behind_ns = behind if self._behind_ns is None else min(behind, self._behind_ns)
            _sink(when + self._behind_ns, f"agent: {what[:80].encode('ascii', 'replace').decode()}".replace("\n", " "))


def _write(fd: int, line: str) -> None:
    os.write(fd, line.encode())
