"""The command line of ``holdfast``, read into typed records: one class per command, nothing done yet.

Which words there are is in :mod:`holdfast.cli.grammar`, what they mean in :mod:`holdfast.cli.words`: both are imported
when there are words to read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from holdfast.linux.places import default_data, default_state
from holdfast.spec.runtime import JsonObject  # noqa: TC001 - msgspec reads the records' annotations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Isolation = Literal["vm", "namespace"]


class SandboxOptions(Struct, frozen=True):
    """What a new pod's sandbox is.  ``template`` is None for Holdfast's choice, ``"none"`` for booting afresh.

    Attributes:
        writable_shares: whether the pod may have any.
        pmem: whether there is persistent memory, for layers.
        ports: whether there are places for assigned devices.
    """

    isolation: Isolation = "vm"
    template: str | None = None
    memory_bytes: int = 256 * 1024**2
    cpus: int = 1
    writable_shares: bool = True
    pmem: bool = False
    ports: bool = False


class RunOptions(Struct, frozen=True):
    """``run``: of ``image``, ``bundle`` and ``rootfs`` one is given.  ``mounts`` are objects of the runtime-spec."""

    image: str | None
    bundle: str | None
    args: tuple[str, ...] = ()
    pod: str | None = None
    name: str | None = None
    sandbox: SandboxOptions = SandboxOptions()
    mounts: tuple[JsonObject, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    hostname: str | None = None
    entrypoint: tuple[str, ...] | None = None
    annotations: dict[str, str] = {}
    interactive: bool = False
    terminal: bool = False
    detach: bool = False
    read_only: bool = False
    scratch_bytes: int | None = None
    verity: bool = False
    encrypt_scratch: bool = False
    reuse_scratch: bool = False
    devices: tuple[str, ...] = ()
    rootfs: str | None = None


class PlanOptions(Struct, frozen=True):
    run: RunOptions


class PsOptions(Struct, frozen=True):
    pass


class PodCreateOptions(Struct, frozen=True):
    pod: str
    sandbox: SandboxOptions = SandboxOptions()
    annotations: dict[str, str] = {}


class PodInspectOptions(Struct, frozen=True):
    pod: str


class PodRemoveOptions(Struct, frozen=True):
    pods: tuple[str, ...]
    force: bool = False


class PoolOptions(Struct, frozen=True):
    """How many pods are to be ready, and what their machines are."""

    size: int
    memory_bytes: int
    cpus: int


class PodForkOptions(Struct, frozen=True):
    """``names`` are of the first of the ``count`` new pods; the others' are made up."""

    pod: str
    count: int = 1
    names: tuple[str, ...] = ()


class PodSaveOptions(Struct, frozen=True):
    """``stop`` ends the pod when it is saved."""

    pod: str
    file: str
    stop: bool = False


class PodRestoreOptions(Struct, frozen=True):
    """``name`` is None for that of the pod that was saved; ``bundles`` are by container, ``""`` for the only one."""

    file: str
    name: str | None = None
    bundles: dict[str, str] = {}


class ExecOptions(Struct, frozen=True):
    """``container`` is None for the only one in the pod."""

    pod: str
    container: str | None
    args: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    interactive: bool = False
    terminal: bool = False


class StorageOptions(Struct, frozen=True):
    pod: str


class AttachOptions(Struct, frozen=True):
    """``mounts`` are as in :class:`RunOptions`; only in a ``container`` they need a destination."""

    pod: str
    mounts: tuple[JsonObject, ...]
    container: str | None = None


class DetachOptions(Struct, frozen=True):
    """``targets`` are guest paths, as ``attach`` printed them, or host paths; or paths in the ``container``."""

    pod: str
    targets: tuple[str, ...]
    container: str | None = None


class ImageImportOptions(Struct, frozen=True):
    path: str
    name: str


class ImagePullOptions(Struct, frozen=True):
    reference: str
    name: str | None = None


class ImageListOptions(Struct, frozen=True):
    pass


