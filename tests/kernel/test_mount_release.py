"""Unmounting: what is no error, what is waited for, who is named; and the order of a tree."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import NotReleased
from holdfast.linux import syscalls
from holdfast.mounts import Mount, release, remove_mount_point, table, unmount, unmount_all, unmount_recursive
from holdfast.mounts import mount as make
from holdfast.mounts.release import drop, drop_below
from tests import leaks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def records(tmp_path: Path) -> str:
    return str(tmp_path / "records")


def tmpfs(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    syscalls.mount("none", str(path), "tmpfs")
    return path


def where() -> set[str]:
    return set(leaks.mounts().values())


@pytest.mark.parametrize("call", [unmount, unmount_all, unmount_recursive])
@pytest.mark.parametrize("lazy", [False, True])
def test_nothing_there_is_no_error(call, lazy, tmp_path, records):
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "circle").symlink_to("circle")
    for path in ("", "plain", "file", "link", "circle", "nosuch", "nosuch/below", "file/below", "plain/"):
        assert not call(str(tmp_path / path) if path else "", lazy=lazy, records=records)


@pytest.mark.parametrize("call", [unmount, unmount_all])
def test_a_link_to_a_mount_is_not_followed(call, tmp_path, records):
    target = tmpfs(tmp_path / "t")
    (tmp_path / "link").symlink_to("t")
    assert not call(str(tmp_path / "link"), records=records)
    assert str(target) in where()
    assert call(str(target) + "/", records=records)


def test_links_on_the_way_and_relative_paths(tmp_path, records, monkeypatch):
    tmpfs(tmp_path / "a/t")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    assert unmount_recursive("link/t", records=records)
    tmpfs(tmp_path / "a/t")
    assert unmount("link/../a/t", records=records)


def test_one_of_a_stack(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    tmpfs(target)
    assert unmount(str(target), records=records)
    assert str(target) in where()
    assert unmount_all(str(target), records=records) == 1


@pytest.mark.parametrize("lazy", [False, True])
def test_children_first(lazy, tmp_path, records):
    """Among them stacks, what a stack hides, and names that only begin alike."""
    top = tmp_path / "top"
    for path in ("", "a", "a/b/c", "a b", "hidden/x"):
        tmpfs(top / path)
    tmpfs(top / "hidden")  # over what has a mount below
    tmpfs(top / "a")  # and this one stacked
    beside = tmpfs(tmp_path / "top2")
    assert len(table.within(str(top))) == 7
    assert unmount_recursive(str(top), lazy=lazy, records=records)
    assert where() & {str(top), str(beside)} == {str(beside)}
    assert not table.within(str(top))
    assert unmount(str(beside), records=records)


@pytest.mark.parametrize("lazy", [False, True])
def test_below_a_folder_that_is_no_mount(lazy, tmp_path, records):
    for path in ("x/a", "x/b", "x/b/c"):
        tmpfs(tmp_path / path)
    assert unmount_recursive(str(tmp_path / "x"), lazy=lazy, records=records)
    assert not table.within(str(tmp_path))


def test_mounts_that_were_moved(tmp_path, records):
    """The table is in the order of numbers; a mount may be on one with a higher number."""
    inner, outer = tmpfs(tmp_path / "inner"), tmpfs(tmp_path / "outer")
    (outer / "d").mkdir()
    syscalls.mount(str(inner), str(outer / "d"), "", syscalls.MS_MOVE)
    assert [entry.target for entry in table.within(str(outer))] == [str(outer), str(outer / "d")]
    assert unmount_recursive(str(outer), records=records)


def test_the_table_is_that_of_mountinfo(tmp_path):
    """Both ways of reading it say the same."""
    tmpfs(tmp_path)  # below the root's own mount there is one way only
    for path in ("a", "a/b c", "a/b c/d\\e", "a/\n"):
        tmpfs(tmp_path / path)
    syscalls.mount("none", str(tmp_path / "a/b c"), "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)

    def facts(entries: list[table.Entry]) -> set[tuple[object, ...]]:
        return {
            (entry.number, entry.parent, entry.target, entry.read_only)
            for entry in entries
            if table.is_within(entry.target, str(tmp_path))
        }

    assert facts(table.everything()) == facts(table.within(str(tmp_path)))
    assert len(table.within(str(tmp_path))) == 5
    assert sum(entry.read_only for entry in table.within(str(tmp_path))) == 1
    syscalls.umount(str(tmp_path / "a"), syscalls.MNT_DETACH)
    syscalls.umount(str(tmp_path))


def test_more_mounts_than_one_call_lists(tmp_path, records):
    tmpfs(tmp_path)
    top = tmpfs(tmp_path / "top")
    for number in range(600):
        (top / str(number)).mkdir()
        syscalls.mount(str(tmp_path), str(top / str(number)), "", syscalls.MS_BIND)
    assert len(table.within(str(top))) == 601
    assert unmount_recursive(str(top), lazy=True, records=records)
    assert not table.within(str(top))
    assert unmount(str(tmp_path), records=records)


HOLD = """
import mmap, os, sys
how, path = sys.argv[1:]
if how == "cwd":
    os.chdir(path)
