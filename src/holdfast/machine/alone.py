"""Work whose processes end with the process that asked for it, whatever ends that."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import HoldfastError, from_dict, from_exception
from holdfast.linux import syscalls, user_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def run_alone(work: Callable[[], bytes]) -> bytes:
    """Does ``work`` in the first process of a PID namespace; returns what it returns.

    So a machine that it starts ends with that process (pid_namespaces(7)), and that with this one, as a pod's machine
    does with the pod's monitor.  Not for a process with threads.

    Raises:
        HoldfastError: that which the work raised; or its process was killed.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        os.close(reader)
        _guard(work, writer)
    os.close(writer)
    with open(reader, "rb") as file:
        try:
            answer = file.read()
        except KeyboardInterrupt:  # the worker has been interrupted, too, and tidies up
            file.read()
            raise
        finally:
            os.waitpid(pid, 0)
    if not answer:
        raise HoldfastError("work in a process of its own", why="it was killed", code="killed")
    if answer[:1] == b"-":
        raise from_dict(msgspec.json.decode(answer[1:]))
    return answer[1:]


def _guard(work: Callable[[], bytes], writer: int) -> NoReturn:
    """The process between: what it enters is for its child, and nothing of this is left in the caller."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.geteuid():
            user_namespaces.enter()
        syscalls.unshare(syscalls.CLONE_NEWPID)
        _end_with_parent(writer)  # entering a user namespace would undo that (prctl(2))
        pid = os.fork()
        if not pid:
            _work(work, writer)
        os.waitpid(pid, 0)
    except Exception as error:
        _write(writer, _error(error))
    finally:
        os._exit(0)


def _work(work: Callable[[], bytes], writer: int) -> NoReturn:
    try:
        _end_with_parent(writer)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _write(writer, b"+" + work())
    except Exception as error:
        _write(writer, _error(error))
    finally:
        os._exit(0)


def _end_with_parent(writer: int) -> None:
    """Also if it has ended already: then nobody reads any more, which poll(2) tells of the writing end."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    poller = select.poll()
    poller.register(writer, 0)
    if poller.poll(0):
        os._exit(1)


def _error(error: Exception) -> bytes:
    return b"-" + msgspec.json.encode(from_exception(error).as_dict())


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
