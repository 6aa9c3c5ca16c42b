"""QEMU's control protocol against a server that says what QEMU would, in the order that a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import Exhausted, HoldfastError, MachineFailed, NotReleased, TimedOut
from holdfast.machine import qmp as qmp_module
from holdfast.machine.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": ["oob"]}}
#: What a request may take: never reached, for what ends it must do so by itself.
LONG = 60.0
#: How long a test waits for that, which is less than any deadline of a request that is not the test's own.
GUARD = 5.0
#: For what shall not come: long enough for it to come if it did.
SHORT = 0.02
DIED = MachineFailed("use the machine", why="QEMU was killed by signal 9", code="machine-died")


class Server:
    """QEMU's end of the socket pair.

    Attributes:
        fds: descriptors that came with commands; this end's own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.fds: list[int] = []
        self._socket = sock
        self._text = ""
        self._commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._read)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionResetError):  # closed, with something unread
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 8)
            self.fds += fds
        if not data:
            self.hang_up()
        self._text = (self._text + data.decode()).lstrip()  # a descriptor comes with a space
        with contextlib.suppress(json.JSONDecodeError):  # the rest of it comes later
            while self._text:  # nothing but its own syntax ends a command
                command, end = json.JSONDecoder().raw_decode(self._text)
                self._text = self._text[end:].lstrip()
                self._commands.put_nowait(command)

    def say(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\r\n")

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The next command, which must be this one."""
        async with asyncio.timeout(GUARD):
            message = await self._commands.get()
        assert message["execute"] == name
        if arguments is not None:
            assert message["arguments"] == arguments
        return message

    def answer(self, command: dict[str, Any], result: object = None) -> None:
        self.say({"return": result or {}, "id": command["id"]})

    def refuse(self, command: dict[str, Any], why: str, kind: str = "GenericError") -> None:
        self.say({"error": {"class": kind, "desc": why}, "id": command["id"]})

    def event(self, name: str, data: dict[str, Any]) -> None:
        self.say({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    async def greet(self) -> None:
        self.say(GREETING)
        await self.command("qmp_capabilities")
        self.say({"return": {}})

    def nothing_asked(self) -> bool:
        return self._commands.empty()

    def hang_up(self) -> None:
        """QEMU is gone; a second call does nothing."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()


class Talk:
    """Both ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.full: list[str] = []
        self.qmp = Qmp(ours, self.full.append)
        self.server = Server(theirs)

    async def end(self) -> None:
        await self.qmp.close()
        self.server.hang_up()
        for fd in self.server.fds:
            os.close(fd)

    async def connect(self) -> None:
        await asyncio.gather(self.qmp.connect(LONG), self.server.greet())

    async def given_up(self) -> None:
        """Waits until the library has cleaned up after a connection that nobody waits for any more."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=GUARD)

    @contextlib.asynccontextmanager
    async def asking(self, request: Awaitable[Any]) -> AsyncIterator[asyncio.Task[Any]]:
        """Something is asked for while the server does the block; both must end."""
        task = asyncio.ensure_future(request)
        try:
            yield task
        finally:
            await asyncio.wait({task}, timeout=GUARD)

    async def lose(self, request: Awaitable[Any], command: str) -> asyncio.Task[Any]:
        """A request that QEMU has got when it ends."""
        task = asyncio.ensure_future(request)
        await self.server.command(command)
        self.server.hang_up()
        return task


def run(test: Callable[[Talk], Awaitable[None]], *, connected: bool = True) -> None:
    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        talk = Talk()
        try:
            async with asyncio.timeout(4 * GUARD):
                if connected:
                    await talk.connect()
                await test(talk)
        finally:
            await talk.end()
        assert complaints == []

    asyncio.run(main())


# -- greeting ---------------------------------------------------------------------------------


def test_greeting_and_a_command():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("query-version", {"a": 1})) as asked:
            talk.server.answer(await talk.server.command("query-version", {"a": 1}), [7])
        assert asked.result() == [7]

    run(test)


@pytest.mark.parametrize("greeting", [{"QMP": {}}, {"hello": 1}, {}])
def test_a_greeting_that_is_none(greeting):
    async def test(talk: Talk) -> None:
        talk.server.say(greeting)
        with pytest.raises(MachineFailed, match="QEMU greet"):
            await talk.qmp.connect(LONG)

    run(test, connected=False)


