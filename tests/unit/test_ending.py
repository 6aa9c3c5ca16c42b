"""How a pod ends: what its guest has not written back is waited for as long as it writes, and is never passed over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from holdfast.errors import NotReleased
from holdfast.pod import ending as module

if TYPE_CHECKING:
    import pytest


class Machine:
    """Has written one more block each time that it is asked, up to a number."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.pid = 0
        self.written = 0
        self.changed = asyncio.Condition()

    async def traffic(self) -> dict[str, tuple[int, int]]:
        async with self.changed:
            self.written = min(self.written + 1, self.blocks)
            self.changed.notify_all()
        return {"0:0": (0, self.written)}

    async def has_written(self, blocks: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.written >= blocks)


class Engine:
    """One holder, whose release ends when the machine has written so much, or fails."""

    def __init__(self, machine: Machine, until: int, errors: list[Exception]) -> None:
        self.machine, self.until, self.errors = machine, until, errors
        self.tries = 0

    def held(self) -> list[str]:
        return ["a"]

    async def release(self, _holder: str) -> None:
        self.tries += 1
        await self.machine.has_written(self.until)
        if self.errors:
            raise self.errors.pop()


def end(monkeypatch: pytest.MonkeyPatch, machine: Machine, engine: Engine) -> list[Exception]:
    """What the release at a pod's end reports."""
    monkeypatch.setattr(module, "_CLEAN_SECONDS", 0.01)
    return asyncio.run(module.release_cleanly(cast("Any", engine), cast("Any", machine), "pod"))


def test_a_guest_that_goes_on_writing_is_waited_for(monkeypatch):
    machine = Machine(blocks=10)
    assert end(monkeypatch, machine, Engine(machine, 8, [])) == []


def test_a_guest_that_has_stopped_writing_is_not(monkeypatch):
    machine = Machine(blocks=3)
    [error] = end(monkeypatch, machine, Engine(machine, 100, []))
    assert isinstance(error, NotReleased)
    assert error.code == "unclean-end"
    assert "has written nothing" in str(error)


def test_what_a_container_kept_busy_is_tried_once_more(monkeypatch):
    machine = Machine(blocks=1)
    engine = Engine(machine, 0, [NotReleased("unmount", why="busy")])
    assert end(monkeypatch, machine, engine) == []
    assert engine.tries == 2


def test_what_could_not_be_written_is_said(monkeypatch):
    """Also when the machine's end has let go of it since."""
    machine = Machine(blocks=1)
    errors: list[Exception] = [NotReleased("unmount", why="twice"), NotReleased("unmount", why="once")]
    assert [str(error) for error in end(monkeypatch, machine, Engine(machine, 0, errors))] == ["unmount: twice"]
