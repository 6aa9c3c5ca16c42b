"""The monitor: the one host process that owns a pod's machine, its devices and its part of the journal.

It is PID 1 of a PID namespace of its own, so whatever kills it, the kernel kills QEMU and every helper
with it; and it has a mount namespace of its own, so every bind mount of a share goes with it too.
"""

from __future__ import annotations

import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Entry point: reads its modules, and then from its socket which pod it is of: see :mod:`holdfast.pod.early`.

    Becomes a daemon by the fork that the PID namespace needs anyway: the child is its first process, and
    the parent tells it its number, as the host sees it, and exits.
    """
    from holdfast import trace
    from holdfast.linux import syscalls, user_namespaces
    from holdfast.pod import early

    trace.open_trace("monitor")
    trace.mark("interpreter")
    from holdfast.pod.service import serve

    trace.mark("modules")
    request, fds = early.receive(early.SOCKET_FD)
    if not request:
        os._exit(0)
    trace.mark("told which pod")
    if os.geteuid():  # its root may have the others
        user_namespaces.enter()
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
    os.set_inheritable(early.SOCKET_FD, False)
    # A guest can make QEMU abort (a 9p name with a slash fails an assertion of 7.2): its memory, which is the pod's, is
    # then not left on the host's disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    trace.mark("namespaces and fork")
    status = 70
    try:
        status = serve(request, fds, early.SOCKET_FD, host_pid)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
