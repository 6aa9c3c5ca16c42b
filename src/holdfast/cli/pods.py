"""``ps`` and ``pod``: which pods there are, one of them, a new one, more like one, one less."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast import api
from holdfast.cli import output as shown
from holdfast.cli.run import sandbox_arguments
from holdfast.errors import HoldfastError, InUse, NotFound, Unsupported
from holdfast.pod.client import Client
from holdfast.pod.messages import ContainerInfo, PodInfo
from holdfast.spec.annotations import NO_WRITABLE_SHARES
from holdfast.storage.journal import Journal, PodRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.cli.options import (
        CommandLine,
        PodCreateOptions,
        PodForkOptions,
        PodInspectOptions,
        PodRemoveOptions,
        PsOptions,
    )
    from holdfast.cli.output import Output

#: A monitor answers ``inspect`` at once, whatever else it does; one that does not is as good as hung.
INSPECT_SECONDS = 5.0
_COMMAND_WIDTH = 40


def ps(_command: PsOptions, line: CommandLine, output: Output) -> int:
    """Lists every pod and what ran or runs in it."""
    pods = list(survey(Path(line.root)))
    if output.json:
        output.data(pods)
        return 0
    rows = [row for pod in pods for row in _rows(pod)]
    output.table(("POD", "CONTAINER", "STATE", "IMAGE", "COMMAND", "AGE"), rows)
    if any(pod.state == "dead" for pod in pods):
        output.warn("of dead pods only what they held is left; holdfast gc lets go of it")
    return 0


def survey(root: Path) -> Iterator[PodInfo]:
    """Every pod, oldest first; one that ends meanwhile is left out, a dead one has state ``dead``."""
    if not (root / "journal.db").exists():  # a journal is made when it is opened, and a look should make nothing
        return
    with Journal(root) as journal:
        for row in journal.pods():
            try:
                yield ask(root, row.name)
            except HoldfastError as error:
                if journal.is_alive(row.name):
                    yield _stub(row, "unknown", error.why)
                elif any(row.name == other.name for other in journal.pods()):
                    yield _stub(row, "dead", "its monitor is dead")


def ask(root: Path, pod: str) -> PodInfo:
    """What a pod's monitor says of it.

    Raises:
        NotFound: there is none.
        TimedOut: the monitor does not answer.
    """
    with Client.connect(root, pod) as client:
        return msgspec.convert(client.request("inspect", {}, INSPECT_SECONDS), PodInfo)


def _stub(row: PodRow, state: str, why: str) -> PodInfo:
    return PodInfo(row.name, state, row.isolation, "", row.pid, 0, 0, 0, "", row.created_ns, why=why)


def _rows(pod: PodInfo) -> Iterator[tuple[str, ...]]:
    if not pod.containers:
        yield pod.name, "", pod.state, "", "", shown.age(pod.created_ns)
    for container in pod.containers:
        command = shown.shorten(shlex.join(container.args), _COMMAND_WIDTH)
        state = pod.state if pod.state != "running" else state_of(container)
        yield pod.name, container.name, state, container.image, command, shown.age(container.started_ns)


def state_of(container: ContainerInfo) -> str:
    """A container's state, with its exit status when it has one."""
    return f"{container.state} ({container.code})" if container.code >= 0 else container.state


def create(command: PodCreateOptions, line: CommandLine, output: Output) -> int:
    """``pod create``: a pod without a container, which stays until it is removed."""
    if set(command.annotations) - {NO_WRITABLE_SHARES}:  # that one is part of the sandbox
        raise Unsupported(
            "create pod", subject="--annotation", why="a pod's own annotations are not built yet",
            hint="holdfast run --annotation K=V gives one to a container", code="annotations-unsupported",
        )  # fmt: skip
    arguments = sandbox_arguments(command.sandbox)
    with api.Pod(
        command.pod, root=line.root, data=line.data, say=output.say, detached=True, **arguments
    ) as pod:  # fmt: skip
        if output.json:
            output.data(pod.inspect())
        else:
            output.line(pod.name)
    return 0


def fork(command: PodForkOptions, line: CommandLine, output: Output) -> int:
    """``pod fork``: prints the new pods' names."""
    with api.Pod.open(command.pod, root=line.root, data=line.data) as pod:
        made = pod.fork(command.count, names=command.names, detached=True)
    for new in made:
        new.close()
    names = [new.name for new in made]
    if output.json:
        output.data(names)
    else:
        output.line("\n".join(names))
    return 0


def inspect(command: PodInspectOptions, line: CommandLine, output: Output) -> int:
    """``pod inspect``: all that its monitor knows of it."""
    pod = ask(Path(line.root), command.pod)
    if output.json:
        output.data(pod)
        return 0
    output.fields(
        (
            ("name", pod.name),
            ("state", pod.state),
            ("why", pod.why),
            ("created", datetime.fromtimestamp(pod.created_ns // 1_000_000_000).astimezone().isoformat(" ")),
            ("isolation", f"{pod.isolation} ({pod.accelerator})" if pod.accelerator else pod.isolation),
            ("started from", pod.started_from),
            ("memory", shown.size(pod.memory_bytes) if pod.memory_bytes else ""),
            ("cpus", pod.cpus or ""),
            ("runtime", pod.guest.get("runtime", "")),
            ("monitor", f"process {pod.pid}"),
            ("machine" if pod.isolation == "vm" else "agent", f"process {pod.qemu_pid}" if pod.qemu_pid else ""),
        )
    )
    for container in pod.containers:
        output.line("")
        output.fields(
            (
                ("container", container.name),
                ("  state", state_of(container)),
                ("  why", container.why),
                ("  image", container.image),
                ("  command", shlex.join(container.args)),
                ("  age", shown.age(container.started_ns)),
            )
        )
    return 0


def remove(command: PodRemoveOptions, line: CommandLine, output: Output) -> int:
    """``pod remove``: ends pods; goes on past one that fails, and then fails with its error."""
    return shown.remove_each(command.pods, lambda name: _remove(name, line, force=command.force), output)


def _remove(name: str, line: CommandLine, *, force: bool) -> None:
    root = Path(line.root)
    try:
        pod = api.Pod.open(name, root=root, data=line.data)
    except NotFound:
        if not (root / "pods" / name).is_dir():
            raise
        with Journal(root) as journal:  # dead: what it left is all there is to remove
            if journal.collect(name):
                return
        raise
    with pod:
        running = [container.name for container in pod.inspect().containers if container.state == "running"]
        if running and not force:
            raise InUse(
                "remove pod", subject=name, why=f"{', '.join(running)} runs in it", code="pod-busy",
                hint=f"holdfast pod remove --force {name}",
            )  # fmt: skip
        pod.remove()
