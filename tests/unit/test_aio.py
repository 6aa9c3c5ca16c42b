"""A connection in an event loop, over a real socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import (
    CommandNotFound,
    HoldfastError,
    InUse,
    MachineFailed,
    NotReleased,
    ProtocolError,
    TimedOut,
)
from holdfast.wire.aio import Connection
from holdfast.wire.frames import CANCEL, CREDIT, DATA, EOF, EVENT, REQUEST, RESPONSE, SYNC, Decoder, Frame
from holdfast.wire.mux import WINDOW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

DEADLINE = 20.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test in a loop of its own; nothing may go wrong unnoticed in it."""

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        async with asyncio.timeout(DEADLINE):
            await test()
        assert complaints == []

    asyncio.run(main())


@contextlib.asynccontextmanager
async def connected(
    on_request: Any = None, on_event: Any = None, on_lost: Any = None
) -> AsyncIterator[tuple[Connection, Connection]]:
    """A client, and a server that answers with ``on_request``."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    client, server = Connection(on_lost=on_lost), Connection(on_request, on_event)
    await loop.create_connection(lambda: client, sock=ours)
    await loop.create_connection(lambda: server, sock=theirs)
    try:
        yield client, server
    finally:
        for connection in (client, server):
            connection.fail(ProtocolError("end of the test"))
        await asyncio.sleep(0)


class Peer:
    """The other end as bare bytes: a peer that does whatever the test wants."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.decoder = Decoder()
        self.frames: list[Frame] = []

    async def send(self, *frames: Frame | bytes) -> None:
        data = b"".join(frame if isinstance(frame, bytes) else frame.encode() for frame in frames)
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def frame(self) -> Frame:
        while not self.frames:
            data = await asyncio.get_running_loop().sock_recv(self.end, 65536)
            assert data, "closed"
            self.frames += self.decoder.feed(data)
        return self.frames.pop(0)


