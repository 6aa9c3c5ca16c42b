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
from tests.vm.support import assert_holds_nothing
from tests.vm.test_mount_points import WAITING, bundle, collect, end, kill, named, names, waiting

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


def test_nothing_is_removed_where_nobody_can_tell_whose_it_is(state_root, tmp_path):
    """ramfs has no birth times."""
    root = tmp_path / "root"
    root.mkdir()
    syscalls.mount("none", str(root), "ramfs")
    try:
        with Journal(state_root) as journal:
            leave(journal, root, "a/b")
            assert len(mount_points.unused(journal)) == 2
            mount_points.remove_unused(journal)
            assert ((root / "a/b").is_dir(), journal.held()) == (True, [])
    finally:
        syscalls.umount(str(root))


def test_a_root_that_is_renamed_while_a_container_has_it(pod, tmp_path, source):
    """Nobody but the pod can say that it has it still, and gc must not forget what is to be removed there."""
    made = bundle(tmp_path / "b", WAITING)
    root, moved = made / "rootfs", made / "moved"
    before = sorted(os.path.relpath(name, root) for name in names(root))
    with waiting(pod, made, source) as session:
        root.rename(moved)
        assert named(pod) == collect(pod, tmp_path) == []
        root.mkdir()
        assert named(pod) == collect(pod, tmp_path) == []
        end(session)
    assert [os.path.relpath(name, moved) for name in names(moved)] == before
    assert_holds_nothing(pod)


def test_a_root_that_was_renamed_when_its_pod_is_killed_is_forgotten(pod, tmp_path, source):
    made = bundle(tmp_path / "b", WAITING)
    info = pod.inspect()
    with waiting(pod, made, source):
        (made / "rootfs").rename(made / "moved")
        kill(info)
    left = named(pod)
    assert f"{made}/rootfs/new/deep/dir" in left
    assert collect(pod, tmp_path) == left
    assert named(pod) == []
