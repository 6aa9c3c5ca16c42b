"""Child processes of PID 1: starting, waiting, reaping.

Containers are started by an OCI runtime that exits; their processes then become children of PID 1
(credentials(7), prctl(2) ``PR_SET_CHILD_SUBREAPER``), which is how the agent learns their exit status.
"""

from __future__ import annotations

import json
import os
import signal

from holdfast.errors import GuestFailed, from_dict, from_exception
from holdfast.guest.loop import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.guest.loop import Task

#: Exit statuses kept of processes that nobody has asked for yet: a container may end before its pid is known.
_KEPT = 256
_MOST_ANSWER = 1 << 20


class Children:
    """Reaps every child and hands its wait status to whoever asked for it."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._unclaimed: dict[int, int] = {}
        self._expected = 0

    def expect(self) -> None:
        """Begins to keep the statuses of processes that nobody asks for yet; :meth:`expect_no_more` ends it.

        Kept for longer, a status could be taken for that of a later process with the same number.
        """
        self._expected += 1

    def expect_no_more(self) -> None:
        """Ends what :meth:`expect` began."""
        self._expected -= 1
        if not self._expected:
            self._unclaimed.clear()

    def reap(self) -> None:
        """Collects every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            callback = self._callbacks.pop(pid, None)
            if callback is not None:
                callback(status)
            elif self._expected:
                self._unclaimed[pid] = status
                if len(self._unclaimed) > _KEPT:
                    del self._unclaimed[next(iter(self._unclaimed))]

    def on_exit(self, pid: int, callback: Callable[[int], None]) -> None:
        """Calls ``callback(wait status)`` when ``pid`` has ended; at once if it has already."""
        if pid in self._unclaimed:
            callback(self._unclaimed.pop(pid))
        else:
            self._callbacks[pid] = callback

    def run(self, argv: list[str], stdin: int, stdout: int, stderr: int) -> Task:
        """Task: runs a program to its end; returns its wait status.  The descriptors stay the caller's.

        When the task is given up, the program is killed.
        """
        return (yield from self.wait(self.spawn(argv, stdin, stdout, stderr)))

    def spawn(
        self, argv: list[str], stdin: int, stdout: int, stderr: int, *, environment: dict[str, str] | None = None
    ) -> int:
        """Starts a program, with these variables besides the usual; returns its number.  It must be waited for."""
        return os.posix_spawn(
            argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(environment or {})},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, stderr, 2),
            ],
            setsigdef=[signal.SIGPIPE, signal.SIGCHLD], setsigmask=[], setsid=True,
        )  # fmt: skip

    def wait(self, pid: int) -> Task:
        """Task: waits for a program's end; returns its wait status.  When the task is given up, it is killed."""
        status, _ = yield from self._end(pid)
        return status

    def call(self, function: Callable[[], Any], keep: tuple[int, ...] = ()) -> Task:
        """Task: runs what may take long, or enters a namespace, in a copy of this process; returns what it returned.

        When the task is given up, the copy is killed.

        Args:
            keep: descriptors that the function uses.  All others are closed in the copy: they are of other containers'
                streams, whose ends would not be seen as long as it lives.

        Raises:
            HoldfastError: what the function raised.
            GuestFailed: the copy came to another end.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
            if not pid:
                _report(writer, function, keep)
            os.close(writer)
            writer = -1
            status, said = yield from self._end(pid, reader)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        answer = json.loads(said or b"{}")
        if "error" in answer:
            raise from_dict(answer["error"])
        if "result" not in answer:
            raise GuestFailed("work aside", why=f"the process that did it ended with status {status:#x}")
        return answer["result"]

    def _end(self, pid: int, reader: int = -1) -> Task:
        """Task: how a child ended, and what it said: that is read first, for it may be more than a pipe holds."""
        said = b""
        result: list[int] = []
        self.on_exit(pid, result.append)
        pidfd = os.pidfd_open(pid)
        try:
            while reader >= 0 and len(said) < _MOST_ANSWER:
                yield readable(reader)
                part = os.read(reader, _MOST_ANSWER)
                if not part:
                    break
                said += part
            while not result:
                yield readable(pidfd)
                self.reap()
        except BaseException:
            if not result:  # else it has been reaped, and the number may be another's
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            raise
        finally:
            os.close(pidfd)
        return result[0], said


def _report(writer: int, function: Callable[[], Any], keep: tuple[int, ...]) -> None:
    """The copy's life."""
    try:
        try:
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd > 2 and fd != writer and fd not in keep:
                    try:
                        os.close(fd)
                    except OSError:  # that of the listing
                        continue
            answer = {"result": function()}
        except BaseException as error:
            answer = {"error": from_exception(error).as_dict()}
        said = json.dumps(answer).encode()
        while said:
            said = said[os.write(writer, said) :]
    finally:
        os._exit(0)
