"""Things that several holders share: made by the first, unmade by the last, counted in between.

The rules that make this safe live here once, for slots, mounts and shares alike:

* A second acquirer waits for the first and shares its outcome, error included.
* Counts change after effects: a failed making leaves no trace, and the same acquire works when tried again.
* One that gives up while waiting holds nothing; if nobody is left, what was made is unmade.
* A failed unmaking keeps the thing recorded, with its last holder; letting go again goes on from there,
  and nobody joins a thing that is half unmade.
* So it is with a making that failed and could not be undone (:class:`HalfMade`), though nobody holds that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")


class HalfMade(Exception):
    """Raised by a ``make`` that failed and whose undoing failed too.

    Args:
        error: why the making failed; that is what acquirers get.
        value: what unmaking needs to know to go on from there.
    """

    def __init__(self, error: BaseException, value: object) -> None:
        super().__init__(str(error))
        self.error = error
        self.value = value


class Entry(Generic[V]):
    """One shared thing: its value once made, and how often each holder holds it."""

    def __init__(self) -> None:
        self.holders: dict[str, int] = {}
        self.waiting = 0
        self.made = False
        self.value: V
        self.making: asyncio.Future[None] | None = None
        self.unmaking: asyncio.Future[None] | None = None
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
        if not entry.made:
            await self._made(key, entry, make)
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
            entry.making = asyncio.ensure_future(self._make_now(key, entry, make))
            entry.making.add_done_callback(retrieve)  # for when everybody has given up
        entry.waiting += 1
        try:
            await asyncio.shield(entry.making)
        except BaseException:
            entry.waiting -= 1
            self._unmake_if_unwanted(key, entry)
            raise
        entry.waiting -= 1

    async def _make_now(self, key: K, entry: Entry[V], make: Callable[[], Awaitable[V]]) -> None:
        """Makes the thing; the outcome is recorded before anybody else can run."""
        try:
            entry.value = await make()
        except HalfMade as half:
            entry.value = half.value  # type: ignore[assignment]
            entry.made = entry.broken = True
            raise half.error from None
        except BaseException:
            del self._entries[key]
            raise
        entry.made = True
        self._unmake_if_unwanted(key, entry)

    def _unmake_if_unwanted(self, key: K, entry: Entry[V]) -> None:
        """Unmakes what has been made when everybody who wanted it has given up meanwhile."""
        if entry.made and not (entry.holders or entry.waiting or entry.broken):
            self._start_unmaking(key, entry)

    async def release(self, key: K, holder: str) -> None:
        """Lets go once; the last one unmakes.  What is not held is no error.

        Raises:
            Exception: what unmaking raised; the thing stays recorded and held, and this can be tried again.
        """
        entry = self._entries.get(key)
        if entry is None or holder not in entry.holders:
            return
        # Who waits for what has been made this instant is about to hold it.
        if entry.holders[holder] > 1 or len(entry.holders) > 1 or entry.waiting:
            drop(entry.holders, holder)
            return
        await self._unmade(key, entry)

    async def _unmade(self, key: K, entry: Entry[V]) -> None:
        await asyncio.shield(entry.unmaking or self._start_unmaking(key, entry))

    def _start_unmaking(self, key: K, entry: Entry[V]) -> asyncio.Future[None]:
        entry.broken = True
        entry.unmaking = asyncio.ensure_future(self._unmake_now(key, entry))
        entry.unmaking.add_done_callback(retrieve)
        return entry.unmaking

    async def _unmake_now(self, key: K, entry: Entry[V]) -> None:
        try:
            await self._unmake(key, entry.value)
        except BaseException:
            entry.unmaking = None
            raise
        del self._entries[key]

    async def abandon(self, key: K, holder: str) -> None:
        """Lets go for somebody who will not try again: what could not be unmade is left for :meth:`retry`.

        Raises:
            Exception: what unmaking raised.
        """
        try:
            await self.release(key, holder)
        except BaseException:
            entry = self._entries.get(key)
            if entry is not None:
                entry.holders.pop(holder, None)
            raise

    async def retry(self) -> list[Exception]:
        """Unmakes what is left that nobody holds; returns why what is still left is left."""
        errors: list[Exception] = []
        for key, entry in list(self._entries.items()):
            if entry.broken and not entry.holders and self._entries.get(key) is entry:
                try:
                    await self._unmade(key, entry)
                except Exception as error:
                    errors.append(error)
        return errors

    @property
    def left(self) -> bool:
        """Whether anything is half unmade that nobody holds."""
        return any(entry.broken and not entry.holders for entry in self._entries.values())

    async def settle(self) -> None:
        """Waits until what everybody has given up while it was made has been unmade, or has failed to be."""
        for entry in list(self._entries.values()):
            if entry.making is not None and not entry.waiting:
                await asyncio.wait({entry.making})
            if entry.unmaking is not None and not entry.holders:
                await asyncio.wait({entry.unmaking})

    def adopt(self, key: K, value: V, holders: dict[str, int]) -> None:
        """Takes over a thing that is there already, with those who hold it, and how often."""
        entry = self._entries[key] = Entry()
        entry.value, entry.holders, entry.made = value, dict(holders), True

    def counts(self, key: K) -> dict[str, int]:
        """Who holds a thing, and how often."""
        return dict(self._entries[key].holders)

    @property
    def unsettled(self) -> bool:
        """Whether anything is being made or unmade, or is half unmade."""
        return any(not e.made or e.broken or e.waiting or e.unmaking is not None for e in self._entries.values())

    def value(self, key: K) -> V | None:
        """The made thing, or None."""
        entry = self._entries.get(key)
        return entry.value if entry is not None and entry.made else None

    def replace(self, key: K, value: V) -> None:
        """Puts another value in the place of what was made: it has changed."""
        self._entries[key].value = value

    def items(self) -> list[tuple[K, V, list[str]]]:
        """Everything made, with its holders."""
        return [(key, e.value, sorted(e.holders)) for key, e in self._entries.items() if e.made]

    def __len__(self) -> int:
        return len(self._entries)


def drop(holders: dict[str, int], holder: str) -> None:
    """One holding less."""
    holders[holder] -= 1
    if not holders[holder]:
        del holders[holder]


def retrieve(task: asyncio.Future[None]) -> None:
    """Somebody may be left to hear of a failure, or nobody: that is no reason for asyncio to complain."""
    if not task.cancelled():
        task.exception()
