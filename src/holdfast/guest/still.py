"""Before the machine is copied: every container stands still, and nobody uses what the copy will not have as it is.

That is a share, whose files another QEMU has open (:mod:`holdfast.guest.renew`), and a filesystem that is to be empty
in the copy (:mod:`holdfast.guest.fresh`).  A process that had a file of one open would go on in the copy with what is
not there, so the copy is refused, by the process's name, and the containers go on.
"""

from __future__ import annotations

import errno
import os

from holdfast.errors import InUse, TimedOut
from holdfast.guest import fresh, mounting, shares
from holdfast.guest.loop import sleep
from holdfast.guest.mountinfo import living, mounted, threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task
    from holdfast.guest.mountinfo import Mounted

    #: Device numbers -> "share" or "fresh mount".
    Watched = dict[tuple[int, ...], str]

_CGROUPS = "/sys/fs/cgroup"
#: Control groups that stand still.
_still: list[str] = []
_FREEZE_S = 5.0
_POLL_S = 0.002
_CODES = {"share": "share-in-use", "fresh mount": "fresh-in-use"}
_HINTS = {
    "share": "close it, or leave it, and try again; a disk can be copied whatever is open",
    "fresh mount": "close it, or leave it, and try again; without fork=fresh it is copied whatever is open",
}


def stand_still(pids: dict[str, int], recorded: dict[str, str], wanted: dict[str, Any], children: Children) -> Task:
    """Task: has all containers stand still, with nothing in use of shares and of filesystems that are to be fresh.

    They do in the copy until it has been made different from this machine: nothing draws the same random numbers twice.

    Args:
        pids: of the first process of each container that runs.
        recorded: their control groups as the runtime knows them.
        wanted: which are to be fresh: ``{"disks": [path], "memory": {container: [place]}}``; see :func:`fresh.hold`.

    Raises:
        InUse: a process has a file of one open, or is in one; something is mounted in one.  Nothing stands still.
    """
    groups = {name: group for name, pid in pids.items() if (group := _group(pid, recorded.get(name, "")))}
    try:
        for group in groups.values():
            _still.append(group)
            _set_frozen(group, True)
        for name, group in groups.items():
            yield from _until_frozen(name, group)
        ours = mounted("self")
        served = {mount.device for mount in ours if mount.fstype == b"9p"}
        emptied = fresh.hold(list(wanted.get("disks", ())), dict(wanted.get("memory", {})), living(pids))
        _check_mounts("the guest", ours, dict.fromkeys(emptied, "fresh mount"))
        watched = dict.fromkeys(served, "share") | dict.fromkeys(emptied, "fresh mount")
        if watched:
            for name, group in groups.items():
                _check_container(name, _processes(group), watched)
        if served:
            for _, folder in shares.EXPORTS.values():
                yield from mounting.write_back(folder, children)
    except BaseException:
        go_on()
        raise
    return {}


def go_on() -> None:
    """Has all containers go on; those that do, and those that are gone, are no error."""
    fresh.let_go()
    while _still:
        _set_frozen(_still.pop(), False)


# -- control groups ----------------------------------------------------------------------------------


def _group(pid: int, recorded: str) -> str:
    """A container's control group, which need not have its name; empty if it is gone.

    It is not asked of the first process unless nobody else knows: that may have moved to a group below its container's.
    """
    if recorded and os.path.isdir(_CGROUPS + recorded):
        return _CGROUPS + recorded
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            path = file.read().rpartition("::")[2].strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return _CGROUPS + path


def _set_frozen(group: str, frozen: bool) -> None:
    try:
        with open(f"{group}/cgroup.freeze", "w") as file:
            file.write("1" if frozen else "0")
    except OSError:  # it is gone
        return


def _until_frozen(name: str, group: str) -> Task:
    waited = 0.0
    while True:
        try:
            with open(f"{group}/cgroup.events") as file:
                if "frozen 1" in file.read():
                    return
        except FileNotFoundError:
            return
        if waited > _FREEZE_S:
            raise TimedOut("freeze container", subject=name, why=f"it has not stopped within {_FREEZE_S:g} s")
        yield sleep(_POLL_S)
        waited += _POLL_S


def _processes(folder: str) -> list[int]:
    found = []
    for path, _, files in os.walk(folder):
        if "cgroup.procs" in files:
            try:
                with open(f"{path}/cgroup.procs") as file:
                    found += [int(line) for line in file]
            except OSError as error:
                # Threads that were put into a group of their own: one above has the process (cgroups(7)).
                if error.errno != errno.EOPNOTSUPP:
                    raise
    return found


# -- who uses what -----------------------------------------------------------------------------------


def _check_container(name: str, processes: list[int], watched: Watched) -> None:
    namespaces: set[int] = set()
    for pid in processes:
        for thread in threads(pid):
            try:
                namespace = os.stat(f"/proc/{thread}/ns/mnt").st_ino
                if namespace not in namespaces:  # a container may have made some of its own
                    namespaces.add(namespace)
                    _check_mounts(name, mounted(thread), watched)
                _check_thread(name, pid, thread, watched)
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        _check_maps(name, pid, watched)


def _check_mounts(name: str, mounts: list[Mounted], watched: Watched) -> None:
    """What is mounted in one of them would be in the way, of taking it out or of emptying it."""
    kinds = {mount.number: watched[mount.device] for mount in mounts if mount.device in watched}
    for mount in mounts:
        if kind := kinds.get(mount.parent):
            raise _in_use(kind, name, f"something is mounted in a {kind}, at {_text(mount.target)}")
        if kinds.get(mount.number) == "fresh mount" and mount.root != b"/":
            raise _in_use("fresh mount", name, f"a folder of a fresh mount is mounted at {_text(mount.target)}")


def _check_thread(name: str, pid: int, thread: int, watched: Watched) -> None:
    """What it has open and where it is: threads need not share that (``CLONE_FILES`` and ``CLONE_FS``, unshare(2))."""
    folder = f"/proc/{thread}"
    for used in [*(f"fd/{fd}" for fd in os.listdir(f"{folder}/fd")), "cwd", "root", "exe"]:
        try:
            device = os.stat(f"{folder}/{used}").st_dev
        except OSError:  # closed, or of a kernel thread
            continue
        if kind := watched.get((os.major(device), os.minor(device))):
            path = os.readlink(os.fsencode(f"{folder}/{used}"))
            raise _in_use(kind, name, f"{_process(pid)} has {_text(path)} open ({used})")


def _check_maps(name: str, pid: int, watched: Watched) -> None:
    """What it has mapped, which all of its threads share; one that has ended shows nothing."""
    for thread in threads(pid):
        try:
            with open(f"/proc/{thread}/maps", "rb") as maps:
                lines = maps.readlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            major, minor = (int(part, 16) for part in line.split(b" ", 4)[3].split(b":"))
            if kind := watched.get((major, minor)):
                raise _in_use(kind, name, f"{_process(pid)} has {_text(line.split(maxsplit=5)[5].strip())} mapped")
        if lines:
            return


def _process(pid: int) -> str:
    """For an error."""
    with open(f"/proc/{pid}/comm", "rb") as file:
        return f"process {pid} ({_text(file.read().strip())})"


def _text(path: bytes) -> str:
    """For an error: a path may be of any bytes."""
    return path.decode(errors="replace")


def _in_use(kind: str, name: str, why: str) -> InUse:
    return InUse(f"freeze {kind}", subject=name, why=why, code=_CODES[kind], hint=_HINTS[kind])
