"""Mounts: shares, disks and memory as a container sees them, and what of them the host sees."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from typing import TYPE_CHECKING

import pytest

import holdfast
from holdfast.errors import InUse, NotFound, NotReleased
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec.default import CAPABILITIES
from tests.images import busybox_tree, is_clean, make_bundle, make_disk, run
from tests.vm.support import (
    BUSYBOX,
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    Session,
    assert_holds_nothing,
    output,
    running,
    sh,
    start,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
#: Enough to try to remount things.
KINDS = ("bounding", "effective", "permitted")
MIGHTY = [*CAPABILITIES, "CAP_SYS_ADMIN", "CAP_MKNOD"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A host directory to share, with something beside it that is not."""
    (tmp_path / "secret").write_text("beside it\n")
    shared = tmp_path / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "file").write_text("from the host\n")
    (shared / "other").write_text("other\n")
    return shared


@pytest.fixture
def mighty(tmp_path: Path):
    """A function that runs a script in a bundle whose root may mount, with mounts."""

    def run_mighty(pod, script: str, mounts):
        capabilities = dict.fromkeys(KINDS, MIGHTY)
        root = tmp_path / "mighty"
        if not root.exists():
            busybox_tree(root)
        bundle = make_bundle(
            tmp_path / "b", ["sh", "-c", script], root={"path": str(root)}, process={"capabilities": capabilities}
        )
        return pod.run(bundle=bundle, mounts=mounts)

    return run_mighty


# -- shares ---------------------------------------------------------------------------------------


