"""The control groups of pods that have the host's kernel, and the runtime that can work with the host's layout.

A pod's containers are in groups below one of the pod's own, whose name follows from the state root and the pod: the
pod's line in the journal is enough to find it, and whoever forgets the pod removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from holdfast.errors import NotReleased, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOUNT = "/sys/fs/cgroup"
_FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin")
_SECONDS = 2.0


class Runtime(NamedTuple):
    """An OCI runtime of the host.

    Attributes:
        options: that it needs before its command.
        why: this one: the layout of the host's control groups.
    """

    path: str
    options: tuple[str, ...]
    why: str


def choose_runtime(mount: str = MOUNT, folders: tuple[str, ...] = _FOLDERS) -> Runtime:
    """The runtime for this host: crun, as in a virtual machine, where it runs, else runc.

    crun works with version 2 of control groups alone, and refuses a host that has both kinds mounted; runc knows all
    of them.

    Raises:
        Unsupported: there is none that can.
    """
    unified = os.path.exists(f"{mount}/cgroup.controllers")
    layout = "version 2" if unified else "version 1, or both versions at once"
    names = ("crun", "runc") if unified else ("runc",)
    for name in names:
        for folder in folders:
            if os.access(f"{folder}/{name}", os.X_OK):
                options = ("--cgroup-manager=cgroupfs",) if name == "crun" else ()
                return Runtime(f"{folder}/{name}", options, f"the host's control groups are {layout}")
    raise Unsupported(
        "choose runtime", subject=" or ".join(names), why=f"not installed, and the host's control groups are {layout}",
        code="no-runtime", hint=f"apt install {names[0]}",
    )  # fmt: skip


def of_pod(root: str | Path, pod: str) -> str:
    """The group of a pod, from the top of every hierarchy: two state roots may have pods of one name."""
    real = os.path.realpath(root)  # whatever name of it a command was given
    return f"/holdfast-{pod}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"


def remove(group: str, seconds: float = _SECONDS) -> None:
    """Removes a group with those below it, in every hierarchy; already gone is success.

    Raises:
        NotReleased: processes are in it still.
    """
    deadline = time.monotonic() + seconds
    for top in _hierarchies():
        for folder, _, _ in os.walk(f"{top}{group}", topdown=False):
            while not _removed(folder):
                if time.monotonic() > deadline:
                    raise NotReleased(
                        "remove control group", subject=folder, why="processes are in it", code="cgroup-busy",
                        hint="end them (cgroup.procs has their numbers), then try again",
                    )  # fmt: skip
                time.sleep(0.001)  # a process that has just ended is in its group for a moment longer


def _removed(folder: str) -> bool:
    try:
        os.rmdir(folder)  # what looks like files in it goes with it: cgroups(7)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _hierarchies() -> Iterator[str]:
    """Where hierarchies of control groups are mounted."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith(("cgroup ", "cgroup2 ")):
                yield before.split(" ")[4]
