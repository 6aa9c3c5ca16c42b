"""``run`` and ``exec``: a process in a pod, as if it were this one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast import api, trace
from holdfast.errors import HoldfastError, NotFound, ProtocolError
from holdfast.linux.user_namespaces import rootless
from holdfast.pod import requests
from holdfast.pod.client import STDERR, STDIN, STDOUT, Client
from holdfast.pod.messages import ContainerRequest, ExecRequest, Stdio
from holdfast.spec.pmem import pmem_limits

if TYPE_CHECKING:
    from holdfast.cli.options import CommandLine, ExecOptions, RunOptions, SandboxOptions
    from holdfast.cli.output import Output


def run(command: RunOptions, line: CommandLine, output: Output) -> int:
    """Runs a container, in a pod of its own or in one that is there."""
    trace.mark("modules")
    pod_name, name = names(command)
    request = container_request(command, name, line)
    arguments = sandbox_arguments(command.sandbox) | {"pmem": pmem_limits(request.spec.get("annotations") or {})}
    arguments["ports"] |= bool((request.spec.get("windows") or {}).get("devices"))
    trace.mark("image and specification")
    if command.pod is None:
        from holdfast.pod import planning

        without_root = command.sandbox.isolation == "namespace" and rootless()
        # What can be known to be wrong is said before a machine is started.
        planning.plan(planning.understand(request), Path(line.data), without_root=without_root)
        trace.mark("plan")
    if command.detach:
        return _run_detached(command, line, output, pod_name, request, arguments)
    if command.pod is not None:
        return _attended(line, pod_name, "run", request, output, command.interactive)
    request = msgspec.structs.replace(request, ends_pod=True)
    with api.Pod(pod_name, root=line.root, data=line.data, say=output.say, **arguments):
        trace.mark("pod has answered")
        return _attended(line, pod_name, "run", request, output, command.interactive)


def _run_detached(
    command: RunOptions,
    line: CommandLine,
    output: Output,
    pod_name: str,
    request: ContainerRequest,
    arguments: dict[str, Any],
) -> int:
    if command.pod is not None:
        _start(line, pod_name, request)
        _say_started(output, line, f"{pod_name}/{request.name}", pod_name, request.name)
        return 0
    with api.Pod(pod_name, root=line.root, data=line.data, say=output.say, detached=True, **arguments) as pod:
        try:
            _start(line, pod_name, request)
        except BaseException:  # nobody else knows of the pod yet
            pod.remove()
            raise
    _say_started(output, line, pod_name, pod_name, request.name)
    return 0


def _say_started(output: Output, line: CommandLine, text: str, pod: str, container: str) -> None:
    if line.json:
        output.data({"pod": pod, "container": container})
    else:
        output.line(text)


def _start(line: CommandLine, pod: str, request: ContainerRequest) -> None:
    with Client.connect(Path(line.root), pod) as client:
        client.request("run", msgspec.to_builtins(request))


def execute(command: ExecOptions, line: CommandLine, output: Output) -> int:
    """``exec``: one more process in a container that runs."""
    container = command.container or _only_container(line, command.pod)
    request = ExecRequest(
        container, command.args, tuple(f"{name}={value}" for name, value in command.env.items()), command.cwd or "",
        command.user or "", command.terminal, _stdio(command.interactive, command.terminal),
    )  # fmt: skip
    return _attended(line, command.pod, "exec", request, output, command.interactive)


def _only_container(line: CommandLine, pod: str) -> str:
    """The one that runs; of several, the one that the pod was made for."""
    with api.Pod.open(pod, root=line.root, data=line.data) as opened:
        running = [container.name for container in opened.inspect().containers if container.state == "running"]
    if len(running) == 1:
        return running[0]
    if pod in running:
        return pod
    why = f"these run: {', '.join(running)}" if running else "no container runs in the pod"
    hint = f"say which: holdfast exec {pod}/CONTAINER" if running else f"holdfast run --pod {pod} starts one"
    raise NotFound("choose container", subject=pod, why=why, hint=hint, code="container-not-running")


def _attended(
    line: CommandLine, pod: str, method: str, request: ContainerRequest | ExecRequest, output: Output, stdin: bool
) -> int:
    """Starts a process and is its stdin, stdout, stderr and terminal until it ends."""
    from holdfast.cli.terminal import attend

    terminal = request.terminal if isinstance(request, ExecRequest) else _has_terminal(request)
    with Client.connect(Path(line.root), pod) as client:
        client.on_say = output.say
        client.open(STDOUT, STDERR, *([STDIN] if stdin else []))
        try:
            answer = client.request(method, msgspec.to_builtins(request))
            trace.mark("container has started")
            status = attend(client, answer["key"], output, stdin=stdin, terminal=terminal)
            trace.mark("container has ended")
            return status
        except ProtocolError as error:
            if error.code != "monitor-died":
                raise
            raise HoldfastError(
                "run in pod", subject=pod, why="its monitor has died, and the machine with it", code="monitor-died",
                hint="holdfast audit shows what it may have left, holdfast gc lets go of it",
            ) from None  # fmt: skip


def _has_terminal(request: ContainerRequest) -> bool:
    """A bundle may ask for a terminal by itself."""
    return bool((request.spec.get("process") or {}).get("terminal"))


def _stdio(interactive: bool, terminal: bool) -> Stdio:
    from holdfast.cli.terminal import window_size

    return Stdio(STDIN if interactive else 0, STDOUT, STDERR, window_size() if terminal else (24, 80))


# -- what a command line asks for, for a monitor ------------------------------------------------


def names(command: RunOptions) -> tuple[str, str]:
    """The pod's name and the container's; a pod that is made for a container is called like it."""
    if command.pod is not None:
        return command.pod, command.name or f"c-{os.urandom(4).hex()}"
    name = command.name or f"pod-{os.urandom(4).hex()}"
    return name, name


def container_request(command: RunOptions, name: str, line: CommandLine) -> ContainerRequest:
    """The container that is to be run; nothing is started.

    Raises:
        HoldfastError: the image, the bundle or a mount is not there or not right.
    """
    options: dict[str, Any] = {}
    if command.scratch_bytes is not None:
        options["scratch_bytes"] = command.scratch_bytes
    for flag in ("verity", "encrypt_scratch", "reuse_scratch"):
        if getattr(command, flag):  # else annotations may say so
            options[flag] = True
    request = requests.container_request(
        name, Path(line.data), image=command.image or "", bundle=command.bundle, rootfs=command.rootfs,
        args=command.args, entrypoint=command.entrypoint, env=command.env, cwd=command.cwd, user=command.user,
        hostname=command.hostname or "", terminal=command.terminal, annotations=command.annotations,
        mounts=command.mounts, read_only=command.read_only, devices=command.devices, **options,
    )  # fmt: skip
    stdio = Stdio(detach=True) if command.detach else _stdio(command.interactive, _has_terminal(request))
    return msgspec.structs.replace(request, stdio=stdio)


def sandbox_arguments(sandbox: SandboxOptions) -> dict[str, Any]:
    """Arguments of :class:`holdfast.api.Pod`."""
    return {
        "isolation": sandbox.isolation, "memory": sandbox.memory_bytes, "cpus": sandbox.cpus,
        "template": sandbox.template,
        "writable_shares": sandbox.writable_shares, "pmem": sandbox.pmem,
        "ports": sandbox.ports,
    }  # fmt: skip
