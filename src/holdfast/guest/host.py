"""The agent of a pod that has no machine: the same code, PID 1 of namespaces on the host's kernel.

What differs is here: the port is a socket, and its end is the pod's; the host says which device is in which slot; the
export of shares is a folder that can be seen; and nothing in a process that shares the host's kernel may ever set the
clock, load modules or power anything off.  The namespaces are the sandbox: a process in them sees the host's file
tree, since that is where the runtime is, but with a ``/run`` of its own, so that the guest's paths are as private as
in a machine, and nothing that is mounted leaves it.
"""

from __future__ import annotations

import _socket as socket  # the other one takes long to import
import gc
import os
import sys

from holdfast.errors import InvalidInput, Unsupported
from holdfast.guest import disks, shares
from holdfast.guest import settings as settings_of
from holdfast.guest.agent import Agent, say
from holdfast.guest.runtime import Runtime
from holdfast.linux import syscalls, user_namespaces
from holdfast.linux.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC, MS_SHARED, MS_SLAVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXPORT = "/run/mounts/plan9"
#: Those of spec/default.py: where the host has lower ones, and does not let us raise them, its own must do.
DEFAULT_LIMITS = {"RLIMIT_NOFILE": 1048576, "RLIMIT_NPROC": 4194304}
_CAP_SYS_RESOURCE = 24
#: Options of a bind that set no flag of the mount.
_NO_FLAGS = frozenset(
    ("bind", "rbind", "rw", *(r + kind for r in ("", "r") for kind in ("private", "slave", "shared", "unbindable")))
)
#: As statvfs(3) has them, and as options are spelled.
_FLAGS = {
    os.ST_RDONLY: "ro", os.ST_NOSUID: "nosuid", os.ST_NODEV: "nodev", os.ST_NOEXEC: "noexec", os.ST_NOATIME: "noatime",
    os.ST_NODIRATIME: "nodiratime",
}  # fmt: skip
_NAMESPACES = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWNET
)  # its PID namespace it was born into


class HostRuntime(Runtime):
    """The host's OCI runtime."""

    def prepare(self, spec: dict[str, Any], name: str) -> None:
        """See :meth:`Runtime.prepare`."""
        super().prepare(spec, name)
        _allow_setuid(spec["root"]["path"])
        for mount in spec.get("mounts") or ():
            _keep_flags(mount)
        if user_namespaces.inside():
            _without_root(spec)

    def prepare_process(self, process: dict[str, Any]) -> None:
        """See :meth:`Runtime.prepare_process`; caps limits that nobody has asked for."""
        if user_namespaces.inside():
            _check_ids(process.get("user") or {})
        limits = process.get("rlimits") or []
        if limits and not _may_raise_limits():
            process["rlimits"] = [_capped(limit) for limit in limits]


def _keep_flags(mount: dict[str, Any]) -> None:
    """Says the flags of a share again: runc sets a bind's anew if it sets any, and without root may take none away."""
    options, source = mount.get("options") or [], str(mount.get("source"))
    if source.startswith("/run/mounts/shares/") and not _NO_FLAGS.issuperset(options):
        flags = os.statvfs(source).f_flag
        mount["options"] = [*options, *(word for flag, word in _FLAGS.items() if flags & flag)]


def _allow_setuid(root: str) -> None:
    """A bundle's root filesystem is a share; unlike other shares it may have programs such as ``su``."""
    if root.startswith("/run/mounts/shares/"):
        try:
            syscalls.mount_setattr(syscalls.AT_FDCWD, root, 0, attr_clr=syscalls.MOUNT_ATTR_NOSUID)
        except PermissionError:  # in a user namespace: the host's own mount is nosuid, and stays so
            if not user_namespaces.inside():
                raise


def _without_root(spec: dict[str, Any]) -> None:
    """What an OCI runtime can do in a user namespace: no control groups, and owners that exist in it."""
    spec["linux"].pop("cgroupsPath", None)
    spec["linux"].pop("resources", None)  # rules for devices, which cannot be made there; others have been refused
    for mount in spec.get("mounts") or ():
        mount["options"] = [option for option in mount.get("options") or () if _can_own(option)]


def _can_own(option: str) -> bool:
    """False for an owner that does not exist, such as a terminals' group 5: devpts then belongs to who mounts it."""
    kind, _, number = option.partition("=")
    return kind not in ("uid", "gid") or not number.isdecimal() or user_namespaces.exists(kind, int(number))


