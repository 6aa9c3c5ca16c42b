"""Hints: pod annotations that say that a mount is one thing which several containers share.

A hint is one name's ``source``, ``type``, ``share`` and ``options``, under any of these keys::

    dev.gvisor.spec.mount.NAME.FIELD        gVisor's
    gvisor.dev/spec/mount/NAME/FIELD        the same, as it was written until 2019
    dev.holdfast.mount.NAME.FIELD           ours

They are read whole, before anything is started, and in the order of their keys: annotations are a map, and what is
reported must not depend on how its owner happened to walk it.  Everything here is a function of text: sources are
compared as paths are written, and what a link leads to is for the caller to put in their place.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from holdfast.errors import InvalidInput, Unsupported
from holdfast.mounts import options as mount_options
from holdfast.spec import hint_options
from holdfast.spec.runtime import clean_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from holdfast.spec.runtime import Mount

Kind = Literal["tmpfs", "bind"]
Share = Literal["container", "pod", "shared"]
#: What a container gets of a hinted source: memory, something on disk that is the pod's own, the host's directory.
Backing = Literal["memory", "disk", "share"]

GVISOR = "dev.gvisor.spec.mount."
GVISOR_2019 = "gvisor.dev/spec/mount/"
HOLDFAST = "dev.holdfast.mount."
PREFIXES = (GVISOR, GVISOR_2019, HOLDFAST)

_KINDS: dict[str, Kind] = {"tmpfs": "tmpfs", "bind": "bind"}
_SHARES: dict[str, Share] = {"container": "container", "pod": "pod", "shared": "shared"}
_FIELDS = ("source", "type", "share", "options")
#: How gVisor's own file server is to be used: there is none here, so any of its values will do.
_DIRECTFS = ("default", "off")
_LONGEST_NAME = 253
#: At most so many problems are told in one error.
_MOST_TOLD = 10
#: What a tmpfs has for a source when nobody means anything by it.
_NO_SOURCE = frozenset({"", "none", "shm", "tmpfs"})


class Hint(Struct, frozen=True, omit_defaults=True):
    """One volume of the pod, as its annotations describe it.

    Attributes:
        name: unique in the pod.
        source: clean and absolute; unique in the pod.
        kind: ``tmpfs`` or ``bind``.
        share: who uses it: one ``container``, several of this ``pod``, or ``shared`` with others outside.
        options: of the one mount that all share; each once, in their order.
    """

    name: str
    source: str
    kind: Kind
    share: Share
    options: tuple[str, ...] = ()

    @property
    def has_master(self) -> bool:
        """Whether the pod mounts it once and containers get that mount: all but memory shared outside the pod.

        That cannot be, and gVisor, too, mounts such a thing as if there were no hint.
        """
        return self.kind == "bind" or self.share != "shared"

    @property
    def exclusive(self) -> bool:
        """Whether nobody outside the pod uses it, so that what is cached of it stays true."""
        return self.share != "shared"

    @property
    def master_options(self) -> tuple[str, ...]:
        """The options to make the master with: numbers in plain bytes, no words that mean nothing to it."""
        return hint_options.for_master(self.options)

    @property
    def size_bytes(self) -> int:
        """The limit of what is the pod's own; 0 if it is not said, or said in per cent of the memory."""
        size = hint_options.terms(self.options).data.get("size", 0)
        return size if isinstance(size, int) else 0


class Hints(Struct, frozen=True):
    """What :func:`parse_hints` found.

    Attributes:
        hints: by name.
        warnings: what was passed over, one sentence each; empty when read strictly.
    """

    hints: tuple[Hint, ...] = ()
    warnings: tuple[str, ...] = ()


def parse_key(key: str) -> tuple[str, str, str] | None:
    """An annotation's key as (prefix, name, field); None if it is not of a hint.

    Raises:
        InvalidInput: ``hint-key`` if there are not both name and field; ``hint-name``.
    """
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    if prefix is None:  # also what only looks alike: gvisor.dev/spec/mountX/...
        return None
    parts = key.removeprefix(prefix).split(prefix[-1])
    if len(parts) != 2 or not parts[1]:
        hint = f"a key is {prefix}NAME{prefix[-1]}FIELD, and NAME has no {prefix[-1]!r} in it"
        raise _wrong(key, "it does not have a name and a field", "hint-key", hint)
    name, field = parts
    if why := _name_problem(name):
        raise _wrong(key, f"the name {name!r} {why}", "hint-name")
    return prefix, name, field


