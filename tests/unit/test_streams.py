"""Pumps between descriptors and streams: credit, draining, and readers that go away."""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

import pytest

from holdfast.guest.loop import Loop, sleep
from holdfast.guest.streams import Input, Output
from holdfast.wire.frames import CREDIT, DATA, EOF
from holdfast.wire.mux import WINDOW, Mux

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHANNEL = 3


class Wire:
    """A guest's end with its loop, and the host's end, which reads and writes the stream."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.guest, self.host = Mux(), Mux()
        for mux in (self.guest, self.host):
            mux.open(CHANNEL)
        self.reader, self.writer = os.pipe()
        self.got = bytearray()
        self.ended = 0
        self.output: Output | None = None
        self.input: Input | None = None

    def make_output(self) -> Output:
        self.output = Output(self.loop, self.guest, self.reader, CHANNEL, self._on_end)
        return self.output

    def make_input(self) -> Input:
        self.input = Input(self.loop, self.guest, self.writer, CHANNEL)
        return self.input

    def _on_end(self) -> None:
        self.ended += 1

    def to_host(self, *, consume: bool = True) -> list[int]:
        """Carries over what the guest has sent; returns the kinds of frames."""
        data = bytes(self.guest.outgoing)
        self.guest.outgoing.clear()
        kinds = []
        for incoming in self.host.feed(data):
            kinds.append(incoming.kind)
            if incoming.kind == DATA:
                self.got += incoming.data
                if consume:
                    self.host.consumed(CHANNEL, len(incoming.data))
        return kinds

    def to_guest(self) -> None:
        data = bytes(self.host.outgoing)
        self.host.outgoing.clear()
        for incoming in self.guest.feed(data):
            if incoming.kind == CREDIT and self.output is not None:
                self.output.pump()
            elif incoming.kind == DATA:
                self.input.feed(incoming.data)
            elif incoming.kind == EOF:
                self.input.end()

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Runs the guest's loop, carrying frames both ways after every round, until something is so."""

        def after_round() -> None:
            self.to_host()
            self.to_guest()
            if condition():
                self.loop.stop()

        def watchdog():
            yield sleep(20)
            pytest.fail("it did not come to be")

        self.loop.after_round = after_round
        handle = self.loop.spawn(watchdog(), 60, lambda _result, _error: None)
        after_round()
        self.loop.run()
        self.loop._stopped = False
        self.loop.cancel(handle)

    def close(self) -> None:
        for pump in (self.output, self.input):
            if pump is not None:
                pump.abandon()
        for fd, owner in ((self.reader, self.output), (self.writer, self.input)):
            if owner is None:
                with contextlib.suppress(OSError):
                    os.close(fd)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()
    wire.loop._epoll.close()


# -- out --------------------------------------------------------------------------------------


def test_output_to_its_end(wire):
    output = wire.make_output()
    os.write(wire.writer, b"hello")
    wire.run_until(lambda: wire.got == b"hello")
    assert not output.finished
    os.close(wire.writer)
    wire.run_until(lambda: wire.ended == 1)
    assert output.finished
    assert wire.host.is_writable(CHANNEL)
    output.pump()
    output.drain()
    output.abandon()
    assert wire.ended == 1
    wire.writer = -1


def test_much_output_with_a_reader_that_keeps_up(wire):
    wire.make_output()
    os.set_blocking(wire.writer, False)
    data = os.urandom(3 * WINDOW)
    rest = memoryview(data)

    def more() -> bool:
        nonlocal rest
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(wire.writer, rest[:65536]) :]
        return len(wire.got) == len(data)

    wire.run_until(more)
    assert wire.got == data


def test_output_stops_without_credit_and_goes_on_with_it(wire):
    output = wire.make_output()
    os.set_blocking(wire.writer, False)
    written = 0
    for _ in range(1000):
        with contextlib.suppress(BlockingIOError):
            written += os.write(wire.writer, bytes(4096))
        for fd, events in wire.loop._epoll.poll(0):
            wire.loop._watched[fd][1](events)
    assert sum(len(i.data) for i in wire.host.feed(bytes(wire.guest.outgoing))) == WINDOW
    wire.guest.outgoing.clear()
    assert written > WINDOW
    assert wire.reader not in wire.loop._watched  # a full window must not make the loop spin
    output.pump()
    assert wire.reader not in wire.loop._watched
    wire.host.consumed(CHANNEL, 100)
    wire.to_guest()
    assert wire.reader in wire.loop._watched


