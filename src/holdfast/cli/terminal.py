"""A process in a pod, connected to this one: its output, its terminal, the signals that it should get.

Signals do not interrupt anything here: their numbers arrive as bytes in a socket (``signal.set_wakeup_fd``) that the
client watches along with everything else, so there is no moment at which one is lost or comes amiss.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from holdfast.pod.client import STDERR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.cli.output import Output
    from holdfast.pod.client import Client

FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
#: Signals by which somebody wants the process to end.
_ENDING = frozenset(FORWARDED[:4])
#: So many of them in so many seconds, and it is killed: the first process of a container gets no signal that
#: it has no handler for (pid_namespaces(7)), so an ordinary program there cannot be interrupted otherwise.
PATIENCE, PATIENCE_SECONDS = 3, 5.0
#: When the terminal is gone, nobody is left to lose patience.
_HANGUP_SECONDS = 10.0
#: A pipe that poll(2) says is writable takes this much without blocking (pipe(7), PIPE_BUF).
_PIPE_BYTES = 4096


def attend(client: Client, key: str, output: Output, *, stdin: bool, terminal: bool) -> int:
    """Connects this process to ``key`` until that ends; returns its exit status.

    Args:
        client: the connection on which it was started.
        stdin: whether standard input is passed on.
        terminal: whether it has a terminal, which then follows the size of this one.

    Raises:
        BrokenPipeError: nobody reads the output any more.
        KeyboardInterrupt: it could not even be killed.
    """
    with Session(client, key, output, terminal=terminal) as session, _raw(0, wanted=terminal and stdin):
        return client.attend(
            key, 0 if stdin else -1, session.write, wakeup_fd=session.wakeup_fd, on_wakeup=session.on_wakeup
        )


class Session:
    """What happens to signals and output meanwhile.  Handlers are put back at the end."""

    def __init__(self, client: Client, key: str, output: Output, *, terminal: bool) -> None:
        self._client = client
        self._key = key
        self._output = output
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.wakeup_fd = self._reader.fileno()
        self._handlers: dict[int, signal._HANDLER] = {}
        self._terminal = terminal
        self._asked: list[float] = []
        self._old_wakeup_fd = -1

    def __enter__(self) -> Session:
        self._old_wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        watched = (*FORWARDED, signal.SIGALRM, *((signal.SIGWINCH,) if self._terminal else ()))
        for number in watched:
            # What our caller ignores (nohup, a shell's background job) is not for the process either.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, _noted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def on_wakeup(self) -> None:
        """Passes on the signals that have come."""
        with contextlib.suppress(BlockingIOError):
            for number in self._reader.recv(64):
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._client.send("resize", {"key": self._key, "size": list(window_size())})
        elif number == signal.SIGALRM:
            self._kill(signal.SIGKILL)
        elif number not in _ENDING or not self._lost_patience():
            self._kill(number)
            if number == signal.SIGHUP:
                signal.setitimer(signal.ITIMER_REAL, _HANGUP_SECONDS)

    def _lost_patience(self) -> bool:
        now = time.monotonic()
        self._asked = [when for when in self._asked if now - when < PATIENCE_SECONDS] + [now]
        if len(self._asked) == PATIENCE:
            self._output.warn(f"{self._key} does not end: killing it")
            self._kill(signal.SIGKILL)
        elif len(self._asked) > PATIENCE + 1:
            raise KeyboardInterrupt
        return len(self._asked) >= PATIENCE

    def _kill(self, number: int) -> None:
        self._client.send("kill", {"key": self._key, "signal": int(number)})

    def write(self, channel: int, data: bytes) -> None:
        """Writes output as it comes, and goes on passing signals while its reader is slow.

        Raises:
            BrokenPipeError: the reader of stdout is gone.
        """
        fd = 2 if channel == STDERR else 1
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        poller.register(self.wakeup_fd, select.POLLIN)
        view = memoryview(data)
        while view:
            for ready, _events in poller.poll():
                if ready == self.wakeup_fd:
                    self.on_wakeup()
                    continue
                try:
                    view = view[os.write(fd, view[:_PIPE_BYTES]) :]
                except BlockingIOError:  # somebody else who shares the file made it non-blocking, and was faster
                    time.sleep(0.001)
                except OSError:
                    if fd == 1:
                        raise BrokenPipeError from None
                    return  # as for any program whose messages nobody reads


def _noted(_number: int, _frame: object) -> None:
    """The number is in the socket: that is enough."""


def window_size() -> tuple[int, int]:
    """Rows and columns of the terminal that this process has, on whichever of its descriptors."""
    for fd in (1, 0, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(fd)
            if size.lines and size.columns:
                return size.lines, size.columns
    return 24, 80


@contextmanager
def _raw(fd: int, *, wanted: bool) -> Iterator[None]:
    """Every key goes to the process, Ctrl-C too; the terminal is put back whatever ends this."""
    if not (wanted and os.isatty(fd)):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it has been hung up
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
