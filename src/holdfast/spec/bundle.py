"""OCI bundles: a folder with ``config.json`` and, usually, the root filesystem (runtime-spec, bundle.md)."""

from __future__ import annotations

import copy
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import InvalidInput, NotFound
from holdfast.spec.checks import check
from holdfast.spec.runtime import JsonObject, Spec, spec_from_raw

if TYPE_CHECKING:
    from typing import Self


class Bundle(msgspec.Struct, frozen=True):
    """A bundle that was read and found right.

    Attributes:
        path: of the folder, absolute.
        raw: the document with every key it has.  Not to be changed: see :meth:`copy_raw`.
        spec: the typed view of it.
        root_path: the root filesystem's folder on this host, absolute; None if it is made of ``windows.layerFolders``.
    """

    path: str
    raw: JsonObject
    spec: Spec
    root_path: str | None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads and checks the bundle in ``path``.

        Raises:
            NotFound: ``bundle-not-found``, ``spec-not-found``, ``rootfs-not-found``.
            InvalidInput: ``bundle-not-a-directory``, ``spec-not-json``, ``spec-invalid``, ``spec-unreadable``,
                ``rootfs-not-a-directory``.
            Unsupported: ``spec-version``.
        """
        folder = os.path.abspath(path)
        _expect_directory("open bundle", "bundle", folder)
        config = os.path.join(folder, "config.json")
        raw = parse_document(_read(config), config)
        spec = spec_from_raw(raw, config)
        check(spec, config)
        root_path = None
        if not spec.windows.layer_folders and spec.root:
            root_path = os.path.normpath(os.path.join(folder, spec.root.path))
            _expect_directory("open root filesystem", "rootfs", root_path)
        return cls(folder, raw, spec, root_path)

    def copy_raw(self) -> JsonObject:
        """A deep copy of the document, for rewriting."""
        return copy.deepcopy(self.raw)

    def host_path(self, path: str) -> str:
        """``path``, which is relative to the bundle if it is not absolute (config.md, "Mounts": source)."""
        return os.path.join(self.path, path)


def parse_document(data: bytes, subject: object = "") -> JsonObject:
    """The JSON object in ``data``.

    Raises:
        InvalidInput: ``spec-not-json``, with line and column; ``spec-invalid`` if it is JSON, but no object.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = _why_not_json(data, error)
        raise InvalidInput("read container spec", subject=subject, why=why, code="spec-not-json") from None
    if not isinstance(raw, dict):
        why = f"expected an object, got {type(raw).__name__}"
        raise InvalidInput("read container spec", subject=subject, why=why, code="spec-invalid")
    return raw


def _why_not_json(data: bytes, error: Exception) -> str:
    """msgspec gives a byte's number at best; the standard parser tells line and column, and what it expected."""
    import json

    if isinstance(error, RecursionError):
        return "nested too deep"
    try:
        json.loads(data.decode())
    except json.JSONDecodeError as found:
        return f"line {found.lineno}, column {found.colno}: {found.msg}"
    except UnicodeDecodeError as found:
        line = data.count(b"\n", 0, found.start) + 1
        column = found.start - data.rfind(b"\n", 0, found.start)
        return f"line {line}, column {column}: not UTF-8: {found.reason}"
    except RecursionError:
        return "nested too deep"
    return str(error)  # what the standard parser lets pass, such as NaN


def _expect_directory(what: str, noun: str, path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(what, subject=path, why=error, code=f"{noun}-not-found") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidInput(what, subject=path, why=error, code=f"{noun}-unreadable") from None
    if not stat.S_ISDIR(mode):
        raise InvalidInput(what, subject=path, why="is not a directory", code=f"{noun}-not-a-directory")


def _read(path: str) -> bytes:
    try:
        # Not blocking: someone else's bundle may hold a FIFO of that name.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidInput("read container spec", subject=path, why="is not a file", code="spec-unreadable")
            return file.read()
    except FileNotFoundError as error:
        hint = "a bundle is a folder with a config.json; an image is named without --bundle"
        raise NotFound("read container spec", subject=path, why=error, hint=hint, code="spec-not-found") from None
    except OSError as error:
        raise InvalidInput("read container spec", subject=path, why=error, code="spec-unreadable") from None
