"""Requests, events and credit-controlled streams over frames, without doing any I/O itself.

One object per connection turns received bytes into :class:`Incoming` records and puts what is to be
sent into :attr:`Mux.outgoing`.  The agent drives it with ``epoll``, the monitor with asyncio and a
client with ``select``: three loops, one protocol.

A stream is a pair of windows.  A sender may have :data:`WINDOW` bytes on the way; the receiver gives
credit back as its consumer takes them, so one slow reader never stops the others, and no side ever
holds more than a window per stream.
"""

from __future__ import annotations

import json

from holdfast.errors import HoldfastError, ProtocolError
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
    Decoder,
    Frame,
)  # fmt: skip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Bytes of a stream that may be on the way before its reader gives credit.
WINDOW = 256 << 10


class Incoming:
    """Something that arrived.

    Attributes:
        kind: one of the frame kinds.
        channel: the request's id or the stream's number.
        body: the decoded JSON object of a REQUEST, RESPONSE or EVENT; else ``{}``.
        data: the bytes of a DATA, SYNC or SYNCED frame.
    """

    __slots__ = ("body", "channel", "data", "kind")

    def __init__(self, kind: int, channel: int, body: dict[str, Any], data: bytes) -> None:
        self.kind = kind
        self.channel = channel
        self.body = body
        self.data = data


class _Stream:
    __slots__ = ("eof_received", "eof_sent", "receive_window", "send_window")

    def __init__(self) -> None:
        self.send_window = WINDOW
        self.receive_window = WINDOW
        self.eof_sent = False
        self.eof_received = False


class Mux:
    """The state of one connection."""

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._decoder = Decoder(max_payload)
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self.outgoing = bytearray()

    # -- sending ------------------------------------------------------------------------------

    def request(self, method: str, params: dict[str, Any], deadline_ms: int) -> int:
        """Queues a request; the answer is a RESPONSE whose channel is the returned id."""
        self._last_id += 1
        self._send(REQUEST, self._last_id, {"method": method, "params": params, "deadline_ms": deadline_ms})
        return self._last_id

    def cancel(self, request_id: int) -> None:
        """Tells the peer that nobody waits for this answer any more."""
        self._frame(CANCEL, request_id)

    def respond(self, request_id: int, result: object = None, error: dict[str, Any] | None = None) -> None:
        """Queues the answer to a request; a result that cannot be sent is answered with the reason."""
        try:
            self._send(RESPONSE, request_id, {"error": error} if error is not None else {"result": result})
        except HoldfastError as failure:
            self._send(RESPONSE, request_id, {"error": failure.as_dict()})

    def event(self, name: str, params: dict[str, Any]) -> None:
        """Queues an event."""
        self._send(EVENT, 0, {"event": name, "params": params})

    def sync(self, epoch: bytes) -> None:
        """Asks the peer to forget all streams and requests and to echo ``epoch``."""
        self._streams.clear()
        self._frame(SYNC, 0, epoch)

    def synced(self, epoch: bytes) -> None:
        """Answers a SYNC: everything from before it is forgotten on this side."""
        self._streams.clear()
        self.outgoing.clear()
        self._frame(SYNCED, 0, epoch)

    def open(self, channel: int) -> None:
        """Opens a stream under a number that the requester chose.

        Raises:
            ProtocolError: the number is taken.
        """
        if channel in self._streams:
            raise ProtocolError("open stream", subject=channel, why="the number is taken")
        self._streams[channel] = _Stream()

    def close(self, channel: int) -> None:
        """Forgets a stream; what still arrives for it is dropped."""
        self._streams.pop(channel, None)

    def room(self, channel: int) -> int:
        """Bytes that may be written to the stream now; 0 for an unknown or finished one."""
        stream = self._streams.get(channel)
        return 0 if stream is None or stream.eof_sent else min(stream.send_window, MAX_DATA)

    def is_writable(self, channel: int) -> bool:
        """Whether there ever will be room: the stream is known, and this side has not ended it."""
        stream = self._streams.get(channel)
        return stream is not None and not stream.eof_sent

    def write(self, channel: int, data: bytes) -> None:
        """Queues at most :meth:`room` bytes.

        Raises:
            ProtocolError: there is no room for them.
        """
        if not self.is_writable(channel) or len(data) > self.room(channel):
            raise ProtocolError("write to stream", subject=channel, why="no credit")
        self._streams[channel].send_window -= len(data)
        self._frame(DATA, channel, data)

    def write_eof(self, channel: int) -> None:
        """Ends this side's direction of the stream; a second time does nothing."""
        stream = self._streams.get(channel)
        if stream is not None and not stream.eof_sent:
            stream.eof_sent = True
            self._frame(EOF, channel)

    def consumed(self, channel: int, count: int) -> None:
        """Gives the peer credit for bytes that have been taken."""
        stream = self._streams.get(channel)
        if stream is not None and count:
            stream.receive_window += count
            self._frame(CREDIT, channel, count.to_bytes(4, "big"))

    def _send(self, kind: int, channel: int, body: dict[str, Any]) -> None:
        try:
            payload = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ProtocolError("send message", why=f"not JSON: {error}", code="message-invalid") from None
        if len(payload) > MAX_PAYLOAD:
            why = f"{len(payload)} bytes are more than the {MAX_PAYLOAD} that a message may have"
            raise ProtocolError("send message", why=why, code="message-too-large")
        self._frame(kind, channel, payload)

    def _frame(self, kind: int, channel: int, payload: bytes = b"") -> None:
        self.outgoing += Frame(kind, channel, payload).encode()

    # -- receiving ----------------------------------------------------------------------------

    def feed(self, data: bytes) -> Iterator[Incoming]:
        """What ``data`` completes, checked: a peer that exceeds its credit or sends no JSON object is dropped.

        Raises:
            ProtocolError: the peer broke the protocol in a way that skipping bytes cannot mend.
        """
        for frame in self._decoder.feed(data):
            incoming = self._accept(frame)
            if incoming is not None:
                yield incoming

    def _accept(self, frame: Frame) -> Incoming | None:
        kind, channel, payload = frame.kind, frame.channel, frame.payload
        if kind in (REQUEST, RESPONSE, EVENT):
            return Incoming(kind, channel, _object(payload), b"")
        if kind in (SYNC, SYNCED, CANCEL):
            return Incoming(kind, channel, {}, payload)
        stream = self._streams.get(channel)
        if stream is None:  # late data of a stream that this side has closed
            return None
        if kind in (DATA, EOF) and stream.eof_received:
            raise ProtocolError("read stream", subject=channel, why="the peer sent more after the end")
        if kind == DATA:
            if not payload:  # costs no credit, so nothing would bound how many of them are kept
                return None
            if len(payload) > stream.receive_window:
                raise ProtocolError("read stream", subject=channel, why="the peer sent more than its credit")
            stream.receive_window -= len(payload)
        elif kind == EOF:
            stream.eof_received = True
        elif kind == CREDIT:
            stream.send_window += int.from_bytes(payload[:4], "big")
            if stream.send_window > WINDOW:
                raise ProtocolError("read stream", subject=channel, why="the peer gave credit for bytes never sent")
        return Incoming(kind, channel, {}, payload)


def _object(payload: bytes) -> dict[str, Any]:
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("read message", why=f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ProtocolError("read message", why="not a JSON object")
    return body
