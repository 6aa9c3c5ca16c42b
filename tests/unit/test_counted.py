"""Counted things: made once, unmade once, and never believed to be there when they are not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.storage.counted import Counted, HalfMade

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Gate:
    """Something that is under way until the test says how it ends."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.outcome: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    async def pass_through(self) -> None:
        error = await self.outcome
        if error is not None:
            raise error

    def end(self, error: Exception | None = None) -> None:
        self.outcome.set_result(error)


class World:
    """The things themselves; makes and unmakes end when told to, or at once when ``gated`` is off."""

    def __init__(self, *, gated: bool = False) -> None:
        self.gated = gated
        self.there: dict[str, int] = {}
        self.made = 0
        self.making: list[Gate] = []
        self.unmaking: list[Gate] = []
        self.unmake_errors: list[Exception] = []
        self.counted: Counted[str, int] = Counted(self.unmake)

    async def _make(self, key: str) -> int:
        assert key not in self.there, "made twice"
        assert not [gate for gate in self.unmaking if gate.key == key], "made while it was unmade"
        if self.gated:
            gate = Gate(key)
            self.making.append(gate)
            try:
                await gate.pass_through()
            finally:
                self.making.remove(gate)
        self.made += 1
        self.there[key] = self.made
        return self.made

    async def unmake(self, key: str, value: int) -> None:
        assert not [gate for gate in self.unmaking if gate.key == key], "unmade twice at a time"
        if self.gated:
            gate = Gate(key)
            self.unmaking.append(gate)
            try:
                await gate.pass_through()
            finally:
                self.unmaking.remove(gate)
        if self.unmake_errors:
            raise self.unmake_errors.pop(0)
        assert self.there.get(key, value) == value
        self.there.pop(key, None)  # already gone is success

    def acquire(self, key: str = "k", holder: str = "a") -> asyncio.Task[int]:
        return asyncio.ensure_future(self.counted.acquire(key, holder, lambda: self._make(key)))

    def release(self, key: str = "k", holder: str = "a") -> asyncio.Task[None]:
        return asyncio.ensure_future(self.counted.release(key, holder))

    def holders(self, key: str = "k") -> list[str]:
        return next((holders for k, _, holders in self.counted.items() if k == key), [])

    def expect_nothing(self) -> None:
        assert len(self.counted) == 0
        assert self.there == {}


async def settle() -> None:
    """Lets everything run that can run without anything ending."""
    for _ in range(12):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        async with asyncio.timeout(20):
            await test()
        await settle()
        assert complaints == []

    asyncio.run(main())


def test_made_by_the_first_unmade_by_the_last():
    async def test() -> None:
        world = World()
        assert await world.acquire(holder="a") == 1
        assert await world.acquire(holder="b") == 1
        assert await world.acquire(holder="a") == 1
        assert world.counted.value("k") == 1
        assert world.counted.items() == [("k", 1, ["a", "b"])]
        await world.release(holder="a")
        await world.release(holder="b")
        await world.release(holder="b")
        assert world.there == {"k": 1}
        await world.release(holder="a")
        world.expect_nothing()
        assert world.counted.value("k") is None
        assert await world.acquire() == 2

    run(test)


def test_keys_are_independent():
    async def test() -> None:
        world = World(gated=True)
        one, other = world.acquire("k"), world.acquire("l")
        await settle()
        world.making[1].end()
        await other
        assert not one.done()
        world.making[0].end()
        assert {await one, await other} == {1, 2}

    run(test)


def test_what_is_not_held_can_be_released():
    async def test() -> None:
        world = World()
        await world.release()
        await world.acquire(holder="a")
        await world.release(holder="b")
        assert world.holders() == ["a"]

    run(test)


def test_the_second_waits_for_the_first():
    async def test() -> None:
        world = World(gated=True)
        first, second = world.acquire(holder="a"), world.acquire(holder="b")
        await settle()
        assert len(world.making) == 1
        assert not second.done()
        assert world.counted.items() == []
        assert world.counted.value("k") is None
        world.making[0].end()
        assert await first == await second == 1
        assert world.holders() == ["a", "b"]

    run(test)


def test_a_failed_making_is_shared_and_leaves_no_trace():
    async def test() -> None:
        world = World(gated=True)
        tasks = [world.acquire(holder=name) for name in "abc"]
        await settle()
        world.making[0].end(OSError("no room"))
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["no room"] * 3
        world.expect_nothing()
        again = world.acquire()
        await settle()
        world.making[0].end()
        assert await again == 1
        assert world.holders() == ["a"]

    run(test)


@pytest.mark.parametrize("who", ["a", "b", "c", "ab", "bc", "ac"])
def test_who_gives_up_while_waiting_holds_nothing(who):
    async def test() -> None:
        world = World(gated=True)
        tasks = {name: world.acquire(holder=name) for name in "abc"}
        await settle()
        for name in who:
            tasks[name].cancel()
        await settle()
        world.making[0].end()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        stays = [name for name in "abc" if name not in who]
        assert world.holders() == stays
        world.gated = False
        for name in stays:
            await world.release(holder=name)
        world.expect_nothing()

    run(test)