elif how == "file":
    kept = open(path + "/file")
elif how == "map":
    with open(path + "/file", "r+b") as file:
        kept = mmap.mmap(file.fileno(), 4096)
elif how == "root":
    os.chroot(path)
    os.chdir("/")
elif how == "folder":
    kept = os.open(path, os.O_PATH)
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("how", "text"),
    [("cwd", "cwd"), ("file", "open {}/file"), ("map", "mapped {}/file"), ("root", "root"), ("folder", "open")],
)
def test_who_holds_it(how, text, tmp_path, records):
    """containerd says "device or resource busy", and its users look for hours (#4127, #5538, #10239)."""
    target = tmpfs(tmp_path / "t")
    (target / "file").write_bytes(b"x" * mmap.PAGESIZE)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, how, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        with pytest.raises(NotReleased, match="busy") as failure:
            unmount(str(target), wait_s=0.01, records=records)
        assert f"process {child.pid} (python" in str(failure.value)
        assert text.format(target) in str(failure.value)
        assert failure.value.code == "mount-busy"
        assert failure.value.retryable
        child.stdin.close()
    assert unmount(str(target), records=records)


def test_a_file_that_was_deleted_holds_it(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    with open(target / "file", "w"):
        (target / "file").unlink()
        with pytest.raises(NotReleased, match=r"file \(deleted\)"):
            unmount(str(target), wait_s=0, records=records)
    assert unmount(str(target), records=records)


def test_a_mount_on_it_is_named(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    tmpfs(target / "below")
    with pytest.raises(NotReleased, match=f"mounted on it: {target}/below"):
        unmount(str(target), wait_s=0, records=records)
    assert unmount_recursive(str(target), records=records)


def test_a_loop_device_on_it_is_named(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    (tmp_path / "u").mkdir()
    subprocess.run(["mke2fs", "-q", str(target / "disk"), "1M"], check=True, capture_output=True)
    make(Mount("ext4", str(target / "disk"), str(tmp_path / "u"), ["loop"]), records=records)
    with pytest.raises(NotReleased, match=rf"loop device /dev/loop\d+ on {target}/disk"):
        unmount(str(target), wait_s=0, records=records)
    assert unmount(str(tmp_path / "u"), records=records)
    assert unmount(str(target), records=records)


def test_one_that_is_busy_does_not_keep_the_others(tmp_path, records):
    top = tmp_path / "top"
    for path in ("", "a", "b", "c", "c/d"):
        tmpfs(top / path)
    with open(top / "b/file", "w"):
        with pytest.raises(NotReleased, match=str(top / "b")) as failure:
            unmount_recursive(str(top), wait_s=0.01, records=records)
        assert not failure.value.causes  # what it is on is busy because of it, and not news
        assert [entry.target for entry in table.within(str(top))] == [str(top), str(top / "b")]
    assert unmount_recursive(str(top), records=records)


def test_what_is_busy_is_waited_for(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    file = open(target / "file", "w")
    tried = threading.Event()
    real = table.mount_id

    def watched(path: str) -> tuple[int, bool]:  # asked after each refusal
        tried.set()
        return real(path)

    def let_go() -> None:
        tried.wait()
        file.close()

    thread = threading.Thread(target=let_go)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "mount_id", watched)
        assert unmount(str(target), wait_s=60, records=records)
    thread.join()
    assert tried.is_set()


def test_lazy_does_not_wait(tmp_path, records):
    target = tmpfs(tmp_path / "t")
    tmpfs(target / "below")
    with open(target / "below/file", "w") as file:
        assert unmount(str(target), lazy=True, records=records)
        assert not table.within(str(target))
        file.write("still there")


def test_umount8_says_the_same_of_the_same(tmp_path, records):
    """Where it does not say "not mounted", which is no error here."""
    target = tmpfs(tmp_path / "t")
    with open(target / "file", "w"):
        done = subprocess.run(["umount", str(target)], capture_output=True, text=True, check=False)
        assert "busy" in done.stderr
        with pytest.raises(NotReleased, match="busy"):
            unmount(str(target), wait_s=0, records=records)
    subprocess.run(["umount", str(target)], check=True)
    assert not unmount(str(target), records=records)
    assert not os.path.exists(records)


# -- for an agent: all that is stacked, at once -------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def stack(path: Path, times: int = 1) -> None:
    for _ in range(times):
        syscalls.mount("none", str(path), "tmpfs", data="size=64k")


def is_mounted(path: Path) -> bool:
    return str(path) in where()


def test_drop(target):
    stack(target)
    drop(str(target))
    assert not is_mounted(target)
    drop(str(target))


def test_drop_where_nothing_is(tmp_path):
    drop(str(tmp_path / "nosuch"))
    drop(str(tmp_path / "nosuch/below"))


def test_drop_all_that_is_stacked(target):
    stack(target, 3)
    drop(str(target))
    assert not is_mounted(target)


def test_as_many_as_may_be(target):
    stack(target, release._MOST_STACKED)
    drop(str(target))
    assert not is_mounted(target)


def test_more_than_may_be_is_not_taken_for_done(target):
    stack(target, release._MOST_STACKED + 2)
    with pytest.raises(NotReleased, match="stacked"):
        drop(str(target))
    assert is_mounted(target)
    drop(str(target))
    assert not is_mounted(target)


def test_drop_says_who_holds_it_at_once(target):
    stack(target)
    with open(target / "file", "w"):
        with pytest.raises(NotReleased, match="busy") as failure:
            drop(str(target))
        assert failure.value.code == "mount-busy"
        assert f"process {os.getpid()}" in failure.value.why
        assert failure.value.retryable
        assert is_mounted(target)
    drop(str(target))
    assert not is_mounted(target)


def test_drop_follows_no_link(target, tmp_path):
    stack(target)
    (tmp_path / "link").symlink_to(target)
    drop(str(tmp_path / "link"))
    assert is_mounted(target)
    drop(str(target))


def test_remove_a_mount_point(target):
    remove_mount_point(str(target))
    assert not target.exists()
    remove_mount_point(str(target))


def test_what_is_mounted_is_not_removed(target):
    stack(target)
    (target / "file").write_text("kept")
    with pytest.raises(NotReleased):
        remove_mount_point(str(target))
    assert (target / "file").read_text() == "kept"
    (target / "file").unlink()
    with pytest.raises(NotReleased, match="busy"):  # empty, and a mount all the same
        remove_mount_point(str(target))
    drop(str(target))


def test_what_is_in_it_is_not_removed(target):
    (target / "file").write_text("kept")
    with pytest.raises(NotReleased, match="not empty"):
        remove_mount_point(str(target))
    assert os.listdir(target) == ["file"]


def test_drop_below(target):
    stack(target)
    for name in ("a", "a/b", "c"):
        tmpfs(target / name)
    drop_below(str(target) + "/")
    assert [path for path in where() if path.startswith(str(target))] == [str(target)]
    drop(str(target))
