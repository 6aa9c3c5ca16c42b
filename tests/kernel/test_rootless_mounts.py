"""Overlays over mounts, volumes and mount points in a pod that an ordinary user runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from tests import users
from tests.users import RUN, UID, ids
from tests.vm.support import wait_for_end

if TYPE_CHECKING:
    from pathlib import Path

user, nobody = users.FIXTURES


def names(root: Path) -> list[str]:
    return sorted(os.path.join(where, name) for where, folders, files in os.walk(root) for name in folders + files)


def test_a_writable_overlay(user):
    """What is removed and made again is new: a directory must hide what is below it (overlayfs's xattrs)."""
    source = user.folder("source")
    (source / "sub").mkdir()
    for name in ("file", "sub/old"):
        (source / name).write_text("from the source\n")
    user.own(source / "sub", source / "file", source / "sub/old")
    before = names(source)
    script = "rm -r /m/sub && mkdir /m/sub && ls /m/sub; rm /m/file; echo x > /m/new; ls /m; echo y > /one; cat /one"
    volumes = ("-v", f"{source}:/m:O", "-v", f"{source}/file:/one:O")
    assert user.sh(script, *volumes).split() == ["new", "sub", "y"]
    assert names(source) == before
    assert (source / "file").read_text() == "from the source\n"
    user.nothing_is_held()


def test_a_writable_overlay_over_what_others_own(user):
    """Its owner does not exist in the container, which changes nothing of what may be read."""
    assert user.sh("touch /m/new && ls /m/new; cat /m/passwd | head -n 1", "-v", "/etc:/m:O").split(":")[0] == (
        "/m/new\nroot"
    )


def test_no_mount_point_stays(user):
    before = names(user.rootfs)
    there = user.folder("there")
    assert user.sh("ls -d /absent/deep", "-v", f"{there}:/absent/deep") == "/absent/deep\n"
    assert names(user.rootfs) == before


def test_mount_points_of_a_pod_that_is_killed(user):
    before = names(user.rootfs)
    there = user.folder("seen")
    user.text("pod", "create", "--isolation", "namespace", "lost")
    info = user.answer("pod", "inspect", "lost")
    mount = ("-v", f"{there}:/absent/deep")
    user.text("run", "--pod", "lost", "-d", "--name", "c", *mount, "--rootfs", user.rootfs, "sleep", "1000")
    os.kill(info["pid"], signal.SIGKILL)
    wait_for_end(info["pid"])
    wait_for_end(info["qemu_pid"])
    assert ids(user.rootfs / "absent/deep") == (UID, UID)
    assert f"let go of mount-point {user.rootfs}/absent/deep of pod lost" in user.text("gc")
    assert names(user.rootfs) == before
    user.nothing_is_held()


def test_a_root_that_cannot_be_opened_while_a_pod_has_it(user):
    before = names(user.rootfs)
    there, mode = user.folder("shown"), user.rootfs.stat().st_mode
    user.text("pod", "create", "--isolation", "namespace", "kept")
    mount = ("-v", f"{there}:/absent/deep")
    user.text("run", "--pod", "kept", "-d", "--name", "c", *mount, "--rootfs", user.rootfs, "sleep", "1000")
    user.rootfs.chmod(0o111)
    try:
        assert user.answer("audit")["clean"]
        assert user.answer("gc")["collected"] == []
    finally:
        user.rootfs.chmod(mode)
    assert (user.rootfs / "absent/deep").is_dir()
    user.text("pod", "remove", "--force", "kept")
    assert names(user.rootfs) == before
    user.nothing_is_held()


def test_a_volume_on_disk_is_refused(user):
    hint = [f"dev.holdfast.mount.v.{field}" for field in ("source=/v", "type=tmpfs", "share=pod")]
    annotations = [word for text in hint for word in ("--annotation", text)]
    mount = ("--mount", f"type=bind,src={user.home},dst=/v")
    annotations[1] = f"dev.holdfast.mount.v.source={user.home}"
    error = user.fails(*RUN, *annotations, *mount, "--rootfs", user.rootfs, "true")
    assert error["code"] == "rootless-unsupported", error
    user.nothing_is_held()
