"""The mounts of a command line, ``--mount type=...`` and ``-v SRC:DST``, as mount objects of the runtime-spec.

The syntax is podman's, with two types more: ``disk`` and ``physical-disk``, which become the types that utility
VMs know, ``virtual-disk`` and ``physical-disk``.  Nothing is looked up here: whether a source exists, and
what a ``volume`` or ``image`` is, storage decides.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput
from holdfast.mounts.options import FLAG_NAMES, PROPAGATION_NAMES, is_read_only, split
from holdfast.spec import disk_options
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.spec.runtime import JsonObject, clean_path
from holdfast.spec.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

TYPES = ("bind", "disk", "physical-disk", "tmpfs", "volume", "image")

_OCI_TYPES = {"disk": "virtual-disk"}
_ALIASES = {
    "src": "source",
    "dst": "destination",
    "target": "destination",
    "readonly": "ro",
    "read-only": "ro",
    "readwrite": "rw",
    "propagation": "bind-propagation",
    "tmpfs-size": "size",
    "tmpfs-mode": "mode",
}
#: A writable overlay over the mount, whose source stays as it is: podman's ``:O``.
OVERLAY = "overlay"
_DISK_KEYS = ("format", "partition", "access", "fork", "mount", "bind-propagation", "options", "overlay")
_TYPE_KEYS: dict[str, tuple[str, ...]] = {
    "disk": _DISK_KEYS,
    "physical-disk": _DISK_KEYS,
    "bind": ("bind-propagation", "bind-nonrecursive", "cache", "fork", "overlay"),
    "volume": ("fork", "overlay"),
    "tmpfs": ("size", "mode", "tmpcopyup", "notmpcopyup", "fork"),
}
#: How a guest may cache what is bound: ``none``, ``mmap`` (the default) or ``loose`` (as if nobody else wrote).
CACHE_MODES = ("none", "mmap", "loose")
_WITHOUT_VALUE = (*FLAG_NAMES, OVERLAY, "bind-nonrecursive", "tmpcopyup", "notmpcopyup")


def parse_mount(text: str, *, cwd: str, option: str = "--mount", destination_needed: bool = True) -> JsonObject:
    """The mount that ``--mount text`` asks for.

    Args:
        text: ``key=value`` pairs with commas between; a pair with a comma in it is put in double quotes.
        cwd: what a relative source is relative to.
        option: the option's name, for errors.
        destination_needed: False if the place in the guest may be left to Holdfast.

    Returns:
        ``destination`` (perhaps empty), ``type``, ``source``, ``options``.

    Raises:
        InvalidInput: ``mount-option``.
    """
    subject = f"{option} {text}"
    keys = _pairs(text, subject)
    kind = keys.pop("type", "volume")  # podman's default, too
    if kind not in TYPES:
        raise _wrong(subject, f"unknown type {kind!r}", f"type is one of {', '.join(TYPES)}")
    source, destination = keys.pop("source", ""), keys.pop("destination", "")
    known = ("ro", "rw", *_TYPE_KEYS.get(kind, ()), *(FLAG_NAMES if kind != "image" else ()))
    for key, value in keys.items():
        if key not in known:
            own = ", ".join(("source", "destination", "ro", "rw", *_TYPE_KEYS.get(kind, ())))
            raise _wrong(subject, f"type={kind} takes no {key!r}", f"it takes {own}")
        if value and key in _WITHOUT_VALUE:
            raise _wrong(subject, f"{key!r} takes no value")
    is_device = kind in _OCI_TYPES or kind == "physical-disk"
    if keys.get("mount", "yes") not in ("yes", "none"):
        raise _wrong(subject, f"mount={keys['mount']}", "mount=none gives the device instead of what is on it")
    if is_device and (destination.startswith(BLOCKDEV) or keys.get("mount") == "none"):
        path = destination.removeprefix(BLOCKDEV)
        destination = BLOCKDEV + (_destination(path, subject) if path or destination_needed else "")
    elif destination or destination_needed:
        destination = _destination(destination, subject)
    return {
        "destination": destination,
        "type": _OCI_TYPES.get(kind, kind),
        "source": _source(kind, source, cwd, subject),
        # What is shared by hints begins empty, or as others have left it: not as what it is mounted on.
        "options": [o for o in _options(kind, keys, subject) if o != "tmpcopyup" or not source],
    }


def parse_volume(text: str, *, cwd: str, option: str = "-v") -> JsonObject:
    """The mount that ``-v SRC:DST[:OPTIONS]`` asks for: a host path if SRC begins with ``/`` or ``.``, else a volume.

    Raises:
        InvalidInput: ``mount-option``.
    """
    subject = f"{option} {text}"
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise _wrong(subject, "expected SRC:DST or SRC:DST:OPTIONS")
    source, destination, words = {1: ("", parts[0], ""), 2: (*parts, ""), 3: tuple(parts)}[len(parts)]
    kind = "bind" if source[:1] in ("/", ".") else "volume"
    keys: dict[str, str] = {}
    for word in words.split(",") if words else ():
        if word in PROPAGATION_NAMES:
            keys["bind-propagation"] = word
        elif word == "bind":
            keys["bind-nonrecursive"] = ""
        elif word in ("ro", "rw") or word in FLAG_NAMES:
            keys[word] = ""
        elif word == "O":
            keys[OVERLAY] = ""
        elif word.partition("=")[0] in ("upperdir", "workdir"):
            raise _wrong(subject, f"{word}: what is written goes with the container", "O alone, without it")
        # z and Z ask for a new SELinux label: a share is relabelled by nobody, so there is nothing to do.
        elif word not in ("rbind", "z", "Z"):
            raise _wrong(subject, f"unknown option {word!r}", "ro, rw, O, nosuid, nodev, noexec, rprivate, rslave...")
    if kind == "volume":
        keys.pop("bind-propagation", None)
    return {
        "destination": _destination(destination, subject),
        "type": kind,
        "source": _source(kind, source, cwd, subject) if source else "",
        "options": _options(kind, keys, subject),
    }


def add_mounts(raw: JsonObject, mounts: Iterable[JsonObject]) -> None:
    """Adds ``mounts`` to the spec ``raw``, in place: ``raw`` is the caller's own copy.

    A mount takes the place of one with the same destination, and comes before those below it, which it would
    hide.  One on ``/dev`` brings devices of its own: what the spec mounts below is dropped, as engines do.
    """
    listed: list[JsonObject] = raw.get("mounts") or []
    for mount in sorted(mounts, key=lambda mount: clean_path(mount["destination"]).count("/")):
        target = clean_path(mount["destination"])
        below = target.rstrip("/") + "/"
        kept = [(path, other) for other in listed if (path := clean_path(other["destination"])) != target]
        if target == "/dev":
            kept = [(path, other) for path, other in kept if not path.startswith(below)]
        listed = [other for _, other in kept]
        index = next((index for index, (path, _) in enumerate(kept) if path.startswith(below)), len(kept))
        listed.insert(index, mount)
    raw["mounts"] = listed


def _pairs(text: str, subject: str) -> dict[str, str]:
    if set(text) & {"\n", "\r", "\0"}:
        raise _wrong(subject, "holds a line break or a NUL")
    keys: dict[str, str] = {}
    for pair in _fields(text, subject):
        name, equals, value = pair.partition("=")
        key = name.strip().lower()
        key = _ALIASES.get(key, key)
        if not key:
            raise _wrong(subject, "an empty key" if equals else "two commas, or one at an end")
        if key in keys:
            raise _wrong(subject, f"{key!r} is given twice")
        if key in ("type", "source", "destination", "size", "mode", "bind-propagation") and not value:
            raise _wrong(subject, f"{key!r} needs a value")
        keys[key] = value
    return keys


def _fields(text: str, subject: str) -> list[str]:
    """The fields of a line of CSV (RFC 4180): quotes go around a whole field, and a quote in it is doubled."""
    fields: list[str] = []
    rest: str | None = text or None
    while rest is not None:
        # An odd number of quotes up to a comma: the comma is inside of them.
        end = rest.find(",")
        while end >= 0 and rest.startswith('"') and rest.count('"', 0, end) % 2:
            end = rest.find(",", end + 1)
        field, rest = (rest, None) if end < 0 else (rest[:end], rest[end + 1 :])
        if '"' in field:
            inner = field[1:-1].replace('""', "")
            if len(field) < 2 or field[0] != '"' or field[-1] != '"' or '"' in inner:
                raise _wrong(subject, "quotes do not match", "quote whole pairs: 'type=bind,\"src=/a,b\",dst=/c'")
            field = field[1:-1].replace('""', '"')
        fields.append(field)
    return fields


def _destination(path: str, subject: str) -> str:
    if not path:
        raise _wrong(subject, "no destination", "say where in the container: dst=/path")
    if not path.startswith("/"):
        raise _wrong(subject, f"destination must be absolute, not {path!r}")
    if clean_path(path) == "/":
        raise _wrong(subject, "destination is the root itself")
    return clean_path(path)


def _source(kind: str, source: str, cwd: str, subject: str) -> str:
    if kind == "tmpfs":
        if source and not source.startswith("/"):
            raise _wrong(subject, f"{source!r} is not absolute", "the source of a tmpfs is what a hint calls it")
        return source or "tmpfs"
    if kind == "volume":
        if "/" in source:
            raise _wrong(subject, f"{source!r} is not a volume's name", "for a folder of this host say type=bind")
        return source
    if not source:
        raise _wrong(subject, "no source", f"say what to mount: src={'IMAGE' if kind == 'image' else 'PATH'}")
    return source if kind == "image" else _absolute(cwd, source)


def _absolute(cwd: str, path: str) -> str:
    """``path`` below ``cwd``, without what means nothing; ``..`` stays: only the kernel knows where a link leads."""
    return "/" + "/".join(part for part in os.path.join(cwd, path).split("/") if part not in ("", "."))


def _options(kind: str, keys: dict[str, str], subject: str) -> list[str]:
    """In the order in which engines write them: bind, propagation, access, the rest."""
    options: list[str] = []
    if kind == "bind":
        propagation = keys.get("bind-propagation") or "rprivate"
        if propagation not in PROPAGATION_NAMES:
            raise _wrong(subject, f"bind-propagation={propagation}", f"it is one of {', '.join(PROPAGATION_NAMES)}")
        options += ["bind" if "bind-nonrecursive" in keys else "rbind", propagation]
        if (cache := keys.get("cache")) is not None:
            if cache not in CACHE_MODES:
                raise _wrong(subject, f"cache={cache}", f"it is one of {', '.join(CACHE_MODES)}")
            options.append(f"cache={cache}")
    options.append(_access(kind, keys, subject))
    options += [key for key in keys if key == OVERLAY or key in FLAG_NAMES]
    if kind == "tmpfs":
        options += _tmpfs_options(keys, subject)
    if kind in ("disk", "physical-disk"):
        options += _disk_options(keys, subject)
    if kind in ("bind", "volume", "tmpfs"):
        options += _for_holdfast(("fork",), keys, subject)
    return options


def _disk_options(keys: dict[str, str], subject: str) -> list[str]:
    """The propagation, what is for Holdfast, and data for the filesystem."""
    options: list[str] = []
    if propagation := keys.get("bind-propagation"):
        if propagation not in PROPAGATION_NAMES:
            raise _wrong(subject, f"propagation={propagation}", f"it is one of {', '.join(PROPAGATION_NAMES)}")
        options.append(propagation)
    options += _for_holdfast(("format", "partition", "access", "fork"), keys, subject)
    return options + split(keys.get("options", ""))


def _for_holdfast(names: tuple[str, ...], keys: dict[str, str], subject: str) -> list[str]:
    """Those of these that are given, as options of a mount."""
    given = [name for name in names if name in keys]
    for name in given:
        disk_options.check(name, keys[name], subject)
    return [f"{disk_options.PREFIX}{name}={keys[name]}" for name in given]


def _access(kind: str, keys: dict[str, str], subject: str) -> str:
    if "ro" in keys and "rw" in keys:
        raise _wrong(subject, "both ro and rw")
    if not keys.keys() & {"ro", "rw"}:
        return "ro" if kind == "image" else "rw"  # an image is shared by all that mount it
    name = "ro" if "ro" in keys else "rw"
    value = keys[name]
    try:
        read_only = is_read_only([f"{name}={value}" if value else name])
    except InvalidInput as error:
        raise _wrong(subject, f"{name}: {error.why}") from None
    return "ro" if read_only else "rw"


def _tmpfs_options(keys: dict[str, str], subject: str) -> list[str]:
    # podman's defaults; "tmpcopyup" keeps what the image has there, which one that is empty in copies has nowhere.
    options = [name for name in ("nosuid", "nodev") if name not in keys and name[2:] not in keys]
    if "notmpcopyup" not in keys and ("tmpcopyup" in keys or keys.get("fork") != "fresh"):
        options.append("tmpcopyup")
    if size := keys.get("size"):
        percent = size.removesuffix("%")
        # tmpfs(5): a percentage is of the RAM, here of the pod's.
        share = percent != size and percent.isdecimal() and 0 < int(percent) <= 100
        options.append(f"size={size if share else parse_size(size, subject=subject)}")
    if mode := keys.get("mode"):
        if not (set(mode) <= set("01234567") and int(mode, 8) <= 0o7777):
            raise _wrong(subject, f"mode={mode} is not an octal mode such as 1777")
        options.append(f"mode={mode}")
    return options


def _wrong(subject: str, why: str, hint: str = "") -> InvalidInput:
    return InvalidInput("read mount", subject=subject, why=why, hint=hint, code="mount-option")
