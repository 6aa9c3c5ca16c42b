"""``config.json`` of an OCI bundle, as typed records of what Holdfast reads.

A typed view beside the document, never instead of it: engines write keys that no version of the specification
knows, and the runtime in the guest must get them all.  So rewriting is done on a deep copy of the raw object, and
these records are for looking only.

A key that is ``null`` counts as absent.  The schema allows null in few places, but the engines are Go programs,
where a null and an absent key decode alike, and some write null for an empty list (``windows.layerFolders``).
"""

from __future__ import annotations

import functools
import posixpath
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from holdfast.errors import InvalidInput
from holdfast.mounts.options import is_read_only

if TYPE_CHECKING:
    from collections.abc import Iterator

JsonObject = dict[str, Any]

# config.md, POSIX-platform user: ids are uint32; the last one means "leave as it is" to chown(2).
Id = Annotated[int, Meta(ge=0, le=2**32 - 2)]
Unsigned = Annotated[int, Meta(ge=0)]

DISK_TYPES = ("virtual-disk", "physical-disk")


class Record(Struct, frozen=True, rename="camel"):
    """Base of all: unknown keys are ignored, as the specification demands (config.md, "Extensibility")."""


class ConsoleSize(Record, frozen=True):
    height: Unsigned = 0
    width: Unsigned = 0


class User(Record, frozen=True):
    uid: Id = 0
    gid: Id = 0
    umask: Unsigned | None = None
    additional_gids: tuple[Id, ...] = ()
    username: str = ""


class Capabilities(Record, frozen=True):
    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class Rlimit(Record, frozen=True):
    type: str
    soft: Unsigned
    hard: Unsigned


class Process(Record, frozen=True):
    cwd: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    terminal: bool = False
    console_size: ConsoleSize | None = None
    user: User = User()
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    selinux_label: str = ""
    oom_score_adj: int | None = None


class Root(Record, frozen=True):
    path: str = ""
    readonly: bool = False


class IdMapping(Record, frozen=True):
    container_id: Id = field(name="containerID")
    host_id: Id = field(name="hostID")
    size: Unsigned


class Mount(Record, frozen=True):
    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()

    @property
    def kind(self) -> str:
        """The type, and ``bind`` for whatever binds by its options: podman and runc look at those, not at the type."""
        if self.type in DISK_TYPES:
            return self.type
        binds = self.type == "bind" or any(option in ("bind", "rbind") for option in self.options)
        return "bind" if binds else self.type

    @property
    def target(self) -> str:
        """The destination as a clean absolute path; a relative one is relative to the root, as runc has it."""
        return clean_path(self.destination)

    @property
    def read_only(self) -> bool:
        return is_read_only(self.options)


class Hook(Record, frozen=True):
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Hooks(Record, frozen=True):
    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, tuple[Hook, ...]]]:
        for name, encoded in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True):
            yield encoded, getattr(self, name)


class Namespace(Record, frozen=True):
    type: str
    path: str = ""


class Device(Record, frozen=True):
    """A device node to make in the container (``linux.devices``)."""

    type: str
    path: str
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    uid: Id | None = None
    gid: Id | None = None


class DeviceRule(Record, frozen=True):
    """``linux.resources.devices``: what the cgroup allows."""

    allow: bool
    type: str = ""
    major: int | None = None
    minor: int | None = None
    access: str = ""


class Memory(Record, frozen=True):
    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None


class Cpu(Record, frozen=True):
    shares: int | None = None
    quota: int | None = None
    period: int | None = None
    cpus: str = ""
    mems: str = ""


class Pids(Record, frozen=True):
    limit: int | None = None


class Resources(Record, frozen=True):
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    devices: tuple[DeviceRule, ...] = ()


class Linux(Record, frozen=True):
    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    devices: tuple[Device, ...] = ()
    cgroups_path: str = ""
    resources: Resources | None = None
    rootfs_propagation: str = ""
    sysctl: dict[str, str] = {}
    seccomp: JsonObject | None = None
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    mount_label: str = ""

    def namespace(self, kind: str) -> Namespace | None:
        return next((namespace for namespace in self.namespaces if namespace.type == kind), None)


class AssignedDevice(Record, frozen=True):
    id: str
    id_type: str = ""


class Windows(Record, frozen=True):
    """The part of the Windows section that utility VMs for Linux containers use."""

    layer_folders: tuple[str, ...] = ()
    devices: tuple[AssignedDevice, ...] = ()


class Spec(Record, frozen=True):
    oci_version: str
    process: Process | None = None
    root: Root | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks = Hooks()
    annotations: dict[str, str] = {}
    linux: Linux = Linux()
    windows: Windows = Windows()


@functools.lru_cache(maxsize=1024)  # planning asks a dozen times for each mount's
def clean_path(path: str) -> str:
    """``path`` as an absolute one without ``.``, ``..`` and doubled slashes; ``..`` stops at the root."""
    # normpath keeps exactly two leading slashes, which POSIX leaves to the implementation.
    return posixpath.normpath("/" + path.lstrip("/"))


def spec_from_raw(raw: object, subject: object = "") -> Spec:
    """The typed view of a decoded document.

    Raises:
        InvalidInput: ``spec-invalid``; names the field.
    """
    try:
        return msgspec.convert(_without_nulls(raw), Spec)
    except (msgspec.ValidationError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else _explain(str(error), raw)
        raise InvalidInput("read container spec", subject=subject, why=why, code="spec-invalid") from None


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _explain(text: str, raw: object) -> str:
    """msgspec's ``Expected `str`, got `int` - at `$.mounts[3].type` `` as ``mounts[3].type: expected...``."""
    problem, _, path = text.partition(" - at `$")
    path = path.removesuffix("`").removeprefix(".")
    missing = problem.removeprefix("Object missing required field `")
    if missing != problem:
        path = f"{path}.{missing.removesuffix('`')}".removeprefix(".")
        problem = "required, but missing"
    if path.endswith("[...]"):  # a key of a mapping, which msgspec does not name
        path = _name_the_key(path, raw)
    problem = problem[:1].lower() + problem[1:]
    return f"{path}: {problem}" if path else problem


def _name_the_key(path: str, raw: object) -> str:
    path = path.removesuffix("[...]")
    for name in path.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    # The mappings of this model are all of text to text.
    keys = [key for key, value in raw.items() if not isinstance(value, str)] if isinstance(raw, dict) else []
    return f"{path}[{keys[0]!r}]" if keys else path
