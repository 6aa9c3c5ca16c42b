"""Other engines as oracles: the same bundle run by runc, by runsc and by a pod; what a container saw, as data.

Each engine gets a bundle of its own, with a root filesystem made anew: some leave mount points in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import HoldfastError
from tests import leaks
from tests.images import busybox_tree, make_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import holdfast

SECONDS = 60
_MARK = "--- mounts"
#: Data of filesystems that depends on the kernel's configuration.
_KERNEL_S_OWN = frozenset(("inode64",))


class Seen(NamedTuple):
    """What came of a run.

    Attributes:
        output: of the script; empty if the container was refused.
        mounts: what was mounted in the container, in the kernel's order.
    """

    refused: bool
    output: str
    mounts: list[Mounted]
    why: str = ""

    def at(self, *points: str) -> list[Mounted]:
        """The mounts at these places."""
        return [one for one in self.mounts if one.point in points]


class Mounted(NamedTuple):
    """One line of mountinfo, proc_pid_mountinfo(5), as far as two engines can agree on it."""

    point: str
    options: frozenset[str]
    propagation: frozenset[str]
    kind: str
    data: frozenset[str]


class Case(NamedTuple):
    """What is to be run.

    Attributes:
        script: prints what is to be compared.
        lay: makes in the root filesystem what the case needs.
    """

    mounts: Sequence[dict[str, Any]]
    script: str = "true"
    lay: Callable[[Path], object] = lambda _root: None
    read_only: bool = False


def bundle(folder: Path, case: Case) -> Path:
    busybox_tree(folder / "rootfs")
    case.lay(folder / "rootfs")
    script = f"{{ {case.script}\n}} 2>&1; echo '{_MARK}'; cat /proc/self/mountinfo"
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}, *case.mounts]
    return make_bundle(folder, ["sh", "-c", script], mounts=mounts, root={"path": "rootfs", "readonly": case.read_only})


def runc(folder: Path, case: Case) -> Seen:
    return _engine(folder, case, "runc")


def runsc(folder: Path, case: Case) -> Seen:
    return _engine(folder, case, "runsc", "--platform=ptrace", "--ignore-cgroups", "--network=none")


def _engine(folder: Path, case: Case, name: str, *options: str) -> Seen:
    made = bundle(folder / name, case)
    with tempfile.TemporaryDirectory() as state:  # a short path: it has sockets below it
        container = f"oracle-{os.getpid()}-{os.path.basename(state)}"
        argv = [str(shutil.which(name)), "--root", state, *options, "run", "--bundle", str(made), container]
        # runsc's sandbox is nobody, and has its root in the folder for temporary files.
        done = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False,
            env={**os.environ, "TMPDIR": "/tmp"},
        )  # fmt: skip
    return _seen(done.returncode == 0, done.stdout, done.stderr)


def pod(folder: Path, case: Case, of: holdfast.Pod) -> Seen:
    """In a pod, of either kind."""
    try:
        done = of.run(bundle=bundle(folder / "pod", case))
    except HoldfastError as error:
        return Seen(True, "", [], str(error))
    return _seen(done.status == 0, done.text, done.stderr.decode())


def _seen(worked: bool, stdout: str, stderr: str) -> Seen:
    output, mark, table = stdout.partition(_MARK + "\n")
    assert worked == bool(mark), (stdout, stderr)
    return Seen(not mark, output, [_line(line) for line in table.splitlines()], stderr)


def _line(line: str) -> Mounted:
    fields = line.split(" ")
    dash = fields.index("-")
    propagation = frozenset(word.split(":")[0] for word in fields[6:dash])
    return Mounted(
        fields[4], frozenset(fields[5].split(",")), propagation, fields[dash + 1],
        frozenset(fields[dash + 3].split(",")) - _KERNEL_S_OWN,
    )  # fmt: skip


def podman(store: Path, root: Path, options: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    """A script on a root filesystem in podman, with its own words for mounts; all that it keeps is in ``store``."""
    with tempfile.TemporaryDirectory() as short:
        argv = [
            str(shutil.which("podman")), "--root", str(store), "--runroot", short, "--storage-driver", "vfs",
            "--cgroup-manager", "cgroupfs", "--runtime", str(shutil.which("runc")), "run", "--rm", "--network", "none",
            "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", *options, "--rootfs", str(root), "sh", "-c",
            script,
        ]  # fmt: skip
        done = subprocess.run(
            argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
        )
        leaks.wait_for_who_mentions(short)  # another podman removes the container, if this one was not quicker
    return done


def tmpfs(where: str, *options: str) -> dict[str, Any]:
    return {"destination": where, "type": "tmpfs", "source": "tmpfs", "options": list(options)}


def bind(source: object, where: str, *options: str) -> dict[str, Any]:
    return {"destination": where, "type": "bind", "source": str(source), "options": list(options) or ["rbind"]}


def spoken(document: object) -> str:
    """For messages of tests."""
    return json.dumps(document, default=str)
