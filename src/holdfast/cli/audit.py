"""``audit`` and ``gc``: what is held by nobody, and letting go of it.

A pod's rows in the journal, its leases and its folder are true as long as its monitor lives, which is whoever holds
the lock on the pod's ``lock`` file.  Of a monitor that lives, what it says it holds is compared with what its machine
really has.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.cli import output as shown
from holdfast.cli.pods import ask
from holdfast.cli.templates import machines
from holdfast.errors import HoldfastError, NotFound
from holdfast.machine import upkeep
from holdfast.machine.upkeep import Freed
from holdfast.pod import templates
from holdfast.pod.client import Client
from holdfast.storage import mount_points
from holdfast.storage.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.cli.options import AuditOptions, CommandLine, GcOptions
    from holdfast.cli.output import Output

_VERIFY_SECONDS = 10.0
#: What is being attached or detached is in the machine and not in the journal, or the reverse, for a moment.
_SETTLE_SECONDS = 0.3


class Finding(msgspec.Struct, frozen=True):
    """Something that nobody holds, or that is not what its holder says.

    Attributes:
        kind: ``pod``, ``folder``, ``process``, ``lease``, ``slot``, ``monitor``, or a kind of journal row
            (``attachment``, ``share``, ...).
        object: which: a path, a slot, a process id.
        pod: whose it was.
        why: what is wrong.
        collectable: whether ``gc`` lets go of it.
    """

    kind: str
    object: str
    pod: str
    why: str
    collectable: bool = True


def audit(_command: AuditOptions, line: CommandLine, output: Output) -> int:
    """Prints what is held by nobody; 1 if anything is."""
    found = find(Path(line.root))
    if output.json:
        output.data({"clean": not found, "findings": found})
    elif found:
        _table(found, output)
        if any(finding.collectable for finding in found):
            output.warn("holdfast gc lets go of what nobody holds")
    else:
        output.line("nothing is held by nobody")
    return 1 if found else 0


def collect(_command: GcOptions, line: CommandLine, output: Output) -> int:
    """``gc``: lets go of what it may, removes what no pod will start from, prints both; 1 if anything is left."""
    root, data = Path(line.root), Path(line.data)
    found = [finding for finding in find(root) if finding.collectable]
    for finding in found:
        if finding.kind == "process":
            _kill(int(finding.object), root)
    names = {finding.pod for finding in found}
    if names:
        with Journal(root) as journal:
            for name in sorted(names):
                journal.collect(name)
            mount_points.remove_unused(journal)
    left = find(root)
    pods = machines(root, data)
    guests = {pod.guest for pod in pods} | templates.guests(data)
    freed = upkeep.collect(data, {pod.template for pod in pods}, guests)
    freed += [Freed("leftover", name, "its builder is dead", size) for name, size in templates.sweep(data)]
    if output.json:
        output.data({"collected": [one for one in found if one not in left], "findings": left, "freed": freed})
    else:
        for finding in found:
            if finding not in left:
                output.line(f"let go of {finding.kind} {finding.object}" + _of(finding))
        for one in freed:
            output.line(f"removed {one.kind} {one.object}, {shown.size(one.bytes)}: {one.why}")
        if freed:
            output.line(f"{shown.size(sum(one.bytes for one in freed))} are free again")
        if not found and not freed:
            output.line("there was nothing to let go of")
        if left:
            _table(left, output)
    return 1 if left else 0


def _of(finding: Finding) -> str:
    return f" of pod {finding.pod}" if finding.pod not in ("", finding.object) else ""


def _table(found: list[Finding], output: Output) -> None:
    output.table(("KIND", "OBJECT", "POD", "WHY"), [(one.kind, one.object, one.pod, one.why) for one in found])


def find(root: Path) -> list[Finding]:
    """Everything that is held by nobody below a state root; makes and changes nothing.

    Looks twice: pods come and go meanwhile, and what is in both answers is no passing state.
    """
    found = _look(root)
    if found:
        time.sleep(_SETTLE_SECONDS)
        again = _look(root)
        found = [finding for finding in found if finding in again]
    return found


def _look(root: Path) -> list[Finding]:
    found: list[Finding] = []
    if (root / "journal.db").exists():
        with Journal(root) as journal:
            found += _in_journal(journal)
            for pod in journal.pods():
                if journal.is_alive(pod.name):
                    found += _in_pod(root, pod.name)
    elif (root / "pods").is_dir():
        found += [_folder(path) for path in sorted((root / "pods").iterdir())]
    return found + list(_stray_machines(root))


def _in_journal(journal: Journal) -> Iterator[Finding]:
    """Pods whose monitor is dead, with all they held; rows, leases and folders of pods that are not known."""
    known = {pod.name: pod for pod in journal.pods()}
    alive: dict[str, bool] = {}

    def dead(name: str) -> bool:
        if name not in alive:
            alive[name] = journal.is_alive(name)
        return not alive[name]

    for name, pod in known.items():
        if dead(name):
            yield Finding("pod", name, name, f"its monitor (process {pod.pid}) is dead")
    for row in journal.held():
        if row.kind != mount_points.KIND and dead(row.pod):
            state = {"intent": "was about to be acquired", "releasing": "was being released"}.get(row.state, "was held")
            yield Finding(row.kind, row.object, row.pod, f"{state} by a pod that is dead")
    for row in mount_points.unused(journal):
        yield Finding(row.kind, row.object, row.pod, "made for a container, in a root filesystem that none has now")
    for lease in journal.leases():
        if dead(lease["pod"]):
            mode = "writing" if lease["writable"] else "reading"
            yield Finding("lease", lease["path"], lease["pod"], f"the right to open it for {mode} is a dead pod's")
    for path in sorted(journal.pods_folder.iterdir()):
        if path.name not in known and dead(path.name):
            yield _folder(path)


def _folder(path: Path) -> Finding:
    return Finding("folder", str(path), path.name, "no pod in the journal has it")


def _in_pod(root: Path, name: str) -> Iterator[Finding]:
    """What the monitor of a pod that lives says of its slots and other places."""
    try:
        if ask(root, name).state != "running":
            return
        with Client.connect(root, name) as client:
            found = client.request("verify", {}, _VERIFY_SECONDS)
    except NotFound:  # it has ended
        return
    except HoldfastError as error:
        yield Finding("monitor", name, name, f"it lives, and does not answer: {error}", collectable=False)
        return
    for kind, why in (
        ("unknown", "the machine has something there that the journal does not know"),
        ("missing", "the journal has something there that the machine does not have"),
    ):
        for place in found[kind]:
            where, _, number = place.partition(" ")
            yield Finding(where, number, name, why, collectable=False)


# -- machines without a monitor -------------------------------------------------------------------


def _stray_machines(root: Path) -> Iterator[Finding]:
    """A machine ends with its monitor, by its PID namespace; should one not, it shows by the folder that it serves."""
    machines = list(_machines(root))
    if machines:
        pods: dict[str, bool] = {}
        with Journal(root) as journal:
            for pid, pod in machines:
                pods[pod] = pods[pod] if pod in pods else journal.is_alive(pod)
                if not pods[pod]:
                    yield Finding("process", str(pid), pod, "a machine whose monitor is dead")


def _machines(root: Path) -> Iterator[tuple[int, str]]:
    """QEMU processes of a state root's pods: process id and pod."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (pod := _pod_of(int(entry), root)):
            yield int(entry), pod


def _pod_of(pid: int, root: Path) -> str:
    """The pod whose folder a QEMU process serves; empty if it is no such process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")
    except OSError:
        return ""
    if "qemu-system" not in os.path.basename(words[0]):
        return ""
    start = f",path={str(root).replace(',', ',,')}/pods/"  # as QEMU's option parser wants commas
    for word in words:
        _, found, rest = word.partition(start)
        if found:
            return rest.partition("/")[0]
    return ""


def _kill(pid: int, root: Path) -> None:
    """Kills a stray machine; through a pidfd, so that it cannot be another process by now."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _pod_of(pid, root):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _wait_readable(pidfd, 5.0)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def _wait_readable(fd: int, seconds: float) -> None:
    import select

    poller: Any = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll(seconds * 1000)
