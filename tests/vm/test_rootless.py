"""Pods in machines of an ordinary user: images, disks and shares work, with the users that exist for them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests import images, users
from tests.users import NOBODY, SUBORDINATE

user, nobody = users.FIXTURES


def test_a_user_s_machine(nobody, tmp_path):
    """One boot for all of it: the user's data folder has no template yet."""
    layout = images.make_busybox(tmp_path)
    shutil.copytree(layout, nobody.home / "layout")
    for path in (nobody.home / "layout").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    nobody.text("image", "import", f"{nobody.home}/layout:v", "--name", "busybox")
    shared, disk = nobody.folder("shared"), images.make_disk(nobody.home / "disk", "ext4")
    nobody.own(disk)
    mounts = ("-v", f"{shared}:/s", "--mount", f"type=disk,src={disk},dst=/d")
    script = (
        "id -u; ls -ln /home | tail -n 1 | cut -c1-40; echo kept > /d/file; touch /s/own; chown 1:1 /s/own; touch /s/a"
    )
    number, owners = nobody.text("run", *mounts, "busybox", "sh", "-c", script).splitlines()
    assert (number, owners.split()[2:4]) == ("0", ["1000", "1001"])
    assert users.ids(shared / "a") == (NOBODY, NOBODY)
    assert users.ids(shared / "own") == (SUBORDINATE, SUBORDINATE)
    assert images.is_clean(disk)
    assert "kept" in images.run("debugfs", "-R", "cat /file", disk).stdout
    assert nobody.text("run", "--user", "user", "busybox", "id", "-u") == "1000\n"
    nobody.nothing_is_held()
    # The copies of their RAM are elsewhere, in shared memory, and the user's.
    nobody.text("template", "remove", *(one["key"] for one in nobody.answer("template", "list")))
    assert not list(Path("/dev/shm").glob(f"holdfast-{NOBODY}/*/*"))