def test_when_all_have_given_up_it_is_unmade():
    async def test() -> None:
        world = World(gated=True)
        tasks = [world.acquire(holder=name) for name in "ab"]
        await settle()
        for task in tasks:
            task.cancel()
        await settle()
        assert len(world.making) == 1  # it is not torn apart in the middle
        world.making[0].end()
        await settle()
        [gate] = world.unmaking
        gate.end()
        await world.counted.settle()
        world.expect_nothing()

    run(test)


def test_when_all_have_given_up_a_failure_is_nobodys():
    async def test() -> None:
        world = World(gated=True)
        task = world.acquire()
        await settle()
        task.cancel()
        await settle()
        world.making[0].end(OSError("no room"))
        await world.counted.settle()
        world.expect_nothing()

    run(test)


@pytest.mark.parametrize("steps", range(8))
def test_given_up_at_any_instant_after_the_making(steps):
    """Between the end of the making and the waiter's next step there are instants, too."""

    async def test() -> None:
        world = World(gated=True)
        task = world.acquire()
        await settle()
        world.making[0].end()
        world.gated = False
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await settle()
        if task.cancelled():
            world.expect_nothing()
        else:
            assert world.holders() == ["a"]

    run(test)


@pytest.mark.parametrize("steps", range(8))
def test_acquired_at_any_instant_around_the_end_of_the_making(steps):
    async def test() -> None:
        world = World(gated=True)
        first = world.acquire(holder="a")
        await settle()
        world.making[0].end()
        world.gated = False
        for _ in range(steps):
            await asyncio.sleep(0)

        async def briefly() -> int:
            value = await world.counted.acquire("k", "b", lambda: world._make("k"))
            await world.counted.release("k", "b")
            return value

        assert await briefly() == 1
        assert await first == 1
        assert world.there == {"k": 1}  # the first one holds it: what it got must be there
        assert world.holders() == ["a"]

    run(test)


def test_several_acquire_and_release_at_once():
    async def test() -> None:
        world = World(gated=True)

        async def briefly(name: str) -> None:
            value = await world.counted.acquire("k", name, lambda: world._make("k"))
            assert world.there == {"k": value}
            await world.counted.release("k", name)

        tasks = [asyncio.ensure_future(briefly(name)) for name in "abcd"]
        await settle()
        world.gated = False
        world.making[0].end()
        await asyncio.gather(*tasks)
        await settle()
        world.expect_nothing()
        assert world.made == 1

    run(test)


def test_a_failed_unmaking_keeps_the_thing_with_its_last_holder():
    async def test() -> None:
        world = World()
        await world.acquire()
        for _ in range(3):  # never believed to be done, however often it is tried
            world.unmake_errors.append(OSError("busy"))
            with pytest.raises(OSError, match="busy"):
                await world.release()
            assert world.counted.items() == [("k", 1, ["a"])]
            assert world.there == {"k": 1}
        await world.release()
        world.expect_nothing()
        await world.release()

    run(test)


def test_nobody_joins_what_is_half_unmade():
    async def test() -> None:
        world = World()
        await world.acquire(holder="a")
        world.unmake_errors += [OSError("busy"), OSError("still busy")]
        with pytest.raises(OSError, match="busy"):
            await world.release(holder="a")
        with pytest.raises(OSError, match="still busy"):
            await world.acquire(holder="b")
        assert world.holders() == ["a"]
        assert await world.acquire(holder="b") == 2
        assert world.holders() == ["b"]
        await world.release(holder="a")  # what it held has been unmade for it
        assert world.holders() == ["b"]
        await world.release(holder="b")
        world.expect_nothing()

    run(test)


def test_who_comes_during_the_unmaking_waits_and_makes_anew():
    async def test() -> None:
        world = World()
        await world.acquire(holder="a")
        world.gated = True
        releasing = world.release(holder="a")
        await settle()
        tasks = [world.acquire(holder=name) for name in "bc"]
        again = world.release(holder="a")
        await settle()
        assert world.making == []
        world.unmaking[0].end()
        await settle()
        world.making[0].end()
        assert [await task for task in tasks] == [2, 2]
        await asyncio.gather(releasing, again)
        assert world.holders() == ["b", "c"]

    run(test)


def test_a_release_that_is_given_up_goes_on():
    async def test() -> None:
        world = World()
        await world.acquire()
        world.gated = True
        task = world.release()
        await settle()
        task.cancel()
        await asyncio.wait({task})
        world.unmaking[0].end()
        await settle()
        world.expect_nothing()

    run(test)


def test_abandoned_things_are_unmade_when_tried_again():
    async def test() -> None:
        world = World()
        await world.acquire()
        world.unmake_errors += [OSError("busy"), OSError("still busy")]
        with pytest.raises(OSError, match="busy"):
            await world.counted.abandon("k", "a")
        assert world.counted.items() == [("k", 1, [])]
        assert [str(error) for error in await world.counted.retry()] == ["still busy"]
        assert await world.counted.retry() == []
        world.expect_nothing()

    run(test)


