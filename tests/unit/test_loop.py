"""The agent's loop: tasks, deadlines, cancelling, and watched descriptors."""

from __future__ import annotations

import os
import select
import signal
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import TimedOut
from holdfast.guest.children import Children
from holdfast.guest.loop import Loop, readable, sleep

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 60.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


class Outcome:
    """Where a task's end is told; ends the loop unless told otherwise."""

    def __init__(self, loop: Loop, *, stops: bool = True) -> None:
        self.calls: list[tuple[object, BaseException | None]] = []
        self._loop = loop
        self._stops = stops

    def __call__(self, result: object, error: BaseException | None) -> None:
        self.calls.append((result, error))
        if self._stops:
            self._loop.stop()


def finish(task, seconds=LONG):
    """Runs one task to its end."""
    loop = Loop()
    done = Outcome(loop)
    loop.spawn(task, seconds, done)
    if not done.calls:
        loop.run()
    [(result, error)] = done.calls
    if error is not None:
        raise error
    return result


def test_a_task_that_never_waits():
    def task():
        return 7
        yield

    assert finish(task()) == 7


def test_sleeping():
    def task():
        for _ in range(3):
            yield sleep(0.002)
        return "rested"

    started = monotonic()
    assert finish(task()) == "rested"
    assert monotonic() - started >= 0.006


def test_waiting_for_a_descriptor(pipe):
    reader, writer = pipe

    def task():
        os.write(writer, b"x")
        yield readable(reader)
        data = os.read(reader, 9)
        os.write(writer, b"y")
        yield readable(reader)
        return data + os.read(reader, 9)

    assert finish(task()) == b"xy"


def test_an_error_is_told():
    def task():
        yield sleep(0)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        finish(task())


def test_an_error_before_the_first_wait():
    def task():
        raise OSError("no")
        yield

    with pytest.raises(OSError, match="no"):
        finish(task())


def test_tasks_run_side_by_side(pipe):
    reader, writer = pipe
    loop = Loop()
    order = []

    def waits():
        yield readable(reader)
        order.append("got it")

    def gives():
        yield sleep(0.001)
        order.append("gave it")
        os.write(writer, b"x")

    loop.spawn(waits(), LONG, Outcome(loop))
    loop.spawn(gives(), LONG, Outcome(loop, stops=False))
    loop.run()
    assert order == ["gave it", "got it"]


def test_deadline_undoes():
    undone = []

    def task():
        try:
            yield sleep(LONG)
        finally:
            undone.append(True)

    with pytest.raises(TimedOut, match="its deadline passed in the guest"):
        finish(task(), 0.002)
    assert undone == [True]


def test_deadline_while_waiting_for_a_descriptor(pipe):
    reader, writer = pipe
    loop = Loop()
    done = Outcome(loop)

    def task():
        yield readable(reader)

    loop.spawn(task(), 0.002, done)
    loop.run()
    assert isinstance(done.calls[0][1], TimedOut)
    os.write(writer, b"x")  # nobody waits for it any more
    assert loop._epoll.poll(0) == []


def test_a_task_may_end_well_after_its_deadline():
    def task():
        try:
            yield sleep(LONG)
        except TimedOut:
            return "what there was"

    assert finish(task(), 0.002) == "what there was"


def test_undoing_may_wait_too():
    undone = []

    def task():
        try:
            yield sleep(LONG)
        finally:
            yield sleep(0.001)
            undone.append(True)

    with pytest.raises(TimedOut):
        finish(task(), 0.002)
    assert undone == [True]


def test_cancel():
    loop = Loop()
    done = Outcome(loop, stops=False)
    undone = []

    def task():
        try:
            yield sleep(LONG)
        finally:
            undone.append(True)

    handle = loop.spawn(task(), LONG, done)
    loop.cancel(handle)
    assert undone == [True]
    assert isinstance(done.calls[0][1], TimedOut)
    loop.cancel(handle)
    loop.cancel(None)
    loop.cancel(object())
    assert len(done.calls) == 1


def test_watching(pipe):
    reader, writer = pipe
    loop = Loop()
    seen = []

    def on_event(events: int) -> None:
        seen.append((events & select.EPOLLIN != 0, os.read(reader, 9)))
        loop.stop()

    loop.watch(reader, select.EPOLLIN, lambda _events: seen.append("replaced"))
    loop.watch(reader, select.EPOLLIN, on_event)
    os.write(writer, b"x")
    loop.run()
    assert seen == [(True, b"x")]
    loop.watch(writer, select.EPOLLIN, on_event)
    loop.watch(writer, select.EPOLLOUT, lambda _events: seen.append("writable"))
    loop.unwatch(reader)
    loop.unwatch(reader)
    assert loop._epoll.poll(0) == [(writer, select.EPOLLOUT)]
    loop.unwatch(writer)
    assert loop._epoll.poll(0) == []


def test_what_one_callback_unwatches_is_not_called_in_the_same_round():
    loop = Loop()
    seen = []
    pipes = [os.pipe() for _ in range(2)]

    def first_come(reader: int) -> None:
        seen.append(reader)
        for other, _ in pipes:
            loop.unwatch(other)
        loop.stop()

    for reader, writer in pipes:
        loop.watch(reader, select.EPOLLIN, lambda _events, reader=reader: first_come(reader))
        os.write(writer, b"x")
    loop.run()
    assert len(seen) == 1
    for ends in pipes:
        for fd in ends:
            os.close(fd)


def test_after_round(pipe):
    reader, writer = pipe
    loop = Loop()
    order = []
    loop.after_round = lambda: (order.append("after"), loop.stop())
    loop.watch(reader, select.EPOLLIN, lambda _events: order.append("event"))
    os.write(writer, b"x")
    loop.run()
    assert order == ["event", "after"]


# -- children ---------------------------------------------------------------------------------


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_program_runs_to_its_end(null, pipe):
    _, writer = pipe
    assert finish(Children().run(["/bin/sh", "-c", "echo out; exit 3"], null, writer, null)) == 3 << 8
    assert os.read(pipe[0], 99) == b"out\n"


def test_its_signals_are_as_new(null, pipe):
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        program = ["/bin/sh", "-c", "kill -PIPE $$; exit 0"]
        assert finish(Children().run(program, null, null, null)) == signal.SIGPIPE
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_a_program_that_is_given_up_is_killed(null):
    children = Children()
    loop = Loop()
    done = Outcome(loop)
    pids = []
    on_exit = children.on_exit
    children.on_exit = lambda pid, callback: (pids.append(pid), on_exit(pid, callback))[1]
    loop.spawn(children.run(["/bin/sh", "-c", "exec tail -f /dev/null"], null, null, null), 0.01, done)
    loop.run()
    assert isinstance(done.calls[0][1], TimedOut)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == -signal.SIGKILL


def test_a_program_that_is_not_there(null):
    with pytest.raises(FileNotFoundError):
        finish(Children().run(["/nosuch"], null, null, null))


def test_exits_before_anybody_asks_are_kept():
    children = Children()
    children.expect()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    children.reap()
    statuses = []
    children.on_exit(pid, statuses.append)
    assert statuses == [0]
    later = os.posix_spawn("/bin/false", ["false"], {})
    children.on_exit(later, statuses.append)
    os.waitid(os.P_PID, later, os.WEXITED | os.WNOWAIT)
    children.reap()
    assert statuses == [0, 256]
    children.reap()