def _name_problem(name: str) -> str:
    if not name:
        return "is empty"
    # posixpath.normpath leaves these two alone, which is how they got past gVisor's check.
    if name in (".", ".."):
        return "is one that every folder has"
    if "/" in name or not name.isprintable() or " " in name:
        return "holds a slash, a space or a character that cannot be printed"
    return f"is longer than {_LONGEST_NAME} characters" if len(name) > _LONGEST_NAME else ""


def parse_hints(annotations: Mapping[str, str], *, base: str = "", strict: bool = True) -> Hints:
    """The hints that a pod's annotations hold.

    Args:
        base: the bundle's folder, absolute: what relative sources are relative to.
        strict: whether every fault is an error.  If not, a field with a fault, and then a hint that lacks one, is
            passed over with a warning, as gVisor does since 2023.  Keys without name and field, contradictions and
            sources that two hints have are errors always.

    Raises:
        InvalidInput: ``hint-key``, ``hint-name``, ``hint-field``, ``hint-source``, ``hint-type``, ``hint-share``,
            ``hint-options``, ``hint-incomplete``, ``hint-conflict`` or ``hint-duplicate-source``.  It names key and
            value; further faults are among its causes.
    """
    reader = _Reader(base, strict)
    for key in sorted(annotations):
        reader.take(key, annotations[key])
    hints = [hint for name in sorted(reader.fields) if (hint := reader.hint(name))]
    reader.errors += _duplicates(hints)
    if reader.errors:
        raise _first_of(reader.errors)
    return Hints(tuple(hints), tuple(reader.warnings))


class _Reader:
    """Collects the fields of each name, then makes hints of them, and keeps what was wrong."""

    def __init__(self, base: str, strict: bool) -> None:
        self.base = base
        self.strict = strict
        self.fields: dict[str, dict[str, tuple[str, str]]] = {}
        self.errors: list[InvalidInput] = []
        self.warnings: list[str] = []

    def take(self, key: str, value: str) -> None:
        try:
            parsed = parse_key(key)
        except InvalidInput as error:
            self.errors.append(_wrong(f"{key}={value}", error.why, error.code, error.hint))
            return
        if parsed is None:
            return
        prefix, name, field = parsed
        fields = self.fields.setdefault(name, {})
        if field in fields and fields[field][1] != value:
            other = "=".join(fields[field])
            self.errors.append(_wrong(f"{key}={value}", f"contradicts {other}", "hint-conflict"))
        elif field in _FIELDS:
            fields[field] = (key, value)
        elif not (prefix == GVISOR and field == "directfs" and value in _DIRECTFS):
            why = f"there is no field {field!r}; there are {', '.join(_FIELDS)}"
            self._fault(_wrong(f"{key}={value}", why, "hint-field"))

    def _fault(self, error: InvalidInput) -> None:
        if self.strict:
            self.errors.append(error)
        else:
            self.warnings.append(f"passed over: {error}")

    def hint(self, name: str) -> Hint | None:
        known: dict[str, Any] = {}
        for field, read in (("source", self._source), ("type", _kind), ("share", _share)):
            if field in self.fields[name]:
                key, value = self.fields[name][field]
                try:
                    known[field] = read(key, value)
                except InvalidInput as error:
                    self._fault(error)
        options = self._options(name, known.get("type", ""))
        missing = [field for field in ("source", "type", "share") if field not in known]
        if not missing:
            return Hint(name, known["source"], known["type"], known["share"], options)
        absent = [field for field in missing if field not in self.fields[name]]
        if absent or not self.strict:  # read strictly, one that is there and wrong has been told already
            given = ", ".join(f"{key}={value}" for key, value in sorted(self.fields[name].values()))
            why = (
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; given is {given or 'nothing'}"
            )
            self._fault(_wrong(f"hint {name}", why, "hint-incomplete"))
        return None

    def _source(self, key: str, value: str) -> str:
        if not value or "\0" in value:
            raise _wrong(f"{key}={value}", "holds a NUL" if value else "it is empty", "hint-source")
        if not value.startswith("/") and not self.base:
            raise _wrong(f"{key}={value}", "relative, and there is no bundle that it could be in", "hint-source")
        return clean_path(posixpath.join(self.base, value))

    def _options(self, name: str, kind: str) -> tuple[str, ...]:
        if "options" not in self.fields[name]:
            return ()
        key, value = self.fields[name]["options"]
        words = hint_options.unique(mount_options.split(value))
        kept = []
        for word in words:
            try:
                hint_options.check(word, kind, unknown=not self.strict)
                kept.append(word)
            except InvalidInput as error:
                self._fault(_wrong(f"{key}={value}", f"{word!r} {error.why}", "hint-options", error.hint))
        if why := hint_options.contradiction(kept):
            self._fault(_wrong(f"{key}={value}", why, "hint-options"))
            kept = [word for word in kept if word not in mount_options.PROPAGATION_NAMES]
        return tuple(kept)


