"""What the agent does for filesystems that are empty in copies: it empties them, and sees who uses one.

The agent's own code, with this host's kernel, on filesystems of every kind that a pod can have them on.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
from fcntl import ioctl
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import GuestFailed, HoldfastError, InUse
from holdfast.guest import fresh, still
from holdfast.guest.mountinfo import living
from tests.images import is_clean, make_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_GETFLAGS, _SETFLAGS, APPEND, IMMUTABLE = 0x80086601, 0x40086602, 0x20, 0x10
DEPTH = 1500


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a new filesystem of a kind in a new folder, until the test ends."""
    made: list[Path] = []

    def mount(kind: str, where: Path | None = None) -> Path:
        where = where or tmp_path / f"mount{len(made)}"
        where.mkdir(exist_ok=True)
        source = "none" if kind == "tmpfs" else make_disk(tmp_path / f"disk{len(made)}", kind)
        subprocess.run(["mount", "-t", kind, source, where], check=True)
        made.append(where)
        return where

    yield mount
    fresh.let_go()
    for where in reversed(made):
        subprocess.run(["umount", where], check=True)


class Children:
    """The agent's other processes: here there is nothing that does not wait."""

    def call(self, work: Callable[[], Any], keep: tuple[int, ...]) -> Any:
        assert all(os.fstat(fd) for fd in keep)
        return work()
        yield


def empty(folder: Path) -> None:
    fresh.hold([str(folder)], {}, {})
    task = fresh.empty(Children())  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        next(task)


def mark(path: Path, flags: int) -> None:
    """Sets an inode's flags, as chattr(1) does."""
    fd = os.open(path, os.O_RDONLY)
    try:
        (old,) = struct.unpack("Q", ioctl(fd, _GETFLAGS, bytes(8)))
        ioctl(fd, _SETFLAGS, struct.pack("Q", old | flags))
    finally:
        os.close(fd)


def fill(top: Path, outside: Path) -> None:
    """Everything that a tree can have in it."""
    (top / "many").mkdir()
    for number in range(2000):
        (top / f"many/{number}").write_bytes(b"")
    fd = os.open(top, os.O_PATH)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    (top / "folder/below").mkdir(parents=True)
    (top / "folder/below/file").write_bytes(b"x" * 100_000)
    os.link(top / "folder/below/file", top / "second name")
    for name, target in (("out", outside), ("root", "/"), ("nowhere", "nowhere"), ("up", ".."), ("self", "self")):
        (top / name).symlink_to(target)
    for odd in (b"\xff\xfe", b"new\nline", b" ", b"-rf", b"*", b"x" * 255):
        os.mkdir(os.fsencode(top) + b"/" + odd)
        open(os.fsencode(top) + b"/" + odd + b"/" + odd, "wb").close()
    os.mkfifo(top / "fifo", 0)
    os.mknod(top / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(top / "socket"))
    (top / "folder").chmod(0)


