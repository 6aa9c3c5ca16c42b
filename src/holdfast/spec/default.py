"""The spec of a container made from an image: what podman would write, less the network.

The rules for command, environment and folder are podman's: people move between the two.  What needs the image's
files - names of users, their groups and homes - is left for the guest, which has them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import msgspec

from holdfast.errors import InvalidInput
from holdfast.spec.runtime import JsonObject, clean_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: podman's set.  An ordinary user loses the effective ones at execve(2), so one list serves every user.
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP",
    "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip

MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
    "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/dev/block", "/sys/devices/virtual/powercap",
    "/sys/firmware", "/sys/fs/selinux",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# The network namespace is new and empty but for its loopback: a pod has no network.
NAMESPACES = ("pid", "ipc", "uts", "mount", "cgroup", "network")


class ImageConfig(Protocol):
    """The ``config`` of an image (image-spec, config.md), as far as a spec depends on it.

    An image's volumes change nothing here: their paths are writable in the container's scratch, which lives as
    long as the anonymous volumes of a container that is removed when it ends.
    """

    @property
    def entrypoint(self) -> Sequence[str]: ...
    @property
    def cmd(self) -> Sequence[str]: ...
    @property
    def env(self) -> Sequence[str]: ...
    @property
    def user(self) -> str: ...
    @property
    def working_dir(self) -> str: ...
    @property
    def stop_signal(self) -> str: ...


class _NoConfig(msgspec.Struct, frozen=True):
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""


#: Of a root filesystem that came without an image: all that it wishes is said by the caller.
NO_CONFIG: ImageConfig = _NoConfig()


class ContainerSpec(msgspec.Struct, frozen=True):
    """A spec, and what of it only the guest can settle.

    Attributes:
        raw: the document; belongs to the caller.
        user: None if ``process.user`` is final (``UID:GID``, or root).  Else the text to look up in the container's
            ``/etc/passwd`` and ``/etc/group``: ``NAME``, ``NAME:GROUP`` or ``UID``.  Numbers in it are in
            ``process.user`` already, and stay if the files do not know them; a name that they do not know is an error.
    """

    raw: JsonObject
    user: str | None = None


def spec_for_image(
    image_config: ImageConfig,
    *,
    args: Sequence[str] = (),
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    hostname: str = "",
    terminal: bool = False,
    annotations: Mapping[str, str] | None = None,
    read_only: bool = False,
) -> ContainerSpec:
    """The spec of a container from an image.

    Args:
        image_config: the image's own wishes, which the other arguments override.
        args: in place of the image's Cmd.
        entrypoint: in place of the image's Entrypoint, and then its Cmd goes too; empty for none at all.
        env: over the image's.
        cwd: absolute.
        user: ``NAME``, ``UID``, ``NAME:GROUP``, ``UID:GID``...
        hostname: also put into the environment.
        terminal: whether the process gets a terminal.
        annotations: of the container.
        read_only: the root filesystem is; ``/run``, ``/tmp`` and ``/var/tmp`` are then made writable in memory.

    Raises:
        InvalidInput: ``no-command``, ``cwd-not-absolute``, ``user``.
    """
    variables = {"PATH": PATH} | _variables(image_config.env)
    raw = _skeleton()
    raw["process"]["args"] = _command(image_config, args, entrypoint)
    raw["process"]["env"] = [f"{name}={value}" for name, value in variables.items()]
    # A relative WorkingDir is one that docker's own builder once wrote.
    raw["process"]["cwd"] = clean_path(image_config.working_dir or "/")
    if read_only:
        raw["mounts"] += [_memory(path) for path in ("/run", "/tmp", "/var/tmp")]
    if image_config.stop_signal:  # image-spec, conversion.md
        raw["annotations"]["org.opencontainers.image.stopSignal"] = image_config.stop_signal
    return customise(
        raw,
        env=env,
        cwd=cwd,
        user=user or image_config.user or "0:0",
        hostname=hostname,
        terminal=terminal,
        annotations=annotations,
        read_only=read_only,
    )


def customise(
    raw: JsonObject,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    hostname: str = "",
    terminal: bool = False,
    annotations: Mapping[str, str] | None = None,
    read_only: bool = False,
) -> ContainerSpec:
    """A copy of ``raw``, a bundle's document for one, with what a command line says over it.

    Each argument means what it means for :func:`spec_for_image`, and changes nothing if it is not given.
    """
    raw = copy.deepcopy(raw)
    process = raw.get("process") or {"cwd": "/"}
    raw["process"] = process
    if args:
        process["args"] = list(args)
    if cwd is not None:
        if not cwd.startswith("/"):
            why = "the working folder in the container must be absolute"
            raise InvalidInput("set working folder", subject=cwd, why=why, code="cwd-not-absolute")
        process["cwd"] = clean_path(cwd)
    variables = _variables(process.get("env") or ())
    if hostname:
        raw["hostname"] = hostname
        variables.setdefault("HOSTNAME", hostname)
    if terminal:
        process["terminal"] = True
        variables.setdefault("TERM", "xterm")
    process["env"] = [f"{name}={value}" for name, value in (variables | dict(env or {})).items()]
    if annotations:
        raw["annotations"] = {**(raw.get("annotations") or {}), **annotations}
    if read_only:
        raw["root"] = {**(raw.get("root") or {}), "readonly": True}
    unresolved = None
    if user:
        uid, gid, unresolved = _user(user)
        # Groups that came with another user do not stay with this one.
        process["user"] = {**(process.get("user") or {}), "uid": uid, "gid": gid}
        process["user"].pop("additionalGids", None)
    return ContainerSpec(raw, unresolved)


def _command(image: ImageConfig, args: Sequence[str], entrypoint: Sequence[str] | None) -> list[str]:
    command = [*image.entrypoint, *(args or image.cmd)] if entrypoint is None else [*entrypoint, *args]
    if not command:
        why = "the image has neither Entrypoint nor Cmd" if entrypoint is None else "the entrypoint is empty"
        raise InvalidInput(
            "make container spec", why=f"no command: {why}", hint="give one after the image's name", code="no-command"
        )
    return command


def _variables(env: Iterable[str]) -> dict[str, str]:
    """By name; of a name given twice the last counts, at the first's place.  A name without ``=`` is empty."""
    variables: dict[str, str] = {}
    for entry in env:
        name, _, value = entry.partition("=")
        if name:
            variables[name] = value
    return variables


