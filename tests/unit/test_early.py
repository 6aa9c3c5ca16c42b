"""A monitor's process before it is told its pod: it gets what it is told, and ends when nobody can tell it any more."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import MachineFailed
from holdfast.pod import early

if TYPE_CHECKING:
    from pathlib import Path

#: In place of the monitor: says what it has received, and of each descriptor which file it is.
ECHO = (
    "import os, sys; sys.path[:] = {path!r}; from holdfast.pod import early\n"
    "request, fds = early.receive(early.SOCKET_FD)\n"
    "numbers = b' '.join(str(os.fstat(fd).st_ino).encode() for fd in fds)\n"
    "os.fork() or (os.write(early.SOCKET_FD, request + b'|' + numbers), os._exit(0))"
)
WAIT_S = 20


def read_all(fd: int) -> bytes:
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(WAIT_S)
        found = b""
        while part := sock.recv(65536):
            found += part
    return found


@pytest.fixture
def files(tmp_path: Path):
    opened = []

    def make(count: int) -> list[int]:
        for number in range(count):
            opened.append(os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
        return opened

    yield make
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("count", [1, 3, 450])
def test_it_is_told_everything(files, count):
    fds = files(count)
    request = b"x" * 300_000  # more than a socket holds
    said = read_all(early.EarlyMonitor(ECHO).tell(request, fds))
    assert said == request + b"|" + b" ".join(str(os.fstat(fd).st_ino).encode() for fd in fds)


def test_it_holds_the_lock_when_the_caller_has_let_go(tmp_path):
    lock_fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    holding = (
        "import os, sys; sys.path[:] = {path!r}; from holdfast.pod import early; early.receive(early.SOCKET_FD)\n"
        "os.fork() or (os.write(3, b'!'), os.read(3, 1))"
    )
    with socket.socket(fileno=early.EarlyMonitor(holding).tell(b"{}", [lock_fd])) as sock:
        sock.settimeout(WAIT_S)
        assert sock.recv(1) == b"!"
        os.close(lock_fd)
        with open(tmp_path / "lock") as again:
            with pytest.raises(BlockingIOError):
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""  # it has ended
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_that_has_died_is_an_error():
    monitor = early.EarlyMonitor("raise SystemExit(1) # {path}")
    os.waitid(os.P_PID, monitor._pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(MachineFailed, match="its monitor has died"):
        monitor.tell(b"{}", [])


def test_the_real_one_ends_with_the_command_that_expected_it(tmp_path):
    """Whatever ends the command: here nothing of its own gets to run."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from holdfast.pod import early\nearly.expect(); print(early.take()._pid, flush=True); sys.stdin.read()"
    )
    command = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stdin is not None
    pidfd = os.pidfd_open(int(command.stdout.readline()))
    try:
        command.send_signal(signal.SIGKILL)
        command.wait()
        ended = threading.Event()
        threading.Thread(target=lambda: (_wait(pidfd), ended.set()), daemon=True).start()
        assert ended.wait(WAIT_S)
    finally:
        os.close(pidfd)
        command.stdin.close()
        command.stdout.close()


def _wait(pidfd: int) -> None:
    import select

    select.select([pidfd], [], [])


def test_what_was_expected_is_taken_once_or_ended():
    early.expect()
    first = early._expected
    early.expect()
    assert early._expected is first
    taken = early.take()
    assert taken is first
    assert early.take() is None
    early.forget()  # there is nothing to forget
    taken.close()
    early.expect()
    pid = early._expected._pid
    early.forget()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_inherits_nothing_else(files):
    """A pipe's reader would wait for the pod's end, if the monitor had its other end."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    waiting = early.START.split("from holdfast")[0] + "import os; os.write(3, b'!'); os.read(3, 1)"
    monitor = early.EarlyMonitor(waiting)
    try:
        assert monitor._socket.recv(1) == b"!"
        os.close(writer)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
        monitor.close()