def test_drain_sends_what_is_left_though_somebody_holds_the_pipe_open(wire):
    output = wire.make_output()
    os.write(wire.writer, b"last words")
    output.drain()
    assert wire.to_host() == [DATA, EOF]
    assert wire.got == b"last words"
    assert output.finished
    assert wire.ended == 1


def fill_window(wire: Wire, left: int) -> None:
    while (room := wire.guest.room(CHANNEL)) and wire.guest._streams[CHANNEL].send_window > left:
        wire.guest.write(CHANNEL, bytes(min(room, wire.guest._streams[CHANNEL].send_window - left)))


def test_drain_waits_for_credit(wire):
    fill_window(wire, 4)
    output = wire.make_output()
    os.write(wire.writer, b"last words")
    output.drain()
    assert not output.finished
    wire.to_host(consume=False)
    assert wire.got.endswith(b"last")
    wire.host.consumed(CHANNEL, 100)
    wire.to_guest()
    assert wire.to_host() == [DATA, EOF]
    assert wire.got.endswith(b"last words")


def test_drain_without_credit_does_not_spin(wire):
    fill_window(wire, 4)
    output = wire.make_output()
    os.write(wire.writer, b"last words")
    output.drain()
    assert wire.reader not in wire.loop._watched


# -- in ---------------------------------------------------------------------------------------


def test_input_to_its_end(wire):
    wire.make_input()
    wire.host.write(CHANNEL, b"hello")
    wire.host.write_eof(CHANNEL)
    wire.to_guest()
    assert os.read(wire.reader, 99) == b"hello"
    assert os.read(wire.reader, 99) == b""
    assert wire.to_host() == [CREDIT]


def test_a_slow_reader_holds_back_credit_only(wire):
    wire.make_input()
    data = os.urandom(2 * WINDOW)
    rest, taken = memoryview(data), bytearray()
    os.set_blocking(wire.reader, False)
    while room := wire.host.room(CHANNEL):
        wire.host.write(CHANNEL, bytes(rest[:room]))
        rest = rest[room:]
    wire.to_guest()
    assert wire.writer in wire.loop._watched  # the pipe is full: it waits until it is not

    def write() -> bool:
        nonlocal rest
        while room := min(wire.host.room(CHANNEL), len(rest)):
            wire.host.write(CHANNEL, bytes(rest[:room]))
            rest = rest[room:]
        wire.to_guest()
        return len(taken) == len(data)

    wire.loop.watch(wire.reader, select.EPOLLIN, lambda _events: taken.extend(os.read(wire.reader, 10_000)))
    wire.run_until(write)
    wire.loop.unwatch(wire.reader)
    assert taken == data


def test_the_end_comes_after_what_is_pending(wire):
    wire.make_input()
    os.set_blocking(wire.reader, False)
    for _ in range(4):
        wire.host.write(CHANNEL, bytes(wire.host.room(CHANNEL)))
    wire.host.write_eof(CHANNEL)
    parts = []
    wire.loop.watch(wire.reader, select.EPOLLIN, lambda _events: parts.append(os.read(wire.reader, 65536)))
    wire.run_until(lambda: b"" in parts)
    wire.loop.unwatch(wire.reader)
    assert sum(map(len, parts)) == 4 * (32 << 10)


def test_a_reader_that_has_gone_does_not_stall_the_sender(wire):
    wire.make_input()
    os.close(wire.reader)
    wire.host.write(CHANNEL, b"into the void")
    wire.to_guest()
    assert wire.writer not in wire.loop._watched
    assert wire.to_host() == [CREDIT]
    for _ in range(2 * WINDOW // (32 << 10)):
        wire.host.write(CHANNEL, bytes(wire.host.room(CHANNEL)))
        wire.to_guest()
        wire.to_host()
    assert wire.host.room(CHANNEL)
    wire.host.write_eof(CHANNEL)
    wire.to_guest()
    wire.reader = os.open("/dev/null", os.O_RDONLY)


def test_a_reader_that_goes_while_something_is_pending(wire):
    wire.make_input()
    while room := wire.host.room(CHANNEL):
        wire.host.write(CHANNEL, bytes(room))
    wire.to_guest()
    os.close(wire.reader)
    for fd, events in wire.loop._epoll.poll(1):
        assert events & (select.EPOLLERR | select.EPOLLOUT)
        wire.loop._watched[fd][1](events)
    wire.to_host()
    assert wire.host._streams[CHANNEL].send_window == WINDOW
    wire.reader = os.open("/dev/null", os.O_RDONLY)