def test_an_end_instead_of_a_greeting():
    async def test(talk: Talk) -> None:
        talk.server.hang_up()
        with pytest.raises(MachineFailed):
            await talk.qmp.connect(LONG)

    run(test, connected=False)


def test_no_greeting_in_time():
    async def test(talk: Talk) -> None:
        with pytest.raises(TimedOut, match=r"greet: no answer within 0\.02 s"):
            await talk.qmp.connect(SHORT)
        await talk.given_up()

    run(test, connected=False)


def test_death_before_the_greeting():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.connect(LONG)) as asked:
            await asyncio.wait({asked}, timeout=SHORT)
            talk.qmp.fail(DIED)
        assert asked.exception() is DIED
        await talk.given_up()

    run(test, connected=False)


# -- commands ---------------------------------------------------------------------------------


def test_a_refused_command():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("device_add", {})) as asked:
            talk.server.refuse(await talk.server.command("device_add"), "Bus 'scsi9' not found")
        with pytest.raises(MachineFailed, match="QEMU device_add: Bus 'scsi9' not found") as failure:
            asked.result()
        assert failure.value.code == "qemu-refused"

    run(test)


def test_no_space_left():
    """A full host disk is something else than a refusal: making room and trying again helps."""

    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("block_resize", {})) as asked:
            talk.server.refuse(await talk.server.command("block_resize"), "Failed to grow: No space left on device")
        with pytest.raises(Exhausted, match="No space left") as failure:
            asked.result()
        assert failure.value.code == "disk-full"

    run(test)


def test_no_answer_in_time(monkeypatch):
    """What comes too late is nobody's: the next command gets its own answer."""
    monkeypatch.setattr(qmp_module, "COMMAND_SECONDS", SHORT)

    async def test(talk: Talk) -> None:
        with pytest.raises(TimedOut, match=r"query-late: no answer within 0\.02 s"):
            await talk.qmp.execute("query-late", {})
        late = await talk.server.command("query-late")
        monkeypatch.setattr(qmp_module, "COMMAND_SECONDS", LONG)
        async with talk.asking(talk.qmp.execute("query-next", {})) as asked:
            talk.server.answer(late, ["late"])
            talk.server.answer(await talk.server.command("query-next"), ["next"])
        assert asked.result() == ["next"]

    run(test)


def test_a_command_that_is_given_up_makes_room_for_the_next():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("query-slow", {})) as slow:
            await talk.server.command("query-slow")
            slow.cancel()
        assert slow.cancelled()
        async with talk.asking(talk.qmp.execute("query-next", {})) as asked:
            talk.server.answer(await talk.server.command("query-next"), ["next"])
        assert asked.result() == ["next"]

    run(test)


def test_one_command_at_a_time():
    """A descriptor and its command must stay together, whatever else is asked meanwhile."""

    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("first", {})) as first, talk.asking(talk.qmp.execute("second", {})):
            command = await talk.server.command("first")
            await asyncio.wait({first}, timeout=SHORT)
            assert talk.server.nothing_asked()
            talk.server.answer(command)
            talk.server.answer(await talk.server.command("second"))

    run(test)


@pytest.mark.parametrize(
    "why",
    [
        "Failed to find node with node-name='d0-1'",
        "Cannot find device='' nor node-name='d0-1'",
        "File descriptor named 'fdset-id:3' not found",
        "Block node 'd0-1' does not exist",
    ],
)
def test_removing_what_is_not_there_is_success(why):
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute_if_there("blockdev-del", {})) as asked:
            talk.server.refuse(await talk.server.command("blockdev-del"), why)
        asked.result()

    run(test)


def test_removing_what_cannot_be_removed_is_none():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute_if_there("blockdev-del", {})) as asked:
            talk.server.refuse(await talk.server.command("blockdev-del"), "Block device d0-1 is in use")
        with pytest.raises(MachineFailed, match="is in use"):
            asked.result()

    run(test)


