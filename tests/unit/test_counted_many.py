"""Counted things made and unmade many at once: the same rules for each alone."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.errors import HoldfastError
from holdfast.storage.counted import HalfMade
from holdfast.storage.counted_many import CountedMany


class World:
    """The things themselves: a making or an unmaking ends when the test says so, and as it says."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.made: list[list[str]] = []
        self.unmade: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: dict[str, Exception] = {}
        self.keep: dict[str, Exception] = {}
        self.counted: CountedMany[str, str] = CountedMany(self.unmake)

    async def make(self, keys: list[str]) -> list[str | BaseException]:
        self.made.append(keys)
        await self.gate.wait()
        assert not self.there & set(keys), "made twice"
        self.there |= set(keys) - set(self.refuse)
        return [self.refuse.pop(key, key.upper()) for key in keys]

    async def unmake(self, values: list[str]) -> list[Exception | None]:
        self.unmade.append(values)
        await self.gate.wait()
        errors = [self.keep.pop(value.lower(), None) for value in values]
        self.there -= {value.lower() for value, error in zip(values, errors, strict=True) if error is None}
        return errors

    def acquire(self, keys: str, holder: str = "a") -> asyncio.Task[list[str]]:
        return asyncio.ensure_future(self.counted.acquire_all(list(keys), holder, self.make))

    async def release(self, keys: str, holder: str = "a") -> list[Exception]:
        return await self.counted.release_all(list(keys), holder)

    def holders(self) -> dict[str, list[str]]:
        return {key: holders for key, _, holders in self.counted.items()}


async def rounds(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def run():
    def run(test) -> None:
        async def main() -> None:
            world = World()
            await test(world)
            assert world.there == set()
            assert len(world.counted) == 0

        asyncio.run(main())

    return run


def test_all_by_one_act(run):
    async def test(world: World) -> None:
        assert await world.acquire("abc") == ["A", "B", "C"]
        assert await world.acquire("cbd", "b") == ["C", "B", "D"]
        assert world.made == [["a", "b", "c"], ["d"]]
        assert await world.release("abc") == []
        assert world.unmade == [["A"]]
        assert world.holders() == {"b": ["b"], "c": ["b"], "d": ["b"]}
        assert await world.release("bcd", "b") == []
        assert await world.release("bcd", "b") == []
        assert world.unmade == [["A"], ["B", "C", "D"]]

    run(test)


def test_the_same_thing_twice_is_held_twice(run):
    async def test(world: World) -> None:
        assert await world.acquire("aba") == ["A", "B", "A"]
        assert world.made == [["a", "b"]]
        await world.release("ab")
        assert world.holders() == {"a": ["a"]}
        await world.release("a")

    run(test)


def test_one_that_fails_takes_the_others_back(run):
    async def test(world: World) -> None:
        world.refuse["b"] = HoldfastError("make", subject="b")
        with pytest.raises(HoldfastError, match="make b") as failure:
            await world.acquire("abc")
        assert failure.value.causes == ()
        assert world.unmade == [["A", "C"]]
        assert await world.acquire("abc") == ["A", "B", "C"]
        await world.release("abc")

    run(test)


def test_what_cannot_be_taken_back_is_said_and_tried_again(run):
    async def test(world: World) -> None:
        world.refuse["b"] = HoldfastError("make", subject="b")
        world.keep["c"] = HoldfastError("unmake", subject="c")
        with pytest.raises(HoldfastError, match="make b") as failure:
            await world.acquire("abc")
        assert [str(cause) for cause in failure.value.causes] == ["unmake c"]
        assert world.there == {"c"}
        assert await world.counted.retry() == []

    run(test)


def test_who_wants_only_what_succeeded_has_it(run):
    """Another's failure is none of the second holder's, and does not take away what that waits for."""

    async def test(world: World) -> None:
        world.gate.clear()
        world.refuse["b"] = HoldfastError("make", subject="b")
        first, second, third = world.acquire("ab"), world.acquire("a", "b"), world.acquire("b", "c")
        await rounds()
        world.gate.set()
        assert await second == ["A"]
        for failed in (first, third):
            with pytest.raises(HoldfastError, match="make b"):
                await failed
        assert world.unmade == []
        await world.release("a", "b")

    run(test)


def test_half_made(run):
    async def test(world: World) -> None:
        world.refuse["b"] = HalfMade(HoldfastError("make", subject="b"), "B")
        with pytest.raises(HoldfastError, match="make b"):
            await world.acquire("b")
        world.there.add("b")
        assert world.counted.left
        assert await world.acquire("bc") == ["B", "C"]  # first unmade to its end
        assert world.unmade == [["B"]]
        await world.release("bc")

    run(test)


@pytest.mark.parametrize("others", [False, True])
def test_who_gives_up_holds_nothing(run, others):
    async def test(world: World) -> None:
        world.gate.clear()
        first = world.acquire("ab")
        second = world.acquire("b", "b") if others else None
        await rounds()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        world.gate.set()
        await world.counted.settle()
        if second is not None:
            assert await second == ["B"]
            await world.release("b", "b")
        assert world.made == [["a", "b"]]
        assert world.unmade == ([["A"], ["B"]] if others else [["A", "B"]])

    run(test)


def test_a_failed_unmaking_keeps_only_what_failed(run):
    async def test(world: World) -> None:
        await world.acquire("abc")
        world.keep["b"] = HoldfastError("unmake", subject="b")
        assert [str(error) for error in await world.release("abc")] == ["unmake b"]
        assert world.holders() == {"b": ["a"]}
        assert await world.release("abc") == []
        assert world.unmade == [["A", "B", "C"], ["B"]]

    run(test)


def test_nobody_joins_what_is_being_unmade(run):
    async def test(world: World) -> None:
        await world.acquire("ab")
        world.gate.clear()
        release = asyncio.ensure_future(world.release("ab"))
        await rounds()
        again = world.acquire("bc", "b")
        await rounds()
        assert world.made == [["a", "b"]]
        world.gate.set()
        assert await release == []
        assert await again == ["B", "C"]
        assert world.made == [["a", "b"], ["b", "c"]]
        await world.release("bc", "b")

    run(test)


def test_a_making_that_fails_as_a_whole(run):
    async def test(world: World) -> None:
        async def make(_keys: list[str]) -> list[str | BaseException]:
            raise HoldfastError("make all")

        with pytest.raises(HoldfastError, match="make all"):
            await world.counted.acquire_all(["a", "b"], "a", make)
        assert await world.acquire("ab") == ["A", "B"]
        await world.release("ab")

    run(test)
