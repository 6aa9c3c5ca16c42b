"""A client of a monitor: blocking, without an event loop, so that commands start fast.

:meth:`Client.request` sends and waits.  :meth:`Client.attend` connects descriptors of this process to a
process in the pod until that ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from holdfast.errors import NotFound, ProtocolError, TimedOut, from_dict
from holdfast.wire.frames import CREDIT, DATA, EOF, EVENT, RESPONSE
from holdfast.wire.mux import Mux

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.wire.mux import Incoming

STDIN, STDOUT, STDERR = 1, 2, 3


class Client:
    """One connection to a monitor.  Owns its socket.

    Attributes:
        on_say: called with each line that the monitor has to say while it works.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._mux = Mux()
        self._responses: dict[int, dict[str, Any]] = {}
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._streams: list[Incoming] = []
        self.on_say: Callable[[str], None] = lambda _text: None
        self.closed = False

    @classmethod
    def connect(cls, root: Path, pod: str) -> Client:
        """Connects to a running pod's monitor.

        Raises:
            NotFound: there is no such pod, or its monitor is dead.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(root / "pods" / pod / "monitor.sock"))
        except OSError:
            sock.close()
            dead = (root / "pods" / pod).is_dir()
            raise NotFound(
                "find pod", subject=pod, code="pod-not-found",
                why="its monitor is dead" if dead else "there is none of that name",
                hint="holdfast gc lets go of what it left" if dead else "holdfast ps lists the pods",
            ) from None  # fmt: skip
        return cls(sock)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; a second call does nothing."""
        self.closed = True
        self._socket.close()

    def fileno(self) -> int:
        """Of the connection, to wait for its end."""
        return self._socket.fileno()

    def shut_down(self) -> None:
        """Says that no more requests come; what the monitor still sends can be read."""
        with contextlib.suppress(OSError):  # the monitor may be gone already
            self._socket.shutdown(socket.SHUT_WR)

    def request(self, method: str, params: dict[str, Any], seconds: float = 120.0) -> Any:
        """Asks and waits for the answer.

        Raises:
            HoldfastError: what the monitor answered, or that it is gone.
            TimedOut: no answer in time.
        """
        request_id = self._mux.request(method, params, int(seconds * 1000))
        deadline = time.monotonic() + seconds
        while request_id not in self._responses:
            left = deadline - time.monotonic()
            if left <= 0:
                self._mux.cancel(request_id)
                self._flush()
                raise TimedOut(method, why=f"the pod's monitor has not answered within {seconds:g} s")
            self._receive(left)
        body = self._responses.pop(request_id)
        if isinstance(body.get("error"), dict):
            raise from_dict(body["error"])
        return body.get("result")

    def open(self, *channels: int) -> None:
        """Opens streams under these numbers, before the request that uses them."""
        for channel in channels:
            self._mux.open(channel)

    def wait_closed(self, seconds: float, *, unless: str = "") -> bool:
        """Waits until the monitor has closed the connection: it does when it has ended; False if it has not.

        Args:
            unless: an event of this name ends the waiting, too.
        """
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                if unless and self.last_event(unless) is not None:
                    return False
                self._receive(left)
        except ProtocolError:
            return True
        return False

    def last_event(self, name: str) -> dict[str, Any] | None:
        """Takes the oldest event of a name that has arrived, if any."""
        for index, (known, params) in enumerate(self._events):
            if known == name:
                del self._events[index]
                return params
        return None

    # -- a process's stdio --------------------------------------------------------------------

    def attend(
        self,
        key: str,
        stdin_fd: int,
        write: Callable[[int, bytes], None],
        *,
        wakeup_fd: int = -1,
        on_wakeup: Callable[[], None] | None = None,
    ) -> int:
        """Carries a process's stdio until it has ended; returns its exit status.

        Args:
            key: the process.
            stdin_fd: read and forwarded; -1 for none.
            write: takes (``STDOUT`` or ``STDERR``, bytes).
            wakeup_fd, on_wakeup: a descriptor to watch besides, and what to do when it is readable.

        Raises:
            HoldfastError: the machine or its monitor died.
        """
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        if wakeup_fd >= 0:
            poller.register(wakeup_fd, select.POLLIN)
        reading = False
        while True:
            self._deliver(write)
            ended = self._exit_of(key)
            if ended is not None:
                return ended
            wants = stdin_fd >= 0 and self._mux.room(STDIN) > 0
            if wants != reading and stdin_fd >= 0:
                if wants:
                    poller.register(stdin_fd, select.POLLIN)
                else:
                    poller.unregister(stdin_fd)
                reading = wants
            for fd, _events in poller.poll():
                if fd == self._socket.fileno():
                    self._receive(None)
                elif fd == wakeup_fd and on_wakeup is not None:
                    on_wakeup()
                elif fd == stdin_fd and not self._forward(stdin_fd):
                    poller.unregister(stdin_fd)
                    stdin_fd, reading = -1, False

    def _exit_of(self, key: str) -> int | None:
        for index, (name, params) in enumerate(self._events):
            if name == "exit" and params.get("key") == key:
                del self._events[index]
                code = int(params.get("code", -1))
                if code < 0:
                    error = params.get("error")
                    raise from_dict(error if isinstance(error, dict) else {"what": "run", "code": "machine-died"})
                return code
        return None

    def _deliver(self, write: Callable[[int, bytes], None]) -> None:
        arrived, self._streams = self._streams, []
        for incoming in arrived:
            if incoming.kind == DATA:
                write(incoming.channel, incoming.data)
                self._mux.consumed(incoming.channel, len(incoming.data))
        self._flush()

    def _forward(self, fd: int) -> bool:
        try:
            data = os.read(fd, self._mux.room(STDIN))
        except OSError:
            data = b""
        if data:
            self._mux.write(STDIN, data)
        else:
            self._mux.write_eof(STDIN)
        self._flush()
        return bool(data)

    # -- the socket ---------------------------------------------------------------------------

    def send(self, method: str, params: dict[str, Any]) -> None:
        """Asks without waiting; the answer is dropped."""
        self._mux.request(method, params, 60_000)
        self._flush()

    def _receive(self, seconds: float | None) -> None:
        self._flush()
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(262144)
        except TimeoutError:
            return
        except OSError as error:
            raise self._lost(error) from None
        if not data:
            raise self._lost("it has ended")
        for incoming in self._mux.feed(data):
            self._dispatch(incoming)

    def _dispatch(self, incoming: Incoming) -> None:
        if incoming.kind == RESPONSE:
            self._responses[incoming.channel] = incoming.body
        elif incoming.kind == EVENT:
            params = incoming.body.get("params")
            if isinstance(params, dict):
                self._on_event(str(incoming.body.get("event")), params)
        elif incoming.kind in (DATA, EOF, CREDIT):
            self._streams.append(incoming)

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "say":
            self.on_say(str(params.get("text", "")))
        else:
            self._events.append((name, params))

    def _flush(self) -> None:
        if self._mux.outgoing:
            self._socket.settimeout(60)
            try:
                self._socket.sendall(self._mux.outgoing)
            except OSError as error:
                raise self._lost(error) from None
            self._mux.outgoing.clear()

    def _lost(self, why: object) -> ProtocolError:
        return ProtocolError("talk to the pod's monitor", why=why, code="monitor-died")