@pytest.mark.parametrize("command", ["add-fd", "getfd"])
def test_descriptors(command, tmp_path):
    """QEMU gets a descriptor of its own, of the same file, with the command that names it; ours stays open."""

    async def test(talk: Talk) -> None:
        with open(tmp_path / "disk", "w") as file:
            one = talk.qmp.add_fd(3, file.fileno()) if command == "add-fd" else talk.qmp.get_fd("name", file.fileno())
            async with talk.asking(one) as asked:
                arguments = {"fdset-id": 3} if command == "add-fd" else {"fdname": "name"}
                talk.server.answer(await talk.server.command(command, arguments), {"fdset-id": 3, "fd": 17})
            assert asked.result() == (17 if command == "add-fd" else None)
            [passed] = talk.server.fds
            assert passed != file.fileno()
            assert os.path.sameopenfile(passed, file.fileno())

    run(test)


# -- events -----------------------------------------------------------------------------------


def test_a_full_disk_of_the_host_is_told():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("query-status", {})):
            talk.server.event("BLOCK_IO_ERROR", {"device": "", "node-name": "d0-1", "nospace": True})
            talk.server.event("BLOCK_IO_ERROR", {"device": "other", "node-name": "d0-2", "nospace": False})
            talk.server.event("BLOCK_IO_ERROR", {"device": "", "nospace": True})
            talk.server.event("STOP", {})
            talk.server.answer(await talk.server.command("query-status"))
        assert talk.full == ["d0-1", "disk"]

    run(test)


def test_a_device_is_gone_when_that_is_said():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as asked:
            talk.server.answer(await talk.server.command("device_del", {"id": "disk0"}))
            talk.server.event("DEVICE_DELETED", {"device": "disk1", "path": "/machine/peripheral/disk1"})
            talk.server.event("DEVICE_DELETED", {"path": "/machine/peripheral/disk0/virtio-backend"})
            await asyncio.wait({asked}, timeout=SHORT)
            assert not asked.done()
            talk.server.event("DEVICE_DELETED", {"device": "disk0", "path": "/machine/peripheral/disk0"})
        asked.result()

    run(test)


def test_a_device_may_be_gone_before_the_answer():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as asked:
            command = await talk.server.command("device_del")
            talk.server.event("DEVICE_DELETED", {"device": "disk0"})
            talk.server.event("DEVICE_DELETED", {"device": "disk0"})
            talk.server.answer(command)
        asked.result()

    run(test)


def test_devices_are_removed_side_by_side():
    """QEMU takes its time for each; nobody waits for another's."""

    async def test(talk: Talk) -> None:
        async with (
            talk.asking(talk.qmp.delete_device("disk0", LONG)) as one,
            talk.asking(talk.qmp.delete_device("disk1", LONG)) as other,
        ):
            for device in ("disk0", "disk1"):
                talk.server.answer(await talk.server.command("device_del", {"id": device}))
            talk.server.event("DEVICE_DELETED", {"device": "disk1"})
            await other
            assert not one.done()
            talk.server.event("DEVICE_DELETED", {"device": "disk0"})
        one.result()

    run(test)


def test_a_device_that_is_not_there_is_gone():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as asked:
            command = await talk.server.command("device_del")
            talk.server.refuse(command, "Device 'disk0' not found", "DeviceNotFound")
        asked.result()

    run(test)


def test_a_device_that_cannot_be_removed():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as asked:
            talk.server.refuse(await talk.server.command("device_del"), "Bus 'pcie.0' does not support hotplugging")
        with pytest.raises(MachineFailed, match="hotplugging") as failure:
            asked.result()
        assert failure.value.code == "qemu-refused"

    run(test)


@pytest.mark.parametrize("meanwhile", [False, True], ids=["is-going", "has-gone-meanwhile"])
def test_a_device_that_stays_for_a_while(meanwhile):
    """The guest may let go after the deadline: then the next try finds it gone, or waits for the same event."""

    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", SHORT)) as asked:
            talk.server.answer(await talk.server.command("device_del"))
        with pytest.raises(NotReleased, match=r"unplug disk disk0: no answer within 0\.02 s") as failure:
            asked.result()
        assert failure.value.code == "device-not-gone"
        assert failure.value.retryable
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as asked:
            if meanwhile:
                talk.server.event("DEVICE_DELETED", {"device": "disk0"})
                talk.server.refuse(
                    await talk.server.command("device_del"), "Device 'disk0' not found", "DeviceNotFound"
                )
            else:
                command = await talk.server.command("device_del", {"id": "disk0"})
                talk.server.refuse(command, "Device disk0 is already in the process of unplug")
                await asyncio.wait({asked}, timeout=SHORT)
                assert not asked.done()
                talk.server.event("DEVICE_DELETED", {"device": "disk0"})
        asked.result()

    run(test)


