"""The OCI runtime that runs containers: how it is called, and what its failures mean."""

from __future__ import annotations

import json
import os

from holdfast.errors import CommandNotExecutable, CommandNotFound, GuestFailed
from holdfast.guest import propagation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Where it keeps what it knows of each container.
STATE = "/run/crun"
#: The guest's own; see :class:`Runtime`.
CRUN = ("/usr/bin/crun", "--cgroup-manager=cgroupfs")


class Runtime:
    """The OCI runtime that runs containers.

    Args:
        argv: the program, and the options that it needs before any command.
        cgroup: the control group that the containers' own go below; empty for the top, which is the guest's own.
    """

    def __init__(self, argv: tuple[str, ...] = CRUN, cgroup: str = "") -> None:
        self.argv = argv
        self._cgroup = cgroup

    def command(self, log: str) -> list[str]:
        """How every command begins."""
        return [*self.argv, "--root", STATE, "--log", log, "--log-format", "json"]

    def prepare(self, spec: dict[str, Any], name: str) -> None:
        """Puts a container into the control group that it must be in, if there is one; says what its runtime needs."""
        if self.argv[:1] and os.path.basename(self.argv[0]) == "crun":
            propagation.keep(spec)
        if self._cgroup:
            spec["linux"] = {**(spec.get("linux") or {}), "cgroupsPath": f"{self._cgroup}/{name}"}

    def prepare_process(self, process: dict[str, Any]) -> None:
        """Changes what is otherwise right of a container's process, or of a further one, and cannot be done here."""


def control_group(id: str) -> str:
    """The control group that the runtime has made for a container, as a path below cgroup2's root; empty if unknown.

    The container's processes may have moved to groups below it.
    """
    try:
        with open(f"{STATE}/{id}/status") as file:
            path = json.load(file).get("cgroup-path")
    except (OSError, ValueError):
        return ""
    return "/" + path.strip("/") if path else ""


def log_text(log: str) -> str:
    """The runtime's last error, from its JSON log."""
    try:
        with open(log) as file:
            lines = file.read(65536).splitlines()
    except OSError:
        return "the runtime failed and left no log"
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            return line
        if isinstance(record, dict) and record.get("msg"):
            return str(record["msg"])
    return "the runtime failed and said nothing"


def failure(log: str, name: str) -> Exception:
    """The runtime's failure as an error: not found and not executable have exit statuses of their own."""
    text = log_text(log)
    if "found in $PATH" in text or ("executable file" in text and "not found" in text):
        hint = "is the command in the image, and its folder in PATH?"
        return CommandNotFound("start", subject=name, why=text, hint=hint)
    lowered = text.lower()
    if "exec" in lowered and "no such file or directory" in lowered:
        return CommandNotFound(
            "start", subject=name, why=text, hint="is the command, or its interpreter, in the image?"
        )
    # EPERM is how crun reports that what is to be executed is no regular file.
    refusals = ("permission denied", "format error", "is a directory", "open executable: operation not permitted")
    if "exec" in lowered and any(part in lowered for part in refusals):
        return CommandNotExecutable(
            "start", subject=name, why=text, hint="is it executable, and for this architecture?"
        )
    return GuestFailed("start container", subject=name, why=text, code="runtime-failed")
