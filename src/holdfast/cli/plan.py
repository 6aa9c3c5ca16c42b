"""``plan``: what ``run`` would do, step by step; nothing is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast import api
from holdfast.cli.run import container_request, names, sandbox_arguments
from holdfast.linux.user_namespaces import rootless

if TYPE_CHECKING:
    from holdfast.cli.options import CommandLine, PlanOptions
    from holdfast.cli.output import Output


def plan(command: PlanOptions, line: CommandLine, output: Output) -> int:
    """Prints the steps, numbered; with ``--json`` as ``{"steps": [...], "describe": [...]}``."""
    run = command.run
    pod_name, name = names(run)
    request = container_request(run, name, line)
    sandbox_arguments(run.sandbox)
    found: dict[str, Any]
    if run.pod is not None:
        with api.Pod.open(pod_name, root=line.root, data=line.data) as pod:
            found = pod.plan(request)
    else:
        from holdfast.pod import planning

        without_root = run.sandbox.isolation == "namespace" and rootless()
        made = planning.plan(planning.understand(request), Path(line.data), without_root=without_root)
        found = {"steps": msgspec.to_builtins(made.steps), "describe": made.describe()}
    if output.json:
        output.data(found)
        return 0
    width = len(str(len(found["describe"])))
    for number, text in enumerate(found["describe"], 1):
        output.line(f"{number:>{width}}. {text}")
    return 0