@contextlib.asynccontextmanager
async def against(on_request: Any = None, on_event: Any = None) -> AsyncIterator[tuple[Connection, Peer]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    connection = Connection(on_request, on_event)
    await asyncio.get_running_loop().create_connection(lambda: connection, sock=ours)
    try:
        with theirs:
            yield connection, Peer(theirs)
    finally:
        connection.fail(ProtocolError("end of the test"))
        await asyncio.sleep(0)


async def echo(_connection: Connection, method: str, params: dict[str, Any]) -> Any:
    return {"method": method, **params}


# -- requests ---------------------------------------------------------------------------------


def test_requests_and_answers():
    async def test() -> None:
        async with connected(echo) as (client, _):
            assert await client.request("m", {"x": 1}, 5) == {"method": "m", "x": 1}
            answers = await asyncio.gather(*(client.request("m", {"n": n}, 5) for n in range(50)))
            assert [answer["n"] for answer in answers] == list(range(50))

    run(test)


def test_answers_come_in_any_order():
    async def test() -> None:
        gates = {name: asyncio.Event() for name in "ab"}

        async def serve(_connection: Connection, method: str, _params: dict[str, Any]) -> str:
            await gates[method].wait()
            return method

        async with connected(serve) as (client, _):
            tasks = {name: asyncio.ensure_future(client.request(name, {}, 5)) for name in "ab"}
            gates["b"].set()
            assert await tasks["b"] == "b"
            assert not tasks["a"].done()
            gates["a"].set()
            assert await tasks["a"] == "a"

    run(test)


@pytest.mark.parametrize(
    "error",
    [
        InUse("open disk", subject="/d", why="pod p has it", hint="end it", code="disk-in-use"),
        CommandNotFound("run", subject="nosuch"),
        NotReleased("release", causes=[TimedOut("unplug", subject="0:1"), InUse("x")]),
    ],
)
def test_errors_cross_as_what_they_are(error):
    async def test() -> None:
        async def fail(*_: object) -> None:
            raise error

        async with connected(fail) as (client, _):
            with pytest.raises(type(error)) as failure:
                await client.request("m", {}, 5)
            assert failure.value.as_dict() == error.as_dict()
            assert str(failure.value) == str(error)
            assert failure.value.exit_status == error.exit_status

    run(test)


@pytest.mark.parametrize("error", [OSError(2, "No such file", "/x"), KeyError("k"), ValueError("v")])
def test_other_errors_cross_too(error):
    async def test() -> None:
        async def fail(*_: object) -> None:
            raise error

        async with connected(fail) as (client, _):
            with pytest.raises(HoldfastError):
                await client.request("m", {}, 5)

    run(test)


def test_a_result_that_cannot_be_sent():
    async def test() -> None:
        async def serve(*_: object) -> object:
            return object()

        async with connected(serve) as (client, _):
            with pytest.raises(ProtocolError, match="not JSON"):
                await client.request("m", {}, 5)

    run(test)


def test_deadline_and_cancel_reach_the_peer():
    async def test() -> None:
        async with against() as (connection, peer):
            with pytest.raises(TimedOut, match=r"request m: no answer within 0\.01 s") as failure:
                await connection.request("m", {"x": 1}, 0.01)
            assert failure.value.retryable
            request = await peer.frame()
            assert request.kind == REQUEST
            assert b'"deadline_ms":10' in request.payload
            assert await peer.frame() == Frame(CANCEL, request.channel)
            # The late answer belongs to nobody, and the next request is not confused by it.
            await peer.send(Frame(RESPONSE, request.channel, b'{"result":1}'))
            task = asyncio.ensure_future(connection.request("n", {}, 5))
            following = await peer.frame()
            assert following.channel != request.channel
            await peer.send(Frame(RESPONSE, following.channel, b'{"result":2}'))
            assert await task == 2

    run(test)


def test_who_is_cancelled_cancels_at_the_peer():
    async def test() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def serve(*_: object) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with connected(serve) as (client, _):
            task = asyncio.ensure_future(client.request("m", {}, 5))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended.wait()

    run(test)


def test_a_request_that_is_cancelled_before_it_was_begun():
    """Both frames in one piece: the task is cancelled before its first step, and its number must be free again."""

    async def test() -> None:
        request = Frame(REQUEST, 5, b'{"method":"m","params":{}}')
        async with against(echo) as (_, peer):
            await peer.send(request.encode() + Frame(CANCEL, 5).encode())
            await peer.send(Frame(CANCEL, 99))
            await peer.send(Frame(REQUEST, 6, b'{"method":"m","params":{}}'))
            assert (await peer.frame()).channel == 6
            await peer.send(request)
            assert (await peer.frame()).channel == 5

    run(test)


def test_one_number_twice_at_a_time():
    async def test() -> None:
        async def never(*_: object) -> None:
            await asyncio.Event().wait()

        request = Frame(REQUEST, 5, b'{"method":"m","params":{}}')
        async with against(never) as (connection, peer):
            await peer.send(request, request)
            await connection.lost
            assert isinstance(connection.error, ProtocolError)

    run(test)


@pytest.mark.parametrize("body", [b"{}", b'{"method":1,"params":{}}', b'{"method":"m"}', b'{"method":"m","params":[]}'])
def test_malformed_requests_are_answered(body):
    async def test() -> None:
        async with against(echo) as (_, peer):
            await peer.send(Frame(REQUEST, 1, body))
            answer = await peer.frame()
            assert (answer.kind, answer.channel) == (RESPONSE, 1)
            assert b'"ProtocolError"' in answer.payload

    run(test)


def test_events():
    async def test() -> None:
        seen: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        async with connected(on_event=lambda *event: seen.put_nowait(event)) as (client, _):
            client.event("one", {"x": 1})
            client.event("two", {})
            assert [await seen.get(), await seen.get()] == [("one", {"x": 1}), ("two", {})]
        client.event("late", {})
        async with against(on_event=lambda *event: seen.put_nowait(event)) as (_, peer):
            await peer.send(Frame(EVENT, 0, b'{"event":1,"params":{}}'), Frame(EVENT, 0, b'{"event":"e"}'))
            await peer.send(Frame(EVENT, 0, b'{"event":"good","params":{}}'))
            assert await seen.get() == ("good", {})

    run(test)


# -- losing it --------------------------------------------------------------------------------


def test_every_waiter_fails_at_once_when_the_connection_is_lost():
    async def test() -> None:
        async with against() as (connection, peer):
            reader, writer = connection.open_stream(), connection.open_stream()
            waiters = [
                *(asyncio.ensure_future(connection.request("m", {}, 1000)) for _ in range(3)),
                asyncio.ensure_future(connection.synchronise(1000)),
            ]
            while (await peer.frame()).kind != SYNC:
                pass
            reader, writer = connection.open_stream(), connection.open_stream()
            waiters += [
                asyncio.ensure_future(reader.read()),
                asyncio.ensure_future(writer.write(bytes(2 * WINDOW))),
            ]
            await asyncio.sleep(0)
            peer.end.close()
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
            assert all(isinstance(outcome, ProtocolError) for outcome in outcomes), outcomes
            assert {outcome.code for outcome in outcomes} == {"connection-lost"}
            assert connection.lost.done()
            for late in (
                connection.request("m", {}, 5), connection.synchronise(5), reader.read(), writer.write(b"x"),
            ):  # fmt: skip
                with pytest.raises(ProtocolError):
                    await late
            connection.event("late", {})
            writer.write_eof()
            reader.close()

    run(test)


def test_the_owner_may_know_better_why():
    async def test() -> None:
        lost = asyncio.Event()
        async with connected(on_lost=lost.set) as (client, server):
            task = asyncio.ensure_future(client.request("m", {}, 1000))
            await asyncio.sleep(0)
            server.fail(ProtocolError("gone"))
            await lost.wait()
            assert not task.done()
            client.fail(MachineFailed("use the machine", why="QEMU was killed by signal 9"))
            client.fail(ProtocolError("too late"))
            with pytest.raises(MachineFailed, match="signal 9"):
                await task

    run(test)


def test_what_is_being_answered_ends_with_the_connection():
    async def test() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def serve(*_: object) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with against(serve) as (_, peer):
            await peer.send(Frame(REQUEST, 1, b'{"method":"m","params":{}}'))
            await began.wait()
            peer.end.close()
            await ended.wait()

    run(test)


def test_garbage_is_skipped():
    async def test() -> None:
        async with against(echo) as (_, peer):
            await peer.send(b"\x1f\xd5 boot messages \x1f", Frame(REQUEST, 1, b'{"method":"m","params":{}}'))
            assert (await peer.frame()).channel == 1

    run(test)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(EVENT, 0, b"no json"),
        Frame(CREDIT, 1, b"\xff\xff\xff\xff"),
        Frame(RESPONSE, 1, b"[" * 50_000),
    ],
)
def test_a_peer_that_breaks_the_protocol_loses_the_connection(frame):
    async def test() -> None:
        async with against() as (connection, peer):
            connection.open_stream(1)
            task = asyncio.ensure_future(connection.request("m", {}, 1000))
            await peer.frame()
            await peer.send(frame)
            with pytest.raises(ProtocolError):
                await task

    run(test)


