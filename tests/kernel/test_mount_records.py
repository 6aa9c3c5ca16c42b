"""What must be undone with a mount is known to whoever unmounts it: another process, and one after a crash.

The processes here are killed at every point that the library names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import Corrupt, HoldfastError, NotReleased
from holdfast.linux import syscalls
from holdfast.mounts import (
    Mount,
    features,
    overlay,
    records,
    recover,
    table,
    temporary,
    unmount,
    unmount_all,
    unmount_recursive,
)  # fmt: skip
from holdfast.mounts import mount as make
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Does what it is told with the library, and dies at (or waits at) a point.
CHILD = """
import os, signal, sys, json
from holdfast.linux import syscalls
from holdfast.mounts import Mount, features, mount, mount_all, recover, records, temporary, unmount
job = json.loads(sys.argv[1])
def reached(point):
    if point != job["point"]:
        return
    if job["how"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print(point, flush=True)
    sys.stdin.readline()
records.reached = reached
if job["old"]:
    for feature in features.ALL:
        feature._found = False
if job["namespace"]:
    syscalls.unshare(syscalls.CLONE_NEWNS)
mounts = [Mount.from_dict(one) for one in job["mounts"]]
if job["action"] == "mount":
    mount(mounts[0], records=job["records"])
elif job["action"] == "unmount":
    unmount(job["target"], records=job["records"])
elif job["action"] == "recover":
    recover(job["records"])
else:
    with temporary(mounts, records=job["records"]):
        reached("inside")
reached("end")
"""


class Case:
    """A place to mount on, a disk, layers; and other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = str(folder / "records")
        self.target = folder / "target"
        self.target.mkdir()
        self.disk = folder / "disk"
        subprocess.run(["mke2fs", "-q", "-t", "ext4", str(self.disk), "4M"], check=True, capture_output=True)
        self.before = leaks.mounts()

    def loop(self) -> Mount:
        return Mount("ext4", str(self.disk), str(self.target), ["loop"])

    def layers(self, *more: str) -> Mount:
        """Layers whose names do not fit a page."""
        paths = [self.folder / "layers" / f"{'x' * 200}{number}" for number in range(30)]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        return Mount("overlay", "overlay", str(self.target), [*overlay.options(map(str, paths)), *more])

    def start(self, action: str, *mounts: Mount, point: str, how: str = "die", **more: object) -> subprocess.Popen[str]:
        job = {
            "action": action, "mounts": [one.to_dict() for one in mounts], "point": point, "how": how, "old": False,
            "namespace": False, "target": str(self.target), "records": self.records, **more,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def kill_at(self, point: str, action: str, *mounts: Mount, **more: object) -> None:
        with self.start(action, *mounts, point=point, **more) as child:
            child.communicate(timeout=60)
        assert child.returncode == -9, f"it did not come to {point!r}"

    def is_clean(self) -> bool:
        """Nothing is left of it, not even a loop device on its way out."""
        return leaks.mounts() == self.before and leaks.no_loop_of(self.disk) and not os.path.exists(self.records)


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    found = Case(tmp_path)
    yield found
    unmount_recursive(str(tmp_path), lazy=True, records=found.records)


LOOP_POINTS = ["loop attached", "recorded", "mounted", "done", "end"]


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("point", LOOP_POINTS)
def test_killed_while_mounting(case, point, old):
    """containerd's Windows layers are recorded after they can be seen: killed between, they stay for ever."""
    case.kill_at(point, "mount", case.loop(), old=old)
    unmount(str(case.target), records=case.records)
    with leaks.Watch() as watch:
        watch.settled_leaks()
    assert not table.at(str(case.target))
    make(case.loop(), records=case.records)  # the same again works
    assert unmount(str(case.target), records=case.records)
    assert not table.at(str(case.target))
    recover(case.records)
    assert case.is_clean()


@pytest.mark.parametrize("point", ["unmounted", "undone loop"])
def test_killed_while_unmounting(case, point):
    make(case.loop(), records=case.records)
    case.kill_at(point, "unmount")
    assert not table.at(str(case.target))
    assert os.listdir(case.records)
    assert not unmount(str(case.target), records=case.records)  # it is gone, and what belonged to it goes now
    assert case.is_clean()


@pytest.mark.parametrize("point", ["unmounted", "undone loop"])
def test_killed_while_unmounting_and_then_mounted_again(case, point):
    make(case.loop(), records=case.records)
    case.kill_at(point, "unmount")
    make(case.loop(), records=case.records)
    assert unmount(str(case.target), records=case.records)
    assert case.is_clean()


@pytest.mark.parametrize("point", ["recorded", "calling mount", "mounted", "undone links", "end"])
def test_killed_over_an_overlay_of_links(case, point):
    case.kill_at(point, "mount", case.layers(), old=True)
    unmount(str(case.target), records=case.records)
    assert case.is_clean()


@pytest.mark.parametrize("point", ["recorded", "layers mapped", "mounted", "undone clones", "end"])
def test_killed_over_an_overlay_with_other_owners(case, point):
    if features.IDMAP:
        case.kill_at(point, "mount", case.layers("uidmap=0:1:9", "gidmap=0:1:9"))
        unmount(str(case.target), records=case.records)
    assert case.is_clean()
    assert len(os.listdir(case.folder / "layers")) == 30 if features.IDMAP else True


@pytest.mark.parametrize("point", ["recorded", "mounted", "inside", "unmounted", "undone folder"])
def test_killed_with_temporary_mounts(case, point):
    """containerd cleans these up only when it starts, and of volumes it is copying never."""
    disk = Mount("ext4", str(case.disk), "", ["loop"])
    (case.folder / "tree/sub").mkdir(parents=True)
    mounts = [disk, Mount("bind", str(case.folder / "tree"), ""), Mount("tmpfs", "none", "sub")]
    case.kill_at(point, "temporary", *mounts)
    assert recover(case.records)
    assert case.is_clean()
    assert recover(case.records) == []


def test_killed_while_recovering(case):
    case.kill_at("inside", "temporary", Mount("ext4", str(case.disk), "", ["loop"]))
    case.kill_at("unmounted", "recover")
    assert recover(case.records)
    assert case.is_clean()


def test_another_process_unmounts(case):
    make(case.loop(), records=case.records)
    with case.start("unmount", point="") as child:
        child.communicate(timeout=60)
    assert child.returncode == 0
    assert case.is_clean()


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_it_is_on_record_before_it_can_be_seen(case, old):
    """And whoever unmounts meanwhile does not take away what another process is working with."""
    with case.start("mount", case.loop(), point="recorded", how="wait", old=old) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "recorded\n"
        assert not table.at(str(case.target))
        (record,) = records.of(case.records, str(case.target))
        assert "loop" in record.undo[0]
        assert not unmount(str(case.target), records=case.records)
        assert recover(case.records) == []
        assert len(os.listdir(case.records)) == 1
        child.communicate("\n" * 9, timeout=60)
    assert child.returncode == 0
    assert (case.target / "lost+found").is_dir()
    assert unmount(str(case.target), records=case.records)
    assert case.is_clean()


def test_stacked_mounts_have_records_of_their_own(case, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(case.disk.read_bytes())
    make(case.loop(), records=case.records)
    make(Mount("ext4", str(other), str(case.target), ["loop"]), records=case.records)
    make(Mount("tmpfs", "none", str(case.target)), records=case.records)
    assert len(os.listdir(case.records)) == 2
    for left in (2, 1, 0):
        assert unmount(str(case.target), records=case.records)
        assert len(records.of(case.records, str(case.target))) == left
        assert left == 2 or leaks.no_loop_of(other)
    assert case.is_clean()


def test_what_umount8_took_away_is_settled_by_the_next(case):
    make(case.loop(), records=case.records)
    subprocess.run(["umount", str(case.target)], check=True)
    assert recover(case.records) == [str(case.target)]
    assert case.is_clean()


def test_what_is_in_another_namespace_is_left_alone(case):
    """A folder that is removed takes a mount on it along in every other namespace: not before nobody is there."""
    with case.start("mount", case.loop(), point="end", how="wait", namespace=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "end\n"
        assert recover(case.records) == []
        assert not unmount(str(case.target), records=case.records)
        assert len(os.listdir(case.records)) == 1
        child.stdin.close()
    assert recover(case.records) == [str(case.target)]
    assert not os.path.exists(case.records)


def test_a_busy_mount_keeps_its_record(case):
    """containerd's manager deletes the record first: what is then busy is nobody's."""
    make(case.loop(), records=case.records)
    with open(case.target / "file", "w"):
        with pytest.raises(NotReleased):
            unmount(str(case.target), wait_s=0, records=case.records)
        assert len(os.listdir(case.records)) == 1
    assert unmount(str(case.target), records=case.records)
    assert case.is_clean()


def test_a_record_of_before_the_last_boot(case):
    """Its mount is gone; its loop device is somebody else's by now."""
    make(case.loop(), records=case.records)
    (record,) = records.of(case.records, str(case.target))
    (step,) = record.undo
    syscalls.umount(str(case.target), syscalls.MNT_DETACH)
    record.undo = [{"loop": {"device": "/dev/loop-control", "file": step["loop"]["file"]}}]  # must not be looked at
    record._boot = "another"
    record.write()
    record.release()
    assert recover(case.records) == [str(case.target)]
    assert case.is_clean()


def test_a_loop_device_that_has_another_file_by_now_is_not_touched(case, tmp_path):
    make(case.loop(), records=case.records)
    (record,) = records.of(case.records, str(case.target))
    record.mount_id = 0x7FFFFFFF  # of a mount that is gone
    record.undo[0]["loop"]["file"][1] += 1
    record.write()
    record.release()
    assert recover(case.records) == [str(case.target)]
    assert leaks.loops_of(case.disk)
    assert unmount(str(case.target), records=case.records)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 2}', b"\xff"])
def test_a_record_that_cannot_be_read_is_said_and_harms_no_other(case, text):
    os.mkdir(case.records)
    bad = f"{case.records}/{records._crc('/elsewhere')}-0"
    with open(bad, "wb") as file:
        file.write(text)
    make(case.loop(), records=case.records)
    assert unmount_recursive(str(case.folder), records=case.records)
    with pytest.raises(Corrupt, match=bad):
        recover(case.records)
    os.unlink(bad)
    os.rmdir(case.records)
    assert case.is_clean()


def test_steps_that_fail_leave_the_record(case):
    """Undoing goes on past them, and nothing but an empty folder is ever removed."""
    folder = case.folder / "kept"
    folder.mkdir()
    (folder / "file").write_text("kept")
    record = records.Record(case.records, str(case.target))
    record.undo = [{"links": str(case.folder / "nosuch")}, {"folder": str(folder)}, {"nosuch step": 1}]
    record.write()
    record.release()
    for _ in range(2):
        with pytest.raises(NotReleased, match="unknown step") as failure:
            unmount(str(case.target), records=case.records)
        assert "not empty" in str(failure.value)
        assert (folder / "file").read_text() == "kept"
    os.unlink(record.path)
    os.rmdir(case.records)


def test_drafts_of_who_was_killed_while_writing(case):
    os.mkdir(case.records)
    draft = f"{case.records}/.draft"
    open(draft, "w").close()
    recover(case.records)
    assert os.path.exists(draft)  # somebody may be writing it
    os.utime(draft, (0, 0))
    recover(case.records)
    assert case.is_clean()


# -- temporary mounts


def test_temporary_mounts_end_with_their_block(case):
    with temporary([case_disk(case), Mount("tmpfs", "none")], records=case.records) as path:
        assert len(table.at(path)) == 2
        assert recover(case.records) == []  # somebody is at it
        (case.folder / "beside").mkdir()
    assert not os.path.exists(path)
    assert case.is_clean()


def case_disk(case: Case) -> Mount:
    return Mount("ext4", str(case.disk), "", ["loop"])


def test_all_that_was_mounted_in_a_temporary_folder_goes(case):
    """containerd takes away one mount of several, and then fails on the rest."""
    with temporary([Mount("tmpfs", "none"), Mount("tmpfs", "none")], records=case.records) as path:
        os.mkdir(f"{path}/sub")
        syscalls.mount("none", f"{path}/sub", "tmpfs")
        syscalls.mount("none", path, "tmpfs")
    assert case.is_clean()


def test_nothing_is_deleted_through_a_temporary_mount(case):
    """containerd's removal of a folder that was still mounted deleted images (#1785, #1868, #10704)."""
    tree = case.folder / "tree"
    tree.mkdir()
    (tree / "file").write_text("kept")
    with pytest.raises(NotReleased, match="busy"):  # noqa: SIM117
        with temporary([Mount("bind", str(tree))], records=case.records, wait_s=0) as path:
            kept = open(f"{path}/file")
    with kept:
        assert (tree / "file").read_text() == "kept"
        assert table.at(path)
    assert recover(case.records) == [path]
    assert (tree / "file").read_text() == "kept"
    assert case.is_clean()


def test_temporary_mounts_that_fail_half_way(case):
    with (
        pytest.raises(HoldfastError, match="nosuchfs"),
        temporary([case_disk(case), Mount("tmpfs", "none"), Mount("nosuchfs", "none")], records=case.records),
    ):
        pytest.fail("it was entered")
    assert case.is_clean()


def test_temporary_overlays_are_written_back(case):
    """A volatile one leaves a mark in its work folder, and the next mount of the same is refused."""
    words = overlay.options([str(case.folder)], str(case.folder / "u"), str(case.folder / "w"))
    for name in "uw":
        (case.folder / name).mkdir()
    mount = Mount("overlay", "overlay", "", [words[0], "volatile", *words[1:]])
    for _ in range(2):
        with temporary([mount], records=case.records):
            pass
    assert mount.options[1] == "volatile"  # the caller's is not changed (containerd's helper mixes it up)
    assert case.is_clean()


def test_the_same_temporary_mounts_are_entered_once(case):
    block = temporary([], records=case.records)
    with block:
        pass
    with pytest.raises(RuntimeError):
        block.__enter__()
    assert unmount_all(str(case.target), records=case.records) == 0
