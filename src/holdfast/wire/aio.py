"""A connection in an asyncio loop: requests with deadlines, events, streams.

The monitor uses one of these towards the agent and one towards each client.  When the connection is
lost every waiter fails at once, with the reason that its owner gives.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError, ProtocolError, TimedOut, from_dict, from_exception
from holdfast.wire.frames import CANCEL, CREDIT, DATA, EOF, EVENT, REQUEST, RESPONSE, SYNC, SYNCED
from holdfast.wire.mux import Mux

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.wire.mux import Incoming

    Handler = Callable[["Connection", str, dict[str, Any]], Awaitable[object]]


class Stream:
    """One stream of a connection, both directions."""

    def __init__(self, connection: Connection, channel: int) -> None:
        self._connection = connection
        self.channel = channel
        self._chunks: list[bytes] = []
        self._eof = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes, ``b""`` at the end; reading gives the sender credit.

        Raises:
            HoldfastError: the connection was lost.
        """
        while not self._chunks:
            if self._eof:
                return b""
            await self._wait()
        data = self._chunks.pop(0)
        self._connection.consumed(self.channel, len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Sends all of ``data``, as the reader gives credit.

        Raises:
            HoldfastError: the connection was lost.
        """
        view = memoryview(data)
        while view:
            room = self._connection.room(self.channel)
            if not room:
                if self._connection.error is None and not self._connection.is_writable(self.channel):
                    raise ProtocolError("write to stream", subject=self.channel, why="it has been closed")
                await self._wait()
                continue
            self._connection.send_data(self.channel, bytes(view[:room]))
            view = view[room:]

    def write_eof(self) -> None:
        """Says that no more bytes come."""
        self._connection.send_eof(self.channel)

    def close(self) -> None:
        """Forgets the stream; who reads or writes it is told that it has ended."""
        self._connection.close_stream(self.channel)

    async def _wait(self) -> None:
        self._changed.clear()
        self._connection.check()
        await self._changed.wait()
        self._connection.check()

    def arrived(self, kind: int, data: bytes) -> None:
        """Called by the connection for every frame of this stream."""
        if kind == DATA:
            self._chunks.append(data)
        elif kind == EOF:
            self._eof = True
        self._changed.set()


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        on_request: answers the peer's requests; what it raises becomes the answer's error.
        on_event: takes the peer's events.
        on_lost: called when the peer has closed; it must :meth:`fail` the connection, now or soon, with a
            better reason than that.  Without it the connection fails at once.
    """

    def __init__(
        self,
        on_request: Handler | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self._on_lost = on_lost
        self._on_request = on_request
        self._on_event = on_event
        self._mux = Mux()
        self._transport: asyncio.Transport | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, Stream] = {}
        self._synced: asyncio.Future[None] | None = None
        self._epoch = b""
        self._next_channel = 1
        self._holding = False
        self.error: HoldfastError | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- for its users ------------------------------------------------------------------------

    async def request(self, method: str, params: dict[str, Any], seconds: float, *, last: bool = False) -> Any:
        """Sends a request and waits for its answer.

        Args:
            last: nothing is sent after it until :meth:`go_on`.

        Raises:
            TimedOut: no answer within ``seconds``; the peer is told that nobody waits any more.
            HoldfastError: what the peer answered, or why the connection was lost.
        """
        self.check()
        request_id = self._mux.request(method, params, int(seconds * 1000))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = future
        self._flush()
        self._holding |= last
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            self._abandon(request_id)
            raise TimedOut("request", subject=method, why=f"no answer within {seconds:g} s") from None
        except asyncio.CancelledError:
            self._abandon(request_id)
            raise
        finally:
            self._pending.pop(request_id, None)

    def go_on(self) -> None:
        """Sends what was held back after a last request."""
        self._holding = False
        self._flush()

    def _abandon(self, request_id: int) -> None:
        if self.error is None:
            self._mux.cancel(request_id)
            self._flush()

    async def synchronise(self, seconds: float) -> None:
        """Makes both sides forget what was before; returns when the peer has echoed a fresh epoch.

        Raises:
            TimedOut: it did not within ``seconds``.
        """
        self.check()
        self._epoch = os.urandom(16)
        self._synced = asyncio.get_running_loop().create_future()
        self._mux.sync(self._epoch)
        self._end_streams()
        self._flush()
        try:
            async with asyncio.timeout(seconds):
                await self._synced
        except TimeoutError:
            raise TimedOut("wait for the agent", why=f"no answer within {seconds:g} s") from None

    def event(self, name: str, params: dict[str, Any]) -> None:
        """Sends an event; lost silently when the connection is."""
        if self.error is None:
            self._mux.event(name, params)
            self._flush()

    def open_stream(self, channel: int = 0) -> Stream:
        """A stream under ``channel``, or under the next number that is free."""
        if not channel:
            while self._next_channel in self._streams:
                self._next_channel += 1
            channel = self._next_channel
            self._next_channel += 1
        self._mux.open(channel)
        stream = self._streams[channel] = Stream(self, channel)
        return stream

    async def stop_serving(self) -> None:
        """Cancels the requests of the peer that are being answered, and waits until each has cleaned up."""
        current = asyncio.current_task()
        tasks = [task for task in self._serving.values() if task is not current]
        for task in tasks:
            if not task.cancelling():  # a second cancellation would interrupt the cleaning up after the first
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def check(self) -> None:
        """Raises the error that ended the connection, if one has."""
        if self.error is not None:
            raise self.error

    def fail(self, error: HoldfastError) -> None:
        """Ends the connection: every waiter gets ``error``, now and later."""
        if self.error is not None:
            return
        self.error = error
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)
        if self._synced is not None and not self._synced.done():
            self._synced.set_exception(error)
        for stream in self._streams.values():
            stream.arrived(0, b"")
        for task in self._serving.values():
            task.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
        if self._transport is not None:
            self._transport.close()

    # -- for its streams ----------------------------------------------------------------------

    def room(self, channel: int) -> int:
        """See :meth:`Mux.room`."""
        return self._mux.room(channel)

    def is_writable(self, channel: int) -> bool:
        """See :meth:`Mux.is_writable`."""
        return self._mux.is_writable(channel)

    def send_data(self, channel: int, data: bytes) -> None:
        """See :meth:`Mux.write`."""
        self._mux.write(channel, data)
        self._flush()

    def send_eof(self, channel: int) -> None:
        """See :meth:`Mux.write_eof`."""
        if self.error is None:
            self._mux.write_eof(channel)
            self._flush()

    def consumed(self, channel: int, count: int) -> None:
        """See :meth:`Mux.consumed`."""
        if self.error is None:
            self._mux.consumed(channel, count)
            self._flush()

    def close_stream(self, channel: int) -> None:
        """Forgets a stream; its late data is dropped."""
        stream = self._streams.pop(channel, None)
        self._mux.close(channel)
        if stream is not None:
            stream.arrived(EOF, b"")

    def _end_streams(self) -> None:
        """A new epoch knows none of the streams of the one before."""
        for channel in list(self._streams):
            self.close_stream(channel)

    # -- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        try:
            for incoming in self._mux.feed(data):
                self._dispatch(incoming)
        except ProtocolError as error:
            self.fail(error)
        except Exception as error:  # the peer is not trusted: nothing that it sends may leave waiters hanging
            self.fail(ProtocolError("read message", why=f"{type(error).__name__}: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        if self._on_lost is not None and self.error is None:
            self._on_lost()
            return
        self.fail(ProtocolError("connection lost", why=exc or "the peer closed it", code="connection-lost"))

    def _dispatch(self, incoming: Incoming) -> None:
        kind, channel = incoming.kind, incoming.channel
        if self._on_request is None and kind in (REQUEST, CANCEL, SYNC):
            # Whoever serves nothing answers nothing: a guest could have answers pile up that it never reads.
            raise ProtocolError("read message", why="the peer asks, and only answers are expected of it")
        if kind == RESPONSE:
            self._answered(channel, incoming.body)
        elif kind in (DATA, EOF, CREDIT):
            stream = self._streams.get(channel)
            if stream is not None:
                stream.arrived(kind, incoming.data)
        elif kind == EVENT and self._on_event is not None:
            name, params = incoming.body.get("event"), incoming.body.get("params")
            if isinstance(name, str) and isinstance(params, dict):
                self._on_event(name, params)
        elif kind == REQUEST:
            self._start_serving(channel, incoming.body)
        elif kind == CANCEL:
            task = self._serving.get(channel)
            if task is not None:
                task.cancel()
        elif kind == SYNCED and self._synced is not None and not self._synced.done():
            if incoming.data == self._epoch:  # else it answers what somebody asked before
                self._synced.set_result(None)
        elif kind == SYNC:
            self._mux.synced(incoming.data)
            self._end_streams()
            self._flush()

    def _answered(self, request_id: int, body: dict[str, Any]) -> None:
        future = self._pending.get(request_id)
        if future is None or future.done():
            return
        error = body.get("error")
        if isinstance(error, dict):
            future.set_exception(from_dict(error))
        else:
            future.set_result(body.get("result"))

    def _start_serving(self, request_id: int, body: dict[str, Any]) -> None:
        if request_id in self._serving:
            raise ProtocolError("answer request", subject=request_id, why="a request of this number is being answered")
        task = self._serving[request_id] = asyncio.create_task(self._serve(request_id, body))
        # Not in the task's own `finally`: one that is cancelled before it has begun does not get there.
        task.add_done_callback(lambda _: self._serving.pop(request_id, None))

    async def _serve(self, request_id: int, body: dict[str, Any]) -> None:
        try:
            method, params = body.get("method"), body.get("params")
            if self._on_request is None or not isinstance(method, str) or not isinstance(params, dict):
                raise ProtocolError("answer request", subject=method or "", why="unknown or malformed")
            result = await self._on_request(self, method, params)
        except Exception as error:
            self._respond(request_id, None, from_exception(error).as_dict())
        else:
            self._respond(request_id, result, None)

    def _respond(self, request_id: int, result: object, error: dict[str, Any] | None) -> None:
        if self.error is None:
            self._mux.respond(request_id, result, error)
            self._flush()

    def _flush(self) -> None:
        outgoing = self._mux.outgoing
        if outgoing and not self._holding and self._transport is not None and not self._transport.is_closing():
            self._transport.write(bytes(outgoing))
            outgoing.clear()
