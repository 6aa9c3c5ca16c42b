"""The monitor: the one host process that owns a pod's machine, its devices and its part of the journal.

It is PID 1 of a PID namespace of its own, so whatever kills it, the kernel kills QEMU and every helper
with it; and it has a mount namespace of its own, so every bind mount of a share goes with it too.
"""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Entry point: ``argv[1]`` is a :class:`PodRequest`, ``argv[2]`` the lock's and ``argv[3]`` the first client's fd.

    Becomes a daemon by the fork that the PID namespace needs anyway: the child is its first process, and
    the parent tells it its number, as the host sees it, and exits.
    """
    from holdfast.linux import syscalls

    lock_fd, client_fd = int(sys.argv[2]), int(sys.argv[3])
    os.setsid()
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.write(writer, str(pid).encode())
        os._exit(0)
    host_pid = int(os.read(reader, 32))
    os.close(reader)
    os.close(writer)
    os.set_inheritable(lock_fd, False)
    os.set_inheritable(client_fd, False)
    # A guest can make QEMU abort (a 9p name with a slash fails an assertion of 7.2): its memory, which is the pod's, is
    # then not left on the host's disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    status = 70
    try:
        from holdfast.pod.service import serve

        status = serve(sys.argv[1].encode(), lock_fd, client_fd, host_pid)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
