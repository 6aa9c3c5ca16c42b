"""What tests/vm/test_mount_points.py says of pods in machines holds for pods in namespaces; and mounts of the host."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from holdfast.linux import syscalls
from holdfast.storage import mount_points
from holdfast.storage.journal import Journal
from holdfast.storage.mount_points import MountPoints
from holdfast.storage.steps import MakeMountPoints, MountPoint
from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_mount_points

if TYPE_CHECKING:
    from pathlib import Path

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(same_as(test_mount_points))


def leave(journal: Journal, root: Path, path: str) -> None:
    """Makes a mount point that nobody removes: another pod has the root when this one ends."""
    status = root.stat()
    step = MakeMountPoints("points", str(root), status.st_dev, status.st_ino, (MountPoint(path),))
    ours, others = MountPoints(journal, "p"), MountPoints(journal, "q")
    asyncio.run(ours.make(step, "c"))
    asyncio.run(others.make(step, "c"))
    ours.release("c")
    for used in others._roots.values():  # as if it had been killed
        used.fd.close()


def test_nothing_is_removed_through_a_mount(state_root, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with Journal(state_root) as journal:
        leave(journal, root, "a/b")
        syscalls.mount("none", f"{root}/a", "tmpfs")
        try:
            (root / "a/b").mkdir()
            mount_points.remove_unused(journal)
            assert (root / "a/b").is_dir()
        finally:
            syscalls.umount(f"{root}/a")
        assert journal.held() == []


def test_what_cannot_be_removed_now_stays_recorded(state_root, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with Journal(state_root) as journal:
        leave(journal, root, "a/b")
        syscalls.mount(str(root), str(root), "", syscalls.MS_BIND)
        try:
            syscalls.mount("none", str(root), "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
            mount_points.remove_unused(journal)
            assert [row.object for row in mount_points.unused(journal)] == [f"{root}/a", f"{root}/a/b"]
        finally:
            syscalls.umount(str(root))
        journal.forget_pod("p")
        assert (os.listdir(root), journal.held()) == ([], [])