def test_a_directory(shared_pod, folder):
    script = "cat /m/file; cd /m; echo new > sub/new; chmod 640 sub/new; chown 7:8 sub/new; rm other; mv file moved"
    assert output(sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m"])) == "from the host\n"
    new = folder / "sub/new"
    assert (new.read_text(), new.stat().st_mode & 0o777, new.stat().st_uid, new.stat().st_gid) == ("new\n", 0o640, 7, 8)
    assert sorted(os.listdir(folder)) == ["moved", "sub"]
    assert_holds_nothing(shared_pod)


def test_changes_are_seen_at_once_on_both_sides(shared_pod, folder):
    with start(shared_pod, "while read n; do cat /m/$n; echo seen > /m/answer; done", name="c", stdin=True,
               mounts=[f"type=bind,src={folder},dst=/m"]) as session:  # fmt: skip
        for number in range(3):
            (folder / f"n{number}").write_text(f"number {number}\n")
            session.write(b"n%d\n" % number)
            session.wait_for(b"number %d\n" % number)
        (folder / "n0").write_text("changed\n")
        session.write(b"n0\n")
        session.wait_for(b"changed\n")
        session.end_input()
        assert session.wait() == 0
    assert (folder / "answer").read_text() == "seen\n"


@pytest.mark.parametrize("spelling", ["ro", "readonly", "ro=true", "readonly=1"])
def test_a_read_only_directory(shared_pod, folder, spelling):
    before = sorted(os.listdir(folder))
    script = "cat /m/file; echo x > /m/new; rm /m/file; chmod 777 /m; touch /m/file"
    result = sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m,{spelling}"])
    assert result.stdout == b"from the host\n"
    assert result.stderr.count(b"Read-only file system") == 4
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("option", ["ro", "RO", "rro", "readonly", "ReadOnly", "read-only"])
def test_every_spelling_of_read_only_in_a_specification(shared_pod, folder, option):
    mount = {"destination": "/m", "type": "bind", "source": str(folder), "options": ["rbind", option]}
    assert b"Read-only" in sh(shared_pod, "echo x > /m/new", mounts=[mount]).stderr
    assert not (folder / "new").exists()


def test_a_read_only_share_withstands_root_in_the_guest(shared_pod, folder, mighty):
    """The host's side is read-only, so it does not matter what the guest makes of it."""
    script = "mount -o remount,bind,rw /m; echo x > /m/new; rm -f /m/file; grep ' /m ' /proc/mounts"
    result = mighty(shared_pod, script, [f"type=bind,src={folder},dst=/m,ro"])
    assert " rw," in result.text  # the guest did what it was told
    assert sorted(os.listdir(folder)) == ["file", "other", "sub"]


def test_a_single_file(shared_pod, folder):
    mounts = [f"type=bind,src={folder / 'file'},dst=/etc/one"]
    assert (
        output(sh(shared_pod, "cat /etc/one; echo more >> /etc/one; ls /etc", mounts=mounts)).splitlines()[0]
        == "from the host"
    )
    assert (folder / "file").read_text() == "from the host\nmore\n"


def test_only_that_file_is_visible(shared_pod, folder):
    """What is served is what the monitor has in its export; the container's folder lists nothing else."""
    with running(shared_pod, "c", [f"type=bind,src={folder / 'file'},dst=/etc/one"]):
        export = f"/proc/{shared_pod.inspect().pid}/root{shared_pod.root}/pods/{shared_pod.name}/export"
        served = [name for _where, _folders, names in os.walk(export) for name in names]
        assert served == ["file"]


def test_a_read_only_file(shared_pod, folder):
    result = sh(shared_pod, "echo x > /f; cat /f", mounts=[f"type=bind,src={folder / 'file'},dst=/f,ro"])
    assert b"Read-only" in result.stderr
    assert result.stdout == b"from the host\n"


def test_a_share_shows_what_is_mounted_in_it(data, state_root, folder):
    run("mount", "-t", "tmpfs", "none", folder / "sub")
    try:
        (folder / "sub/inner").write_text("inner\n")
        with holdfast.Pod(root=state_root, data=data) as pod:
            mount = f"type=bind,src={folder},dst=/m"
            assert output(sh(pod, "cat /m/sub/inner", mounts=[mount])) == "inner\n"
            assert output(sh(pod, "ls /m/sub", mounts=[f"{mount},bind-nonrecursive"])) == ""
            assert_holds_nothing(pod)
    finally:
        run("umount", folder / "sub")


def test_links_in_a_share_do_not_lead_out(shared_pod, folder, tmp_path):
    """Links are the container's to follow, in its own root; the server follows none."""
    os.symlink(tmp_path / "secret", folder / "absolute")
    os.symlink("../secret", folder / "relative")
    os.symlink("/", folder / "root")
    os.symlink("../../../../../../../..", folder / "up")
    script = f"cd /m; cat absolute relative {{root,up}}{tmp_path}/secret; ls root/usr/share; echo x > absolute"
    result = sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m"])
    assert b"beside it" not in result.stdout
    assert result.stdout == b""
    assert (tmp_path / "secret").read_text() == "beside it\n"


def test_a_destination_that_is_a_link_in_the_image(shared_pod, folder, tmp_path, mighty):
    """A destination is resolved in the container's root: a link in it cannot place a mount in the guest."""
    root = tmp_path / "mighty"
    busybox_tree(root)
    os.symlink("../../../../../run", root / "trap")
    result = mighty(shared_pod, "cat /trap/in/file; ls /run", [f"type=bind,src={folder},dst=/trap/in"])
    assert result.text == "from the host\nin\n"
    assert output(sh(shared_pod, "echo the guest is well")) == "the guest is well\n"


def test_special_files_in_a_share(shared_pod, folder):
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        script = "test -p /m/fifo && test -S /m/socket; echo through > /m/fifo & cat /m/fifo"
        assert output(sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m"])) == "through\n"


def test_odd_names_and_large_files(shared_pod, folder):
    odd = os.fsencode(folder) + b'/\xff\xfe,a\\b "c"\n'
    with open(odd, "wb") as file:
        file.write(os.urandom(5 * MIB))
    script = 'cd /m; for f in *b*; do cat "$f" > copy; cmp "$f" copy && echo same; done; rm copy'
    assert output(sh(shared_pod, script, mounts=[f"type=bind,src={folder},dst=/m"])) == "same\n"


def test_a_source_with_commas(shared_pod, tmp_path):
    source = tmp_path / "a,b:c"
    source.mkdir()
    (source / "f").write_text("found\n")
    assert output(sh(shared_pod, "cat /m/f", mounts=[f'type=bind,"src={source}",dst=/m'])) == "found\n"


def test_writable_maps_of_a_shared_file(shared_pod, tmp_path):
    """SQLite with a write-ahead log needs shared memory maps: cache=mmap gives them."""
    program = """
import mmap, sqlite3
with open("/m/map", "w+b") as file:
    file.truncate(8192)
    with mmap.mmap(file.fileno(), 8192) as view:
        view[4090:4100] = b"0123456789"
        view.flush()
db = sqlite3.connect("/m/db")
db.execute("PRAGMA journal_mode=wal")
db.execute("CREATE TABLE t (n)")
with db:
    db.executemany("INSERT INTO t VALUES (?)", [[n] for n in range(1000)])
print(db.execute("SELECT sum(n) FROM t").fetchone()[0])
db.close()
"""
    mounts = [HOST_USR, f"type=bind,src={tmp_path},dst=/m"]
    result = shared_pod.run(BUSYBOX, [*HOST_PYTHON, "-c", program], env=HOST_PYTHON_ENV, mounts=mounts)
    assert (result.status, result.text) == (0, "499500\n"), result.stderr
    assert (tmp_path / "map").read_bytes()[4090:4100] == b"0123456789"
    assert "499500" in run("sqlite3", tmp_path / "db", "SELECT sum(n) FROM t; PRAGMA integrity_check").stdout


# -- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "squashfs", "erofs"])
def test_disks(shared_pod, folder, tmp_path, filesystem):
    disk = make_disk(tmp_path / "disk", filesystem, folder)
    writable = filesystem in ("ext4", "xfs")
    script = "cat /d/file 2>/dev/null; grep ' /d ' /proc/mounts | cut -d' ' -f3; echo data > /d/new"
    result = sh(shared_pod, script, mounts=[f"type=disk,src={disk},dst=/d"])
    assert result.stdout == (b"" if filesystem == "xfs" else b"from the host\n") + filesystem.encode() + b"\n"
    assert (result.status == 0) is writable
    if writable:  # it is there when it is attached again
        assert output(sh(shared_pod, "cat /d/new", mounts=[f"type=disk,src={disk},dst=/d"])) == "data\n"
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_read_only_disk_is_not_touched(shared_pod, folder, tmp_path, filesystem, mighty):
    disk = make_disk(tmp_path / "disk", filesystem, folder)
    before = disk.read_bytes()
    result = sh(shared_pod, "echo x > /d/new; ls /d", mounts=[f"type=disk,src={disk},dst=/d,ro"])
    assert b"Read-only" in result.stderr
    mighty(shared_pod, "mount -o remount,rw /d; echo x > /d/new", [f"type=disk,src={disk},dst=/d,ro"])
    assert disk.read_bytes() == before


def test_written_data_is_there_and_the_disk_clean(data, state_root, tmp_path):
    """Also when the pod ends right after the container."""
    disk = make_disk(tmp_path / "disk", "ext4", size="64M")
    result = holdfast.run(
        BUSYBOX, ["sh", "-c", "seq 1 500000 > /d/numbers"], mounts=[f"type=disk,src={disk},dst=/d"],
        root=state_root, data=data,
    )  # fmt: skip
    assert result.status == 0
    assert is_clean(disk)
    run("debugfs", "-R", f"dump /numbers {tmp_path / 'numbers'}", disk)
    assert (tmp_path / "numbers").read_text() == "".join(f"{n}\n" for n in range(1, 500001))


def test_qcow2(shared_pod, folder, tmp_path):
    raw = make_disk(tmp_path / "raw", "ext4", folder)
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk)
    mounts = [f"type=disk,src={disk},dst=/d"]
    assert output(sh(shared_pod, "cat /d/file; echo data > /d/new", mounts=mounts)) == "from the host\n"
    assert output(sh(shared_pod, "cat /d/new", mounts=[f"{mounts[0]},ro"])) == "data\n"
    run("qemu-img", "check", disk)
    run("qemu-img", "convert", "-O", "raw", disk, raw)
    assert is_clean(raw)


def test_options_of_a_mount(shared_pod, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4")
    script = "cp /bin/busybox /d/true; /d/true; echo $?; mknod /d/null c 1 3 2>/dev/null; grep ' /d ' /proc/mounts"
    found = sh(shared_pod, script, mounts=[f"type=disk,src={disk},dst=/d,noexec,nosuid,nodev,noatime"])
    assert b"Permission denied" in found.stderr
    options = found.text.splitlines()[-1].split()[3].split(",")
    assert {"noexec", "nosuid", "nodev", "noatime", "rw"} <= set(options)
    share = tmp_path / "share"
    share.mkdir()
    shutil.copy("/bin/busybox", share / "true")
    result = sh(shared_pod, "/s/true", mounts=[f"type=bind,src={share},dst=/s,noexec"])
    assert b"Permission denied" in result.stderr


@pytest.mark.parametrize("prefix", ["no", "rno"])
def test_options_that_forbid_hold_in_the_container(shared_pod, folder, tmp_path, prefix):
    """Also in the spelling for whole trees (mount_setattr(2)), from the start and into a running container alike."""
    shutil.copy("/bin/busybox", folder / "true")
    os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    options = [prefix + name for name in ("exec", "suid", "dev")]
    share = {"type": "bind", "source": str(folder), "options": ["rbind", "rw", *options]}
    device = {"type": "virtual-disk", "source": str(disk), "options": ["rw", *options]}
    script = """
        for at; do
            grep " $at " /proc/mounts | cut -d' ' -f4
            $at/true 2>&1 | grep -c 'Permission denied'
            { echo x > $at/null; } 2>&1 | grep -c -E 'Permission denied|Operation not permitted'
            echo x > $at/new && cat $at/new
        done
    """
    mounts = [{**share, "destination": "/share"}, {**device, "destination": "/disk"}]
    with running(shared_pod, "c", mounts) as name:
        shared_pod.attach({**share, "destination": "/hot"}, container=name)
        places = ["/share", "/disk", "/hot"]
        lines = output(shared_pod.exec(name, ["sh", "-c", script, "sh", *places])).splitlines()
        for place in places:
            assert {"rw", "noexec", "nosuid", "nodev"} <= set(lines.pop(0).split(",")), place
            assert [lines.pop(0) for _ in range(3)] == ["1", "1", "x"], place
    assert (folder / "new").read_text() == "x\n"
    # The same share without them, at the same time and later, has none of them.
    plain = f"type=bind,src={folder},dst=/plain"
    assert sh(shared_pod, "/plain/true", mounts=[plain]).status == 0
    assert_holds_nothing(shared_pod)


def test_one_disk_by_many_names_is_one_attachment(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    os.symlink(disk, tmp_path / "symlink")
    os.link(disk, tmp_path / "hardlink")
    names = [disk, tmp_path / "symlink", tmp_path / "hardlink", f"{folder}/../disk"]
    mounts = [f"type=disk,src={name},dst=/d{number},ro" for number, name in enumerate(names)]
    with running(shared_pod, "c", mounts):
        disks = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "disk"]
        assert len(disks) == 1
        assert output(shared_pod.exec("c", ["cat", "/d0/file", "/d3/file"])) == "from the host\n" * 2
        with running(shared_pod, "d", mounts[1:2]):
            (disk_,) = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "disk"]
            assert disk_["holders"] == ["c", "d"]
        with pytest.raises(InUse) as caught:
            sh(shared_pod, "true", mounts=[f"type=disk,src={tmp_path / 'hardlink'},dst=/d"])
        assert caught.value.code == "disk-in-use"
    assert_holds_nothing(shared_pod)


def test_the_same_share_for_two_containers(shared_pod, folder):
    mounts = [f"type=bind,src={folder},dst=/m"]
    with running(shared_pod, "c", mounts), running(shared_pod, "d", mounts):
        (share,) = shared_pod.storage()["shares"]
        assert share["holders"] == ["c", "d"]
        assert output(shared_pod.exec("c", ["sh", "-c", "echo x > /m/x"])) == ""
        assert output(shared_pod.exec("d", ["cat", "/m/x"])) == "x\n"
    assert_holds_nothing(shared_pod)


# -- memory ---------------------------------------------------------------------------------------


def test_tmpfs(shared_pod):
    script = "df -m /t | tail -n 1; dd if=/dev/zero of=/t/x bs=1M count=20; stat -c %a /t"
    result = sh(shared_pod, script, mounts=["type=tmpfs,dst=/t,size=8M,mode=1770"])
    lines = result.text.splitlines()
    assert lines[0].split()[:2] == ["tmpfs", "8"]
    assert lines[1] == "1770"
    assert b"No space left" in result.stderr
    assert b"Read-only" in sh(shared_pod, "echo x > /t/x", mounts=["type=tmpfs,dst=/t,ro"]).stderr


def test_tmpfs_starts_with_what_the_image_has_there(shared_pod):
    assert (
        output(sh(shared_pod, "cat /etc/release; echo x > /etc/release", mounts=["type=tmpfs,dst=/etc"])) == "tests\n"
    )
    assert sh(shared_pod, "ls /etc/release", mounts=["type=tmpfs,dst=/etc,notmpcopyup"]).status == 1


# -- hot ------------------------------------------------------------------------------------------


def test_attach_and_detach(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    path = shared_pod.attach(f"type=disk,src={disk},ro")
    assert path.startswith("/run/mounts/scsi/m")
    (attachment,) = shared_pod.storage()["attachments"]
    assert attachment["guest_paths"] == [path]
    assert shared_pod.attach(f"type=disk,src={disk},ro") == path  # the same; let go of as often as it was attached
    shared_pod.detach(path)
    assert len(shared_pod.storage()["attachments"]) == 1
    shared_pod.detach(path)
    share = shared_pod.attach(f"type=bind,src={folder}")
    assert len(shared_pod.storage()["shares"]) == 1
    shared_pod.detach(share)
    assert_holds_nothing(shared_pod)


def test_a_disk_that_a_container_still_uses_stays(pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    path = pod.attach(f"type=disk,src={disk},rw")
    pod.detach(path)
    path = pod.attach(f"type=disk,src={disk},ro")
    with running(pod, "c", [f"type=disk,src={disk},dst=/d,ro"]) as name:
        (attachment,) = [a for a in pod.storage()["attachments"] if a["kind"] == "disk"]
        assert attachment["holders"] == ["attach:2", name]
        pod.detach(path)
        assert output(pod.exec(name, ["cat", "/d/file"])) == "from the host\n"
    assert_holds_nothing(pod)
    assert is_clean(disk)


def test_a_detach_while_the_guest_is_busy(pod, folder, tmp_path, mighty):
    """It fails, changes nothing that matters, and works when tried again."""
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    path = pod.attach(f"type=disk,src={disk}")
    with start_busy(pod, tmp_path, path) as session:
        session.wait_for(b"busy")
        with pytest.raises(NotReleased) as caught:
            pod.detach(path)
        assert caught.value.retryable
        assert path in str(caught.value) or str(disk) in str(caught.value)
        (attachment,) = [a for a in pod.storage()["attachments"] if a["kind"] == "disk"]
        assert attachment["file"] == str(disk)
        with pytest.raises(NotReleased):
            pod.detach(path)
        session.end_input()
        assert session.wait() == 0
    pod.detach(path)
    with pytest.raises(NotFound) as missing:
        pod.detach(path)
    assert missing.value.code == "not-attached"
    assert_holds_nothing(pod)
    assert is_clean(disk)


def start_busy(pod, tmp_path, path):
    """A container in the guest's own mount namespace, standing in the disk's folder until its input ends."""
    bundle = make_bundle(
        tmp_path / "busy", ["sh", "-c", f"cd /proc/1/root{path} && echo busy && cat"],
        hostname="", linux={"namespaces": [{"type": "mount"}]},
        process={"capabilities": {kind: [*MIGHTY, "CAP_SYS_PTRACE"] for kind in KINDS}},
    )  # fmt: skip
    stdio = Stdio(STDIN, STDOUT, STDERR)
    return Session(pod, "run", container_request("busy", pod.data, bundle=bundle, stdio=stdio), stdin=True)
