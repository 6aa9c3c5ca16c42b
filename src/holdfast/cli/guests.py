"""``guest``: the system that pods' machines run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import output as shown
from holdfast.errors import NotFound
from holdfast.machine import guest_image

if TYPE_CHECKING:
    from holdfast.cli.options import CommandLine, GuestBuildOptions, GuestInspectOptions
    from holdfast.cli.output import Output


def build(_command: GuestBuildOptions, line: CommandLine, output: Output) -> int:
    """``guest build``: silent when the guest is there, for every set-up calls it."""
    guest = guest_image.ensure(Path(line.data), progress=output.say)
    if output.json:
        output.data(guest)
    return 0


def inspect(_command: GuestInspectOptions, line: CommandLine, output: Output) -> int:
    """``guest inspect``: the guest that pods of this host would start with now."""
    guest = guest_image.find(Path(line.data))
    if guest is None:
        why = "none is built from this host's files as they are now"
        raise NotFound("find guest", subject=line.data, why=why, hint="holdfast guest build", code="guest-not-found")
    if output.json:
        output.data(guest)
        return 0
    parts = (guest.kernel, guest.initrd, guest.root)
    output.fields(
        (
            ("id", guest.id),
            ("kernel", guest.kernel_release),
            ("interpreter", guest.interpreter),
            ("agent", guest.agent_digest),
            ("modules", " ".join(guest.modules)),
            ("files", "\n".join(f"{path}  {shown.size(_size(Path(path)))}" for path in parts)),
            ("made from", f"{len(guest.inputs)} files of this host"),
        )
    )
    return 0


def _size(path: Path) -> int:
    return path.stat().st_size
