"""The agent's event loop: descriptors, timers, and tasks that are generators.

A task yields what it waits for, ``sleep(seconds)`` or ``readable(fd)``, and is resumed after.  That is
all the concurrency the agent needs, and importing asyncio in an emulated guest would cost a second.
"""

from __future__ import annotations

import select
from time import monotonic

from holdfast.errors import TimedOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    Wait = tuple[str, float]
    Task = Generator[Wait, None, Any]


_UNDO_SECONDS = 10.0


def sleep(seconds: float) -> Wait:
    """What a task yields to go on after ``seconds``."""
    return ("sleep", seconds)


def readable(fd: int) -> Wait:
    """What a task yields to go on when ``fd`` is readable (a pidfd: when the process ended)."""
    return ("fd", fd)


class _Running:
    __slots__ = ("deadline", "done", "fd", "task", "wake")

    def __init__(self, task: Task, deadline: float, done: Callable[[object, BaseException | None], None]) -> None:
        self.task = task
        self.deadline = deadline
        self.done = done
        self.wake: float | None = 0.0
        self.fd = -1


class Loop:
    """Watches descriptors and runs tasks until :meth:`stop`.

    Attributes:
        after_round: called when everything that was ready has been dealt with, before waiting again.
    """

    def __init__(self) -> None:
        self.after_round: Callable[[], None] = lambda: None
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._running: list[_Running] = []
        self._stopped = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls ``callback(events)`` whenever ``fd`` has one of ``events``; replaces an earlier watch."""
        if fd not in self._watched:
            self._epoll.register(fd, events)
        elif self._watched[fd][0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = (events, callback)

    def unwatch(self, fd: int) -> None:
        """Stops watching ``fd``; one that is not watched is no error."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def spawn(self, task: Task, seconds: float, done: Callable[[object, BaseException | None], None]) -> object:
        """Runs ``task``; ``done(result, error)`` is called once.  Returns a handle for :meth:`cancel`.

        After ``seconds`` the task gets a :class:`TimedOut` thrown in, so that its ``finally`` clauses undo.
        """
        running = _Running(task, monotonic() + seconds, done)
        self._running.append(running)
        self._advance(running, None)
        return running

    def cancel(self, handle: object) -> None:
        """Throws :class:`TimedOut` into a task that nobody waits for any more."""
        for running in self._running:
            if running is handle:
                self._advance(running, TimedOut("request given up by its sender"))
                return

    def stop(self) -> None:
        """Ends :meth:`run` after the current round."""
        self._stopped = True

    def run(self) -> None:
        """Runs until :meth:`stop`."""
        while not self._stopped:
            for fd, events in self._epoll.poll(self._timeout()):
                watched = self._watched.get(fd)
                if watched is not None:
                    watched[1](events)
            self._wake_tasks()
            self.after_round()

    def _timeout(self) -> float:
        times = [min(r.deadline, r.deadline if r.wake is None else r.wake) for r in self._running]
        return max(0.0, min(times) - monotonic()) if times else -1

    def _wake_tasks(self) -> None:
        now = monotonic()
        for running in list(self._running):
            if now >= running.deadline:
                running.deadline = now + _UNDO_SECONDS  # its undoing may wait, too
                self._advance(running, TimedOut("request", why="its deadline passed in the guest"))
            elif running.wake is not None and now >= running.wake:
                self._advance(running, None)

    def _advance(self, running: _Running, error: BaseException | None) -> None:
        if running.fd >= 0:
            self.unwatch(running.fd)
            running.fd = -1
        running.wake = None
        try:
            kind, value = running.task.throw(error) if error is not None else next(running.task)
        except StopIteration as stop:
            self._finish(running, stop.value, None)
        except Exception as failure:
            self._finish(running, None, failure)
        else:
            if kind == "sleep":
                running.wake = monotonic() + value
            else:
                running.fd = int(value)
                self.watch(running.fd, select.EPOLLIN, lambda _events: self._advance(running, None))

    def _finish(self, running: _Running, result: object, error: BaseException | None) -> None:
        if running in self._running:
            self._running.remove(running)
        running.done(result, error)
