"""A runtime that was started before it is needed, and waits for a container to run.

crun copies itself into memory and executes the copy, and has its eleven libraries linked each time: on an emulated
processor half of the time that a container takes to start.  None of it depends on the container, so the agent of a
machine has it done when the machine boots, and every machine that starts from a save finds it done.  What crun then
waits for is its configuration: that is a FIFO (fifo(7)) that the agent has open.

Descriptors, of which a process has those that it was started with, are those of a container without input or terminal;
others get a runtime of their own.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from time import monotonic, sleep

from holdfast.guest import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.guest.children import Children
    from holdfast.guest.process import Stdio
    from holdfast.guest.runtime import Runtime

#: The container's name for the runtime: none that a user can give.
ID = "+ready"
_POLL_SECONDS = 0.002
_START_SECONDS = 10.0


class ReadyRuntime:
    """One that waits.  Owns its process and descriptors until it is :meth:`told`.

    Attributes:
        stdio: those of the container.
        pid: of the runtime.
    """

    def __init__(self, runtime: Runtime, children: Children, folder: str, stdio: Stdio) -> None:
        """Starts it, and waits until it waits.

        Raises:
            OSError: it could not be started, or has ended, or does not come to its configuration.
        """
        self.stdio = stdio
        self._folder = folder
        self._writer = -1
        os.makedirs(folder, 0o700, exist_ok=True)
        os.mkfifo(f"{folder}/config.json", 0o600)
        argv = ["run", "--detach", "--bundle", folder, "--pid-file", f"{folder}/pid", ID]
        command = [*runtime.command(f"{folder}/log"), *argv]
        environment = {"LD_BIND_NOW": "1"}  # every symbol is looked up now, not when it is used first: ld.so(8)
        self.pid = children.spawn(command, *stdio.child, environment=environment)
        self._pidfd = os.pidfd_open(self.pid)
        try:
            self._writer = self._open_writer()
        except BaseException:
            self.close()
            raise

    def _open_writer(self) -> int:
        deadline = monotonic() + _START_SECONDS
        while True:
            try:
                return os.open(f"{self._folder}/config.json", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO or self._has_ended() or monotonic() > deadline:
                    raise
            sleep(_POLL_SECONDS)

    def _has_ended(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def tell(self, configuration: bytes) -> bool:
        """Has it run the container; False if it cannot, and is closed then.

        The runtime reads its configuration twice, the second time a file: it is there before the first ends.
        """
        if len(configuration) > select.PIPE_BUF * 16 or self._has_ended():  # what fits into a pipe, at once: pipe(7)
            self.close()
            return False
        path = f"{self._folder}/config.json"
        files.write(f"{path}.new", configuration)
        os.rename(f"{path}.new", path)
        try:
            written = os.write(self._writer, configuration)
        except OSError:  # it has ended just now
            written = 0
        if written < len(configuration):
            self.close()
            return False
        self._close_fds()
        return True

    def _close_fds(self) -> None:
        for fd in (self._writer, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._writer = self._pidfd = -1

    def close(self) -> None:
        """Ends it; nothing of it is left."""
        if self._pidfd >= 0 and not self._has_ended():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._close_fds()
        self.stdio.close()
        for name in ("config.json", "config.json.new", "log", "pid"):
            try:
                os.unlink(f"{self._folder}/{name}")
            except FileNotFoundError:
                continue
        os.rmdir(self._folder)
