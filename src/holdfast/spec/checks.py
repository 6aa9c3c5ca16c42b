"""What a spec of the right shape can still have wrong: the rules that runc and crun hold containers to.

They are held to here, before anything is attached or started, and all at once: one run tells everything.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput, Unsupported
from holdfast.spec.runtime import DISK_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.spec.runtime import Linux, Mount, Process, Spec

NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")


def check(spec: Spec, subject: object = "") -> None:
    """Raises if a container cannot be made from ``spec``.

    Raises:
        Unsupported: ``spec-version``; the document is of a later major version.
        InvalidInput: ``spec-invalid``; every problem, with its field.
    """
    _check_version(spec.oci_version, subject)
    found = list(problems(spec))
    if found:
        raise InvalidInput("read container spec", subject=subject, why="; ".join(found), code="spec-invalid")


def problems(spec: Spec) -> Iterator[str]:
    """Each problem as ``field: what is wrong``."""
    if not spec.windows.layer_folders and not (spec.root and spec.root.path):
        yield "root.path: required, but missing (windows.layerFolders would do, too)"
    if spec.windows.layer_folders and spec.root and spec.root.path:
        yield "root.path: cannot be given together with windows.layerFolders"
    if len(spec.windows.layer_folders) == 1:
        yield "windows.layerFolders: needs at least two, a layer and the folder for the container's own writes"
    if spec.root and "\0" in spec.root.path:
        yield "root.path: holds a NUL"
    if spec.process:
        yield from _process_problems(spec.process)
    for index, mount in enumerate(spec.mounts):
        for problem in _mount_problems(mount):
            yield f"mounts[{index}].{problem}"
    yield from _namespace_problems(spec.linux)
    uts = spec.linux.namespace("uts")
    for name, value in (("hostname", spec.hostname), ("domainname", spec.domainname)):
        if value and not uts:
            yield f"{name}: cannot be set without a uts namespace in linux.namespaces"
    for name, hooks in spec.hooks:
        for index, hook in enumerate(hooks):
            if not hook.path.startswith("/"):
                yield f"hooks.{name}[{index}].path: must be absolute, not {hook.path!r}"


def _check_version(version: str, subject: object) -> None:
    major, _, rest = version.partition(".")
    # config.md, "Specification version": SemVer 2.0.0.
    if not (major.isdecimal() and rest[:1].isdecimal() and "." in rest):
        why = f"ociVersion: {version!r} is not a version such as '1.0.2'"
        raise InvalidInput("read container spec", subject=subject, why=why, code="spec-invalid")
    if major != "1":
        why = f"ociVersion: version {version} of the runtime specification; versions 1.x are supported"
        raise Unsupported("read container spec", subject=subject, why=why, code="spec-version")


def _process_problems(process: Process) -> Iterator[str]:
    if not process.args or not process.args[0]:
        yield "process.args: names no command"
    if not process.cwd.startswith("/"):
        yield f"process.cwd: must be absolute, not {process.cwd!r}"
    for name, texts in (("args", process.args), ("cwd", (process.cwd,)), ("env", process.env)):
        if any("\0" in text for text in texts):
            yield f"process.{name}: holds a NUL"
    for index, entry in enumerate(process.env):
        if entry.find("=") < 1:
            yield f"process.env[{index}]: must be NAME=VALUE, not {entry!r}"
    # config.md, "rlimits": duplicated entries must be an error.
    for kind, count in Counter(limit.type for limit in process.rlimits).items():
        if count > 1:
            yield f"process.rlimits: {kind} is given {count} times"


def _mount_problems(mount: Mount) -> Iterator[str]:
    if not mount.destination:
        yield "destination: is empty"
    elif mount.target == "/":
        yield f"destination: {mount.destination!r} is the root itself"
    if not mount.kind:
        yield "type: required, but missing (only bind and rbind in options make it unneeded)"
    if mount.kind in ("bind", *DISK_TYPES) and not mount.source:
        yield f"source: required for a mount of type {mount.kind}"
    for name, text in (("destination", mount.destination), ("source", mount.source)):
        if "\0" in text:
            yield f"{name}: holds a NUL"
    if bool(mount.uid_mappings) != bool(mount.gid_mappings):
        yield "uidMappings, gidMappings: one is given without the other"


def _namespace_problems(linux: Linux) -> Iterator[str]:
    for index, namespace in enumerate(linux.namespaces):
        if namespace.type not in NAMESPACES:
            yield f"linux.namespaces[{index}].type: {namespace.type!r} is none of {', '.join(NAMESPACES)}"
        if namespace.path and not namespace.path.startswith("/"):
            yield f"linux.namespaces[{index}].path: must be absolute, not {namespace.path!r}"
    for kind, count in Counter(namespace.type for namespace in linux.namespaces).items():
        if count > 1:
            yield f"linux.namespaces: {kind} is given {count} times"
