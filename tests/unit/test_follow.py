"""Following names in directories, and inotify itself; neither needs root."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from holdfast.linux import inotify
from holdfast.linux.inotify import Event, Inotify
from holdfast.storage.follow import Follower

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


class Followed:
    """A follower with a directory; counts what it is told, and what is closed."""

    def __init__(self, folder: Path) -> None:
        self.follower = Follower()
        self.folder = folder
        self.told: dict[int, int] = {}
        self.closed: list[int] = []
        self._told = asyncio.Event()

    def follow(self, number: int, name: str) -> None:
        def changed() -> None:
            self.told[number] = self.told.get(number, 0) + 1
            self._told.set()

        fd = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:
            self.follower.follow(number, fd, name, changed, lambda: self.closed.append(number))
        finally:
            os.close(fd)

    async def until_told(self, number: int, times: int) -> None:
        async with asyncio.timeout(10):
            while self.told.get(number, 0) < times:
                self._told.clear()
                await self._told.wait()


@pytest.fixture
def run(tmp_path: Path):
    def run(test: Callable[[Followed], Awaitable[None]]) -> None:
        async def main() -> None:
            followed = Followed(tmp_path)
            await test(followed)
            for number in range(10):
                followed.follower.forget(number)

        asyncio.run(main())

    return run


def test_it_tells_once_at_the_start_and_for_each_change_of_the_name(run, tmp_path):
    async def test(followed: Followed) -> None:
        followed.follow(0, "name")
        assert followed.told == {0: 1}
        changes = [
            (tmp_path / "name").touch, lambda: os.rename(tmp_path / "name", tmp_path / "other"),
            lambda: os.rename(tmp_path / "other", tmp_path / "name"), (tmp_path / "name").unlink,
            lambda: os.symlink("x", tmp_path / "name"),
        ]  # fmt: skip
        for times, change in enumerate(changes, 2):
            (tmp_path / "beside").touch()
            change()
            await followed.until_told(0, times)
        assert followed.told == {0: len(changes) + 1}  # nothing was said of what is beside it

    run(test)


def test_two_names_of_one_directory(run, tmp_path):
    async def test(followed: Followed) -> None:
        followed.follow(0, "a")
        followed.follow(1, "b")
        followed.follower.forget(0)
        (tmp_path / "a").touch()
        (tmp_path / "b").touch()
        await followed.until_told(1, 2)
        assert followed.told == {0: 1, 1: 2}
        assert followed.closed == [0]

    run(test)


def test_odd_names(run, tmp_path):
    name = os.fsdecode(b"\xff\xfe \n,")

    async def test(followed: Followed) -> None:
        followed.follow(0, name)
        (tmp_path / name).touch()
        await followed.until_told(0, 2)

    run(test)


def test_a_directory_that_is_removed(run, tmp_path):
    async def test(followed: Followed) -> None:
        followed.folder = tmp_path / "gone"
        followed.folder.mkdir()
        followed.follow(0, "name")
        followed.folder.rmdir()
        await followed.until_told(0, 2)
        followed.follower.forget(0)
        followed.follower.forget(0)
        assert followed.closed == [0]

    run(test)


def test_events_that_were_lost(run, monkeypatch):
    """With them gone, everything is looked at."""
    overflow = [Event(-1, inotify.IN_Q_OVERFLOW, b"")]

    async def test(followed: Followed) -> None:
        followed.follow(0, "a")
        followed.follow(1, "b")
        with monkeypatch.context() as patch:
            patch.setattr(Inotify, "read", lambda _: overflow)
            followed.follower._read()
        assert followed.told == {0: 2, 1: 2}

    run(test)


def test_nothing_is_open_when_nothing_is_followed(run):
    async def test(followed: Followed) -> None:
        before = os.listdir("/proc/self/fd")
        followed.follow(0, "a")
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        followed.follower.forget(0)
        assert len(os.listdir("/proc/self/fd")) == len(before)

    run(test)


def test_inotify(tmp_path):
    fd = os.open(tmp_path, os.O_PATH)
    one = Inotify()
    try:
        watch = one.watch(fd)
        assert one.watch(fd) == watch
        assert one.read() == []
        (tmp_path / "a").touch()
        os.rename(tmp_path / "a", tmp_path / ("b" * 255))
        events = one.read()
        assert [(event.watch, event.mask, event.name) for event in events] == [
            (watch, inotify.IN_CREATE, b"a"), (watch, inotify.IN_MOVED_FROM, b"a"),
            (watch, inotify.IN_MOVED_TO, b"b" * 255),
        ]  # fmt: skip
        one.unwatch(watch)
        assert [event.mask for event in one.read()] == [inotify.IN_IGNORED]
        with pytest.raises(OSError, match="inotify_rm_watch: Invalid argument"):
            one.unwatch(watch)
    finally:
        one.close()
        one.close()
        os.close(fd)
    with pytest.raises(ValueError, match="closed"):
        one.read()
