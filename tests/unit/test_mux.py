"""Streams within their credit, whatever pieces the bytes come in; a peer that breaks the rules is told so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.errors import ProtocolError
from holdfast.wire.frames import (
    CANCEL,
    CREDIT,
    DATA,
    EOF,
    EVENT,
    MAX_DATA,
    MAX_PAYLOAD,
    REQUEST,
    RESPONSE,
    SYNC,
    SYNCED,
    Frame,
)
from holdfast.wire.mux import WINDOW, Incoming, Mux

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def deliver(sender: Mux, receiver: Mux) -> list[Incoming]:
    data = bytes(sender.outgoing)
    sender.outgoing.clear()
    return list(receiver.feed(data))


def pair(*channels: int) -> tuple[Mux, Mux]:
    one, other = Mux(), Mux()
    for channel in channels:
        one.open(channel)
        other.open(channel)
    return one, other


@given(st.text(max_size=8), st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_messages(name, params):
    one, other = pair()
    number = one.request(name, params, 1500)
    one.event(name, params)
    one.respond(7, params)
    one.respond(8, error=params)
    one.cancel(number)
    request, event, response, error, cancel = deliver(one, other)
    assert (request.kind, request.channel) == (REQUEST, number)
    assert request.body == {"method": name, "params": params, "deadline_ms": 1500}
    assert (event.kind, event.body) == (EVENT, {"event": name, "params": params})
    assert (response.kind, response.channel, response.body) == (RESPONSE, 7, {"result": params})
    assert (error.channel, error.body) == (8, {"error": params})
    assert (cancel.kind, cancel.channel) == (CANCEL, number)


def test_every_request_has_a_number_of_its_own():
    mux = Mux()
    assert len({mux.request("m", {}, 1) for _ in range(10)}) == 10


def test_a_message_that_cannot_be_sent():
    mux = Mux()
    for params in ({"x": object()}, {"x": b""}, {"x": "a" * MAX_PAYLOAD}):
        with pytest.raises(ProtocolError, match="send message"):
            mux.request("m", params, 1)
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ProtocolError, match="send message"):
        mux.event("e", {"x": nested})
    assert mux.outgoing == b""


@pytest.mark.parametrize("result", [object(), "a" * MAX_PAYLOAD])
def test_a_result_that_cannot_be_sent_is_answered_with_the_reason(result):
    one, other = pair()
    one.respond(3, result)
    [answer] = deliver(one, other)
    assert answer.channel == 3
    assert answer.body["error"]["kind"] == "ProtocolError"


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b"1" * 10_000])
@pytest.mark.parametrize("kind", [REQUEST, RESPONSE, EVENT])
def test_what_is_no_json_object(kind, payload):
    with pytest.raises(ProtocolError, match="read message"):
        list(Mux().feed(Frame(kind, 1, payload).encode()))


def test_sender_stays_within_the_window():
    one, other = pair(1)
    sent = 0
    while room := one.room(1):
        assert room <= MAX_DATA
        one.write(1, bytes(room))
        sent += room
    assert sent == WINDOW
    with pytest.raises(ProtocolError, match="no credit"):
        one.write(1, b"x")
    received = deliver(one, other)
    assert sum(len(i.data) for i in received) == WINDOW
    other.consumed(1, 10)
    [credit] = deliver(other, one)
    assert credit.kind == CREDIT
    assert one.room(1) == 10


def test_more_than_the_credit():
    mux = Mux()
    mux.open(1)
    frame = Frame(DATA, 1, bytes(MAX_DATA)).encode()
    list(mux.feed(frame * (WINDOW // MAX_DATA)))
    with pytest.raises(ProtocolError, match="more than its credit"):
        list(mux.feed(Frame(DATA, 1, b"x").encode()))


@pytest.mark.parametrize("credit", [b"\0\0\0\1", b"\xff\xff\xff\xff", b"\1"])
def test_credit_for_bytes_never_sent(credit):
    mux = Mux()
    mux.open(1)
    with pytest.raises(ProtocolError, match="never sent"):
        list(mux.feed(Frame(CREDIT, 1, credit).encode()))


def test_empty_data_is_nothing():
    """It costs no credit, and who counts chunks or takes b"" for the end must not see it."""
    mux = Mux()
    mux.open(1)
    assert list(mux.feed(Frame(DATA, 1).encode() * 3)) == []


def test_eof_once():
    one, other = pair(1)
    one.write(1, b"last")
    one.write_eof(1)
    one.write_eof(1)
    assert one.room(1) == 0
    assert not one.is_writable(1)
    for data in (b"", b"x"):
        with pytest.raises(ProtocolError):
            one.write(1, data)
    assert [i.kind for i in deliver(one, other)] == [DATA, EOF]
    assert other.is_writable(1)  # the other direction goes on
    other.write(1, b"answer")
    assert [i.data for i in deliver(other, one)] == [b"answer"]


@pytest.mark.parametrize("more", [Frame(EOF, 1), Frame(DATA, 1, b"x"), Frame(DATA, 1)])
def test_more_after_the_end(more):
    mux = Mux()
    mux.open(1)
    list(mux.feed(Frame(EOF, 1).encode()))
    with pytest.raises(ProtocolError, match="after the end"):
        list(mux.feed(more.encode()))


def test_numbers():
    mux = Mux()
    mux.open(1)
    with pytest.raises(ProtocolError, match="taken"):
        mux.open(1)
    mux.close(1)
    mux.close(1)
    assert mux.room(1) == 0
    assert not mux.is_writable(1)
    mux.write_eof(1)
    mux.consumed(1, 5)
    assert mux.outgoing == b""
    assert list(mux.feed(Frame(DATA, 1, b"late").encode() + Frame(CREDIT, 1, bytes(4)).encode())) == []
    mux.open(1)
    assert mux.room(1) == MAX_DATA


def test_synchronise_forgets_everything_on_both_sides():
    one, other = pair(1)
    other.write(1, b"old")
    other.event("old", {})
    one.sync(b"epoch")
    [sync] = deliver(one, other)
    assert (sync.kind, sync.data) == (SYNC, b"epoch")
    other.synced(sync.data)
    [synced] = deliver(other, one)
    assert (synced.kind, synced.data) == (SYNCED, b"epoch")
    for mux in (one, other):
        assert mux.room(1) == 0
        mux.open(1)


def test_a_broken_rule_does_not_lose_what_follows():
    """Whoever goes on after an error (the agent does) gets the next frame."""
    mux = Mux()
    with pytest.raises(ProtocolError):
        list(mux.feed(Frame(EVENT, 0, b"{").encode() + Frame(EVENT, 0, b'{"event":"e"}').encode()))
    assert [i.body for i in mux.feed(b"")] == [{"event": "e"}]


class TwoMuxes(RuleBasedStateMachine):
    """Two sides, many streams, bytes delivered in pieces of any size: what is written is what is read, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.muxes = Mux(), Mux()
        self.wires = bytearray(), bytearray()  # what each side has sent and the other not yet got
        self.open: set[int] = set()
        self.written: dict[tuple[int, int], bytearray] = {}
        self.read: dict[tuple[int, int], bytearray] = {}
        self.unconsumed: dict[tuple[int, int], int] = {}
        self.ended: set[tuple[int, int]] = set()
        self.saw_end: set[tuple[int, int]] = set()

    sides = st.sampled_from((0, 1))
    channels = st.integers(1, 4)

    @rule(channel=channels)
    def open_stream(self, channel: int) -> None:
        if channel not in self.open:
            self.open.add(channel)
            for side in (0, 1):
                self.muxes[side].open(channel)
                self.written[side, channel] = bytearray()
                self.read[side, channel] = bytearray()
                self.unconsumed[side, channel] = 0

    @precondition(lambda self: self.open)
    @rule(side=sides, data=st.data(), size=st.sampled_from([1, 100, 5000, MAX_DATA]), times=st.integers(1, 9))
    def write(self, side: int, data: st.DataObject, size: int, times: int) -> None:
        channel = data.draw(st.sampled_from(sorted(self.open)))
        for _ in range(times):
            room = self.muxes[side].room(channel)
            outstanding = len(self.written[side, channel]) - (
                len(self.read[1 - side, channel]) - self.unconsumed[1 - side, channel]
            )
            assert room <= max(0, WINDOW - outstanding)
            chunk = bytes([len(self.written[side, channel]) % 251]) * min(room, size)
            if chunk:
                self.muxes[side].write(channel, chunk)
                self.written[side, channel] += chunk

    @precondition(lambda self: self.open)
    @rule(side=sides, data=st.data())
    def end(self, side: int, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(sorted(self.open)))
        self.muxes[side].write_eof(channel)
        self.ended.add((side, channel))

    @rule(side=sides, size=st.sampled_from([1, 19, 21, 1000, 40_000, 1 << 20]))
    def deliver(self, side: int, size: int) -> None:
        wire = self.wires[side]
        wire += self.muxes[side].outgoing
        self.muxes[side].outgoing.clear()
        piece = bytes(wire[:size])
        del wire[:size]
        for incoming in self.muxes[1 - side].feed(piece):
            key = (1 - side, incoming.channel)
            if incoming.kind == DATA:
                assert key not in self.saw_end
                self.read[key] += incoming.data
                self.unconsumed[key] += len(incoming.data)
            elif incoming.kind == EOF:
                assert key not in self.saw_end
                self.saw_end.add(key)

    @precondition(lambda self: any(self.unconsumed.values()))
    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, count in self.unconsumed.items() if count)))
        count = data.draw(st.integers(1, self.unconsumed[key]))
        self.muxes[key[0]].consumed(key[1], count)
        self.unconsumed[key] -= count

    @invariant()
    def what_is_read_was_written(self) -> None:
        for (side, channel), data in self.read.items():
            written = self.written[1 - side, channel]
            assert len(data) <= len(written)
            assert self.unconsumed[side, channel] <= WINDOW

    def teardown(self) -> None:
        """When everybody reads, everything arrives."""
        for _ in range(4):
            for side in (0, 1):
                self.deliver(side, 1 << 24)
            for key, count in self.unconsumed.items():
                self.muxes[key[0]].consumed(key[1], count)
                self.unconsumed[key] = 0
        for (side, channel), data in self.read.items():
            assert data == self.written[1 - side, channel]
            assert ((side, channel) in self.saw_end) == ((1 - side, channel) in self.ended)
            if (side, channel) not in self.ended:
                assert self.muxes[side].room(channel) == MAX_DATA


TestTwoMuxes = TwoMuxes.TestCase
TestTwoMuxes.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)
