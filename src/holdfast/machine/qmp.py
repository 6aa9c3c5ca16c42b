"""QEMU's control protocol: `qemu.qmp` with deadlines, descriptors, and device removal that waits.

Two traps of the library are closed here: its event listeners go silent, without an exception, when the
connection dies, so every wait here also watches for that; and whether an interrupted command ran cannot
be known, so ids are deterministic and removing what is not there is success.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from holdfast.errors import Exhausted, HoldfastError, MachineFailed, NotReleased, TimedOut

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

COMMAND_SECONDS = 10.0
#: From the end of the connection to that of the process.
_DEATH_SECONDS = 2.0


class Qmp:
    """One QMP connection.  Commands run one at a time, so that a descriptor and its command stay together."""

    def __init__(self, sock: socket.socket, on_no_space: Callable[[str], None]) -> None:
        self._socket = sock
        self._on_no_space = on_no_space
        self._client = QMPClient("holdfast")
        self._lock = asyncio.Lock()
        self._error: HoldfastError | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deleted: dict[str, asyncio.Future[None]] = {}
        self._connected = False

    async def connect(self, seconds: float) -> None:
        """Negotiates.

        Raises:
            MachineFailed: QEMU died; with its own last words, if it had any.
            TimedOut: it did not greet within ``seconds``.
        """
        self._socket.setblocking(False)
        self._client.register_listener(EventListener(event_filter=self._on_event))
        try:
            await self._race(self._client.connect(self._socket), seconds, "greet")
        except QMPError as error:
            raise await self._lost("greet", error) from None
        self._connected = True

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        """Runs a command and returns its answer.

        Raises:
            MachineFailed: QEMU refused it (its own text is in ``why``), or has died.
            TimedOut: no answer in time.
        """
        async with self._lock:
            return await self._execute(command, arguments)

    async def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        if self._error is not None:
            raise self._error
        try:
            return await self._race(self._client.execute(command, arguments), COMMAND_SECONDS, command)
        except ExecuteError as error:
            text = str(error)
            if "No space left" in text:
                raise Exhausted(f"QEMU {command}", why=text, code="disk-full") from None
            raise MachineFailed(f"QEMU {command}", why=text, code="qemu-refused") from None
        except QMPError as error:
            raise await self._lost(command, error) from None

    async def execute_if_there(self, command: str, arguments: dict[str, Any]) -> None:
        """Runs a command that removes something; that it is not there any more is success."""
        try:
            await self.execute(command, arguments)
        except MachineFailed as error:
            lowered = error.why.lower()
            if not any(text in lowered for text in ("not found", "cannot find", "failed to find", "does not exist")):
                raise

    async def add_fd(self, fdset: int, fd: int) -> int:
        """Gives QEMU a descriptor as ``/dev/fdset/<fdset>``; ours stays open.  Returns its number in QEMU."""
        async with self._lock:
            await self._send_fd("add-fd", fd)
            return int((await self._execute("add-fd", {"fdset-id": fdset}))["fd"])

    async def get_fd(self, name: str, fd: int) -> None:
        """Gives QEMU a descriptor under a name, for one later command."""
        async with self._lock:
            await self._send_fd("getfd", fd)
            await self._execute("getfd", {"fdname": name})

    async def _send_fd(self, command: str, fd: int) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise await self._lost(command, error) from None

    async def _lost(self, command: str, error: Exception) -> HoldfastError:
        """Why the connection has ended: QEMU has, which is known only a moment later, and then to everybody at once."""
        await asyncio.wait({self._failed}, timeout=_DEATH_SECONDS)
        return self._error or MachineFailed(f"QEMU {command}", why=error, code="machine-died")

    async def delete_device(self, device: str, seconds: float) -> None:
        """Removes a device and waits until QEMU says that it is gone; one that is not there is success.

        Raises:
            NotReleased: the guest did not let go of it in time.
        """
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deleted[device] = gone
        try:
            try:
                await self.execute("device_del", {"id": device})
            except MachineFailed as error:
                if "not found" in error.why:
                    return
                if "in the process of unplug" not in error.why:
                    raise
            await self._race(gone, seconds, f"remove device {device}")
        except TimedOut as error:
            raise NotReleased("unplug disk", subject=device, why=error.why, code="device-not-gone") from None
        finally:
            self._deleted.pop(device, None)

    async def _race(self, awaitable: Any, seconds: float, what: str) -> Any:
        """Waits for ``awaitable``, the machine's death or the deadline, whichever is first."""
        task = asyncio.ensure_future(awaitable)
        try:
            done, _ = await asyncio.wait({task, self._failed}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task in done:
            return task.result()
        task.cancel()
        if self._error is not None:
            raise self._error
        raise TimedOut("QEMU", subject=what, why=f"no answer within {seconds:g} s")

    def _on_event(self, event: Message) -> bool:
        """Sees every event as the listener's filter, and keeps none: a queue that nobody reads would only grow."""
        data = event.get("data")
        if event.get("event") == "BLOCK_IO_ERROR" and isinstance(data, dict) and data.get("nospace"):
            self._on_no_space(str(data.get("node-name") or data.get("device") or "disk"))
        if event.get("event") == "DEVICE_DELETED":
            future = self._deleted.get(str(data.get("device"))) if isinstance(data, dict) else None
            if future is not None and not future.done():
                future.set_result(None)
        return False

    def fail(self, error: HoldfastError) -> None:
        """QEMU is gone: every waiter gets ``error``, now and later."""
        self._error = error
        if not self._failed.done():
            self._failed.set_result(None)

    async def close(self) -> None:
        """Ends the connection; QEMU is expected to be gone already."""
        self.fail(self._error or MachineFailed("use the machine", why="it was closed", code="machine-closed"))
        if self._connected:
            self._connected = False
            with contextlib.suppress(QMPError, OSError, EOFError):
                await self._client.disconnect()
        self._socket.close()