def test_retry_leaves_alone_what_somebody_holds():
    async def test() -> None:
        world = World()
        await world.acquire("k")
        world.unmake_errors.append(OSError("busy"))
        with pytest.raises(OSError, match="busy"):
            await world.release("k")
        await world.acquire("l")
        assert await world.counted.retry() == []
        assert world.holders("k") == world.holders("l") == ["a"]

    run(test)


def test_half_made():
    """A making that failed and could not be undone is nobody's, and is unmade before it is made again."""

    async def test() -> None:
        world = World()

        async def half() -> int:
            world.there["k"] = 9
            raise HalfMade(OSError("no room"), 9)

        with pytest.raises(OSError, match="no room"):
            await world.counted.acquire("k", "a", half)
        assert world.counted.items() == [("k", 9, [])]
        world.unmake_errors.append(OSError("busy"))
        with pytest.raises(OSError, match="busy"):
            await world.acquire()
        assert await world.acquire() == 1
        assert world.there == {"k": 1}

    run(test)


class CountedMachine(RuleBasedStateMachine):
    """Any order of acquiring, giving up, ending, failing and releasing, against what must be true of it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, context: self.complaints.append(context))
        self.world = World(gated=True)
        self.tasks: list[tuple[str, str, str, asyncio.Task[Any]]] = []
        self.held: dict[tuple[str, str], int] = {}

    keys = st.sampled_from("kl")
    names = st.sampled_from("abc")

    def _step(self, times: int) -> None:
        async def steps() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.loop.run_until_complete(steps())
        for entry in list(self.tasks):
            what, key, holder, task = entry
            if task.done():
                self.tasks.remove(entry)
                failed = task.cancelled() or task.exception() is not None
                if what == "acquire" and not failed:
                    self.held[key, holder] = self.held.get((key, holder), 0) + 1

    def _in_loop(self, action: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return action()

        return self.loop.run_until_complete(call())

    @rule(key=keys, holder=names, steps=st.integers(0, 4))
    def acquire(self, key: str, holder: str, steps: int) -> None:
        task = self._in_loop(lambda: self.world.acquire(key, holder))
        self.tasks.append(("acquire", key, holder, task))
        self._step(steps)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), steps=st.integers(0, 4))
    def release(self, data: st.DataObject, steps: int) -> None:
        """Only what a holder has is released, and not while an earlier release of it is under way."""
        busy = {(key, holder) for what, key, holder, _ in self.tasks if what == "release"}
        able = sorted(pair for pair, count in self.held.items() if count and pair not in busy)
        if able:
            key, holder = data.draw(st.sampled_from(able))
            self.held[key, holder] -= 1
            task = self._in_loop(lambda: self.world.release(key, holder))
            self.tasks.append(("release", key, holder, task))
            self._step(steps)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), steps=st.integers(0, 4))
    def cancel(self, data: st.DataObject, steps: int) -> None:
        data.draw(st.sampled_from(self.tasks))[3].cancel()
        self._step(steps)

    @precondition(lambda self: self.world.making)
    @rule(data=st.data(), fails=st.booleans(), steps=st.integers(0, 4))
    def end_making(self, data: st.DataObject, fails: bool, steps: int) -> None:
        gate = data.draw(st.sampled_from(self.world.making))
        if not gate.outcome.done():
            gate.end(OSError("made to fail") if fails else None)
        self._step(steps)

    @precondition(lambda self: self.world.unmaking)
    @rule(data=st.data(), steps=st.integers(0, 4))
    def end_unmaking(self, data: st.DataObject, steps: int) -> None:
        gate = data.draw(st.sampled_from(self.world.unmaking))
        if not gate.outcome.done():
            gate.end()
        self._step(steps)

    @invariant()
    def what_is_held_is_there(self) -> None:
        for (key, holder), count in self.held.items():
            if count:
                assert key in self.world.there
                assert holder in self.world.holders(key)

    @invariant()
    def nobody_holds_who_did_not_get_it(self) -> None:
        under_way = {(key, holder) for _, key, holder, _ in self.tasks}
        for key, _, holders in self.world.counted.items():
            for holder in holders:
                assert self.held.get((key, holder)) or (key, holder) in under_way or self.world.unmaking

    def teardown(self) -> None:
        """When everything has ended and all is released, nothing is left."""
        self.world.gated = False
        for _ in range(20):
            for gate in [*self.world.making, *self.world.unmaking]:
                if not gate.outcome.done():
                    gate.end()
            self._step(5)
        assert self.tasks == []
        for (key, holder), count in self.held.items():
            for _ in range(count):
                self.loop.run_until_complete(self.world.counted.release(key, holder))
        self.loop.run_until_complete(self.world.counted.settle())
        self.world.expect_nothing()
        assert self.complaints == []
        self.loop.close()


TestCountedMachine = CountedMachine.TestCase
TestCountedMachine.settings = hypothesis_settings(max_examples=150, stateful_step_count=30)
