"""A mount as data: what containerd's ``Mount`` says, in its words and its JSON."""

from __future__ import annotations

from holdfast.errors import InvalidInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: More options than this is a mistake: overlay alone takes 500 layers, in one option or in one each.
_MOST_OPTIONS = 1000


class Mount:
    """One mount to make.  It never changes, and making it does not change it.

    Args:
        type: ``bind``, ``overlay``, ``tmpfs``, ``ext4``... any filesystem of the kernel; ``fuse.NAME`` or
            ``fuse3.NAME`` for the mount program of that name; empty to look at what is in a file or device.
        source: what is mounted: a path, or any text for a filesystem that has no source.
        target: where: an absolute path; together with a root it is resolved under that, and empty is the root.
        options: as in ``/etc/fstab``; an element may hold several, separated by commas.

    Raises:
        InvalidInput: a part is not text, or contains a NUL byte.
    """

    __slots__ = ("options", "source", "target", "type")

    type: str
    source: str
    target: str
    options: tuple[str, ...]

    def __init__(self, type: str, source: str, target: str = "", options: Iterable[str] = ()) -> None:
        if isinstance(options, str):
            raise InvalidInput("read mount", subject=options, why="options are a list of texts", code="bad-mount")
        words = tuple(options)
        if len(words) > _MOST_OPTIONS:
            raise InvalidInput("read mount", subject=source, why=f"more than {_MOST_OPTIONS} options", code="bad-mount")
        for text in (type, source, target, *words):
            if not isinstance(text, str) or "\0" in text:
                raise InvalidInput("read mount", subject=repr(text), why="not a text without NUL", code="bad-mount")
        put = object.__setattr__
        put(self, "type", type)
        put(self, "source", source)
        put(self, "target", target)
        put(self, "options", words)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Mount does not change: {name}")

    def to_dict(self) -> dict[str, object]:
        """The JSON object that containerd prints: ``Type``, ``Source``, ``Target``, ``Options``."""
        return {"Type": self.type, "Source": self.source, "Target": self.target, "Options": list(self.options)}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Mount:
        """The mount that a JSON object describes, its names in containerd's spelling or in lower case (protobuf's).

        Raises:
            InvalidInput: an unknown or repeated name, or a value of the wrong type.
        """
        found: dict[str, object] = {}
        for key, value in record.items():
            name = key.lower()
            if name not in cls.__slots__ or name in found:
                raise InvalidInput("read mount", subject=key, why="no such field, or there twice", code="bad-mount")
            found[name] = value
        options = found.get("options")
        if options is not None and not isinstance(options, (list, tuple)):
            raise InvalidInput("read mount", subject=repr(options), why="options are a list of texts", code="bad-mount")
        # What is no text is refused by the constructor.
        kind, source, target = (found.get(name) or "" for name in ("type", "source", "target"))
        return cls(kind, source, target, options or ())  # type: ignore[arg-type]

    def describe(self) -> str:
        """The mount for people: ``overlay overlay on /x``."""
        return f"{self.type or 'auto'} {self.source}" + (f" on {self.target}" if self.target else "")

    def _key(self) -> tuple[str, str, str, tuple[str, ...]]:
        return self.type, self.source, self.target, self.options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mount) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Mount({self.type!r}, {self.source!r}, {self.target!r}, {list(self.options)!r})"
