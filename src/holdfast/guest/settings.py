"""The settings of a request, read with their types checked; an absent number is zero, an absent text empty."""

from __future__ import annotations

from holdfast.errors import InvalidInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def item(value: object) -> dict[str, Any]:
    """The settings of one of many things.

    Raises:
        InvalidInput: they are no object.
    """
    if not isinstance(value, dict):
        raise InvalidInput("read request", subject="Settings", why="not an object")
    return value


def text(settings: dict[str, Any], key: str) -> str:
    """A text.

    Raises:
        InvalidInput: it is none.
    """
    value = settings.get(key, "")
    if not isinstance(value, str):
        raise InvalidInput("read request", subject=key, why="not a string")
    return value


def path(settings: dict[str, Any], key: str) -> str:
    """An absolute path without ``..``.

    Raises:
        InvalidInput: it is none.
    """
    value = text(settings, key)
    if not value.startswith("/") or "/../" in value + "/" or "\0" in value:
        raise InvalidInput("read request", subject=key, why=f"not an absolute, clean path: {value!r}")
    return value


def number(settings: dict[str, Any], key: str) -> int:
    """A number that is not negative.

    Raises:
        InvalidInput: it is none.
    """
    value = settings.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput("read request", subject=key, why="not a number")
    return value
