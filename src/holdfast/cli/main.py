"""``holdfast``: reads the command line, does what it says, and turns whatever goes wrong into one message and a status.

Nothing is imported before it is needed: ``run`` has something to start, and should not wait for what only ``doctor``
uses.

Exit status: 0, or the container's own; 1 when a check found something (``audit``, ``gc``, ``doctor``); 125 Holdfast
itself failed, 126 the command cannot be executed, 127 it does not exist; 128 + n when ended by signal n.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType

from holdfast import trace
from holdfast.pod import early

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from holdfast.cli.options import CommandLine
    from holdfast.cli.output import Output

#: Record of a command -> module of this package and function in it: ``(command, line, output) -> exit status``.
COMMANDS = {
    "RunOptions": ("run", "run"),
    "ExecOptions": ("run", "execute"),
    "PlanOptions": ("plan", "plan"),
    "PsOptions": ("pods", "ps"),
    "PodCreateOptions": ("pods", "create"),
    "PodForkOptions": ("pods", "fork"),
    "PodSaveOptions": ("saves", "save"),
    "PodRestoreOptions": ("saves", "restore"),
    "PodInspectOptions": ("pods", "inspect"),
    "PodRemoveOptions": ("pods", "remove"),
    "PoolOptions": ("pool", "pool"),
    "StorageOptions": ("storage", "show"),
    "AttachOptions": ("storage", "attach"),
    "DetachOptions": ("storage", "detach"),
    "ImageImportOptions": ("images", "import_image"),
    "ImagePullOptions": ("images", "pull"),
    "ImageListOptions": ("images", "list_images"),
    "ImageInspectOptions": ("images", "inspect"),
    "ImageRemoveOptions": ("images", "remove"),
    "GuestBuildOptions": ("guests", "build"),
    "GuestInspectOptions": ("guests", "inspect"),
    "TemplateBuildOptions": ("templates", "build"),
    "TemplateListOptions": ("templates", "list_templates"),
    "TemplateInspectOptions": ("templates", "inspect"),
    "TemplateRemoveOptions": ("templates", "remove"),
    "VolumeCreateOptions": ("volumes", "create"),
    "VolumeListOptions": ("volumes", "list_volumes"),
    "VolumeInspectOptions": ("volumes", "inspect"),
    "VolumeRemoveOptions": ("volumes", "remove"),
    "VolumeGrowOptions": ("volumes", "grow"),
    "AuditOptions": ("audit", "audit"),
    "GcOptions": ("audit", "collect"),
    "DoctorOptions": ("doctor", "doctor"),
}
#: What of the standard library is imported for a monitor's sake by what clients import, too: 35 ms of 100.
_SELDOM_USED = ("asyncio", "hashlib", "secrets", "shutil", "subprocess", "tarfile", "tempfile")
_CONTAINER_OUTPUT = ("RunOptions", "ExecOptions")
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        argv: without the program's name; this process's if None.
    """
    _have_stdio()
    trace.open_trace("client")
    trace.mark("interpreter")
    words = sys.argv[1:] if argv is None else argv
    # Until the line has been understood, this is the best guess of how an error is wanted.
    line: CommandLine | None = None
    try:
        if _is_for_new_pod(words):
            early.expect()
        for name in _SELDOM_USED:
            sys.modules.setdefault(name, _Later(name))
        from holdfast.cli.options import parse

        line = parse(words)
        trace.mark("command line read")
        status = _find(line)(line.command, line, make_output(line))
        _flush()
        trace.mark("done")
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except Exception as error:
        return _fail(error, line, words)
    finally:
        early.forget()


class _Later(ModuleType):
    """Stands for a module that is imported when something of it is used first (importlib's lazy ones at ``import``)."""

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _is_for_new_pod(words: list[str]) -> bool:
    """A guess, before there is time to read the words: being wrong costs time, and nothing else."""
    return "run" in words[:5] and "--pod" not in words and not _has_pool(words)


def _has_pool(words: list[str]) -> bool:
    """Whether a pod may be ready: then a monitor would be started for nothing."""
    from holdfast.linux.places import default_state

    root = words[words.index("--root") + 1 :][:1] if "--root" in words else []
    try:
        names = os.listdir(f"{root[0] if root else os.environ.get('HOLDFAST_ROOT') or default_state()}/pods")
    except OSError:
        return False
    return any(name.startswith(early.POOL) for name in names)


def make_output(line: CommandLine) -> Output:
    """Where this command's words go."""
    from holdfast.cli.output import Output

    return Output(json=line.json, container_output=type(line.command).__name__ in _CONTAINER_OUTPUT)


def _find(line: CommandLine) -> Callable[[Any, CommandLine, Output], int]:
    module, function = COMMANDS[type(line.command).__name__]
    found: Callable[[Any, CommandLine, Output], int] = getattr(import_module(f"holdfast.cli.{module}"), function)
    return found


def _fail(error: Exception, line: CommandLine | None, words: list[str]) -> int:
    from holdfast.cli.output import Output
    from holdfast.errors import from_exception

    found = from_exception(error)
    if found.code == "internal" and not found.hint:
        found.hint = "this is a fault of Holdfast; --debug says where"
    if os.geteuid() and not found.hint and (isinstance(error, PermissionError) or found.code == "journal-unusable"):
        found.hint = "it is another user's: choose --root and --data of your own, or try it with sudo"
    try:
        if line.debug if line else "--debug" in words:
            import traceback

            traceback.print_exception(error)
        output = make_output(line) if line else Output(json="--json" in words)
        output.error(found)
        _flush()
    except BrokenPipeError:
        _silence_stdout()
    return found.exit_status


def _have_stdio() -> None:
    """Opens what the caller left closed of 0, 1 and 2, or some file of ours would get that number and their words."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def _flush() -> None:
    if sys.stdout is not None:  # it was closed when the interpreter started
        sys.stdout.flush()


def _silence_stdout() -> None:
    """Keeps the interpreter's last flush from complaining about the reader who has gone."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)
