"""How the disks of a root filesystem are protected and shared, as options say, or else annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import InvalidInput, NotFound, Unsupported
from holdfast.image import verity
from holdfast.spec import annotations as names
from holdfast.storage.plan import DirectoryRoot, LayeredRoot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.image.records import Verity


class Protection(msgspec.Struct, frozen=True):
    """What is wanted; None leaves it to the annotation."""

    verity: bool | None = None
    encrypt_scratch: bool | None = None
    reuse_scratch: bool | None = None


def protect(
    root: LayeredRoot | DirectoryRoot,
    wanted: Protection,
    annotations: Mapping[str, object],
    trees: Mapping[str, Verity | None],
    subject: str,
) -> LayeredRoot | DirectoryRoot:
    """``root`` with what is wanted of its disks.

    Args:
        trees: what is known of layers, by the path of their disks; the disk itself is asked for what is not here.
        subject: the image or bundle.

    Raises:
        InvalidInput: it is a folder of the host, or an annotation is neither true nor false.
        Unsupported: a layer has no hash tree.
    """

    def ask(option: bool | None, name: str) -> bool:
        return names.flag(annotations, name) if option is None else option

    check = ask(wanted.verity, names.VERITY)
    encrypted = ask(wanted.encrypt_scratch, names.ENCRYPT_SCRATCH)
    shared = ask(wanted.reuse_scratch, names.REUSE_SCRATCH)
    if isinstance(root, DirectoryRoot):
        if check or encrypted:
            raise InvalidInput(
                "protect root filesystem", subject=subject, why="it is a folder of this host, on no disk",
                hint="import it as an image", code="root-is-a-folder",
            )  # fmt: skip
        return root
    hashes = {path: trees.get(path) or _read_tree(path, subject) for path, _ in root.layers} if check else {}
    return msgspec.structs.replace(root, verity=hashes, encrypted=encrypted, shared=shared)


def _read_tree(path: str, subject: str) -> Verity:
    try:
        found = verity.read(path)
    except OSError as error:
        raise NotFound("read layer disk", subject=path, why=error, code="source-not-found") from None
    if found is None:
        raise Unsupported(
            "verify image", subject=subject, why=f"{path} has no hash tree: it was made before Holdfast made them",
            hint="import the image again", code="no-hash-tree",
        )  # fmt: skip
    return found