@pytest.mark.parametrize("answer", [b'{"error":{"causes":[1,{}],"kind":7,"what":[]}}', b'{"error":{}}'])
def test_an_error_of_the_wrong_shape_is_an_error_all_the_same(answer):
    async def test() -> None:
        async with against() as (connection, peer):
            task = asyncio.ensure_future(connection.request("m", {}, 1000))
            request = await peer.frame()
            await peer.send(Frame(RESPONSE, request.channel, answer))
            with pytest.raises(HoldfastError):
                await task

    run(test)


# -- streams ----------------------------------------------------------------------------------


def test_streams_both_ways_with_half_close():
    async def test() -> None:
        async with connected() as (client, server):
            ours, theirs = client.open_stream(3), server.open_stream(3)
            data = bytes(range(256)) * 4096  # four windows
            assert len(data) == 4 * WINDOW

            async def read_all() -> bytes:
                parts = []
                while part := await theirs.read():
                    parts.append(part)
                return b"".join(parts)

            reading = asyncio.ensure_future(read_all())
            await ours.write(data)
            ours.write_eof()
            ours.write_eof()
            assert await reading == data
            assert await theirs.read() == b""
            await theirs.write(b"still open this way")
            assert await ours.read() == b"still open this way"
            theirs.write_eof()
            assert await ours.read() == b""
            with pytest.raises(ProtocolError, match="closed"):
                await ours.write(b"after the end")

    run(test)


