"""Storage that a running container gets and gives back, without being started again."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, InUse, InvalidInput, NotFound, NotReleased, Unsupported
from tests.images import is_clean, make_disk
from tests.vm.cli import text
from tests.vm.support import BUSYBOX, assert_holds_nothing, output, running, sh, start

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("from the host\n")
    return shared


def shell(pod, script: str, container: str = "c"):
    return pod.exec(container, ["sh", "-c", script])


def test_a_disk(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with running(shared_pod, "c"):
        path = shared_pod.attach(f"type=disk,src={disk},dst=/new/place,nosuid,noexec", container="c")
        assert output(shell(shared_pod, "cat /new/place/file; echo x > /new/place/x")) == "from the host\n"
        options = output(shell(shared_pod, "grep /new/place /proc/mounts")).split()[3].split(",")
        assert {"rw", "nosuid", "noexec"} <= set(options)
        [found] = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "disk"]
        assert (found["guest_paths"], found["container_paths"]) == ([path], ["c:/new/place"])
        shared_pod.detach("/new/place", container="c")
        assert shell(shared_pod, "test -e /new").status == 1  # what was made is gone again
        assert is_clean(disk)
        with pytest.raises(NotFound):
            shared_pod.detach("/new/place", container="c")
        assert [a["kind"] for a in shared_pod.storage()["attachments"]] == ["layer", "layer", "scratch"]
    assert_holds_nothing(shared_pod)


def test_read_only_things(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with running(shared_pod, "c"):
        shared_pod.attach(f"type=disk,src={disk},dst=/d,ro", container="c")
        shared_pod.attach(f"type=bind,src={folder},dst=/s,ro", container="c")
        shared_pod.attach(f"type=bind,src={folder}/file,dst=/etc/one,ro", container="c")
        assert output(shell(shared_pod, "cat /d/file /s/file /etc/one")) == "from the host\n" * 3
        for path in ("/d/x", "/s/x", "/etc/one"):
            assert b"Read-only" in shell(shared_pod, f"echo x > {path}").stderr
        shared_pod.detach("/etc/one", container="c")
        assert shell(shared_pod, "test -e /etc/one").status == 1
        assert output(shell(shared_pod, "ls /etc | grep -c .")) != "0\n"
    assert_holds_nothing(shared_pod)  # the container's end has released the others


def test_a_mount_point_that_was_there_stays(shared_pod, folder):
    with running(shared_pod, "c"):
        output(shell(shared_pod, "mkdir -p /there/before; echo mine > /there/file"))
        shared_pod.attach(f"type=bind,src={folder},dst=/there", container="c")
        assert output(shell(shared_pod, "ls /there")) == "file\n"
        shared_pod.detach("/there", container="c")
        assert output(shell(shared_pod, "ls /there; cat /there/file")) == "before\nfile\nmine\n"
        # What was made for us and has been filled since is not ours to remove.
        shared_pod.attach(f"type=bind,src={folder},dst=/a/b", container="c")
        output(shell(shared_pod, "echo x > /a/x"))
        shared_pod.detach("/a/b", container="c")
        assert output(shell(shared_pod, "ls /a")) == "x\n"
    assert_holds_nothing(shared_pod)


#: Names that are written otherwise in a mount table: octal numbers for white space and backslashes (proc(5)), which
#: must be read back, but just once.
ODD = ("a b", "back\\slash", "new\nline", "\\040\t#", " ")


def odd_mounts(folder: Path, disk: Path, below: str) -> dict[str, dict[str, Any]]:
    """Mounts by their destination; ``file`` is in each, or is it."""
    share = {"type": "bind", "source": str(folder), "options": ["rbind", "ro"]}
    file = {"type": "bind", "source": str(folder / "file"), "options": ["bind", "ro"]}
    device = {"type": "virtual-disk", "source": str(disk), "options": ["rw"]}
    mounts = {f"{below}/folders/{name}": share for name in ODD}
    mounts[f"{below}/files\t/{ODD[2]}"] = file
    mounts[f"{below}/{'/'.join(ODD)}/disk \\040\n"] = device
    return {destination: {**mount, "destination": destination} for destination, mount in mounts.items()}


def test_destinations_that_a_mount_table_writes_otherwise(shared_pod, folder, tmp_path):
    mounts = odd_mounts(folder, make_disk(tmp_path / "disk", "ext4", folder), "/odd")
    script = 'for path; do test -d "$path" && path="$path/file"; cat "$path" || echo "not $path"; done'
    with running(shared_pod, "c"):
        for mount in mounts.values():
            shared_pod.attach(mount, container="c")
        assert output(shared_pod.exec("c", ["sh", "-c", script, "sh", *mounts])) == "from the host\n" * len(mounts)
        for destination in reversed(mounts):
            shared_pod.detach(destination, container="c")
            with pytest.raises(NotFound):
                shared_pod.detach(destination, container="c")
        # All that was made is gone again.
        assert output(shell(shared_pod, "grep -c /odd /proc/self/mountinfo; ls -d /od*; true")) == "0\n"
        assert [a["kind"] for a in shared_pod.storage()["attachments"]] == ["layer", "layer", "scratch"]
    # And from the start, by the runtime.
    result = shared_pod.run(BUSYBOX, ["sh", "-c", script, "sh", *mounts], mounts=list(mounts.values()))
    assert output(result) == "from the host\n" * len(mounts)
    assert_holds_nothing(shared_pod)


def test_a_busy_mount_is_not_released(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with start(shared_pod, "read x; cd /d; echo in; read x; cd /; echo out; read x", name="c", stdin=True) as session:
        shared_pod.attach(f"type=disk,src={disk},dst=/d", container="c")
        session.write(b"\n")
        session.wait_for(b"in")
        for _ in range(2):
            with pytest.raises(NotReleased) as caught:
                shared_pod.detach("/d", container="c")
            assert (caught.value.code, caught.value.retryable) == ("mount-busy", True)
            assert output(shell(shared_pod, "cat /d/file")) == "from the host\n"  # nothing has changed
        session.write(b"\n")
        session.wait_for(b"out")
        shared_pod.detach("/d", container="c")
        assert is_clean(disk)
        session.end_input()
        session.wait()
    assert_holds_nothing(shared_pod)


def test_a_used_place_is_refused(shared_pod, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with running(shared_pod, "c"):
        shared_pod.attach(f"type=bind,src={folder},dst=/d", container="c")
        for place in ("/d", "/proc", "/x/../d"):
            with pytest.raises(InUse) as caught:
                shared_pod.attach(f"type=bind,src={other},dst={place}", container="c")
            assert caught.value.code == "path-in-use"
        assert output(shell(shared_pod, "cat /d/file")) == "from the host\n"
        shared_pod.detach("/d", container="c")
        assert shared_pod.storage()["shares"] == []
    assert_holds_nothing(shared_pod)


def test_links_in_a_container_lead_nowhere_else(shared_pod, folder):
    with running(shared_pod, "c"):
        output(shell(shared_pod, "ln -s ../../../../run/holdfast /up; ln -s /nowhere/yet /dangling; echo x > /plain"))
        shared_pod.attach(f"type=bind,src={folder},dst=/up/here", container="c")
        assert output(shell(shared_pod, "cat /run/holdfast/here/file")) == "from the host\n"
        shared_pod.detach("/up/here", container="c")
        assert shell(shared_pod, "test -e /run/holdfast").status == 1
        shared_pod.attach(f"type=bind,src={folder},dst=/dangling", container="c")
        assert output(shell(shared_pod, "cat /nowhere/yet/file")) == "from the host\n"
        with pytest.raises(InvalidInput) as caught:
            shared_pod.attach(f"type=bind,src={folder},dst=/plain", container="c")
        assert caught.value.code == "mount-point"
        with pytest.raises(InvalidInput):
            shared_pod.attach(f"type=bind,src={folder}/file,dst=/etc", container="c")
    assert_holds_nothing(shared_pod)


def test_what_cannot_be(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4")
    with pytest.raises(NotFound) as missing:
        shared_pod.attach(f"type=bind,src={folder},dst=/d", container="nobody")
    assert missing.value.code == "container-not-running"
    with running(shared_pod, "c"):
        with pytest.raises(Unsupported):
            shared_pod.attach(f"type=disk,src={disk},dst=blockdev:///dev/x", container="c")
        with pytest.raises(HoldfastError):
            shared_pod.attach(f"type=bind,src={folder}", container="c")
    output(sh(shared_pod, "mkdir /x", name="ended"))
    with pytest.raises(NotFound):
        shared_pod.attach(f"type=bind,src={folder},dst=/d", container="ended")
    assert_holds_nothing(shared_pod)


def test_the_end_of_a_pod_leaves_the_disk_clean(pod, folder, tmp_path):
    """Though the container still stands in it."""
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with start(pod, "read x; cd /d; echo data > data; echo in; sleep 100", name="c", stdin=True) as session:
        pod.attach(f"type=disk,src={disk},dst=/d", container="c")
        session.write(b"\n")
        session.wait_for(b"in")
        pod.remove()
        with contextlib.suppress(HoldfastError):  # whether it hears of its end is a matter of luck
            session.wait()
    assert is_clean(disk)


def test_by_command(pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    where = ("--root", str(pod.root), "--data", str(pod.data))
    with running(pod, "c"):
        printed = text(*where, "attach", f"{pod.name}/c", "--mount", f"type=disk,src={disk},dst=/d,ro")
        assert printed == "/run/mounts/scsi/m3\n"
        assert output(shell(pod, "cat /d/file")) == "from the host\n"
        lines = text(*where, "storage", pod.name).splitlines()
        [line] = [line for line in lines if str(disk) in line]
        assert "c:/d" in line
        assert lines[0].split()[-2:] == ["READ", "WRITTEN"]
        text(*where, "detach", f"{pod.name}/c", "/d")
        assert shell(pod, "test -e /d").status == 1
    assert_holds_nothing(pod)
    assert os.stat(disk).st_nlink == 1