def used_inodes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_files - found.f_ffree


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "xfs"])
def test_everything_goes_and_nothing_else(mounts, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    folder = mounts(kind)
    folder.chmod(0o1770)
    os.chown(folder, 7, 8)
    was, used = os.stat(folder), used_inodes(folder)
    fill(folder, outside)
    if kind == "ext4":
        (folder / "lost+found/#12").write_text("found")
    else:  # a name like any other
        (folder / "lost+found").mkdir()
    empty(folder)
    now = os.stat(folder)
    assert (now.st_mode, now.st_uid, now.st_gid, now.st_ino) == (was.st_mode, 7, 8, was.st_ino)
    assert os.listdir(folder) == (["lost+found"] if kind == "ext4" else [])
    if kind == "ext4":
        assert os.listdir(folder / "lost+found") == []
    if kind != "xfs":  # which keeps room for inodes that it has once made
        assert used_inodes(folder) == used
    assert (outside / "file").read_text() == "kept"
    (folder / "new").write_text("new")
    (folder / "new").unlink()


def test_what_is_marked(mounts, tmp_path):
    """Immutable and append-only, as root of a container can mark them; and the disk is whole."""
    folder = mounts("ext4")
    (folder / "a/b").mkdir(parents=True)
    for name, flags in (("a/b/file", IMMUTABLE), ("a/log", APPEND), ("file", IMMUTABLE | APPEND)):
        (folder / name).write_text("x")
        mark(folder / name, flags)
    os.symlink("x", folder / "a/b/link")
    for name, flags in (("a/b", IMMUTABLE), ("a", APPEND), (".", IMMUTABLE)):
        mark(folder / name, flags)
    with pytest.raises(PermissionError):
        (folder / "file").unlink()
    empty(folder)
    assert os.listdir(folder) == ["lost+found"]
    subprocess.run(["umount", folder], check=True)
    assert is_clean(tmp_path / "disk0")
    subprocess.run(["mount", tmp_path / "disk0", folder], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_another_mount_is_not_entered(mounts, kind):
    folder = mounts(kind)
    (folder / "a").mkdir()
    inner = mounts("tmpfs", folder / "a/inner")
    (inner / "file").write_text("kept")
    with pytest.raises(GuestFailed, match=str(folder)) as caught:
        empty(folder)
    assert caught.value.code == "fresh-not-emptied"
    assert (inner / "file").read_text() == "kept"


# -- what a container has in memory -----------------------------------------------------------------


def hold(place: Path | str) -> set[tuple[int, int]]:
    return fresh.hold([], {"c": [str(place)], "ended": ["/x"]}, {"c": os.getpid(), "other": 1})


def test_memory_of_a_container_is_found(mounts, tmp_path):
    folder = mounts("tmpfs")
    (tmp_path / "link").symlink_to(folder)
    device = os.stat(folder).st_dev
    for place in (folder, tmp_path / "link"):  # crun follows links, too
        assert hold(place) == {(os.major(device), os.minor(device))}
        fresh.let_go()


@pytest.mark.parametrize("what", ["missing", "below", "part", "disk", "hidden", "stacked", "above"])
def test_memory_that_is_not_where_it_was_is_refused(mounts, tmp_path, what):
    """What is emptied in the copy is what was mounted there, or nothing."""
    folder = mounts("ext4" if what == "disk" else "tmpfs")
    place = folder
    if what == "missing":
        place = tmp_path / "missing"
    elif what in ("below", "part"):
        place = folder / "below"
        place.mkdir()
    elif what in ("hidden", "stacked"):
        mounts("ext4" if what == "hidden" else "tmpfs", folder)
    elif what == "above":
        place = mounts("tmpfs", folder / "below")
        mounts("tmpfs", folder)
        mounts("tmpfs", place)
    if what == "part":
        subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        with pytest.raises(InUse, match=str(place)) as caught:
            hold(place)
    finally:
        if what == "part":
            subprocess.run(["umount", place], check=True)
    assert caught.value.code == "fresh-in-use"


# -- who uses it ----------------------------------------------------------------------------------

PROGRAM = """
import ctypes, os, sys, threading
what, folder = sys.argv[1:]
libc = ctypes.CDLL(None)
def begun():
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
def thread(flags):
    libc.unshare(flags)
    if flags == 0x200:  # CLONE_FS
        os.chdir(folder + "/below")
    elif flags == 0x400:  # CLONE_FILES
        os.open(folder + "/file", os.O_RDONLY)
    elif flags == 0:  # the first thread is about to end
        while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
    begun()
def map_file():
    fd = os.open(folder + "/file", os.O_RDONLY)
    libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))  # Python's own keeps the file open
    os.close(fd)
if what == "file":
    os.open(folder + "/file", os.O_RDONLY)
elif what == "deleted":
    os.open(folder + "/file", os.O_RDONLY)
    os.unlink(folder + "/file")
elif what == "folder":
    os.chdir(folder + "/below")
elif what == "map":
    map_file()
elif what == "thread in folder":
    threading.Thread(target=thread, args=[0x200]).start()
    threading.Event().wait()
elif what == "thread with file":
    threading.Thread(target=thread, args=[0x400]).start()
    threading.Event().wait()
elif what.startswith("ended"):
    if what == "ended with map":
        map_file()
    elif what == "ended with file":
        os.open(folder + "/file", os.O_RDONLY)
    threading.Thread(target=thread, args=[0]).start()
    libc.syscall(60, 0)  # exit(2): of this thread alone
begun()
"""


def uses(what: str, folder: Path) -> list[str]:
    """A command that uses something of a folder until its input ends."""
    if what in ("mount", "part"):
        mount = f"mount -t tmpfs none {folder}/below" if what == "mount" else f"mount --bind {folder}/below /mnt"
        return ["unshare", "--mount", "sh", "-c", f"{mount} && echo && exec cat"]
    return [sys.executable, "-I", "-S", "-c", PROGRAM, what, str(folder)]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nothing", ""), ("file", r"\(python.*\) has .*/file open \(fd/3\)"), ("deleted", r"/file \(deleted\) open"),
        ("folder", r"/below open \(cwd\)"), ("map", "/file mapped"), ("mount", "something is mounted in a fresh mount"),
        ("part", "a folder of a fresh mount is mounted at /mnt"),
        ("thread in folder", r"\(python.*\) has .*/below open \(cwd\)"), ("thread with file", r"/file open \(fd/3\)"),
        ("ended", ""), ("ended with map", "/file mapped"), ("ended with file", r"/file open \(fd/3\)"),
    ],
)  # fmt: skip
def test_who_uses_one_is_named(mounts, what, why):
    folder = mounts("tmpfs")
    (folder / "below").mkdir()
    (folder / "file").write_text("x")
    watched = dict.fromkeys(fresh.hold([str(folder)], {}, {}), "fresh mount")
    with subprocess.Popen(uses(what, folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        if not why:
            still._check_container("c", [process.pid], watched)
            return
        with pytest.raises(HoldfastError, match=why) as caught:
            still._check_container("c", [process.pid], watched)
    assert (caught.value.code, caught.value.subject) == ("fresh-in-use", "c")


def test_whose_mounts_are_to_be_seen(tmp_path):
    """Of a process that has ended, waited for or not, there are none; if its first thread has, those of another."""
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with subprocess.Popen(uses("ended", tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pids = {"c": os.getpid(), "zombie": zombie.pid, "gone": gone.pid, "ended": process.pid}
        found = living(pids)
        assert found.pop("ended") != process.pid
        assert found == {"c": os.getpid()}
        assert fresh.hold([], {"zombie": ["/x"]}, living(pids)) == set()
    zombie.wait()
