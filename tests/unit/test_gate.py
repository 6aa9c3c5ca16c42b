"""The gate of a pod: many who change it, or one who needs it still; never both."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.pod.gate import Gate


class Yard:
    """Who is inside, as those who are inside see it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.changing = 0
        self.still = 0
        self.done: list[str] = []

    async def visit(self, kind: str, turns: int, fails: bool = False) -> None:
        enter = self.gate.changing if kind == "changing" else self.gate.still
        async with enter():
            setattr(self, kind, getattr(self, kind) + 1)
            try:
                for _ in range(turns + 1):
                    assert self.still <= 1
                    assert not (self.still and self.changing)
                    await asyncio.sleep(0)
                if fails:
                    raise ValueError(kind)
            finally:
                setattr(self, kind, getattr(self, kind) - 1)
        self.done.append(kind)


VISITS = st.lists(
    st.tuples(st.sampled_from(["changing", "still"]), st.integers(0, 6), st.booleans(), st.none() | st.integers(0, 12)),
    max_size=12,
)  # fmt: skip


@given(VISITS, st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_never_both(visits, pauses):
    """Whoever comes when, fails inside, or is cancelled while waiting or inside; and in the end it is open."""

    async def main() -> None:
        yard = Yard()
        tasks = []

        async def cancel_later(task: asyncio.Task[None], turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()

        for (kind, turns, fails, cancelled), pause in zip(visits, pauses, strict=False):
            task = asyncio.ensure_future(yard.visit(kind, turns, fails))
            tasks.append(task)
            if cancelled is not None:
                tasks.append(asyncio.ensure_future(cancel_later(task, cancelled)))
            for _ in range(pause):
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, (ValueError, asyncio.CancelledError)), result
            assert (yard.changing, yard.still) == (0, 0)
            await yard.visit("still", 1)
            await yard.visit("changing", 1)

    asyncio.run(main())


def test_who_needs_it_still_is_not_kept_waiting_by_those_who_come_later():
    async def main() -> None:
        yard = Yard()
        first = asyncio.ensure_future(yard.visit("changing", 5))
        await asyncio.sleep(0)
        still = asyncio.ensure_future(yard.visit("still", 5))
        await asyncio.sleep(0)
        late = [asyncio.ensure_future(yard.visit("changing", 1)) for _ in range(3)]
        async with asyncio.timeout(10):
            await asyncio.gather(first, still, *late)
        assert yard.done == ["changing", "still", "changing", "changing", "changing"]

    asyncio.run(main())


def test_one_who_gives_up_waiting_leaves_it_open():
    async def main() -> None:
        yard = Yard()
        inside = asyncio.ensure_future(yard.visit("changing", 50))
        await asyncio.sleep(0)
        still = asyncio.ensure_future(yard.visit("still", 0))
        for _ in range(3):
            await asyncio.sleep(0)
        still.cancel()
        with pytest.raises(asyncio.CancelledError):
            await still
        async with asyncio.timeout(10):
            await yard.visit("changing", 0)
        assert not inside.done()
        await inside

    asyncio.run(main())
