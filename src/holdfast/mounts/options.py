"""Mount options as people, engines and ``/etc/fstab`` write them, sorted into what the kernel takes.

One list mixes four things: flags of ``mount(2)``, propagation (a separate call each: the kernel refuses it
together with anything else, mount_namespaces(7)), words for mount programs only, and data for the filesystem.
An option no table knows is data: the filesystem judges it.

Runs in the guest too, so it imports nothing heavy.
"""

from __future__ import annotations

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: option -> (flags, whether it sets them or clears them)
_FLAGS = {
    "nosuid": (sys_.MS_NOSUID, True),
    "suid": (sys_.MS_NOSUID, False),
    "nodev": (sys_.MS_NODEV, True),
    "dev": (sys_.MS_NODEV, False),
    "noexec": (sys_.MS_NOEXEC, True),
    "exec": (sys_.MS_NOEXEC, False),
    "noatime": (sys_.MS_NOATIME, True),
    "atime": (sys_.MS_NOATIME, False),
    "nodiratime": (sys_.MS_NODIRATIME, True),
    "diratime": (sys_.MS_NODIRATIME, False),
    "relatime": (sys_.MS_RELATIME, True),
    "norelatime": (sys_.MS_RELATIME, False),
    "strictatime": (sys_.MS_STRICTATIME, True),
    "nostrictatime": (sys_.MS_STRICTATIME, False),
    "nosymfollow": (sys_.MS_NOSYMFOLLOW, True),
    "symfollow": (sys_.MS_NOSYMFOLLOW, False),
}

#: Flags of the superblock, or of the call: these have no recursive form.
_CALL_FLAGS = {
    "sync": (sys_.MS_SYNCHRONOUS, True),
    "async": (sys_.MS_SYNCHRONOUS, False),
    "dirsync": (sys_.MS_DIRSYNC, True),
    "lazytime": (sys_.MS_LAZYTIME, True),
    "nolazytime": (sys_.MS_LAZYTIME, False),
    "mand": (sys_.MS_MANDLOCK, True),
    "nomand": (sys_.MS_MANDLOCK, False),
    "silent": (sys_.MS_SILENT, True),
    "loud": (sys_.MS_SILENT, False),
    "bind": (sys_.MS_BIND, True),
    "rbind": (sys_.MS_BIND | sys_.MS_REC, True),
    "remount": (sys_.MS_REMOUNT, True),
}

#: Flags of a filesystem, not of one mount of it; with them goes all of the data.
OF_FILESYSTEM = sys_.MS_SYNCHRONOUS | sys_.MS_DIRSYNC | sys_.MS_LAZYTIME | sys_.MS_MANDLOCK

_PROPAGATION = {
    "private": sys_.MS_PRIVATE,
    "rprivate": sys_.MS_PRIVATE | sys_.MS_REC,
    "shared": sys_.MS_SHARED,
    "rshared": sys_.MS_SHARED | sys_.MS_REC,
    "slave": sys_.MS_SLAVE,
    "rslave": sys_.MS_SLAVE | sys_.MS_REC,
    "unbindable": sys_.MS_UNBINDABLE,
    "runbindable": sys_.MS_UNBINDABLE | sys_.MS_REC,
}

