"""``pod save`` and ``pod restore``: a pod in a file, and out of it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast import api

if TYPE_CHECKING:
    from holdfast.cli.options import CommandLine, PodRestoreOptions, PodSaveOptions
    from holdfast.cli.output import Output


def save(command: PodSaveOptions, line: CommandLine, output: Output) -> int:
    """``pod save``: prints where it is."""
    with api.Pod.open(command.pod, root=line.root, data=line.data) as pod:
        pod.save(command.file, stop=command.stop)
    if output.json:
        output.data({"pod": command.pod, "file": command.file})
    else:
        output.line(command.file)
    return 0


def restore(command: PodRestoreOptions, line: CommandLine, output: Output) -> int:
    """``pod restore``: prints the new pod's name."""
    with api.restore(
        command.file, command.name, bundles=command.bundles, root=line.root, data=line.data, detached=True
    ) as pod:
        if output.json:
            output.data(pod.inspect())
        else:
            output.line(pod.name)
    return 0
