"""Mount points that are made in a directory for as long as containers have it for their root, and never forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

from holdfast.errors import InUse, NotFound
from holdfast.linux.fds import OwnedFd
from holdfast.linux.syscalls import AT_FDCWD, statx_birth
from holdfast.storage import mount_points
from holdfast.storage.journal import Journal
from holdfast.storage.mount_points import KIND, MountPoints
from holdfast.storage.real_paths import RealPaths
from holdfast.storage.steps import MakeMountPoints, MountPoint
from tests.vm.support import python_program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/file").write_text("content\n")
    return tmp_path / "root"


@pytest.fixture
def journal(state_root: Path) -> Iterator[Journal]:
    with Journal(state_root) as journal:
        yield journal


def step(root: Path, *paths: str) -> MakeMountPoints:
    """Directories, and files, which do not end with a slash."""
    status = root.stat()
    points = [MountPoint(path.strip("/"), path.endswith("/")) for path in paths]
    return MakeMountPoints("points", str(root), status.st_dev, status.st_ino, tuple(points))


def make(points: MountPoints, root: Path, *paths: str, container: str = "c") -> None:
    asyncio.run(points.make(step(root, *paths), container))


def names(root: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(where, n), root) for where, d, f in os.walk(root) for n in d + f)


def tick() -> None:
    """Returns when what is made then is younger than what was made before."""
    coarse = 5  # CLOCK_REALTIME_COARSE, by which filesystems go
    now = time.clock_gettime_ns(coarse)
    while time.clock_gettime_ns(coarse) == now:
        pass


@contextlib.contextmanager
def alive(journal: Journal, pod: str) -> Iterator[None]:
    """As if its monitor lived."""
    folder = journal.pods_folder / pod
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    shutil.rmtree(folder)


def recorded(journal: Journal, root: Path) -> list[str]:
    return [os.path.relpath(row.object, root) for row in journal.held(kind=KIND)]


# -- made and removed -----------------------------------------------------------------------------


def test_made_and_removed(journal, root):
    before, points = names(root), MountPoints(journal, "p")
    make(points, root, "a/b/", "etc/one", "etc/", "etc/file")
    assert names(root) == ["a", "a/b", "etc", "etc/file", "etc/one"]
    assert recorded(journal, root) == ["a", "a/b", "etc/one"]
    assert {row.state for row in journal.held()} == {"held"}
    points.release("other")
    assert "a/b" in names(root)
    points.release("c")
    assert (names(root), journal.held()) == (before, [])
    points.release("c")


def test_modes_are_those_that_are_wanted_whatever_the_umask(journal, root):
    points = MountPoints(journal, "p")
    wanted = (
        MountPoint("new/deep/file", directory=False),
        MountPoint("memory", mode=0o1777),
        MountPoint("new", mode=0o700),
    )
    umask = os.umask(0o077)
    try:
        asyncio.run(points.make(msgspec.structs.replace(step(root), points=wanted), "c"))
    finally:
        os.umask(umask)
    modes = {
        name: stat.S_IMODE((root / name).stat().st_mode) for name in ("new", "new/deep", "new/deep/file", "memory")
    }
    assert modes == {"new": 0o700, "new/deep": 0o755, "new/deep/file": 0o644, "memory": 0o1777}
    points.release("c")


def test_the_last_user_takes_them_away(journal, root):
    before, points = names(root), MountPoints(journal, "p")
    make(points, root, "a/", container="one")
    make(points, root, "a/", "b/", container="two")
    points.add("two", MountPoint("/c/d"))
    points.add("three", MountPoint("/e"))
    points.release("one")
    assert names(root) == ["a", "b", "c", "c/d", *before]
    points.release("two")
    assert (names(root), journal.held()) == (before, [])


def test_what_is_somebody_s_by_then_stays(journal, root, tmp_path):
    points = MountPoints(journal, "p")
    make(points, root, "a/b/", "one", "two", "gone/", "other/", "moved/x/", "link")
    (root / "a/mine").touch()
    (root / "one").write_text("x")
    (root / "gone").rmdir()
    (tmp_path / "new").mkdir()  # while the other is there, so that it is not the same inode
    (root / "other").rmdir()
    (tmp_path / "new").rename(root / "other")
    (root / "moved").rename(root / "elsewhere")
    (root / "moved").symlink_to("elsewhere")
    (root / "link").unlink()
    (root / "link").symlink_to("/etc/file")
    points.release("c")
    left = ["a", "a/mine", "elsewhere", "elsewhere/x", "etc", "etc/file", "link", "moved", "one", "other"]
    assert (names(root), journal.held()) == (left, [])


def test_an_inode_that_is_used_again(journal, root):
    """ext4 gives the next thing that is made the inode of the last one that was removed."""
    points = MountPoints(journal, "p")
    make(points, root, "a/", "etc/one")
    tick()
    (root / "a").rmdir()
    (root / "etc/one").unlink()
    (root / "a").mkdir()
    (root / "etc/one").touch()
    for row in journal.held():  # on any filesystem
        device, _, born_ns = row.detail["made"]
        journal.hold(row.id, {**row.detail, "made": [device, os.stat(row.object).st_ino, born_ns]})
    points.release("c")
    assert (names(root), journal.held()) == (["a", "etc", "etc/file", "etc/one"], [])


def test_what_cannot_be_told_stays(journal, root):
    """As on a filesystem that has no birth times."""
    points = MountPoints(journal, "p")
    make(points, root, "a/")
    [row] = journal.held()
    journal.hold(row.id, {**row.detail, "made": [*row.detail["made"][:2], 0]})
    points.release("c")
    assert (names(root), journal.held()) == (["a", "etc", "etc/file"], [])


@pytest.mark.parametrize("directory", [True, False])
def test_nothing_is_left_of_what_was_not_wholly_made(root, directory):
    before, fd = names(root), os.open(root, os.O_PATH)
    with OwnedFd(fd), RealPaths(fd) as tree:
        with pytest.raises(OverflowError):  # fchmod(2) cannot even be called
            tree.make(b"etc/new", 1 << 64, directory=directory)
        with pytest.raises(FileExistsError):
            tree.make(b"etc/file", 0o644, directory=directory)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_fd = os.dup(fd)
        os.close(next_fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                tree.make(b"etc/new", 0o755, directory=directory)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert names(root) == before


def test_what_cannot_be_made_is_the_runtime_s_to_tell(journal, root):
    (root / "loop").symlink_to("loop")
    before, points = names(root), MountPoints(journal, "p")
    make(points, root, "etc/file/below/", "loop/x/", "a/", "one", "one/below/", "x" * 300 + "/")
    assert names(root) == ["a", *before, "one"]
    assert sorted(recorded(journal, root)) == ["a", "one"]
    points.release("c")
    assert names(root) == before


def test_links_lead_where_they_lead_in_the_container(journal, root, tmp_path):
    for name, target in (("out", "/../outside"), ("var", "etc/../inside"), ("file", "etc/new"), ("etc/up", "..")):
        (root / name).symlink_to(target)
    before, points = names(root), MountPoints(journal, "p")
    make(points, root, "out/dir/", "var/a/", "file", "etc/up/b/", "inside/c")
    assert sorted(recorded(journal, root)) == [
        "b",
        "etc/new",
        "inside",
        "inside/a",
        "inside/c",
        "outside",
        "outside/dir",
    ]
    assert sorted({*names(root)} - {*before}) == sorted(recorded(journal, root))
    assert not (tmp_path / "outside").exists()
    points.release("c")
    assert names(root) == before


def test_odd_names(journal, root):
    before, points = names(root), MountPoints(journal, "p")
    (root / "odd").symlink_to(b"\xff\n ")
    make(points, root, "odd/ä/", " /\n/", "a/" * 1200)
    assert recorded(journal, root)[:2] == ["\\xff\n ", "\\xff\n /ä"]
    points.release("c")
    (root / "odd").unlink()
    assert (names(root), journal.held()) == (before, [])


def test_another_directory_than_the_one_that_was_seen(journal, root):
    wanted = step(root, "a/")
    root.rename(root.with_name("other"))
    for there in (False, True):
        if there:
            root.mkdir()
        with pytest.raises(NotFound) as caught:
            asyncio.run(MountPoints(journal, "p").make(wanted, "c"))
        assert caught.value.code == "source-not-found"
    assert names(root) == []


# -- other pods -----------------------------------------------------------------------------------


def test_those_of_a_pod_that_is_gone_stay_as_long_as_another_has_the_root(journal, root, tmp_path):
    """It may have something mounted on them, in a namespace that nobody here sees."""
    before = names(root)
    ours, others = MountPoints(journal, "p"), MountPoints(journal, "q")
    (tmp_path / "state").mkdir()
    with Journal(tmp_path / "state") as elsewhere:
        stranger = MountPoints(elsewhere, "p")
        make(ours, root, "a/")
        make(others, root, "a/", "b/")
        make(stranger, root, "b/", "c/")
        ours.release("c")
        journal.forget_pod("p")
        assert mount_points.unused(journal) == []
        mount_points.remove_unused(journal)
        assert recorded(journal, root) == ["a", "b"]
        others.release("c")
        assert names(root) == ["a", "b", "c", *before]
        stranger.release("c")  # knows nothing of the other journal
        assert names(root) == ["a", "b", *before]
    assert [row.pod for row in mount_points.unused(journal)] == ["p", "q"]
    mount_points.remove_unused(journal, "p")
    assert (names(root), journal.held()) == (before, [])


def test_a_root_that_somebody_has_locked_for_good(journal, root, monkeypatch):
    monkeypatch.setattr(mount_points, "_LOCK_SECONDS", 0)
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="locked") as caught:
            make(MountPoints(journal, "p"), root, "a/")
        assert caught.value.code == "root-locked"
    finally:
        os.close(fd)
    assert "a" not in names(root)


# -- pods that are killed -------------------------------------------------------------------------

#: Dies when it is to make the ``n``th, or when all are made.
KILLED = """
import asyncio, os, signal
from pathlib import Path
from holdfast.storage.journal import Journal
from holdfast.storage.mount_points import MountPoints
from holdfast.storage.real_paths import RealPaths
from tests.unit.test_mount_points import make
made, original = [], RealPaths.make
def make_one(*arguments, **options):
    if len(made) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(original(*arguments, **options))
    return made[-1]