#: Spellings of "read-only", and whether they mean it: compared without regard to case, since engines that
#: drive utility VMs write ``RO`` and podman takes ``readonly=true``.
_ACCESS = {"ro": True, "rro": True, "readonly": True, "read-only": True, "rw": False, "rrw": False, "readwrite": False}
_YES_NO = {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

PROPAGATION_NAMES = tuple(_PROPAGATION)
FLAG_NAMES = (*_FLAGS, *(name for name, (flags, _) in _CALL_FLAGS.items() if flags < sys_.MS_BIND))


def is_flag(word: str) -> bool:
    """Whether an option is a flag of a mount, in its plain or its recursive spelling: ``noexec``, ``rnoexec``."""
    lowered = word.lower()
    return lowered in FLAG_NAMES or (lowered[:1] == "r" and lowered[1:] in _FLAGS)


_ALL_FLAGS = frozenset((*_FLAGS, *("r" + name for name in _FLAGS), *_CALL_FLAGS, *_PROPAGATION))


class MountOptions:
    """What :func:`parse` found.

    Attributes:
        flags: of ``mount(2)``: ``MS_RDONLY``, ``MS_BIND``...
        recursive: the part of the per-mount flags that was asked for with the recursive spelling (``rro``,
            ``rnosuid``); they hold for a whole bound tree and take ``mount_setattr(2)`` with ``AT_RECURSIVE``.
        propagation: ``MS_PRIVATE`` and its like, perhaps with ``MS_REC``: one call each, in this order, after
            the mount itself.
        data: what is left, for the filesystem.
    """

    __slots__ = ("data", "flags", "propagation", "recursive")

    def __init__(self, flags: int, recursive: int, propagation: tuple[int, ...], data: tuple[str, ...]) -> None:
        self.flags = flags
        self.recursive = recursive
        self.propagation = propagation
        self.data = data

    @property
    def read_only(self) -> bool:
        return bool(self.flags & sys_.MS_RDONLY)

    @property
    def data_text(self) -> str:
        """The fifth argument of ``mount(2)``."""
        return ",".join(self.data)

    def __repr__(self) -> str:
        return f"MountOptions({self.flags:#x}, {self.recursive:#x}, {self.propagation}, {self.data})"


def words(options: MountOptions) -> list[str]:
    """The flags of a mount and its propagation, as plain words; whether it is read-only is not among them."""
    flags = [name for name, (bits, sets) in _FLAGS.items() if sets and bits & options.flags and name != "ro"]
    names = {value: name for name, value in _PROPAGATION.items()}
    return flags + [names[value] for value in options.propagation]


def split(options: str | Iterable[str]) -> list[str]:
    """Single options: an element may hold several, as in ``lowerdir=a,upperdir=b``.

    A comma inside double quotes (SELinux contexts) or after a backslash (overlay paths) does not separate.
    """
    words: list[str] = []
    for element in [options] if isinstance(options, str) else options:
        if "\\" not in element and '"' not in element:
            words += element.split(",")
            continue
        start, quoted, escaped = 0, False, False
        for index, letter in enumerate(element):
            if escaped:
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter == '"':
                quoted = not quoted
            elif letter == "," and not quoted:
                words.append(element[start:index])
                start = index + 1
        words.append(element[start:])
    return [word for word in words if word]


def _access(word: str) -> bool | None:
    """True for a spelling of read-only, False for one of read-write, None for any other option."""
    name, _, value = word.partition("=")
    meaning = _ACCESS.get(name.lower())
    if meaning is None:
        return None
    yes = _YES_NO.get(value.lower())
    if yes is None:
        raise InvalidInput(
            "read mount option", subject=word, why=f"{value!r} is neither true nor false", code="mount-option"
        )
    return meaning is yes


def is_read_only(options: str | Iterable[str]) -> bool:
    """Whether any option says read-only.

    Read-only wins over a read-write in the same list: a disk is opened once, and the stricter reading
    can be widened by its owner while the looser one cannot be taken back.
    """
    meanings = [_access(word) for word in split(options)]
    return True in meanings


def parse(options: str | Iterable[str]) -> MountOptions:
    """Sort ``options``; of two that contradict each other the later wins, but read-only always does."""
    words = split(options)
    flags = recursive = 0
    propagation: list[int] = []
    data: list[str] = []
    for given in words:
        # Engines that drive utility VMs write flags in any case; what is left goes on as it was written.
        word = given.lower() if given.lower() in _ALL_FLAGS else given
        name, is_recursive = word, False
        if word not in _FLAGS and word[1:] in _FLAGS and word[0] == "r":
            name, is_recursive = word[1:], True
        found = _FLAGS.get(name) or _CALL_FLAGS.get(name)
        if found:
            bits, sets = found
            flags = flags | bits if sets else flags & ~bits
            recursive = recursive | bits if sets and is_recursive else recursive & ~bits
        elif word in _PROPAGATION:
            propagation.append(_PROPAGATION[word])
        elif _access(word) is not None:
            if word.lower() == "rro":
                recursive |= sys_.MS_RDONLY
        # mount(8): x-* are for mount programs and are never given to the kernel.
        elif word != "defaults" and word[:2] not in ("x-", "X-"):
            data.append(word)
    if is_read_only(words):
        flags |= sys_.MS_RDONLY
    else:
        recursive &= ~sys_.MS_RDONLY
    return MountOptions(flags, recursive, tuple(propagation), tuple(data))
