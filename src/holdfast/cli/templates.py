"""``template``: machines that were booted once, and pods that were saved, for pods to start from: made ahead, listed,
inspected, removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast import api
from holdfast.cli import output as shown
from holdfast.errors import InUse, InvalidInput, NotFound
from holdfast.machine import template, upkeep
from holdfast.machine.alone import run_alone
from holdfast.machine.choosing import choose_machine
from holdfast.machine.upkeep import Saved
from holdfast.pod import templates
from holdfast.storage.journal import Journal, MachineRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.cli.options import (
        CommandLine,
        TemplateBuildOptions,
        TemplateInspectOptions,
        TemplateListOptions,
        TemplateRemoveOptions,
    )
    from holdfast.cli.output import Output
    from holdfast.machine.template import Template


class Listed(Saved, frozen=True):
    """A template and the pods that run from it."""

    used_by: tuple[str, ...] = ()


def build(command: TemplateBuildOptions, line: CommandLine, output: Output) -> int:
    """``template build``: prints its key; one that is there and good is left as it is."""
    data = Path(line.data)
    if command.from_pod is not None:
        return _build_from_pod(command.from_pod, command.name or "", line, output)
    if command.images:
        return _build_with_images(command, line, output)
    key = run_alone(lambda: asyncio.run(_build(command, data, output.say)).encode()).decode()
    if output.json:
        output.data(template.load(data, key)[1])
    else:
        output.line(key)
    return 0


def _build_with_images(command: TemplateBuildOptions, line: CommandLine, output: Output) -> int:
    """Prints the template's name."""
    name, size = command.name or "", (command.memory_bytes, command.cpus)
    with api.Pod(root=line.root, data=line.data, memory=size[0], cpus=size[1], say=output.say) as pod:
        for image in command.images:
            pod.hold(image)
        return _build_from_pod(pod.name, name, line, output)


def _build_from_pod(pod_name: str, name: str, line: CommandLine, output: Output) -> int:
    """Prints the template's name."""
    with api.Pod.open(pod_name, root=line.root, data=line.data) as pod:
        pod.make_template(name)
    if output.json:
        output.data(templates.describe(Path(line.data), name)[0])
    else:
        output.line(name)
    return 0


async def _build(command: TemplateBuildOptions, data: Path, say: Callable[[str], None]) -> str:
    expandable = command.pmem or command.ports
    config = await choose_machine(data, command.memory_bytes, command.cpus, expandable, say)
    return (await template.ensure(data, config, say))[1].key


def list_templates(_command: TemplateListOptions, line: CommandLine, output: Output) -> int:
    """``template list``."""
    found = _listed(line)
    if output.json:
        output.data(found)
        return 0
    rows = [
        (
            one.key, *_machine(one.record), shown.size(one.disk_bytes),
            f"stale: {one.stale}" if one.stale else "usable", " ".join(one.used_by) or "-",
        )
        for one in found
    ]  # fmt: skip
    output.table(("TEMPLATE", "MACHINE", "MEMORY", "CPUS", "ON DISK", "STATE", "USED BY"), rows)
    return 0


def inspect(command: TemplateInspectOptions, line: CommandLine, output: Output) -> int:
    """``template inspect``: what it is, checked to be whole."""
    data = Path(line.data)
    key = find_key(data, command.name)
    if key in templates.names(data):
        folder = templates.load(data, key)[0]
        found = templates.describe(data, key)[0]
        assert found is not None
    else:
        folder, found = template.load(data, key)
    if output.json:
        output.data(found)
        return 0
    one = next(one for one in _listed(line) if one.key == key)
    output.fields(
        (
            ("template", key),
            ("state", f"stale: {one.stale}" if one.stale else "usable"),
            ("guest", found.guest),
            ("accelerator", found.accelerator),
            ("memory", shown.size(found.memory_bytes)),
            ("cpus", found.cpus),
            ("places", "for PCI devices and persistent memory" if found.expandable else ""),
            ("qemu", found.qemu_version),
            ("folder", folder),
            ("on disk", shown.size(one.disk_bytes)),
            ("used by", " ".join(one.used_by)),
        )
    )
    return 0


def remove(command: TemplateRemoveOptions, line: CommandLine, output: Output) -> int:
    """``template remove``: goes on past one that fails; pods that were started from one go on in any case."""
    data = Path(line.data)
    users = _users(line)
    if command.stale:
        # One with a name cannot be built again, and what it misses may come back.
        named = templates.names(data)
        stale = [one for one in _listed(line) if one.stale and one.key not in named]
        keys = [one.key for one in stale if command.force or not one.used_by]
    else:
        keys = [find_key(data, name) for name in command.names]

    def remove_one(key: str) -> None:
        if key in users and not command.force:
            raise InUse(
                "remove template", subject=key, why=f"used by {', '.join(users[key])}", code="template-in-use",
                hint="with --force it is removed, and they go on",
            )  # fmt: skip
        (templates if key in templates.names(data) else upkeep).remove(data, key)

    return shown.remove_each(keys, remove_one, output)


def find_key(data: Path, name: str) -> str:
    """The template that ``name`` begins, for nobody types 24 digits.

    Raises:
        NotFound: there is none.
        InvalidInput: there are several.
    """
    # Not the records: one that cannot be read any more should be removable too.
    folder = data / "templates"
    keys = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if name in templates.names(data):
        return name
    found = [key for key in keys if key.startswith(name)] if name else []
    if len(found) > 1 and name not in found:
        raise InvalidInput(
            "find template", subject=name, why=f"it begins {', '.join(sorted(found))}", code="template-ambiguous"
        )
    if not found:
        raise NotFound("find template", subject=name, code="template-not-found", hint="holdfast template list")
    return name if name in found else found[0]


def machines(root: Path, data: Path) -> list[MachineRow]:
    """What the living pods of a state root were started from; a look makes no journal."""
    if not (root / "journal.db").exists():
        return []
    with Journal(root) as journal:
        return journal.machines(data)


def _users(line: CommandLine) -> dict[str, list[str]]:
    """Pods by the key of their template."""
    users: dict[str, list[str]] = {}
    for row in machines(Path(line.root), Path(line.data)):
        if row.template:
            users.setdefault(row.template, []).append(row.pod)
    return users


def _listed(line: CommandLine) -> list[Listed]:
    users = _users(line)
    data = Path(line.data)
    found = upkeep.survey(data)
    for name in templates.names(data):
        record, stale = templates.describe(data, name)
        found.append(Saved(name, stale, template.disk_usage(templates.folder_of(data) / name), record))
    return [Listed(**msgspec.structs.asdict(one), used_by=tuple(users.get(one.key, ()))) for one in found]


def _machine(record: Template | None) -> tuple[str, str, str]:
    """Accelerator, memory and processors."""
    if record is None:
        return "?", "?", "?"
    return record.accelerator, shown.size(record.memory_bytes), str(record.cpus)
