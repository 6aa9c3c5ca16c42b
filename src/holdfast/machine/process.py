"""QEMU as a child process: spawned with exactly the descriptors it is given, watched by a pidfd."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal

from holdfast.errors import MachineFailed, NotFound

#: Where the descriptors that a child inherits begin; ours are moved above first, so that none is overwritten.
FIRST_FD = 3
_ABOVE = 64


class Child:
    """A child process.

    Attributes:
        pid: its number in this PID namespace.
        host_pid: its number as /proc has it, which is the host's when the namespace has mounted none of its own.
        exited: done, with its exit status (negative: the signal), when it has ended and been reaped.
    """

    def __init__(self, argv: list[str], pass_fds: list[int], output_fd: int) -> None:
        """Starts ``argv``.  ``pass_fds[i]`` becomes descriptor ``FIRST_FD + i``; all stay the caller's.

        Raises:
            NotFound: the program is not there.
            MachineFailed: it could not be started.
        """
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        sources = [null, output_fd, output_fd, *pass_fds]
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in sources]
        try:
            self.pid = os.posix_spawn(
                argv[0], argv, {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(moved)],
                setsigdef=[signal.SIGPIPE, signal.SIGINT], setsigmask=[], setsid=True,
            )  # fmt: skip
        except FileNotFoundError:
            raise NotFound(
                "start", subject=argv[0], why="not installed", code="qemu-not-found",
                hint="apt install qemu-system-x86",
            ) from None  # fmt: skip
        except OSError as error:
            raise MachineFailed("start", subject=argv[0], why=error) from None
        finally:
            for fd in (null, *moved):
                os.close(fd)
        self._pidfd = os.pidfd_open(self.pid)
        self.host_pid = _pid_in_proc(self._pidfd)
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        _, status = os.waitpid(self.pid, 0)
        self.exited.set_result(os.waitstatus_to_exitcode(status))

    async def kill(self) -> None:
        """Ends the process and waits until it is gone; one that has ended is no error."""
        self.signal_kill()
        await asyncio.shield(self.exited)

    def signal_kill(self) -> None:
        """Tells the process to end, without waiting."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _pid_in_proc(pidfd: int) -> int:
    """The process's number in the PID namespace that /proc shows (pidfd_open(2): the ``Pid`` line)."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return 0
