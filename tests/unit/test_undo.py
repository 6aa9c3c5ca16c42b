"""Undoing: last first, past errors, each with a deadline of its own, and again when something was left."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.errors import HoldfastError, NotReleased, TimedOut
from holdfast.storage.undo import Undo, not_released


class Log:
    """Actions that note when they were done, and fail as often as told."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: dict[str, int] = {}

    def action(self, name: str, *, failures: int = 0):
        self.failures[name] = failures

        async def act() -> None:
            await asyncio.sleep(0)
            if self.failures[name]:
                self.failures[name] -= 1
                raise OSError(f"{name} failed")
            self.done.append(name)

        return act


def test_last_first():
    log, undo = Log(), Undo()
    undo.push("one", log.action("one"))
    undo.push("two", lambda: log.done.append("two"))
    undo.push("three", log.action("three"))
    assert not undo.empty
    assert asyncio.run(undo.unwind()) == []
    assert log.done == ["three", "two", "one"]
    assert undo.empty
    assert asyncio.run(undo.unwind()) == []


def test_goes_on_past_errors_and_keeps_what_failed_in_order():
    log, undo = Log(), Undo()
    for name, failures in (("a", 2), ("b", 0), ("c", 1), ("d", 0)):
        undo.push(name, log.action(name, failures=failures))
    assert [str(error) for error in asyncio.run(undo.unwind())] == ["c failed", "a failed"]
    assert log.done == ["d", "b"]
    undo.push("e", log.action("e"))
    assert [str(error) for error in asyncio.run(undo.unwind())] == ["a failed"]
    assert log.done == ["d", "b", "e", "c"]
    assert asyncio.run(undo.unwind()) == []
    assert log.done == ["d", "b", "e", "c", "a"]


def test_what_waits_is_not_undone_before_all_that_came_after_it():
    log, undo = Log(), Undo()
    undo.push("a", log.action("a"))
    undo.push("b", log.action("b"), waits=True)
    undo.push("c", log.action("c", failures=1))
    undo.push("d", log.action("d"))
    assert [str(error) for error in asyncio.run(undo.unwind())] == ["c failed"]
    assert log.done == ["d", "a"]
    assert asyncio.run(undo.unwind()) == []
    assert log.done == ["d", "a", "c", "b"]


def test_an_action_that_is_no_coroutine_may_fail_too():
    undo = Undo()
    undo.push("boom", lambda: 1 / 0)
    [error] = asyncio.run(undo.unwind())
    assert isinstance(error, ZeroDivisionError)
    assert not undo.empty


def test_each_has_a_deadline_of_its_own():
    log, undo = Log(), Undo()
    undo.push("first", log.action("first"))
    undo.push("hangs", lambda: asyncio.Event().wait(), seconds=0.02)
    undo.push("hangs too", lambda: asyncio.Event().wait(), seconds=0.01)
    errors = asyncio.run(undo.unwind())
    assert [str(error) for error in errors] == ["hangs too: not done within 0.01 s", "hangs: not done within 0.02 s"]
    assert all(isinstance(error, TimedOut) for error in errors)
    assert log.done == ["first"]
    assert not undo.empty


def test_the_deadline_is_not_what_is_left_of_the_callers():
    async def test() -> None:
        log, undo = Log(), Undo()
        undo.push("one", log.action("one"))
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            assert await undo.unwind() == []
        assert log.done == ["one"]

    asyncio.run(test())


def test_what_a_cancellation_interrupts_stays_remembered():
    async def test() -> None:
        log, undo = Log(), Undo()
        go_on = asyncio.Event()

        async def slow() -> None:
            await go_on.wait()
            log.done.append("slow")

        undo.push("first", log.action("first"))
        undo.push("slow", slow)
        undo.push("fails", log.action("fails", failures=1))
        task = asyncio.ensure_future(undo.unwind())
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await undo.unwind() == []
        assert sorted(log.done) == ["fails", "first", "slow"]

    asyncio.run(test())


def test_a_group_is_undone_side_by_side():
    async def test() -> None:
        log, undo = Log(), Undo()
        together = asyncio.Barrier(2)

        async def one_of(name: str) -> None:
            await together.wait()
            log.done.append(name)

        undo.push("first", log.action("first"))
        undo.push("a", lambda: one_of("a"), "group")
        undo.push("b", lambda: one_of("b"), "group")
        undo.push("last", log.action("last"))
        assert await undo.unwind() == []
        assert (log.done[0], set(log.done[1:3]), log.done[3]) == ("last", {"a", "b"}, "first")

    asyncio.run(test())


def test_a_group_keeps_what_failed():
    log, undo = Log(), Undo()
    for name in "abc":
        undo.push(name, log.action(name, failures=name == "b"), "group")
    assert [str(error) for error in asyncio.run(undo.unwind())] == ["b failed"]
    assert asyncio.run(undo.unwind()) == []
    assert sorted(log.done) == ["a", "b", "c"]


def test_forget():
    log, undo = Log(), Undo()
    undo.push("one", log.action("one"))
    undo.forget()
    assert undo.empty
    assert asyncio.run(undo.unwind()) == []
    assert log.done == []


def test_not_released_reports_everything():
    error = not_released("release storage", "c1", [OSError("one"), HoldfastError("unmount", subject="/x", why="busy")])
    assert isinstance(error, NotReleased)
    assert error.retryable
    text = "release storage c1: 2 part(s) could not be released (it stays recorded: try again)"
    assert str(error) == f"{text}; also: one; also: unmount /x: busy"
    assert [cause["what"] for cause in error.as_dict()["causes"]] == ["system call failed", "unmount"]
