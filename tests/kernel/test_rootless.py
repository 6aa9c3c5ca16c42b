"""Pods in namespaces of an ordinary user: what they can do, what they refuse, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.linux import user_namespaces
from tests import images, users
from tests.users import NOBODY, RUN, SUBORDINATE, UID, User, ids
from tests.vm.support import is_running, wait_for_end

if TYPE_CHECKING:
    from pathlib import Path

user, nobody = users.FIXTURES


# -- what works -----------------------------------------------------------------------------------


def test_a_root_filesystem_runs(user):
    script = "id -u; cat /proc/self/uid_map; hostname; echo $$; touch /made; ls -ln /made | cut -c1-50"
    number, mapped, name, process, made = user.sh(script, "--name", "first").splitlines()
    assert (number, mapped.split(), name, process) == ("0", ["0", str(UID), "1"], "first", "1")
    assert " 0 " in made
    assert ids(user.rootfs / "made") == (UID, UID)
    assert user.holdfast(*RUN, "--rootfs", user.rootfs, "sh", "-c", "exit 7").returncode == 7
    user.nothing_is_held()
    assert ids(user.home / "run/holdfast/journal.db") == (UID, UID)  # where the XDG specification puts it


def test_a_bundle_runs(user):
    """Its namespaces and its rules for devices are those of any bundle; the kernel makes devices for nobody anyhow."""
    folder = user.folder("bundle")
    rules = {"resources": {"devices": [{"allow": False, "access": "rwm"}]}, "cgroupsPath": "/somewhere"}
    images.make_bundle(folder, ["sh", "-c", "cat; ls /dev/null"], root={"path": str(user.rootfs)}, linux=rules)
    assert user.text(*RUN, "-i", "--bundle", folder, stdin=b"typed\n") == "typed\n/dev/null\n"


def test_shares(user):
    shared, file = user.folder("shared"), user.home / "shared/file"
    file.write_text("one\n")
    user.own(file)
    script = (
        "cat /rw/file /alone; echo two > /rw/new; echo x > /ro/file || echo refused;"
        " grep -E ' /(rw|ro|alone) ' /proc/mounts | cut -d' ' -f2,4 | sed 's/,relatime.*//'"
    )
    lines = user.sh(script, "-v", f"{shared}:/rw", "-v", f"{shared}:/ro:ro", "-v", f"{file}:/alone").splitlines()
    assert lines[:3] == ["one", "one", "refused"]
    assert sorted(lines[3:]) == ["/alone rw,nosuid,nodev", "/ro ro,nosuid,nodev", "/rw rw,nosuid,nodev"]
    assert (shared / "new").read_text() == "two\n"
    assert ids(shared / "new") == (UID, UID)


def test_a_share_keeps_what_the_host_has_locked(user):
    """The host's own mount is noexec, and its subfolder's read-only: no user can have it otherwise."""
    there = user.folder("locked")
    mounts = f"mount -t tmpfs -o noexec,noatime none {there} && mkdir {there}/b && mount -t tmpfs -o ro none {there}/b"
    before = ("unshare", "--mount", "--propagation", "private", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    script = "grep -E ' /(s|r)(/b)? ' /proc/mounts | cut -d' ' -f2,4 | sed 's/,relatime.*//; s/,uid=.*//; s/,inode.*//'"
    found = User(user.home, UID, *before).sh(script, "-v", f"{there}:/s", "-v", f"{there}:/r:ro").splitlines()
    assert sorted(found) == [
        "/r ro,nosuid,nodev,noexec,noatime", "/r/b ro,nosuid,nodev",
        "/s rw,nosuid,nodev,noexec,noatime", "/s/b ro,nosuid,nodev",
    ]  # fmt: skip


def test_what_is_mounted_below_a_share_comes_with_it(user):
    assert user.sh("ls /h/proc/self >/dev/null && echo whole", "-v", "/:/h:ro") == "whole\n"
    alone = json.dumps({"destination": "/h", "type": "bind", "source": "/", "options": ["bind", "ro"]})
    bundle = user.folder("alone")
    images.make_bundle(bundle, ["true"], root={"path": str(user.rootfs)}, mounts=[json.loads(alone)])
    error = user.fails(*RUN, "--bundle", bundle)
    assert (error["code"], error["hint"]) == ("rootless-unsupported", "share it with them: rbind"), error
    user.nothing_is_held()


def test_a_writable_overlay_over_a_share(user):
    """Whiteouts and opaque directories are kept in extended attributes that a user may set."""
    shared = user.folder("below")
    (shared / "d").mkdir()
    (shared / "d/f").touch()
    user.own(shared / "d", shared / "d/f")
    assert user.sh("cd /o; rm -r d; mkdir d; ls -A d; touch d/new; ls d", "-v", f"{shared}:/o:O") == "new\n"
    assert os.listdir(shared / "d") == ["f"]


def test_memory(user):
    script = "df -k /m | tail -n 1 | awk '{print $2}'; head -c 2m /dev/zero > /m/f; wc -c < /m/f; stat -c %a /m"
    script = script.replace("awk '{print $2}'", "sed 's/  */ /g' | cut -d' ' -f2")
    size, kept, mode = user.sh(script + " 2>&1", "--mount", "type=tmpfs,dst=/m,size=1m,mode=0701").splitlines()[-3:]
    assert (size, kept, mode) == ("1024", str(1 << 20), "701")


def test_a_read_only_root_filesystem(user):
    script = "touch /x 2>/dev/null || echo kept; touch /tmp/y && echo memory; ls -d /absent"
    there = user.folder("there")
    assert user.sh(script, "--read-only", "-v", f"{there}:/absent") == "kept\nmemory\n/absent\n"
    assert not (user.rootfs / "absent").exists()


def test_a_pod_and_its_commands(user):
    hot = user.folder("hot")
    volume = ("--annotation", "dev.holdfast.mount.v.source=/v", "--annotation", "dev.holdfast.mount.v.type=tmpfs",
              "--annotation", "dev.holdfast.mount.v.share=pod", "--mount", "type=tmpfs,src=/v,dst=/v")  # fmt: skip
    user.text("pod", "create", "--isolation", "namespace", "p")
    try:
        for name in ("a", "b"):
            user.text("run", "--pod", "p", "-d", "--name", name, *volume, "--rootfs", user.rootfs, "sleep", "1000")
        assert [(pod["name"], pod["isolation"]) for pod in user.answer("ps")] == [("p", "namespace")]
        user.text("exec", "p/a", "sh", "-c", "echo shared > /v/file")
        assert user.text("exec", "p/b", "cat", "/v/file") == "shared\n"
        user.text("attach", "p/a", "--mount", f"type=bind,src={hot},dst=/hot")
        user.text("exec", "p/a", "touch", "/hot/file")
        assert ids(hot / "file") == (UID, UID)
        user.text("detach", "p/a", "/hot")
        assert user.holdfast("exec", "p/a", "ls", "/hot/file").returncode
        assert user.answer("audit")["clean"]
    finally:
        user.text("pod", "remove", "--force", "p")
    user.nothing_is_held()


def test_a_killed_monitor_leaves_nothing_that_gc_does_not_find(user):
    user.text("pod", "create", "--isolation", "namespace", "lost")
    info = user.answer("pod", "inspect", "lost")
    user.text("run", "--pod", "lost", "-d", "--name", "c", "--rootfs", user.rootfs, "sleep", "1000")
    os.kill(info["pid"], signal.SIGKILL)
    wait_for_end(info["pid"])
    wait_for_end(info["qemu_pid"])
    assert not is_running(info["qemu_pid"])
    assert "let go of pod lost" in user.text("gc")
    user.nothing_is_held()


def test_others_of_etc_subuid(nobody):
    """root is the user, 1 is the first id of the range, and so on."""
    script = "id; touch /tmp/theirs; cat /proc/self/uid_map"
    who, own, others = nobody.sh(script, "-u", "user").splitlines()
    assert who == "uid=1000(user) gid=1001(users) groups=2000(extra),2001(more)"
    assert (own.split(), others.split()) == (["0", str(NOBODY), "1"], ["1", str(SUBORDINATE), "65536"])
    assert ids(nobody.rootfs / "tmp/theirs") == (SUBORDINATE + 999, SUBORDINATE + 1000)
    assert "gid=300004" in nobody.sh("grep ' /dev/pts ' /proc/mounts")  # the terminals' group is in the range
    nobody.nothing_is_held()


# -- what does not, and says so ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(user: User) -> Path:
    path = images.make_disk(user.home / "disk", "ext4")
    user.own(path)
    return path


def test_disks_are_refused(user, disk):
    argv = (*RUN, "--mount", f"type=disk,src={disk},dst=/d", "--rootfs", user.rootfs, "true")
    for words in (argv, ("plan", *argv[1:])):
        error = user.fails(*words)
        assert (error["code"], error["subject"]) == ("rootless-unsupported", str(disk))
        assert "--isolation vm" in error["hint"]
    user.text("pod", "create", "--isolation", "namespace", "p")
    try:
        assert user.fails("attach", "p", "--mount", f"type=disk,src={disk}")["code"] == "rootless-unsupported"
        assert user.fails("run", "--pod", "p", *argv[3:])["code"] == "rootless-unsupported"
        assert user.answer("storage", "p")["free_slots"] == 256
    finally:
        user.text("pod", "remove", "p")
    user.nothing_is_held()


def test_named_volumes_are_refused(user):
    user.text("volume", "create", "v", "--size", "32M")
    error = user.fails(*RUN, "--mount", "type=volume,src=v,dst=/d", "--rootfs", user.rootfs, "true")
    assert error["code"] == "rootless-unsupported"
    user.text("volume", "remove", "v")


def test_images_are_imported_and_refused(nobody, tmp_path):
    layout = images.make_busybox(tmp_path)
    shutil.copytree(layout, nobody.home / "layout")
    for path in (nobody.home / "layout").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    nobody.text("image", "import", f"{nobody.home}/layout:v", "--name", "busybox")
    error = nobody.fails(*RUN, "busybox", "true")
    assert error["code"] == "rootless-unsupported"
    assert "umoci unpack" in error["hint"]


@pytest.mark.parametrize("limit", [{"memory": {"limit": 1 << 26}}, {"pids": {"limit": 5}}, {"cpu": {"shares": 5}}])
def test_limits_that_nobody_would_keep_are_refused(user, limit):
    bundle = user.home / f"limits-{next(iter(limit))}"
    images.make_bundle(bundle, ["true"], root={"path": str(user.rootfs)}, linux={"resources": limit})
    error = user.fails(*RUN, "--bundle", bundle)
    assert (error["code"], error["subject"]) == ("rootless-unsupported", f"linux.resources.{next(iter(limit))}")


def test_a_user_who_does_not_exist_is_refused(user):
    error = user.fails(*RUN, "-u", "1000", "--rootfs", user.rootfs, "id")
    assert (error["code"], error["subject"]) == ("id-not-mapped", "uid 1000")
    assert "/etc/subuid" in error["hint"]
    user.nothing_is_held()


_CONFINED = """
import os, sys
pid, (reader, writer) = os.getpid(), os.pipe()
if os.fork():
    libc = __import__("ctypes").CDLL(None)
    assert libc.unshare(0x10000000) == 0
    os.write(writer, b".")
    assert os.wait()[1] == 0
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(reader, 1)
for kind in ("uid", "gid"):
    with open(f"/proc/{pid}/{kind}_map", "w") as file:
        file.write("0 0 4294967295")
"""


def test_without_user_namespaces_it_is_refused(user):
    """Where the host allows none: the limit is set in a namespace of the test's own, in which the user is a user."""
    confined = User(user.home, UID, sys.executable, "-c", _CONFINED)
    error = confined.fails(*RUN, "--rootfs", user.rootfs, "true")
    assert error["code"] == "no-user-namespaces"
    assert "No space left on device" in error["why"]  # unshare(2): ENOSPC
    assert users.refusal(confined)
    user.nothing_is_held()


def test_the_doctor_says_what_is_to_be_had(user, nobody):
    def checks(of: User) -> dict[str, Any]:
        return {check["name"]: check for check in json.loads(of.holdfast("--json", "doctor").stdout)["checks"]}

    found = checks(user)
    assert (found["privilege"]["state"], found["user ids"]["state"]) == ("warn", "warn")
    assert found["namespaces"]["state"] == found["mount calls"]["state"] == found["namespace pods"]["state"] == "ok"
    assert "65537 users" in checks(nobody)["user ids"]["what"]


def test_root_is_not_rootless():
    assert not user_namespaces.rootless()
