"""``guest`` and ``template``: the machine that pods start as, and its saved states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import output as shown
from holdfast.errors import InvalidInput, NotFound
from holdfast.machine import guest_image, template

if TYPE_CHECKING:
    from holdfast.cli.options import (
        CommandLine,
        GuestBuildOptions,
        GuestInspectOptions,
        TemplateInspectOptions,
        TemplateListOptions,
        TemplateRemoveOptions,
    )
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


def list_templates(_command: TemplateListOptions, line: CommandLine, output: Output) -> int:
    """``template list``."""
    data = Path(line.data)
    found = template.list_all(data)
    if output.json:
        output.data(found)
        return 0
    current = guest_image.find(data) if found else None
    rows = [
        (
            saved.key, saved.accelerator, shown.size(saved.memory_bytes), saved.cpus,
            shown.size(_disk_usage(data / "templates" / saved.key)),
            "current" if current and current.id == saved.guest else "of another guest",
        )
        for saved in found
    ]  # fmt: skip
    output.table(("TEMPLATE", "ACCELERATOR", "MEMORY", "CPUS", "ON DISK", "GUEST"), rows)
    return 0


def inspect_template(command: TemplateInspectOptions, line: CommandLine, output: Output) -> int:
    """``template inspect``: what it is, checked to be whole."""
    data = Path(line.data)
    folder, found = template.load(data, _key(data, command.name))
    if output.json:
        output.data(found)
        return 0
    output.fields(
        (
            ("template", found.key),
            ("guest", found.guest),
            ("accelerator", found.accelerator),
            ("memory", shown.size(found.memory_bytes)),
            ("cpus", found.cpus),
            ("qemu", found.qemu_version),
            ("folder", folder),
            ("on disk", shown.size(_disk_usage(folder))),
        )
    )
    return 0


def remove_templates(command: TemplateRemoveOptions, line: CommandLine, output: Output) -> int:
    """``template remove``: pods that were started from one go on."""
    data = Path(line.data)
    keys = [_key(data, name) for name in command.names]
    for key in keys:
        template.remove(data, key)
    if output.json:
        output.data({"removed": keys})
    else:
        for key in keys:
            output.line(key)
    return 0


def _key(data: Path, name: str) -> str:
    """The template that ``name`` begins, for nobody types 24 digits.

    Raises:
        NotFound: there is none.
        InvalidInput: there are several.
    """
    # Not the records: one that cannot be read any more should be removable too.
    folder = data / "templates"
    keys = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    found = [key for key in keys if key.startswith(name)] if name else []
    if len(found) > 1 and name not in found:
        raise InvalidInput(
            "find template", subject=name, why=f"it begins {', '.join(sorted(found))}", code="template-ambiguous"
        )
    if not found:
        raise NotFound("find template", subject=name, code="template-not-found", hint="holdfast template list")
    return name if name in found else found[0]


def _size(path: Path) -> int:
    return path.stat().st_size


def _disk_usage(folder: Path) -> int:
    """What is really stored: guest RAM that was never written takes no room."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
