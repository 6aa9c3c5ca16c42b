"""Undoing what was done, in reverse, whatever else fails.

Each undo gets a deadline of its own, never what is left of a caller's that has just passed or been
cancelled, and one that fails does not stop the others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.errors import NotReleased, TimedOut

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNDO_SECONDS = 30.0


class Undo:
    """What to undo if the rest fails, last first."""

    def __init__(self) -> None:
        self._actions: list[tuple[str, Callable[[], Awaitable[object] | None]]] = []

    def push(self, what: str, action: Callable[[], Awaitable[object] | None]) -> None:
        """Remembers how to undo what has just been done."""
        self._actions.append((what, action))

    def forget(self) -> None:
        """Everything went well: nothing is to be undone."""
        self._actions.clear()

    async def unwind(self) -> list[Exception]:
        """Undoes everything, last first; what failed stays remembered and its errors are returned."""
        failed: list[tuple[str, Callable[[], Awaitable[object] | None]]] = []
        errors: list[Exception] = []
        while self._actions:
            what, action = self._actions.pop()
            try:
                async with asyncio.timeout(UNDO_SECONDS):
                    result = action()
                    if result is not None:
                        await result
            except TimeoutError:
                failed.insert(0, (what, action))
                errors.append(TimedOut(what, why=f"not done within {UNDO_SECONDS:g} s"))
            except Exception as error:
                failed.insert(0, (what, action))
                errors.append(error)
        self._actions = failed
        return errors

    @property
    def empty(self) -> bool:
        """Whether nothing is left to undo."""
        return not self._actions


def not_released(what: str, subject: object, errors: list[Exception]) -> NotReleased:
    """The error that reports everything that could not be undone."""
    return NotReleased(
        what, subject=subject, why=f"{len(errors)} part(s) could not be released", causes=errors,
        hint="it stays recorded: try again",
    )  # fmt: skip
