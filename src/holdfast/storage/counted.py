"""Things that several holders share: made by the first, unmade by the last, counted in between.

The rules that make this safe live here once, for slots, mounts and shares alike:

* A second acquirer waits for the first and shares its outcome, error included.
* Counts change after effects: a failed making leaves no trace, and the same acquire works when tried again.
* One that gives up while waiting holds nothing; if nobody is left, what was made is unmade.
* A failed unmaking keeps the thing recorded, with its last holder; letting go again goes on from there,
  and nobody joins a thing that is half unmade.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")


class Entry(Generic[V]):
    """One shared thing: its value once made, and how often each holder holds it."""

    def __init__(self) -> None:
        self.holders: dict[str, int] = {}
        self.waiting = 0
        self.value: V | None = None
        self.making: asyncio.Task[V] | None = None
        self.unmaking: asyncio.Task[None] | None = None
        self.broken = False


class Counted(Generic[K, V]):
    """Shared things of one kind.

    Args:
        unmake: undoes what a ``make`` given to :meth:`acquire` has made; already gone must be success.
    """

    def __init__(self, unmake: Callable[[K, V], Awaitable[None]]) -> None:
        self._unmake = unmake
        self._entries: dict[K, Entry[V]] = {}

    async def acquire(self, key: K, holder: str, make: Callable[[], Awaitable[V]]) -> V:
        """Holds the thing, making it if nobody has.

        Raises:
            Exception: what ``make`` raised, to everybody who waited for it.
        """
        entry = await self._usable(key)
        if entry.value is None:
            await self._made(key, entry, make)
        assert entry.value is not None
        entry.holders[holder] = entry.holders.get(holder, 0) + 1
        return entry.value

    async def _usable(self, key: K) -> Entry[V]:
        """The entry, once nothing is being unmade; a half unmade one is unmade to its end first."""
        while (entry := self._entries.get(key)) is not None:
            if entry.unmaking is None and not entry.broken:
                return entry
            await self._unmade(key, entry)
        entry = self._entries[key] = Entry()
        return entry

    async def _made(self, key: K, entry: Entry[V], make: Callable[[], Awaitable[V]]) -> None:
        if entry.making is None:
            entry.making = asyncio.ensure_future(_as_coroutine(make))
            entry.making.add_done_callback(lambda task: self._after_making(key, entry, task))
        entry.waiting += 1
        try:
            await asyncio.shield(entry.making)
        finally:
            entry.waiting -= 1

    def _after_making(self, key: K, entry: Entry[V], task: asyncio.Task[V]) -> None:
        entry.making = None
        if task.cancelled() or task.exception() is not None:
            if self._entries.get(key) is entry:
                del self._entries[key]
            return
        entry.value = task.result()
        if not entry.waiting:  # everybody who wanted it has given up meanwhile
            entry.broken = True
            entry.unmaking = asyncio.ensure_future(self._unmake_now(key, entry))

    async def release(self, key: K, holder: str) -> None:
        """Lets go once; the last one unmakes.  What is not held is no error.

        Raises:
            Exception: what unmaking raised; the thing stays recorded and held, and this can be tried again.
        """
        entry = self._entries.get(key)
        if entry is None or holder not in entry.holders:
            return
        if entry.holders[holder] > 1 or len(entry.holders) > 1:
            _drop(entry.holders, holder)
            return
        await self._unmade(key, entry)

    async def _unmade(self, key: K, entry: Entry[V]) -> None:
        if entry.unmaking is None:
            entry.unmaking = asyncio.ensure_future(self._unmake_now(key, entry))
        await asyncio.shield(entry.unmaking)

    async def _unmake_now(self, key: K, entry: Entry[V]) -> None:
        entry.broken = True
        try:
            assert entry.value is not None
            await self._unmake(key, entry.value)
        except BaseException:
            entry.unmaking = None
            raise
        if self._entries.get(key) is entry:
            del self._entries[key]

    def value(self, key: K) -> V | None:
        """The made thing, or None."""
        entry = self._entries.get(key)
        return entry.value if entry else None

    def items(self) -> list[tuple[K, V, list[str]]]:
        """Everything made, with its holders."""
        return [(key, e.value, sorted(e.holders)) for key, e in self._entries.items() if e.value is not None]

    def __len__(self) -> int:
        return len(self._entries)


def _drop(holders: dict[str, int], holder: str) -> None:
    holders[holder] -= 1
    if not holders[holder]:
        del holders[holder]


async def _as_coroutine(make: Callable[[], Awaitable[V]]) -> V:
    return await make()
