"""One process of a container with its stdio: pipes, or a terminal that the OCI runtime sends to a console socket."""

from __future__ import annotations

import os

from holdfast import trace
from holdfast.errors import GuestFailed
from holdfast.guest.streams import Input, Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.loop import Loop
    from holdfast.wire.mux import Mux


class Process:
    """One process of a container with its stdio.

    Attributes:
        pid: of the process.
        status: as wait(2) has it; None while it runs.
        folder: of an exec's own files; empty for the first process of a container.
    """

    def __init__(self, key: str, pid: int, terminal_fd: int, mux: Mux) -> None:
        self.key = key
        self.pid = pid
        self.status: int | None = None
        self.folder = ""
        self._terminal_fd = terminal_fd
        self._mux = mux
        self._channels: set[int] = set()
        self._input: Input | None = None
        self._outputs: list[Output] = []

    def connect(self, loop: Loop, stdio: Stdio, params: dict[str, Any], sent: Callable[[], None]) -> None:
        """Pumps between the process and the streams that ``params`` names.

        Args:
            stdio: of which our ends are taken over.
            sent: called when the end of an output has been sent.
        """
        stdin, stdout, stderr = (int(params.get(name) or 0) for name in ("stdin", "stdout", "stderr"))
        outputs = []
        if self._terminal_fd >= 0:
            self.resize(params.get("size"))
            outputs = [(os.dup(self._terminal_fd), stdout)]
            input_fd = os.dup(self._terminal_fd)
        else:
            input_fd, *readers = stdio.ours
            outputs = list(zip(readers, (stdout, stderr), strict=True))
            stdio.ours = []
        self._channels = {channel for _, channel in outputs} | ({stdin} if input_fd >= 0 else set())
        for channel in self._channels:
            self._mux.open(channel)
        if input_fd >= 0:
            self._input = Input(loop, self._mux, input_fd, stdin)
        for fd, channel in outputs:
            self._outputs.append(Output(loop, self._mux, fd, channel, sent))

    def resize(self, size: object) -> None:
        """Sets the terminal's ``[rows, columns]``; the kernel sends SIGWINCH (ioctl_tty(2))."""
        if self._terminal_fd < 0 or not isinstance(size, list) or len(size) != 2:
            return
        import fcntl
        import struct
        import termios

        rows, columns = (min(max(int(number), 0), 0xFFFF) for number in size)
        fcntl.ioctl(self._terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def ended(self, status: int) -> None:
        """It has ended: what it has left is sent, and nothing more is taken for it."""
        self.status = status
        trace.mark("process has ended")
        if self._input is not None:
            self._input.abandon()
        for output in self._outputs:
            output.drain()

    @property
    def finished(self) -> bool:
        """Whether it has ended and the last byte of its output has been sent."""
        return self.status is not None and all(output.finished for output in self._outputs)

    def exit_status(self) -> tuple[int, int]:
        """Its exit status, 128 + number for a signal, and that number or 0; once it has ended."""
        status = self.status or 0
        signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return 128 + signalled if signalled else os.WEXITSTATUS(status), signalled

    def connected(self) -> list[int]:
        """Its open streams: the one for input or 0, then those for output."""
        return [
            self._input.channel if self._input is not None and not self._input.finished else 0,
            *(output.channel for output in self._outputs if not output.finished),
        ]

    def reconnect(self) -> None:
        """Opens its streams again under the same numbers."""
        for channel in dict.fromkeys(self.connected()):
            if channel:
                self._mux.open(channel)
        for output in self._outputs:
            output.pump()

    def stream(self, channel: int) -> tuple[Input | None, Output | None]:
        """Its end of a stream, whichever direction that has."""
        output = next((output for output in self._outputs if output.channel == channel), None)
        return self._input if self._input is not None and self._input.channel == channel else None, output

    def close(self) -> None:
        """Closes its streams and its terminal."""
        for channel in self._channels:
            self._mux.close(channel)
        if self._terminal_fd >= 0:
            os.close(self._terminal_fd)


class Stdio:
    """The child's ends and ours of a process's stdio, all owned until :meth:`close` or handed over."""

    def __init__(self, terminal: bool, stdin: int) -> None:
        self.child: list[int] = []
        self.ours: list[int] = []
        if terminal:
            self.child = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)] * 3
            return
        if stdin:
            reader, writer = os.pipe2(os.O_CLOEXEC)
        else:
            reader, writer = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), -1
        self.child, self.ours = [reader], [writer]
        for _ in range(2):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self.child.append(writer)
            self.ours.append(reader)

    def close_child(self) -> None:
        """Closes the child's ends: the container has them now."""
        for fd in set(self.child):
            os.close(fd)
        self.child = []

    def close(self) -> None:
        """Closes whatever was not handed over."""
        self.close_child()
        for fd in self.ours:
            if fd >= 0:
                os.close(fd)
        self.ours = []


def listen(path: str) -> Any:
    """A console socket, to which the runtime sends a terminal."""
    import _socket

    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)
    return listener


def receive_terminal(listener: Any) -> int:
    """The terminal that the runtime sent to the console socket before it exited."""
    import _socket

    listener.settimeout(5)
    fd, _ = listener._accept()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    try:
        connection.settimeout(5)
        _data, control, _flags, _address = connection.recvmsg(4096, _socket.CMSG_SPACE(4))
    finally:
        connection.close()
    for level, kind, payload in control:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            terminal_fd = int.from_bytes(payload[:4], "little")
            os.set_inheritable(terminal_fd, False)
            return terminal_fd
    raise GuestFailed("start container", why="the runtime sent no terminal")