def _kind(key: str, value: str) -> Kind:
    if value not in _KINDS:
        raise _wrong(f"{key}={value}", f"the type is one of {', '.join(_KINDS)}", "hint-type")
    return _KINDS[value]


def _share(key: str, value: str) -> Share:
    if value not in _SHARES:
        raise _wrong(f"{key}={value}", f"the share is one of {', '.join(_SHARES)}", "hint-share")
    return _SHARES[value]


def _duplicates(hints: Iterable[Hint]) -> list[InvalidInput]:
    first: dict[str, Hint] = {}
    errors = []
    for hint in hints:
        other = first.setdefault(hint.source, hint)
        if other is not hint:
            why = f"it is the source of both {other.name} and {hint.name}"
            errors.append(_wrong(hint.source, why, "hint-duplicate-source"))
    return errors


def check_sources(hints: Iterable[Hint]) -> None:
    """Raises if two hints have one source: for those whose sources were replaced by what their links lead to.

    Raises:
        InvalidInput: ``hint-duplicate-source``.
    """
    if errors := _duplicates(hints):
        raise _first_of(errors)


def check_restated(pod: Sequence[Hint], later: Sequence[Hint], *, strict: bool = True) -> tuple[str, ...]:
    """Looks at the hints of a container that joins a pod: the pod's own are those of its first container.

    Engines give every container of a pod the same annotations, so to say the same again is no fault.

    Returns:
        What was passed over, when not read strictly.

    Raises:
        InvalidInput: ``hint-conflict``, another hint of the same name or source; ``hint-late``, one that the pod
            does not have (only a warning if not ``strict``).
    """
    names = {hint.name: hint for hint in pod}
    sources = {hint.source: hint for hint in pod}
    warnings = []
    for hint in sorted(later, key=lambda hint: hint.name):
        ours = names.get(hint.name) or sources.get(hint.source)
        if ours == hint:
            continue
        if ours:
            mine, yours = (" ".join(f"{k}={v}" for k, v in render(h).items()) for h in (ours, hint))
            raise _wrong(f"hint {hint.name}", f"the pod has {mine}; this container says {yours}", "hint-conflict")
        error = _wrong(
            f"hint {hint.name}", f"source {hint.source} is not among the hints that the pod was started with",
            "hint-late", "annotate the pod, not one container",
        )  # fmt: skip
        if strict:
            raise error
        warnings.append(f"passed over: {error}")
    return tuple(warnings)


def render(hint: Hint, prefix: str = HOLDFAST) -> dict[str, str]:
    """The annotations that :func:`parse_hints` reads as ``hint``."""
    values = {"source": hint.source, "type": hint.kind, "share": hint.share}
    if hint.options:
        values["options"] = ",".join(hint.options)
    return {f"{prefix}{hint.name}{prefix[-1]}{field}": value for field, value in values.items()}


