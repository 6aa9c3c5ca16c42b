"""Undoing what was done, in reverse, whatever else fails.

Each undo gets a deadline of its own, never what is left of a caller's that has just passed or been
cancelled, and one that fails does not stop the others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import NotReleased, TimedOut

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

UNDO_SECONDS = 30.0


class Action(NamedTuple):
    """How to undo one thing; actions next to each other with the same ``group`` are independent.

    Attributes:
        waits: see :meth:`Undo.push`.
    """

    what: str
    run: Callable[[], Awaitable[object] | None]
    group: str
    seconds: float
    waits: bool


class Undo:
    """What to undo if the rest fails, last first."""

    def __init__(self) -> None:
        self._actions: list[Action] = []

    def push(
        self,
        what: str,
        action: Callable[[], Awaitable[object] | None],
        group: str = "",
        seconds: float = UNDO_SECONDS,
        *,
        waits: bool = False,
    ) -> None:
        """Remembers how to undo what has just been done.

        Args:
            group: what was done side by side is undone side by side: neighbours with the same group.
            seconds: how long it may take.
            waits: not before all that came after it has been undone; it is no error then that it stays.
        """
        self._actions.append(Action(what, action, group, seconds, waits))

    def forget(self) -> None:
        """Everything went well: nothing is to be undone."""
        self._actions.clear()

    async def unwind(self) -> list[Exception]:
        """Undoes everything, last first; what failed stays remembered and its errors are returned.

        What a cancellation interrupts stays remembered too: whoever unwinds again goes on from there.
        """
        failed: list[Action] = []
        errors: list[Exception] = []
        try:
            while self._actions:
                if failed and self._actions[-1].waits:
                    failed.insert(0, self._actions.pop())
                    continue
                batch = self._last_batch()
                for action, error in zip(batch, await asyncio.gather(*map(_undo, batch)), strict=True):
                    self._actions.remove(action)
                    if error is not None:
                        failed.insert(0, action)
                        errors.append(error)
        finally:
            self._actions += failed
        return errors

    def _last_batch(self) -> list[Action]:
        batch = [self._actions[-1]]
        for action in reversed(self._actions[:-1]):
            if not action.group or action.group != batch[0].group:
                break
            batch.append(action)
        return batch

    @property
    def empty(self) -> bool:
        """Whether nothing is left to undo."""
        return not self._actions


async def _undo(action: Action) -> Exception | None:
    try:
        async with asyncio.timeout(action.seconds):
            result = action.run()
            if result is not None:
                await result
    except TimeoutError:
        return TimedOut(action.what, why=f"not done within {action.seconds:g} s")
    except Exception as error:
        return error
    return None


def not_released(what: str, subject: object, errors: list[Exception]) -> NotReleased:
    """The error that reports everything that could not be undone."""
    return NotReleased(
        what, subject=subject, why=f"{len(errors)} part(s) could not be released", causes=errors,
        hint="it stays recorded: try again",
    )  # fmt: skip