def test_a_slow_reader_does_not_stop_another_stream():
    async def test() -> None:
        async with connected(echo) as (client, server):
            slow, quick = client.open_stream(), client.open_stream()
            slow_end, quick_end = server.open_stream(slow.channel), server.open_stream(quick.channel)
            writing = asyncio.ensure_future(slow.write(bytes(3 * WINDOW)))
            await quick.write(b"through")
            assert await quick_end.read() == b"through"
            assert await client.request("m", {}, 5) == {"method": "m"}
            assert not writing.done()
            size = 0
            while size < 3 * WINDOW:
                size += len(await slow_end.read())
            await writing

    run(test)


def test_nobody_holds_more_than_a_window():
    async def test() -> None:
        async with against() as (connection, peer):
            stream = connection.open_stream(1)
            writing = asyncio.ensure_future(stream.write(bytes(2 * WINDOW)))
            size = 0
            while size < WINDOW:
                size += len((await peer.frame()).payload)
            assert size == WINDOW
            assert not writing.done()
            await peer.send(Frame(CREDIT, 1, WINDOW.to_bytes(4, "big")))
            await writing

    run(test)


def test_closing_tells_who_waits():
    async def test() -> None:
        async with against() as (connection, peer):
            stream = connection.open_stream(1)
            reading = asyncio.ensure_future(stream.read())
            writing = asyncio.ensure_future(stream.write(bytes(2 * WINDOW)))
            await peer.frame()
            stream.close()
            assert await reading == b""
            with pytest.raises(ProtocolError, match="closed"):
                await writing
            await peer.send(Frame(DATA, 1, b"late"), Frame(EOF, 1), Frame(CREDIT, 1, b"\0\0\0\1"))
            assert connection.open_stream(1).channel == 1

    run(test)


def test_empty_data_is_not_the_end():
    async def test() -> None:
        async with against() as (connection, peer):
            stream = connection.open_stream(1)
            await peer.send(Frame(DATA, 1), Frame(DATA, 1, b"more"), Frame(EOF, 1))
            assert await stream.read() == b"more"
            assert await stream.read() == b""

    run(test)


def test_stream_numbers():
    async def test() -> None:
        async with against() as (connection, _):
            assert [connection.open_stream().channel for _ in range(2)] == [1, 2]
            connection.open_stream(3)
            assert connection.open_stream().channel == 4
            with pytest.raises(ProtocolError, match="taken"):
                connection.open_stream(2)

    run(test)


def test_synchronise():
    async def test() -> None:
        async with connected(echo) as (client, server):
            old, old_end = client.open_stream(1), server.open_stream(1)
            reading = asyncio.ensure_future(old_end.read())
            await asyncio.sleep(0)
            await client.synchronise(5)
            assert await reading == b""
            with pytest.raises(ProtocolError):
                await old.write(b"x")
            ours, theirs = client.open_stream(1), server.open_stream(1)
            await ours.write(b"new")
            assert await theirs.read() == b"new"
            assert await client.request("m", {}, 5)

    run(test)


def test_synchronise_wants_its_own_epoch():
    async def test() -> None:
        async with against() as (connection, peer):
            task = asyncio.ensure_future(connection.synchronise(0.05))
            sync = await peer.frame()
            assert sync.kind == SYNC
            await peer.send(Frame(2, 0, b"another epoch"))
            with pytest.raises(TimedOut, match="wait for the agent"):
                await task
            task = asyncio.ensure_future(connection.synchronise(5))
            fresh = await peer.frame()
            assert fresh.payload != sync.payload
            await peer.send(Frame(2, 0, sync.payload), Frame(2, 0, fresh.payload))
            await task

    run(test)
