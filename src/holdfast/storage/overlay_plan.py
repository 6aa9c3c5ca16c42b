"""A writable overlay over one mount: podman's ``:O``, the mount option ``overlay``.

What the container writes goes to its scratch disk, or to a little memory if its root has none; what lies below is
shared, or attached, read-only, and stays as it is.  The option is of Holdfast's, and never reaches a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from holdfast.errors import InvalidInput
from holdfast.mounts import options as mount_options
from holdfast.spec.disk_options import BLOCKDEV
from holdfast.spec.mounts import OVERLAY

if TYPE_CHECKING:
    from holdfast.spec.runtime import Mount

StepT = TypeVar("StepT")
#: Where podman lets a user say what is written to: a folder of the host, which would outlive the container.
_WHERE = ("upperdir", "workdir")


def lower(mount: Mount) -> Mount:
    """The mount that lies below: without the word, and read-only."""
    kept = tuple(option for option in mount_options.split(mount.options) if option != OVERLAY)
    return msgspec.structs.replace(mount, options=(*kept, "ro"))


def upper(mount: Mount) -> Mount:
    """What the container gets: without the word."""
    kept = tuple(option for option in mount_options.split(mount.options) if option != OVERLAY)
    return msgspec.structs.replace(mount, options=kept)


def wants(mount: Mount, subject: str) -> bool:
    """Whether a mount asks for an overlay.  One that is read-only has no use for it, and gets none (as gVisor does it).

    Raises:
        InvalidInput: ``mount-option``: it says where what is written is to go.
    """
    words = mount_options.split(mount.options)
    if OVERLAY not in words:
        return False
    if where := [word for word in words if word.partition("=")[0] in _WHERE]:
        raise InvalidInput(
            "plan mount", subject=subject, why=f"{where[0]}: what is written goes with the container",
            code="mount-option", hint="leave it out; to keep what is written, mount without overlay",
        )  # fmt: skip
    if mount.destination.startswith(BLOCKDEV):
        raise _impossible(subject, "a device is not mounted")
    return not mount.read_only


def checked(step: StepT | None, subject: str) -> StepT:
    """The step that the overlay lies on.

    Raises:
        InvalidInput: ``mount-option``: there is none.
    """
    if step is None:
        raise _impossible(subject, "what the runtime mounts is the container's own already")
    return step


def _impossible(subject: str, why: str) -> InvalidInput:
    return InvalidInput(
        "plan mount", subject=subject, why=f"no overlay over this: {why}", code="mount-option",
        hint="leave the option overlay (O) out",
    )  # fmt: skip
