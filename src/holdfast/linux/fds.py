"""A file descriptor with one owner."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class OwnedFd:
    """Owns one file descriptor: closed by ``with`` or :meth:`close`, useless afterwards.

    Ownership moves by :meth:`release`, never by copying the number.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor.

        Raises:
            ValueError: it was closed or released.
        """
        if self._fd < 0:
            raise ValueError("file descriptor is closed")
        return self._fd

    def release(self) -> int:
        """Gives the descriptor away; the caller owns it now."""
        fd, self._fd = self.fileno(), -1
        return fd

    def dup(self) -> OwnedFd:
        """A second descriptor of the same open file (close-on-exec)."""
        return OwnedFd(os.dup(self.fileno()))

    @property
    def closed(self) -> bool:
        """Whether there is no descriptor any more."""
        return self._fd < 0

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(closed)"