def match(hints: Iterable[Hint], mount: Mount, base: str = "") -> tuple[Hint, str] | None:
    """The hint that a container's mount is about, and where below the hint's source it begins (``""``: at it).

    Of hints with sources inside each other it is the innermost.

    Args:
        base: the bundle's folder: what the mount's source is relative to, if it is relative.

    Raises:
        Unsupported: ``hint-subpath``; the kubelet has hidden behind a path of its own where in a volume that is kept
            in memory the mount begins.
    """
    if mount.kind not in ("bind", "tmpfs") or "\0" in mount.source:
        return None
    hints = tuple(hints)
    relative = not mount.source.startswith("/")
    if mount.kind == "tmpfs" and mount.source in _NO_SOURCE:
        return None
    if not mount.source or (relative and not base):
        return None
    path = clean_path(posixpath.join(base, mount.source))
    # A tmpfs with a relative source has a name, not a path: it is not below anything.
    exact_only = mount.kind == "tmpfs" and relative
    found = [hint for hint in hints if hint.source == path or (not exact_only and _is_below(path, hint.source))]
    if found:
        hint = max(found, key=lambda hint: len(hint.source))
        return hint, path.removeprefix(hint.source).lstrip("/")
    _refuse_kubelet_subpath(hints, path)
    return None


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _refuse_kubelet_subpath(hints: Sequence[Hint], path: str) -> None:
    """For a ``subPath`` the kubelet binds a part of a volume to ``.../volume-subpaths/VOLUME/CONTAINER/INDEX``."""
    pod, found, rest = path.partition("/volume-subpaths/")
    volume = rest.partition("/")[0]
    for hint in hints if found else ():
        if hint.kind == "tmpfs" and hint.source.startswith(f"{pod}/volumes/") and hint.source.endswith(f"/{volume}"):
            raise Unsupported(
                "share mount", subject=path, code="hint-subpath",
                why=f"it is a part of volume {volume}, which the pod keeps in memory, not there",
                hint=f"mount the whole volume, or annotate type=bind, share=shared for {volume}",
            )  # fmt: skip


def check_compatible(
    hint: Hint, options: Iterable[str], *, exact: bool = False, subject: object = ""
) -> None:  # fmt: skip
    """Raises if a container may not have the shared mount with such options.

    It may be stricter than the hint: read-only where that is writable, and so on for noexec, noatime, nosuid and
    nodev.  It may not be less strict, and what is of the file system and not of one mount (size, mode, uid, gid...)
    can only be said again.  Words without effect on either do not count.

    Args:
        options: the container's.
        exact: both must be the same words, in whatever order.
        subject: the mount, for the error.

    Raises:
        InvalidInput: ``hint-options-differ``, ``hint-less-strict``, ``hint-options-conflict``; ``mount-option`` if the
            container's cannot be read.
    """
    words = mount_options.split(options)
    subject = subject or hint.source
    if exact and set(words) != set(hint.options):
        mine, yours = (",".join(sorted(set(each))) or "none" for each in (hint.options, words))
        why = f"hint {hint.name} has the options {mine}, the container's mount has {yours}"
        raise InvalidInput("share mount", subject=subject, why=why, code="hint-options-differ")
    master, container = hint_options.terms(hint.options), hint_options.terms(words)
    if missing := [name for name in hint_options.RESTRICTIONS if name in master.restrictions - container.restrictions]:
        raise InvalidInput(
            "share mount", subject=subject, code="hint-less-strict",
            why=f"hint {hint.name} has {', '.join(missing)}, the container's mount does not",
            hint=f"add {','.join(missing)} to the mount's options",
        )  # fmt: skip
    for key, value in container.data.items():
        if master.data.get(key) != value:
            ours = hint_options.shown(key, master.data[key]) if key in master.data else "does not say"
            why = f"the container's mount wants {key} {hint_options.shown(key, value)}, hint {hint.name} {ours}"
            raise InvalidInput("share mount", subject=subject, why=why, code="hint-options-conflict")


def backing(hint: Hint, mount: Mount) -> Backing:
    """Where what a container writes to a hinted mount is kept: the hint and the mount's type say it together.

    gVisor's table: a hint of a tmpfs for a mount that is a tmpfs means memory; for a bind, it means that the pod
    has the directory for itself and may keep the data on disk in any form; a hint of a bind is the host's directory.
    """
    if hint.kind == "bind":
        return "share"
    return "disk" if mount.kind == "bind" else "memory"


def _first_of(errors: Sequence[InvalidInput]) -> InvalidInput:
    first, rest = errors[0], errors[1:_MOST_TOLD]
    return InvalidInput(
        first.what, subject=first.subject, why=first.why, hint=first.hint, code=first.code, causes=rest
    )  # fmt: skip


def _wrong(subject: object, why: str, code: str, hint: str = "") -> InvalidInput:
    return InvalidInput("read mount hint", subject=subject, why=why, hint=hint, code=code)
