"""Annotations that say how a container's storage is made, with the names that others gave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Every block of the image's layers is checked by dm-verity.
VERITY = "dev.holdfast.verity"
#: hcsshim: the scratch disk is encrypted.
ENCRYPT_SCRATCH = "io.microsoft.virtualmachine.storage.scratch.encrypted"
#: containerd: the containers of a pod write to one scratch disk.
REUSE_SCRATCH = "containerd.io/snapshot/io.microsoft.container.storage.reuse-scratch"
#: hcsshim: no container of the pod, or this one, gets a share that it can write to.
NO_WRITABLE_SHARES = "io.microsoft.virtualmachine.fileshares.disablewritable"

#: A mount that a hint shares must have the hint's very options; else it may be stricter.
EXACT_HINTS = "dev.holdfast.exact-hints"

#: Whether ``/tmp`` is in memory: ``auto`` (if the image has nothing there), ``tmpfs`` (always) or ``rootfs`` (never).
TMP = "dev.holdfast.tmp"

_WORDS = {"true": True, "1": True, "false": False, "0": False}


def flag(annotations: Mapping[str, object], name: str) -> bool:
    """What an annotation says; false if it is not there.

    Raises:
        InvalidInput: something else.  hcsshim takes the default then, which here would be to protect nothing.
    """
    text = str(annotations.get(name, "false"))
    try:
        return _WORDS[text.strip().lower()]
    except KeyError:
        raise InvalidInput(
            "read annotation", subject=f"{name}={text}", why="neither true nor false", code="annotation"
        ) from None
