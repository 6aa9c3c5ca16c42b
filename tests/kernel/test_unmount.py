"""Unmounting that can be tried again, and never deletes through a mount."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import NotReleased
from holdfast.linux import syscalls
from holdfast.mounts.unmount import remove_mount_point, unmount
from tests import leaks

if TYPE_CHECKING:
    from pathlib import Path

# In the package this name is the library's function.
module = importlib.import_module("holdfast.mounts.unmount")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def mount(path: Path, times: int = 1) -> None:
    for _ in range(times):
        syscalls.mount("none", str(path), "tmpfs", data="size=64k")


def is_mounted(path: Path) -> bool:
    return str(path) in leaks.mounts().values()


def test_mounted(target):
    mount(target)
    unmount(str(target))
    assert not is_mounted(target)
    unmount(str(target))


def test_not_there(tmp_path):
    unmount(str(tmp_path / "nosuch"))
    unmount(str(tmp_path / "nosuch/below"))


def test_stacked(target):
    mount(target, 3)
    unmount(str(target))
    assert not is_mounted(target)


def test_as_many_as_may_be(target):
    mount(target, module._MOST_STACKED)
    unmount(str(target))
    assert not is_mounted(target)


def test_more_than_may_be_is_not_taken_for_done(target):
    mount(target, module._MOST_STACKED + 2)
    with pytest.raises(NotReleased, match="stacked"):
        unmount(str(target))
    assert is_mounted(target)
    unmount(str(target))
    assert not is_mounted(target)


def test_busy_then_tried_again(target):
    mount(target)
    with open(target / "file", "w"):
        with pytest.raises(NotReleased, match="busy") as failure:
            unmount(str(target))
        assert failure.value.code == "mount-busy"
        assert failure.value.retryable
        assert is_mounted(target)
    unmount(str(target))
    assert not is_mounted(target)


def test_a_link_to_a_mount_is_not_followed(target, tmp_path):
    mount(target)
    (tmp_path / "link").symlink_to(target)
    unmount(str(tmp_path / "link"))
    assert is_mounted(target)
    unmount(str(target))


def test_remove(target):
    remove_mount_point(str(target))
    assert not target.exists()
    remove_mount_point(str(target))


def test_what_is_mounted_is_not_removed(target):
    mount(target)
    (target / "file").write_text("kept")
    with pytest.raises(NotReleased):
        remove_mount_point(str(target))
    assert (target / "file").read_text() == "kept"
    (target / "file").unlink()
    with pytest.raises(NotReleased, match="busy"):  # empty, and a mount all the same
        remove_mount_point(str(target))
    unmount(str(target))


def test_what_is_in_it_is_not_removed(target):
    (target / "file").write_text("kept")
    with pytest.raises(NotReleased, match="not empty"):
        remove_mount_point(str(target))
    assert os.listdir(target) == ["file"]