def _user(text: str) -> tuple[int, int, str | None]:
    """uid, gid, and the text if the guest has to look it up."""
    name, colon, group = text.partition(":")
    if ":" in group or (colon and not group) or not text.isprintable() or " " in text:
        raise _bad_user(text, "expected NAME, UID, NAME:GROUP or UID:GID")
    numbers = [int(part or "0") if part.isdecimal() or not part else None for part in (name, group)]
    if any(number is not None and number > 2**32 - 2 for number in numbers):
        raise _bad_user(text, "ids end at 4294967294")
    uid, gid = numbers
    # A user without a group gets the one in /etc/passwd, a number as well as a name.  Root's is known.
    known = uid is not None and gid is not None and (bool(group) or uid == 0)
    return uid or 0, gid or 0, None if known else text if name else f"0{text}"


def _bad_user(text: str, why: str) -> InvalidInput:
    return InvalidInput("read user", subject=text, why=why, code="user")


def _mount(destination: str, kind: str, source: str, *options: str) -> JsonObject:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _memory(path: str) -> JsonObject:
    return _mount(path, "tmpfs", "tmpfs", "rw", "nosuid", "nodev", "tmpcopyup")


def default_mounts() -> list[JsonObject]:
    """The kernel's filesystems, which every container has; ``cgroup`` is version 2 where the host's is."""
    quiet = ("nosuid", "noexec", "nodev")
    return [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
        _mount("/dev/pts", "devpts", "devpts", *quiet[:2], "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
        _mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=65536k"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"),
    ]


def _skeleton() -> JsonObject:
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": 0o022},
            "args": [],
            "env": [],
            "cwd": "/",
            # Not inheritable: CVE-2022-24769.
            "capabilities": {name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1048576},
                {"type": "RLIMIT_NPROC", "hard": 4194304, "soft": 4194304},
            ],
            "noNewPrivileges": False,
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": default_mounts(),
        "annotations": {},
        "linux": {
            "namespaces": [{"type": name} for name in NAMESPACES],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
    }
