"""Mount points that are made in a directory for as long as containers have it for their root."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.guest import mount_points
from holdfast.mounts.root import Root

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/file").write_text("content\n")
    return tmp_path / "root"


def spec(root: Path, *mounts: tuple[str, str]) -> dict[str, Any]:
    """Of (source, destination)."""
    listed = [{"type": "bind", "source": source, "destination": destination} for source, destination in mounts]
    return {"root": {"path": str(root)}, "mounts": listed}


def names(root: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(where, n), root) for where, d, f in os.walk(root) for n in d + f)


def test_made_and_removed(root):
    before = names(root)
    mount_points.make(spec(root, ("/usr", "/a/b"), ("/etc/passwd", "/etc/one"), ("/etc/passwd", "a/b/c")), "c")
    assert names(root) == ["a", "a/b", "etc", "etc/file", "etc/one"]  # what is below a mount is made in that
    mount_points.remove("other")
    assert "a/b" in names(root)
    mount_points.remove("c")
    assert names(root) == before
    mount_points.remove("c")


def test_the_last_user_takes_them_away(root):
    before = names(root)
    mount_points.make(spec(root, ("/usr", "/a")), "one")
    mount_points.make(spec(root, ("/usr", "/a"), ("/usr", "/b")), "two")
    mount_points.remove("one")
    assert names(root) == ["a", "b", *before]
    mount_points.remove("two")
    assert names(root) == before


def test_what_is_somebody_s_by_then_stays(root):
    mount_points.make(spec(root, ("/usr", "/a/b"), ("/etc/passwd", "/one"), ("/etc/passwd", "/two")), "c")
    (root / "a/mine").touch()
    (root / "one").write_text("x")
    mount_points.remove("c")
    assert names(root) == ["a", "a/mine", "etc", "etc/file", "one"]


def test_another_pod_s_mounts_are_not_taken_away(root):
    """It may have something mounted on them, in a namespace that nobody here sees."""
    mount_points.make(spec(root, ("/usr", "/a")), "c")
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        mount_points.remove("c")
    finally:
        os.close(fd)
    assert "a" in names(root)


def test_what_cannot_be_made_is_the_runtime_s_to_tell(root):
    os.symlink("loop", root / "loop")
    before = names(root)
    mount_points.make(spec(root, ("/usr", "/etc/file"), ("/usr", "/loop/x"), ("/usr", "/a")), "c")
    assert "a" in names(root)
    mount_points.remove("c")
    assert names(root) == before


def test_links_do_not_lead_out(root, tmp_path):
    os.symlink("/../outside", root / "out")
    with Root(str(root)) as opened:
        made: list[bytes] = []
        mount_points.place(opened, b"out/dir", True, made).close()
        assert (root / "outside/dir").is_dir()
        mount_points.unmake(opened, made)
    assert names(root) == ["etc", "etc/file", "out"]
    assert not (tmp_path / "outside").exists()
