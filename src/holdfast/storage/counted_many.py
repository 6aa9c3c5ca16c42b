"""Shared things of which many are made, and unmade, by one act: a hundred shares are one request to the guest.

The rules are those of :mod:`~holdfast.storage.counted`, for each thing alone: who waits for one of many hears what
became of that one.  Who acquires many gets all of them, or an error and none.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from holdfast.errors import HoldfastError
from holdfast.storage.counted import Counted, Entry, HalfMade, drop, retrieve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")


class CountedMany(Counted[K, V]):
    """Shared things of one kind.

    Args:
        unmake_all: undoes the making of several; returns for each why it is not undone, or None.
    """

    def __init__(self, unmake_all: Callable[[list[V]], Awaitable[Sequence[Exception | None]]]) -> None:
        super().__init__(self._unmake_one)
        self._unmake_all = unmake_all
        self._work: set[asyncio.Task[None]] = set()

    async def _unmake_one(self, _key: K, value: V) -> None:
        for error in await self._unmake_all([value]):
            if error is not None:
                raise error

    # -- making -------------------------------------------------------------------------------

    async def acquire_all(
        self, keys: Sequence[K], holder: str, make_all: Callable[[list[K]], Awaitable[Sequence[V | BaseException]]]
    ) -> list[V]:
        """Holds all of these, making those that nobody has.

        Args:
            make_all: makes several; returns for each its value, or why there is none (:class:`HalfMade` among that).

        Raises:
            Exception: why one of them was not made; ``holder`` holds none of them then.
        """
        await self._none_half_unmade(keys)
        new = [key for key in dict.fromkeys(keys) if key not in self._entries]
        for key in new:
            self._entries[key] = Entry()
            self._entries[key].making = asyncio.get_running_loop().create_future()
        making = self._start(self._make_many(new, make_all)) if new else None
        entries = [self._entries[key] for key in keys]
        for entry in entries:
            entry.waiting += 1
        try:
            if making is not None:
                await asyncio.shield(making)
            others = {entry.making for entry in entries if entry.making is not None and not entry.making.done()}
            if others:
                await asyncio.wait(others)
        except BaseException:
            self._give_up(keys, entries)
            raise
        errors = [error for entry in entries if (error := _failure(entry)) is not None]
        if errors:
            left = await self._unmade_many(self._give_up(keys, entries))
            if isinstance(errors[0], HoldfastError):
                errors[0].also(*left)
            raise errors[0]
        for entry in entries:
            entry.waiting -= 1
            entry.holders[holder] = entry.holders.get(holder, 0) + 1
        return [entry.value for entry in entries]

    async def _none_half_unmade(self, keys: Sequence[K]) -> None:
        """What is being unmade, or is half unmade, is unmade to its end first."""
        while True:
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and (entry.unmaking is not None or entry.broken):
                    await self._unmade(key, entry)
                    break  # others may have come meanwhile
            else:
                return

    async def _make_many(
        self, keys: list[K], make_all: Callable[[list[K]], Awaitable[Sequence[V | BaseException]]]
    ) -> None:
        """Never raises: what became of each is told to who waits for that one."""
        outcomes: Sequence[V | BaseException]
        try:
            outcomes = await make_all(keys)
        except BaseException as error:
            outcomes = [error] * len(keys)
        for key, outcome in zip(keys, outcomes, strict=True):
            entry = self._entries[key]
            assert entry.making is not None
            if isinstance(outcome, HalfMade):
                entry.value = outcome.value  # type: ignore[assignment]
                entry.made = entry.broken = True
                _settle(entry.making, outcome.error)
            elif isinstance(outcome, BaseException):
                del self._entries[key]
                _settle(entry.making, outcome)
            else:
                entry.value = outcome
                entry.made = True
                _settle(entry.making, None)
        self._start_unmaking_many(self._unwanted(keys))

    def _give_up(self, keys: Sequence[K], entries: list[Entry[V]]) -> list[K]:
        """Waits no more; what has been made and nobody else wants is unmade.  Returns what that is."""
        for entry in entries:
            entry.waiting -= 1
        unwanted = self._unwanted(keys)
        self._start_unmaking_many(unwanted)
        return unwanted

    def _unwanted(self, keys: Iterable[K]) -> list[K]:
        found = {key: self._entries[key] for key in keys if key in self._entries}
        return [key for key, e in found.items() if e.made and not (e.holders or e.waiting or e.broken)]

    # -- unmaking -----------------------------------------------------------------------------

    async def release_all(self, keys: Sequence[K], holder: str) -> list[Exception]:
        """Lets go of each once; the last one unmakes.  What is not held is no error.

        Returns:
            why some could not be unmade: these stay recorded and held, and this can be tried again.
        """
        last: dict[K, None] = {}
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or holder not in entry.holders:
                continue
            if entry.holders[holder] > 1 or len(entry.holders) > 1 or entry.waiting:
                drop(entry.holders, holder)
            else:
                last[key] = None
        return await self._unmade_many(last)

    async def _unmade_many(self, keys: Iterable[K]) -> list[Exception]:
        """Unmakes these, or waits for who does that already; returns what went wrong, each thing once."""
        keys = list(keys)
        self._start_unmaking_many([key for key in keys if self._entries[key].unmaking is None])
        waited = [future for key in keys if (future := self._entries[key].unmaking) is not None]
        if waited:
            await asyncio.wait(waited)
        errors = {id(error): error for future in waited if isinstance(error := future.exception(), Exception)}
        return list(errors.values())

    def _start_unmaking_many(self, keys: list[K]) -> None:
        if not keys:
            return
        for key in keys:
            entry = self._entries[key]
            entry.broken = True
            entry.unmaking = asyncio.get_running_loop().create_future()
        self._start(self._unmake_many(keys))

    async def _unmake_many(self, keys: list[K]) -> None:
        errors: Sequence[BaseException | None]
        try:
            errors = await self._unmake_all([self._entries[key].value for key in keys])
        except BaseException as failure:
            errors = [failure] * len(keys)
        for key, error in zip(keys, errors, strict=True):
            entry = self._entries[key]
            unmaking, entry.unmaking = entry.unmaking, None
            if error is None:
                del self._entries[key]
            assert unmaking is not None
            _settle(unmaking, error)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._work.add(task)  # a loop keeps no task alive by itself
        task.add_done_callback(self._work.discard)
        task.add_done_callback(retrieve)
        return task


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)
        future.exception()  # perhaps nobody is left to hear of it: no reason for asyncio to complain


def _failure(entry: Entry[V]) -> BaseException | None:
    """Why a thing has not been made; None if it has."""
    if entry.making is None:  # adopted
        return None
    return asyncio.CancelledError() if entry.making.cancelled() else entry.making.exception()