def test_what_is_said_when_nobody_waits_for_it_is_no_harm():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("query-status", {})) as asked:
            talk.server.event("DEVICE_DELETED", {"device": "disk0"})
            talk.server.say({"event": "DEVICE_DELETED", "timestamp": {}})
            talk.server.say({"event": "BLOCK_IO_ERROR", "data": "nospace", "timestamp": {}})
            talk.server.answer(await talk.server.command("query-status"))
        asked.result()
        assert talk.full == []

    run(test)


# -- the end ----------------------------------------------------------------------------------


def test_death_in_the_middle_is_everybodys():
    """The connection ends a moment before it is known why: each waiter, and whoever comes later, is told why."""

    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.delete_device("disk0", LONG)) as removing:
            talk.server.answer(await talk.server.command("device_del"))
            running = asyncio.ensure_future(talk.qmp.execute("running", {}))
            await talk.server.command("running")
            queued = asyncio.ensure_future(talk.qmp.execute("queued", {}))
            talk.server.hang_up()
            waiters = {removing, running, queued}
            done, _ = await asyncio.wait(waiters, timeout=SHORT)
            assert done == set()
            talk.qmp.fail(DIED)
            async with asyncio.timeout(GUARD):
                outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert outcomes == [DIED] * 3
        for later in (
            talk.qmp.execute("query-status", {}),
            talk.qmp.execute_if_there("blockdev-del", {}),
            talk.qmp.delete_device("disk0", LONG),
            talk.qmp.add_fd(1, 0),
            talk.qmp.get_fd("name", 0),
        ):
            with pytest.raises(MachineFailed) as failure:
                await later
            assert failure.value is DIED

    run(test)


def test_death_that_is_known_before_the_connection_ends():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("running", {})) as running:
            await talk.server.command("running")
            talk.qmp.fail(DIED)
        assert running.exception() is DIED

    run(test)


def test_death_that_nobody_explains(monkeypatch):
    """QEMU may close its end without ending: then the connection's own error must do."""
    monkeypatch.setattr(qmp_module, "_DEATH_SECONDS", SHORT)

    async def test(talk: Talk) -> None:
        running = await talk.lose(talk.qmp.execute("running", {}), "running")
        with pytest.raises(MachineFailed, match="QEMU running: ") as failure:
            await running
        assert failure.value.code == "machine-died"
        for later in (talk.qmp.execute("query-status", {}), talk.qmp.add_fd(1, 0)):
            with pytest.raises(MachineFailed) as failure:
                await later
            assert failure.value.code == "machine-died"

    run(test)


def test_a_waiter_of_death_may_give_up():
    async def test(talk: Talk) -> None:
        running = await talk.lose(talk.qmp.execute("running", {}), "running")
        await asyncio.wait({running}, timeout=SHORT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        talk.qmp.fail(DIED)
        with pytest.raises(MachineFailed, match="signal 9"):
            await talk.qmp.execute("query-status", {})

    run(test)


@pytest.mark.parametrize("connected", [True, False])
def test_close_twice(connected):
    async def test(talk: Talk) -> None:
        for _ in range(2):
            await talk.qmp.close()
        with pytest.raises(HoldfastError) as failure:
            await talk.qmp.execute("query-status", {})
        assert failure.value.code == "machine-closed"

    run(test, connected=connected)


@pytest.mark.parametrize("hangs_up", [True, False])
def test_closing_after_death_keeps_its_reason(hangs_up):
    async def test(talk: Talk) -> None:
        if hangs_up:
            talk.server.hang_up()
        talk.qmp.fail(DIED)
        await talk.qmp.close()
        with pytest.raises(MachineFailed, match="signal 9"):
            await talk.qmp.execute("query-status", {})

    run(test)


def test_closing_ends_what_waits():
    async def test(talk: Talk) -> None:
        async with talk.asking(talk.qmp.execute("running", {})) as running:
            await talk.server.command("running")
            await talk.qmp.close()
        with pytest.raises(MachineFailed) as failure:
            running.result()
        assert failure.value.code == "machine-closed"

    run(test)
