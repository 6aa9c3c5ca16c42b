"""System calls that need root."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import pytest

from holdfast.linux import syscalls
from tests import leaks

if TYPE_CHECKING:
    from pathlib import Path


def mounted(path: Path) -> str:
    """The line of a mount in the mount table."""
    with open("/proc/self/mountinfo") as file:
        return next((line for line in file if line.split(" ")[4] == str(path)), "")


def test_mount_and_umount(tmp_path):
    syscalls.mount("some-name", str(tmp_path), "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "size=64k,mode=0711")
    line = mounted(tmp_path)
    assert " some-name " in line
    assert "nosuid" in line
    assert "noexec" in line
    assert "size=64k" in line
    syscalls.mount("none", str(tmp_path), "", syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "x").touch()
    syscalls.umount(str(tmp_path))
    assert mounted(tmp_path) == ""
    with pytest.raises(OSError, match="umount2: Invalid argument") as failure:
        syscalls.umount(str(tmp_path))
    assert failure.value.filename == str(tmp_path)


def test_names_that_are_bytes(tmp_path):
    target = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(target)
    syscalls.mount(b"\xff", target, "tmpfs")
    syscalls.umount(target)
    os.rmdir(target)


def test_errors_of_mount(tmp_path):
    with pytest.raises(OSError, match="mount: ") as failure:
        syscalls.mount("none", str(tmp_path), "nosuchfs")
    assert failure.value.errno == errno.ENODEV
    with pytest.raises(FileNotFoundError):
        syscalls.mount("none", str(tmp_path / "nosuch"), "tmpfs")


def test_the_new_way(tmp_path):
    """A filesystem made detached, published by one call."""
    context = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig_string(context, "source", "named")
        syscalls.fsconfig_string(context, "size", "64k")
        syscalls.fsconfig_create(context)
        tree = syscalls.fsmount(context, syscalls.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)
    before = leaks.mounts()
    try:
        os.mkdir("inside", dir_fd=tree)
        assert leaks.mounts() == before
        syscalls.mount_setattr(tree, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_RDONLY)
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, str(tmp_path), syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)
    assert os.listdir(tmp_path) == ["inside"]
    assert "ro,nodev" in mounted(tmp_path)
    syscalls.mount_setattr(syscalls.AT_FDCWD, str(tmp_path), 0, attr_clr=syscalls.MOUNT_ATTR_RDONLY)
    (tmp_path / "writable").touch()
    syscalls.umount(str(tmp_path))


def test_flags_of_a_filesystem():
    context = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig_flag(context, "ro")
        syscalls.fsconfig_create(context)
        tree = syscalls.fsmount(context)
    finally:
        os.close(context)
    try:
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("inside", dir_fd=tree)
    finally:
        os.close(tree)


def test_errors_of_the_new_way(tmp_path):
    with pytest.raises(OSError, match="fsopen") as failure:
        syscalls.fsopen("nosuchfs")
    assert (failure.value.errno, failure.value.filename) == (errno.ENODEV, "nosuchfs")
    context = syscalls.fsopen("tmpfs")
    try:
        with pytest.raises(OSError, match="fsconfig") as failure:
            syscalls.fsconfig_string(context, "nosuch", "x")
        assert failure.value.filename == "nosuch"
        with pytest.raises(OSError, match="fsmount"):
            syscalls.fsmount(context)
    finally:
        os.close(context)
    with pytest.raises(FileNotFoundError):
        syscalls.open_tree(syscalls.AT_FDCWD, str(tmp_path / "nosuch"), 0)
    with pytest.raises(FileNotFoundError):
        syscalls.mount_setattr(syscalls.AT_FDCWD, str(tmp_path / "nosuch"), 0, attr_set=1)
    with pytest.raises(OSError, match="move_mount"):
        syscalls.move_mount(-1, "", syscalls.AT_FDCWD, str(tmp_path), syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def test_openat2_does_not_cross_mounts(tmp_path):
    (tmp_path / "mnt").mkdir()
    syscalls.mount("none", str(tmp_path / "mnt"), "tmpfs")
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="openat2") as failure:
            syscalls.openat2(fd, "mnt", os.O_PATH, syscalls.RESOLVE_NO_XDEV)
        assert failure.value.errno == errno.EXDEV
    finally:
        os.close(fd)
        syscalls.umount(str(tmp_path / "mnt"))


def in_child(action) -> int:
    """What an action that changes the process for good returns, done in a child."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            status = action()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_namespaces(tmp_path):
    def action() -> int:
        before = os.readlink("/proc/self/ns/uts")
        fd = os.open("/proc/self/ns/uts", os.O_RDONLY)
        syscalls.unshare(syscalls.CLONE_NEWUTS)
        inside = os.readlink("/proc/self/ns/uts") != before
        syscalls.setns(fd)
        return 0 if inside and os.readlink("/proc/self/ns/uts") == before else 1

    assert in_child(action) == 0


def test_pivot_root(tmp_path):
    def action() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("none", str(tmp_path), "tmpfs")
        os.mkdir(tmp_path / "old")
        (tmp_path / "marker").touch()
        syscalls.pivot_root(str(tmp_path), str(tmp_path / "old"))
        os.chdir("/")
        return 0 if sorted(os.listdir("/")) == ["marker", "old"] and os.path.isdir("/old/proc") else 1

    assert in_child(action) == 0


def test_clock_settime_fails_where_it_may_not():
    """Setting a clock that cannot be set: the host's own is not for a test to change."""
    with pytest.raises(OSError, match="clock_settime") as failure:
        syscalls.clock_settime(time.CLOCK_MONOTONIC, 1_500_000_000_123_456_789)
    assert failure.value.errno == errno.EINVAL
