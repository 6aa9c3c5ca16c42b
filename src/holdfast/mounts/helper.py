"""Mounts that a program makes: FUSE filesystems, by ``mount.fuse3`` and its like."""

from __future__ import annotations

import os

from holdfast.errors import HoldfastError, Unsupported
from holdfast.linux import syscalls
from holdfast.mounts import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedRandom

_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
_MOST_OUTPUT = 4096
#: A program that has not mounted by then is ended.
DEADLINE_S = 60.0


def is_helped(kind: str, options: Sequence[str]) -> bool:
    """Whether a type of mount is made by a program; with ``fd=`` the caller is the program itself."""
    name = kind.partition(".")[0]
    return name in ("fuse", "fuse3") and not any(option.startswith("fd=") for option in options)


def run(kind: str, source: str, target: str, options: Sequence[str]) -> None:
    """Has the helper mount ``source`` at ``target``; as containerd calls it, one ``-o`` an option.

    Args:
        kind: ``fuse.sshfs``: the program is sshfs; plain ``fuse`` for a source that names it (``sshfs#host:``).
        source: what it mounts.
        target: where.
        options: for the filesystem and for the mount.

    Raises:
        Unsupported: there is no such helper here.
        HoldfastError: it failed, in its own words; or it did not mount anything.
    """
    import subprocess  # not at import: it is the slowest module of all, and most mounts need none of it

    name, _, filesystem = kind.partition(".")
    helpers = [f"mount.{name}"] + (["mount.fuse3"] if name == "fuse" else [])
    program = _find(helpers)
    if program is None:
        raise Unsupported(
            "mount", subject=f"{source} as {kind}", why=f"no program {' or '.join(helpers)}",
            hint="install fuse3", code="no-mount-helper",
        )  # fmt: skip
    words = [program, source, target]
    for option in options:
        words += ["-o", option]
    if filesystem:
        words += ["-t", filesystem]
    before = table.mount_id(target)
    # Its output goes to a file: the filesystem's process, which stays, may keep it open for ever.
    with _output() as output:
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=DEADLINE_S, check=False
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -9
        output.seek(0)
        text = output.read(_MOST_OUTPUT).decode("utf-8", "replace").strip()
    if status:
        if table.mount_id(target) != before:
            syscalls.umount(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        why = f"{os.path.basename(program)} ended with status {status}" + (f": {text}" if text else "")
        raise HoldfastError("mount", subject=f"{source} as {kind}", why=why, code="mount-failed")
    if table.mount_id(target) == before:
        why = f"{os.path.basename(program)} said that it had, and nothing is mounted: {text}"
        raise HoldfastError("mount", subject=f"{source} as {kind}", why=why, code="mount-failed")


def unmount_as_user(target: str) -> bool:
    """Unmounts a FUSE filesystem as its owner, who is not root, may: by ``fusermount3``.  Whether that worked."""
    import subprocess

    program = _find(["fusermount3", "fusermount"])
    if program is None:
        return False
    done = subprocess.run([program, "-u", "--", target], capture_output=True, timeout=DEADLINE_S, check=False)
    return done.returncode == 0


def _find(names: Sequence[str]) -> str | None:
    for name in names:
        for folder in [*os.environ.get("PATH", "").split(":"), *_FOLDERS]:
            if folder and os.access(f"{folder}/{name}", os.X_OK):
                return f"{folder}/{name}"
    return None


def _output() -> BufferedRandom:
    fd = os.memfd_create("output", os.MFD_CLOEXEC)
    return open(fd, "w+b")