RealPaths.make = make_one
with Journal(Path({state!r})) as journal:
    make(MountPoints(journal, "p"), Path({root!r}), "a/b/", "etc/one", "z/")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_at(n: int, state: Path, root: Path) -> None:
    done = subprocess.run(python_program(KILLED.format(n=n, state=str(state), root=str(root))), check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("n", [0, 2, 4])
def test_they_are_known_before_they_are_made(journal, state_root, root, n):
    before = names(root)
    kill_at(n, state_root, root)
    assert len(names(root)) == len(before) + n
    assert [os.path.relpath(row.object, root) for row in mount_points.unused(journal)] == ["a", "a/b", "etc/one", "z"]
    assert {row.state for row in journal.held()} == {"held" if n == 4 else "intent"}
    journal.forget_pod("p")
    assert (names(root), journal.held()) == (before, [])


def test_another_pod_goes_on_with_them_and_removes_them(journal, state_root, root):
    before = names(root)
    kill_at(4, state_root, root)
    points = MountPoints(journal, "q")
    make(points, root, "a/b/", "a/c/")
    journal.forget_pod("p")
    assert recorded(journal, root) == ["a", "a/b", "etc/one", "z", "a/c"]
    points.release("c")
    assert (names(root), journal.held()) == (before, [])


def test_what_has_been_put_there_since_stays(journal, state_root, root):
    kill_at(4, state_root, root)
    (root / "a/b/mine").touch()
    (root / "etc/one").write_text("x")
    mount_points.remove_unused(journal)
    assert (names(root), journal.held()) == (["a", "a/b", "a/b/mine", "etc", "etc/file", "etc/one"], [])


def test_what_was_made_at_another_time_than_it_was_meant_to_be_is_somebody_else_s(journal, root):
    """As long as no inode is known: the pod may have been killed before it was made."""
    status = root.stat()
    detail = {"root": str(root), "device": status.st_dev, "inode": status.st_ino}
    for name, after_ms in (("tick", -9), ("soon", 4_000), ("before", -20), ("later", 6_000)):
        (root / "made").mkdir()
        at_ns = statx_birth(AT_FDCWD, str(root / "made"))[2] - after_ms * 10**6
        (root / "made").rename(root / name)
        journal.intend("p", KIND, str(root / name), {**detail, "path": name, "at_ns": at_ns})
    mount_points.remove_unused(journal)
    assert (names(root), journal.held()) == (["before", "etc", "etc/file", "later"], [])


@pytest.mark.parametrize("there", [True, False])
def test_a_root_that_is_gone_is_forgotten(journal, state_root, root, there):
    kill_at(4, state_root, root)
    root.rename(root.with_name("elsewhere"))
    if there:
        (root / "a").mkdir(parents=True)
    assert len(mount_points.unused(journal)) == 4
    mount_points.remove_unused(journal)
    assert journal.held() == []
    assert names(root) == (["a"] if there else [])


@pytest.mark.parametrize("there", [True, False])
def test_a_root_that_is_renamed_while_a_pod_that_lives_has_it(journal, state_root, root, there):
    before, moved = names(root), root.with_name("moved")
    kill_at(4, state_root, root)
    points = MountPoints(journal, "q")
    make(points, root, "b/")
    root.rename(moved)
    if there:
        root.mkdir()
    with alive(journal, "q"):
        assert mount_points.unused(journal) == []
        mount_points.remove_unused(journal)
        journal.forget_pod("p")
        assert len(journal.held()) == 5
        points.release("c")
        assert (names(moved), journal.held()) == (before, [])
        make(points, moved, "b/")
        moved.rename(root.with_name("again"))
        mount_points.remove_unused(journal)
        assert len(journal.held()) == 1
        mount_points.remove_unused(journal, "q")  # it is being forgotten
        assert journal.held() == []
        points.release("c")