def _check_ids(user: dict[str, Any]) -> None:
    ids = [("uid", user.get("uid", 0)), ("gid", user.get("gid", 0))]
    for kind, number in ids:
        if not user_namespaces.exists(kind, int(number)):
            raise Unsupported(
                "start process", subject=f"{kind} {number}", why="the user who runs the pod has not been given it",
                code="id-not-mapped", hint=f"give them some in /etc/sub{kind}, and apt install uidmap",
            )  # fmt: skip
    # Of the other groups those that do not exist are left out: the kernel has none to give.
    if "additionalGids" in user:
        user["additionalGids"] = [gid for gid in user["additionalGids"] if user_namespaces.exists("gid", int(gid))]


def _capped(limit: dict[str, Any]) -> dict[str, Any]:
    import resource

    kind = str(limit.get("type"))
    most = DEFAULT_LIMITS.get(kind, -1)
    if limit.get("hard") != most:
        return limit
    ours = resource.getrlimit(getattr(resource, kind))[1]
    if ours != resource.RLIM_INFINITY:
        most = min(most, ours)
    return {"type": kind, "hard": most, "soft": min(most, int(limit["soft"]))}


def _may_raise_limits() -> bool:
    """Whether we have CAP_SYS_RESOURCE on the host: a container in which Holdfast runs may not have given it."""
    if user_namespaces.inside():
        return False
    with open("/proc/self/status") as file:
        capabilities = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(capabilities.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)


class HostAgent(Agent):
    """Answers requests that arrive on one end of a socket pair, until the other end is closed."""

    def __init__(self, fd: int, runtime: Runtime) -> None:
        super().__init__(fd, runtime)
        self._disks = disks.places = disks.Told()
        shares.export = EXPORT
        self._methods["disk"] = self._disk
        del self._methods["resume"]  # sets the clock, which is the host's

    def _disk(self, params: dict[str, Any]) -> dict[str, Any]:
        """The host has put a disk into a slot."""
        name = settings_of.text(params, "name")
        if not name.isalnum():
            raise InvalidInput("plug disk", subject=name, why="not a block device's name")
        self._disks.devices[settings_of.number(params, "controller"), settings_of.number(params, "lun")] = name
        return {}

    def _receive(self) -> bytes:
        data = os.read(self._fd, 65536)
        if not data:  # the monitor is gone; a port of a machine is empty then, and somebody may come
            self._loop.stop()
        return data


def isolate(export: str) -> None:
    """Makes the rest of the namespaces, and in them the file tree that the agent works in.

    Args:
        export: the folder of shares, whose later mounts show up at :data:`EXPORT`.

    Raises:
        OSError: a call was refused.
    """
    syscalls.unshare(_NAMESPACES)
    # Slaves: the host's changes come in, ours do not go out.
    syscalls.mount("none", "/", "", MS_REC | MS_SLAVE)
    view = syscalls.open_tree(syscalls.AT_FDCWD, export, syscalls.OPEN_TREE_CLONE)
    try:
        # Not twice: every mount that is here is copied for each container.
        syscalls.umount(export, syscalls.MNT_DETACH)
        syscalls.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # of the new PID namespace
        syscalls.mount("holdfast", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
        os.makedirs(EXPORT)
        syscalls.move_mount(view, "", syscalls.AT_FDCWD, EXPORT, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        # Containers get their mounts by bind: what is mounted later below /run reaches them only if asked for.  The
        # view is no part of that: it only receives, and from a mount that also passes on nothing could be moved away.
        syscalls.mount("none", "/run", "", MS_SHARED)
    finally:
        os.close(view)
    socket.sethostname("holdfast")


def main() -> None:
    """``argv``: the port's descriptor, the export, the containers' control group, and the runtime's words."""
    port, export, cgroup, *runtime = sys.argv[1:]
    os.umask(0o022)  # the caller's is no business of containers
    try:
        for fd in os.listdir("/proc/self/fd"):  # neither the port nor the pod's lock is for a container
            if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}"):
                os.set_inheritable(int(fd), False)
        isolate(export)
        agent = HostAgent(int(port), HostRuntime(tuple(runtime), cgroup))
        gc.freeze()
        agent.run()
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
        raise