class ImageInspectOptions(Struct, frozen=True):
    name: str


class ImageRemoveOptions(Struct, frozen=True):
    names: tuple[str, ...]


class GuestBuildOptions(Struct, frozen=True):
    pass


class GuestInspectOptions(Struct, frozen=True):
    pass


class TemplateBuildOptions(Struct, frozen=True):
    """What pods will ask for: a template is of one size; or ``name``, and the pod or the images that go into it."""

    memory_bytes: int = 256 * 1024**2
    cpus: int = 1
    pmem: bool = False
    ports: bool = False
    name: str | None = None
    from_pod: str | None = None
    images: tuple[str, ...] = ()


class TemplateListOptions(Struct, frozen=True):
    pass


class TemplateInspectOptions(Struct, frozen=True):
    name: str


class TemplateRemoveOptions(Struct, frozen=True):
    """``stale`` stands for the names of those that no new pod would start from."""

    names: tuple[str, ...]
    stale: bool = False
    force: bool = False


class VolumeCreateOptions(Struct, frozen=True):
    """``size_bytes`` is None for the usual one."""

    name: str
    size_bytes: int | None = None
    labels: dict[str, str] = {}


class VolumeListOptions(Struct, frozen=True):
    pass


class VolumeInspectOptions(Struct, frozen=True):
    name: str


class VolumeRemoveOptions(Struct, frozen=True):
    """``force`` makes one that is not there no error; nothing takes one from a pod that lives."""

    names: tuple[str, ...]
    force: bool = False


class VolumeGrowOptions(Struct, frozen=True):
    name: str
    size_bytes: int


class AuditOptions(Struct, frozen=True):
    pass


class GcOptions(Struct, frozen=True):
    pass


class DoctorOptions(Struct, frozen=True):
    pass


class CommandLine(Struct, frozen=True):
    """A whole command line.

    Attributes:
        root: the state root, absolute.
        data: the data root, absolute.
        json: whether what is printed is for programs, errors too.
        debug: whether an error comes with where it happened.
        command: one of the classes above.
    """

    root: str
    data: str
    json: bool
    debug: bool
    command: Struct


def parse(argv: Sequence[str], *, environ: Mapping[str, str] | None = None, cwd: str | None = None) -> CommandLine:
    """What ``holdfast ARGV...`` asks for.

    Args:
        argv: without the program's own name.
        environ: for ``HOLDFAST_ROOT``, ``HOLDFAST_DATA`` and ``-e NAME``; this process's if None.
        cwd: what relative paths are relative to; this process's if None.

    Raises:
        InvalidInput: ``usage``; ``mount-option`` and ``size`` from the values of options.
        SystemExit: after ``--help`` and ``--version``, with 0.
    """
    environ = os.environ if environ is None else environ
    cwd = os.getcwd() if cwd is None else cwd
    from holdfast.cli.grammar import make_parser
    from holdfast.cli.words import Words, usage_error

    found, unknown = make_parser(_command_of(argv)).parse_known_args(list(argv))
    if unknown:
        raise usage_error(
            found.prog, f"unknown option {unknown[0]}" if unknown[0][:1] == "-" else f"what is {unknown[0]!r}?"
        )
    words = Words(found, found.prog, environ, cwd)
    return CommandLine(
        root=words.path(getattr(found, "root", None) or environ.get("HOLDFAST_ROOT") or default_state()),
        data=words.path(getattr(found, "data", None) or environ.get("HOLDFAST_DATA") or default_data()),
        json=getattr(found, "json", False),
        debug=getattr(found, "debug", False),
        command=found.make(words),
    )


def _command_of(argv: Sequence[str]) -> str:
    """The command, if nothing but options for everywhere is before it."""
    words = iter(argv)
    for word in words:
        if word in ("--root", "--data"):
            next(words, None)
        elif word not in ("--json", "--debug") and not word.startswith(("--root=", "--data=")):
            return word
    return ""
