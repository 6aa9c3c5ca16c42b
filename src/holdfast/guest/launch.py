"""The first code of ours that runs in the guest: loads the kernel's remaining modules, then becomes the agent.

It lies beside the ``holdfast`` package as ``agent``, and is all that the initial RAM disk knows of it.
Modules are loaded here and not by the initial RAM disk because a system call costs an emulated CPU less
than a process does: 60 ms less for all of them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

HOME = "/usr/lib/holdfast"
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_SCAN = "/sys/module/scsi_mod/parameters/scan"


def load_modules(listing: str) -> None:
    """Load what ``listing`` names, in its order: on each line a path, then the module's options.

    Raises:
        OSError: the kernel refused one.
    """
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = _FINIT_MODULE[os.uname().machine]
    with open(listing) as file:
        lines = file.read().splitlines()
    for line in lines:
        path, _, options = line.partition(" ")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            failed = syscall(number, fd, options.encode(), 0)
        finally:
            os.close(fd)
        if failed and ctypes.get_errno() != errno.EEXIST:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def load_on_demand(module: str) -> bool:
    """Loads a module that few pods need; False if there is nothing to load: it is built in, or the guest has none."""
    listing = f"{HOME}/modules.d/{module}"
    if not os.path.exists(listing):
        return False
    load_modules(listing)
    return True


def main() -> None:
    """Run as PID 1.  An error ends it, and with it, by a panic, the machine."""
    load_modules(f"{HOME}/modules.list")
    # The controllers were found with scanning turned off (guest_root says why); disks come from now on.
    if os.path.exists(_SCAN):
        with open(_SCAN, "w") as file:
            file.write("async")
    sys.path.insert(0, HOME)
    from holdfast.guest import agent

    agent.main()


if __name__ == "__main__":
    main()
