"""The mount options of shared mounts: which a hint may have, and what of them the containers must agree on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls as sys_
from holdfast.mounts import options as mount_options
from holdfast.spec.mounts import CACHE_MODES
from holdfast.spec.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What one mount of a file system may have more than another, in the order in which it is told.
RESTRICTIONS = {
    "ro": sys_.MS_RDONLY,
    "noexec": sys_.MS_NOEXEC,
    "noatime": sys_.MS_NOATIME,
    "nosuid": sys_.MS_NOSUID,
    "nodev": sys_.MS_NODEV,
}
#: What is of the whole file system, by kind of hint.
_DATA_KEYS = {"tmpfs": ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks"), "bind": ("cache",)}
_ALL_DATA_KEYS = frozenset(key for keys in _DATA_KEYS.values() for key in keys)
#: Options of mount(8) that the runtime-spec lists and that mean nothing to these file systems.
_WITHOUT_EFFECT = frozenset({"acl", "noacl", "iversion", "noiversion"})
#: Words that say how to mount, not what: a master is made in one way only.
_OF_THE_CALL = frozenset({"bind", "rbind", "remount", "defaults"})
#: A mount in a pod cannot send mounts to the host, so this cannot be kept.
_NOT_TO_BE_HAD = ("shared", "rshared")
_COUNT = re.compile(r"(\d{1,15})([kmg]?)", re.ASCII | re.IGNORECASE)


class Terms(Struct, frozen=True):
    """What counts of a list of options.

    Attributes:
        restrictions: those of :data:`RESTRICTIONS` that hold.
        data: values by key, of the whole file system; a size is bytes, or text if it is in per cent.
    """

    restrictions: frozenset[str]
    data: dict[str, int | str]


def unique(words: Iterable[str]) -> tuple[str, ...]:
    """Each word once, where it was last: of two that contradict each other the later holds."""
    return tuple(reversed(dict.fromkeys(reversed(list(words)))))


def terms(options: Iterable[str]) -> Terms:
    """What counts of ``options``.

    Raises:
        InvalidInput: ``mount-option``; a value that cannot be read.
    """
    parsed = mount_options.parse(options)
    data: dict[str, int | str] = {}
    for word in parsed.data:
        key, _, value = word.partition("=")
        if key in _ALL_DATA_KEYS:
            data[key] = _value(key, value)
    return Terms(frozenset(name for name, flag in RESTRICTIONS.items() if parsed.flags & flag), data)


def check(word: str, kind: str, *, unknown: bool = False) -> None:
    """Raises if a hint may not have this option.

    Args:
        kind: of the hint; empty if it is not known.
        unknown: whether one that nothing is known of is let pass.

    Raises:
        InvalidInput: ``mount-option``; why goes on from the word.
    """
    if word in _NOT_TO_BE_HAD:
        raise _wrong(word, "is not supported: no mount made in a pod is sent to the host", "say rslave or rprivate")
    data = mount_options.parse([word]).data
    key, _, value = word.partition("=")
    if not data or word in _WITHOUT_EFFECT:
        return
    if key in _ALL_DATA_KEYS:
        if kind and key not in _DATA_KEYS[kind]:
            raise _wrong(word, f"is not for type {kind}", f"it takes {', '.join(_DATA_KEYS[kind])}")
        _value(key, value)
    elif not unknown:
        raise _wrong(word, "is not a known mount option")


def contradiction(words: Iterable[str]) -> str:
    """What is wrong with the propagation that ``words`` ask for: of the three kinds a mount has one."""
    kinds = {word.removeprefix("r") for word in words if word in mount_options.PROPAGATION_NAMES}
    return f"a mount is either {' or '.join(sorted(kinds))}" if len(kinds) > 1 else ""


def for_master(options: Iterable[str]) -> tuple[str, ...]:
    """``options`` for the mount that is shared: values as the kernel reads them, no words about the call.

    ``cache=`` stays: it is for whoever shares the host's directory with the machine, not for a kernel.
    """
    kept = []
    for word in options:
        key, _, value = word.partition("=")
        if key in _ALL_DATA_KEYS:
            kept.append(f"{key}={shown(key, _value(key, value))}")
        elif word not in _OF_THE_CALL | _WITHOUT_EFFECT and word[:2] not in ("x-", "X-"):
            kept.append(word)
    return tuple(kept)


def shown(key: str, value: int | str) -> str:
    """A value of :attr:`Terms.data` as an option says it."""
    return f"{value:o}" if key == "mode" else str(value)


def _value(key: str, text: str) -> int | str:
    word = f"{key}={text}"
    if key == "cache":
        if text not in CACHE_MODES:
            raise _wrong(word, f"is none of {', '.join(CACHE_MODES)}")
        return text
    if key == "size":
        return _size(text, word)
    if key == "mode":
        if not (text and len(text) <= 5 and set(text) <= set("01234567") and int(text, 8) <= 0o7777):
            raise _wrong(word, "is not an octal mode such as 1777")
        return int(text, 8)
    found = _COUNT.fullmatch(text)
    if not found or (key in ("uid", "gid") and (found.group(2) or int(text) > 2**32 - 2)):
        raise _wrong(word, "is not a number that it could be")
    return int(found.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[found.group(2).lower()]


def _size(text: str, word: str) -> int | str:
    percent = text.removesuffix("%")
    if percent != text:  # tmpfs(5): of the memory, here the pod's
        if not (percent.isascii() and percent.isdecimal() and len(percent) <= 3 and 0 < int(percent) <= 100):
            raise _wrong(word, "is not from 1% to 100%")
        return f"{int(percent)}%"
    try:
        return parse_size(text)
    except InvalidInput as error:
        raise _wrong(word, str(error.why).removeprefix(f"{text!r} ")) from None


def _wrong(word: str, why: str, hint: str = "") -> InvalidInput:
    return InvalidInput("read mount option", subject=word, why=why, hint=hint, code="mount-option")
