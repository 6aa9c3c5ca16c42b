"""``volume``: create, list, inspect, grow and remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast import api
from holdfast.cli import output as shown
from holdfast.storage.volumes import DEFAULT_BYTES

if TYPE_CHECKING:
    from holdfast.cli.options import (
        CommandLine,
        VolumeCreateOptions,
        VolumeGrowOptions,
        VolumeInspectOptions,
        VolumeListOptions,
        VolumeRemoveOptions,
    )
    from holdfast.cli.output import Output
    from holdfast.storage.volumes import Volume, Volumes


def create(command: VolumeCreateOptions, line: CommandLine, output: Output) -> int:
    """``volume create``: prints its name."""
    size_bytes = DEFAULT_BYTES if command.size_bytes is None else command.size_bytes
    made = _volumes(line).create(command.name, size_bytes, command.labels)
    if output.json:
        output.data(made)
    else:
        output.line(made.name)
    return 0


def list_volumes(_command: VolumeListOptions, line: CommandLine, output: Output) -> int:
    """``volume list``."""
    found = _volumes(line).list()
    if output.json:
        output.data(found)
        return 0
    rows = [
        (one.name, shown.size(one.size_bytes), shown.size(one.used_bytes), _holders(one), shown.age(one.created_ns))
        for one in found
    ]
    output.table(("NAME", "SIZE", "USED", "HOLDERS", "AGE"), rows)
    return 0


def inspect(command: VolumeInspectOptions, line: CommandLine, output: Output) -> int:
    """``volume inspect``: how large it is and who has it."""
    return _show(_volumes(line).inspect(command.name), output)


def grow(command: VolumeGrowOptions, line: CommandLine, output: Output) -> int:
    """``volume grow``: prints what it has become."""
    return _show(_volumes(line).grow(command.name, command.size_bytes), output)


def remove(command: VolumeRemoveOptions, line: CommandLine, output: Output) -> int:
    """``volume remove``: goes on past one that fails."""
    volumes = _volumes(line)
    return shown.remove_each(command.names, lambda name: volumes.remove(name, missing_ok=command.force), output)


def _show(volume: Volume, output: Output) -> int:
    if output.json:
        output.data(volume)
        return 0
    output.fields(
        (
            ("name", volume.name),
            ("disk", volume.path),
            ("filesystem", volume.filesystem),
            ("size", shown.size(volume.size_bytes)),
            ("used", f"{shown.size(volume.used_bytes)} of this host"),
            ("created", f"{shown.age(volume.created_ns)} ago"),
            ("labels", "\n".join(f"{name}={value}" for name, value in volume.labels.items())),
            ("held by", _holders(volume)),
        )
    )
    return 0


def _holders(volume: Volume) -> str:
    return ", ".join(f"{holder.pod} ({holder.access})" for holder in volume.holders)


def _volumes(line: CommandLine) -> Volumes:
    return api.volumes(root=line.root, data=line.data)
