"""Volumes filled from every kind of root filesystem, compared with their source and with ``cp -a``, file by file."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import Exhausted, HoldfastError, NotReleased, Unsupported
from holdfast.linux import syscalls
from holdfast.mounts import copy_tree
from holdfast.mounts import copy_up as module
from holdfast.mounts.copy_inode import InodeCopy
from holdfast.mounts.copy_up import Outcome, copy_up
from holdfast.mounts.root import Root, remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OLD_NS = 981_173_106_123_456_789  # 2001
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


def acl(user: int) -> bytes:
    """rwxr-x--- and rw for one user more (posix_acl_xattr.h)."""
    entries = (
        (0x01, 7, 0xFFFFFFFF),
        (0x02, 6, user),
        (0x04, 5, 0xFFFFFFFF),
        (0x10, 7, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    )
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts something in a new folder, until the test ends."""
    made: list[Path] = []

    def mount(kind: str, source: str | Path = "none", options: str = "") -> Path:
        where = tmp_path / f"mount{len(made)}"
        where.mkdir()
        text = ",".join(filter(None, ["noatime", options]))
        subprocess.run(["mount", "-t", kind, "-o", text, str(source), str(where)], check=True)
        made.append(where)
        return where

    yield mount
    for where in reversed(made):
        syscalls.umount(str(where), 0)


@pytest.fixture
def disk(tmp_path: Path, mounts: Callable[..., Path]) -> Callable[..., Path]:
    """A new file system on a disk."""

    def make(kind: str = "ext4", size: str = "64M") -> Path:
        file = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}.raw"
        options = ("-q", "-I", "256", "-m", "0") if kind == "ext4" else ("-q",)
        with open(file, "wb"):
            os.truncate(file, int(size[:-1]) << 20)
        subprocess.run([f"mkfs.{kind}", *options, str(file)], check=True, stdout=subprocess.DEVNULL)
        where = mounts(kind, file, "loop")
        if (where / "lost+found").exists():
            (where / "lost+found").rmdir()
        return where

    return make


def fill(top: Path) -> None:
    """Something of everything, below ``top/vol``; a directory last, so that its times stay."""
    vol = top / "vol"
    (vol / "sub/deeper").mkdir(parents=True)
    (vol / "empty").mkdir()
    (vol / "other").mkdir()
    (vol / "plain").write_text("hello")
    (vol / "nothing").touch()
    (vol / "setuid").write_bytes(b"x" * 70_000)
    (vol / "setgid").write_text("x")
    (vol / "capable").write_text("x")
    (vol / "listed").write_text("x")
    (vol / "sub/deeper/one").write_text("linked")
    os.link(vol / "sub/deeper/one", vol / "sub/deeper/two")
    os.link(vol / "sub/deeper/one", vol / "three")
    (top / "outside").write_text("linked from outside")
    os.link(top / "outside", vol / "from-outside")
    (vol / "absolute").symlink_to("/etc/passwd")
    (vol / "dangling").symlink_to("../nosuch")
    os.link(vol / "dangling", vol / "other/same-link", follow_symlinks=False)
    os.mkfifo(vol / "fifo", 0o640)
    os.link(vol / "fifo", vol / "other/same-fifo")
    os.mknod(vol / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(vol / "block", stat.S_IFBLK | 0o606, os.makedev(259, 70_000))
    with socket.socket(socket.AF_UNIX) as unix:
        here = os.getcwd()
        os.chdir(vol)  # the path of a socket is short
        unix.bind("socket")
        os.chdir(here)
    (vol / os.fsdecode(b"not\xff\xfeutf8\n")).write_text("x")
    (vol / ("n" * 250)).write_text("x")
    with open(vol / "sparse", "wb") as file:
        file.write(b"head")
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(5 << 20)
    os.setxattr(vol / "listed", "system.posix_acl_access", acl(1234))
    os.setxattr(vol / "sub", "system.posix_acl_default", acl(4321))
    give_attributes(vol)


def give_attributes(vol: Path) -> None:
    for name in ("plain", "sub", "fifo", "sub/deeper/one"):
        os.chown(vol / name, 7, 70_000)
    os.chown(vol / "absolute", 3, 4, follow_symlinks=False)
    os.chown(vol, 65534, 65534)
    for name, mode in (
        ("setuid", 0o4755),
        ("setgid", 0o2711),
        ("sub", 0o555),
        ("empty", 0o1777),
        ("other", 0),
        ("", 0o2750),
    ):
        if name == "setuid":
            os.chown(vol / name, 5, 5)
        os.chmod(vol / name, mode)
    os.setxattr(vol / "capable", "security.capability", CAPABILITY)
    os.setxattr(vol / "plain", "user.t", b"value\0\xff")
    os.setxattr(vol, "user.dir", b"of the root")
    os.setxattr(vol / "sub/deeper", "trusted.of-us", b"1")
    os.setxattr(vol / "absolute", "trusted.of-a-link", b"1", follow_symlinks=False)
    for number, (where, folders, names) in enumerate(os.walk(vol, topdown=False)):
        for name in (*names, *folders):
            os.utime(f"{where}/{name}", ns=(OLD_NS + number, OLD_NS - 1_000_000_001 * number), follow_symlinks=False)
    os.utime(vol, ns=(5, OLD_NS))


def digest(top: Path) -> dict[str, Any]:
    """All that there is to know of each name below ``top``, and of ``top``; which are names of one file, too."""
    found: dict[str, Any] = {}
    first: dict[tuple[int, int], str] = {}
    names = [""]
    while names:
        name = names.pop(0)
        path = f"{top}/{name}".rstrip("/")
        info = os.lstat(path)
        kind = stat.S_IFMT(info.st_mode)
        same = first.setdefault((info.st_dev, info.st_ino), name) if not stat.S_ISDIR(kind) else name
        data: Any = None
        if stat.S_ISREG(kind):
            with open(path, "rb", opener=lambda where, flags: os.open(where, flags | os.O_NOATIME)) as file:
                data = info.st_size, hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(kind):
            data = os.readlink(path)
        elif stat.S_ISDIR(kind):
            data = sorted(os.listdir(path))
            names += [f"{name}/{child}".lstrip("/") for child in data]
        else:
            data = info.st_rdev
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if not key.startswith("trusted.SGI_ACL")  # how XFS stores an ACL
        }
        found[name] = (
            oct(info.st_mode),
            info.st_uid,
            info.st_gid,
            info.st_atime_ns,
            info.st_mtime_ns,
            same,
            data,
            xattrs,
        )
    return found


def copy(image: Path, target: Path, path: str = "/vol") -> Outcome:
    target.mkdir(exist_ok=True)
    fd = os.open(target, os.O_PATH)
    try:
        with Root(str(image)) as root:
            return copy_up(root, path, fd)
    finally:
        os.close(fd)


def source_of(kind: str, tmp_path: Path, disk: Callable[..., Path], mounts: Callable[..., Path]) -> Path:
    """A filled image on a file system of this kind."""
    if kind in ("ext4", "xfs"):
        where = disk(kind, "64M" if kind == "ext4" else "400M")
        fill(where)
    elif kind == "tmpfs":
        where = mounts("tmpfs")
        fill(where)
    elif kind == "erofs":
        lower, file = disk(), tmp_path / "image.erofs"
        fill(lower)
        subprocess.run(["mkfs.erofs", "--quiet", str(file), str(lower)], check=True, stdout=subprocess.DEVNULL)
        where = mounts("erofs", file, "loop")
    else:
        upper, lower = disk(), source_of("erofs", tmp_path, disk, mounts)
        for name in ("upper/vol", "work"):
            (upper / name).mkdir(parents=True)
        for key in os.listxattr(lower / "vol"):
            os.setxattr(upper / "upper/vol", key, os.getxattr(lower / "vol", key))
        where = mounts("overlay", "o", f"lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work")
        (where / "vol/plain").write_text("changed")
        (where / "vol/from-outside").unlink()
        (where / "vol/sub/deeper/new").write_text("new")
        give_attributes(where / "vol")
    return where


# -- like the source, and like cp


@pytest.mark.parametrize("target_kind", ["same", "tmpfs", "ext4"])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "erofs", "overlay"])
def test_like_its_source_and_like_cp(kind, target_kind, tmp_path, disk, mounts):
    image = source_of(kind, tmp_path, disk, mounts)
    places = {"same": lambda: image, "tmpfs": lambda: mounts("tmpfs"), "ext4": disk}
    where = (places[target_kind] if target_kind != "same" or kind != "erofs" else disk)()
    before = digest(image / "vol")
    outcome = copy(image, where / "ours")
    subprocess.run(["cp", "-a", f"{image}/vol", f"{where}/cp"], check=True)
    ours, theirs = digest(where / "ours"), digest(where / "cp")
    assert ours == before
    assert ours == theirs
    assert digest(image / "vol") == before
    assert outcome.entries == len(before) - 1
    assert not outcome.dropped
    if "from-outside" in before:
        assert os.stat(where / "ours/from-outside").st_nlink == 1


def test_times_of_directories_are_kept(disk):
    """containerd sets them before it writes the children: they are then "now"."""
    image = disk()
    fill(image)
    copy(image, image / "ours")
    for name in ("", "sub", "sub/deeper", "empty"):
        assert os.stat(image / "ours" / name).st_mtime_ns == os.stat(image / "vol" / name).st_mtime_ns < OLD_NS + 1


def test_the_source_is_not_touched(mounts):
    """Not even its access times, on a file system that keeps them strictly."""
    image = mounts("tmpfs", options="strictatime")
    fill(image)
    before = [
        (name, os.lstat(name).st_atime_ns) for name in (image / "vol", image / "vol/plain", image / "vol/sub/deeper")
    ]
    copy(image, image / "ours")
    assert [(name, os.lstat(name).st_atime_ns) for name, _ in before] == before


def test_a_mask_of_the_process_changes_nothing(disk):
    image = disk()
    fill(image)
    umask = os.umask(0o777)
    try:
        copy(image, image / "ours")
    finally:
        os.umask(umask)
    assert digest(image / "ours") == digest(image / "vol")


def test_nothing_is_inherited_from_the_volume(disk):
    """A default ACL, a setgid bit and an owner of the new volume are those of the image afterwards."""
    image = disk()
    fill(image)
    (image / "ours").mkdir()
    os.setxattr(image / "ours", "system.posix_acl_default", acl(99))
    os.chown(image / "ours", 8, 9)
    os.chmod(image / "ours", 0o2777)
    copy(image, image / "ours")
    assert digest(image / "ours") == digest(image / "vol")


def test_groups_are_the_image_s_where_the_disk_would_inherit_them(disk):
    """With ext4's ``grpid``, a new file has the group of its directory."""
    image, where = disk(), disk()
    fill(image)
    subprocess.run(["mount", "-o", "remount,grpid", str(where)], check=True)
    os.chown(where, 8, 9)
    copy(image, where)
    assert digest(where) == digest(image / "vol")


def test_nobody_enters_a_volume_before_it_is_complete(disk, monkeypatch):
    """Files are made before they have their owner and mode."""
    image, seen = disk(), set()
    fill(image)
    (image / "ours").mkdir(0o777)
    os.chown(image / "ours", 8, 9)
    attributes = InodeCopy.attributes

    def look(self: InodeCopy, *arguments: Any) -> None:
        info = os.stat(image / "ours")
        seen.add((oct(info.st_mode), info.st_uid, info.st_gid))
        attributes(self, *arguments)

    monkeypatch.setattr(InodeCopy, "attributes", look)
    copy(image, image / "ours")
    assert seen == {("0o40700", 0, 0)}


def test_what_overlayfs_and_selinux_keep_in_xattrs_stays_behind(disk):
    image = disk()
    (image / "vol/sub").mkdir(parents=True)
    for path in (image / "vol", image / "vol/sub"):
        os.setxattr(path, "trusted.overlay.opaque", b"y")
        os.setxattr(path, "trusted.overlay.redirect", b"/etc")
        os.setxattr(path, "user.overlay.opaque", b"y")
        os.setxattr(path, "security.selinux", b"system_u:object_r:container_file_t:s0\0")
        os.setxattr(path, "user.mine", b"1")
    assert not copy(image, image / "ours").dropped
    for path in (image / "ours", image / "ours/sub"):
        assert [name for name in os.listxattr(path) if name != "security.selinux"] == ["user.mine"]


def test_xattrs_that_a_volume_cannot_have_are_left_out_and_told(disk, mounts):
    """containerd had this fatal once (continuity #244)."""
    image = disk()
    fill(image)
    outcome = copy(image, mounts("ramfs") / "ours")
    assert outcome.dropped == {
        "security.capability": 1, "user.t": 1, "user.dir": 1, "trusted.of-us": 1, "trusted.of-a-link": 1,
        "system.posix_acl_access": 1, "system.posix_acl_default": 1,
    }  # fmt: skip
    assert "user.dir left out 1 times" in str(outcome)


def test_lost_and_found_of_a_new_disk_is_no_contents(tmp_path, disk):
    image = disk()
    fill(image)
    where = disk()
    (where / "lost+found").mkdir(0o700)
    copy(image, where)
    assert digest(where) == digest(image / "vol")


# -- hard links


def test_files_of_two_devices_with_one_inode_number_are_two_files(mounts):
    """containerd told them apart by the inode number only."""
    lowers = [mounts("tmpfs", options=options) for options in ("", "")]
    for number, lower in enumerate(lowers):
        (lower / "vol").mkdir()
        (lower / f"vol/a{number}").write_text(f"file {number}")
        os.link(lower / f"vol/a{number}", lower / f"vol/b{number}")
    assert len({os.stat(lower / f"vol/a{number}").st_ino for number, lower in enumerate(lowers)}) == 1
    image = mounts("overlay", "o", f"lowerdir={lowers[0]}:{lowers[1]},xino=off")
    where = mounts("tmpfs")
    copy(image, where / "ours")
    assert {name.name: name.read_text() for name in (where / "ours").iterdir()} == {
        "a0": "file 0", "b0": "file 0", "a1": "file 1", "b1": "file 1",
    }  # fmt: skip
    assert [os.stat(where / "ours" / name).st_nlink for name in ("a0", "a1")] == [2, 2]


def test_more_names_than_a_file_can_have(disk, mounts):
    """ext4 stops at 65000; containerd took that as fatal."""
    image = mounts("tmpfs")
    (image / "vol").mkdir()
    (image / "vol/0").write_text("x")
    folder = os.open(image / "vol", os.O_RDONLY)
    try:
        for number in range(1, 65_010):
            os.link("0", str(number), src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
    where = disk()
    assert copy(image, where / "ours").entries == 65_010
    # Names are copied in their order: "9999" is the last.
    assert [os.stat(where / "ours" / name).st_nlink for name in ("0", "9999")] == [65_000, 10]


# -- holes

PATTERNS = ("4K", "4K 1M 4K", "0 1M 1", "0 1M 4K", "4K 1M", "4K 512K 4K 512K 4K", "64K", "0 5000M 4K", "1")


def write_pattern(path: Path, pattern: str) -> None:
    """Lengths of data, hole, data, ..."""
    offset = 0
    with open(path, "wb") as file:
        for number, text in enumerate(pattern.split()):
            size = int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0)
            if number % 2 == 0:
                file.seek(offset)
                file.write(bytes([number + 1]) * size)
            offset += size
        file.truncate(offset)


@pytest.mark.parametrize("kind", ["same", "tmpfs", "overlay"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_holes_stay_holes(kind, pattern, disk, mounts, tmp_path):
    """From an overlay, copy_file_range(2) is refused (EXDEV), and containerd then writes every hole."""
    lower = disk()
    (lower / "vol").mkdir()
    write_pattern(lower / "vol/f", pattern)
    os.sync()
    image = lower
    if kind == "overlay":
        (tmp_path / "empty").mkdir()
        image = mounts("overlay", "o", f"lowerdir={lower}:{tmp_path}/empty")
    where = mounts("tmpfs") if kind == "tmpfs" else lower
    copy(image, where / "ours")
    old, new = os.stat(lower / "vol/f"), os.stat(where / "ours/f")
    assert new.st_size == old.st_size
    assert new.st_blocks <= old.st_blocks * 1.1 + 8
    with open(lower / "vol/f", "rb") as source, open(where / "ours/f", "rb") as copied:
        for offset in {0, 4096, 1 << 20, max(0, old.st_size - 8192)}:
            source.seek(offset)
            copied.seek(offset)
            assert source.read(8192) == copied.read(8192)


def test_blocks_are_shared_where_the_file_system_can(disk):
    image = disk("xfs", "400M")
    (image / "vol").mkdir()
    (image / "vol/f").write_bytes(os.urandom((32 << 20) + 5))
    os.sync()
    free = os.statvfs(image).f_bfree
    copy(image, image / "ours")
    os.sync()
    assert (free - os.statvfs(image).f_bfree) * os.statvfs(image).f_frsize < 4 << 20
    assert (image / "ours/f").read_bytes() == (image / "vol/f").read_bytes()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_way_to_move_data(first, disk, monkeypatch):
    monkeypatch.setattr("holdfast.mounts.copy_inode._MOVERS", sys.modules["holdfast.mounts.copy_inode"]._MOVERS[first:])
    image = disk()
    fill(image)
    copy(image, image / "ours")
    assert digest(image / "ours") == digest(image / "vol")
    assert os.stat(image / "ours/sparse").st_blocks == os.stat(image / "vol/sparse").st_blocks


# -- depth


def test_a_tree_deeper_than_any_path_and_than_descriptors_last(mounts):
    """3000 levels of 100 bytes, a file at both ends that is one file."""
    image = mounts("tmpfs")
    (image / "vol").mkdir()
    levels, name = 3000, "d" * 100
    here = os.open(image / "vol", os.O_RDONLY)
    os.close(os.open("top", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    first = os.open("top", os.O_PATH, dir_fd=here)
    for level in range(levels):
        os.mkdir(name, 0o711, dir_fd=here)
        os.utime(name, ns=(1, level), dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.link(f"/proc/self/fd/{first}", "bottom", dst_dir_fd=here)
    os.symlink("x", "link", dir_fd=here)
    os.link("link", "link2", src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
    os.close(first)
    os.close(here)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, limit[1]))
    try:
        outcome = copy(image, image / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert outcome.entries == levels + 4
    here = os.open(image / "ours", os.O_RDONLY)
    top = os.stat("top", dir_fd=here)
    for _ in range(levels):
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    bottom = os.stat("bottom", dir_fd=here)
    os.close(here)
    assert (bottom.st_ino, bottom.st_nlink) == (top.st_ino, 2)


def test_names_of_one_file_far_apart_and_deep(mounts):
    """The first copy is found again by a path longer than the kernel takes."""
    image = mounts("tmpfs")
    here = os.open(image, os.O_RDONLY)
    for name in ("vol", *["d" * 250] * 40):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.mkfifo("deep", dir_fd=here)
    os.mkdir("e", dir_fd=here)
    other = os.open("e", os.O_RDONLY, dir_fd=here)
    os.link("deep", "far", src_dir_fd=here, dst_dir_fd=other, follow_symlinks=False)
    os.close(here)
    os.close(other)
    assert copy(image, image / "ours").entries == 43
    done = subprocess.run(["find", str(image / "ours"), "-links", "2", "-type", "p"], capture_output=True, check=True)
    assert done.stdout.count(b"\n") == 2


# -- failures


def failing(image: Path, target: Path, path: str = "/vol") -> HoldfastError:
    """The error of a copy that fails, after which the volume is as it was before."""
    target.mkdir(exist_ok=True)
    os.chown(target, 12, 13)
    os.chmod(target, 0o2770)
    before = digest(target)[""][:3], digest(target)[""][6:]
    with pytest.raises(HoldfastError) as failure:
        copy(image, target, path)
    assert (digest(target)[""][:3], digest(target)[""][6:]) == before
    return failure.value


def test_no_room(mounts, disk):
    image = disk()
    fill(image)
    (image / "vol/sub/big").write_bytes(b"x" * (2 << 20))
    target = mounts("tmpfs", options="size=1M,nr_inodes=1000")
    os.setxattr(target, "system.posix_acl_default", acl(3))
    error = failing(image, target)
    assert isinstance(error, Exhausted)
    assert (error.code, error.subject) == ("volume-full", "/vol/sub/big")
    assert "No space left" in error.why
    assert not error.causes
    assert copy(image, mounts("tmpfs") / "ours").found


def test_no_room_for_names(mounts, disk):
    image = disk()
    fill(image)
    error = failing(image, mounts("tmpfs", options="nr_inodes=12"))
    assert (type(error), error.code) == (Exhausted, "volume-full")


def test_a_read_only_volume(mounts, disk, tmp_path):
    image = disk()
    fill(image)
    target = mounts("tmpfs", options="ro")
    with pytest.raises(HoldfastError, match="Read-only file system") as failure:
        copy(image, target)
    assert failure.value.code == "volume-copy"


def test_a_mount_in_the_tree_is_not_entered(mounts, disk):
    image = disk()
    fill(image)
    syscalls.mount("none", f"{image}/vol/sub/deeper", "tmpfs")
    try:
        error = failing(image, image / "ours")
    finally:
        syscalls.umount(f"{image}/vol/sub/deeper")
    assert (type(error), error.code, error.subject) == (Unsupported, "volume-mount", "/vol/sub/deeper")
    assert copy(image, image / "ours").found


class FailsAtTheEnd(copy_tree.TreeCopy):
    """A copy that is complete, and then fails; ``meanwhile`` is what another process does before that."""

    meanwhile: Callable[[], object]
    error: BaseException = OSError(errno.EIO, "Input/output error")

    def run(self) -> None:
        super().run()
        type(self).meanwhile()
        raise self.error


def test_emptying_does_not_delete_through_a_mount(mounts, disk, tmp_path, monkeypatch):
    image = disk()
    fill(image)
    kept = mounts("tmpfs")
    (kept / "file").write_text("kept")
    inside = image / "ours/sub/deeper"
    monkeypatch.setattr(module, "TreeCopy", FailsAtTheEnd)
    bind = lambda: syscalls.mount(str(kept), str(inside), "", syscalls.MS_BIND)  # noqa: E731
    monkeypatch.setattr(FailsAtTheEnd, "meanwhile", staticmethod(bind), raising=False)
    with pytest.raises(HoldfastError, match="Input/output error") as failure:
        copy(image, image / "ours")
    (cause,) = failure.value.causes
    assert isinstance(cause, NotReleased)
    assert (cause.code, cause.subject) == ("volume-not-emptied", "sub")
    assert (kept / "file").read_text() == "kept"
    syscalls.umount(str(inside))
    assert os.listdir(image / "ours") == ["sub"]
    remove_tree_of(image / "ours")


def remove_tree_of(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        remove_tree(fd, os.fsencode(path.name))
    finally:
        os.close(fd)


def test_an_interrupted_copy_is_emptied_too(disk, monkeypatch):
    image = disk()
    fill(image)
    monkeypatch.setattr(module, "TreeCopy", FailsAtTheEnd)
    monkeypatch.setattr(FailsAtTheEnd, "meanwhile", staticmethod(lambda: None), raising=False)
    monkeypatch.setattr(FailsAtTheEnd, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        copy(image, image / "ours")
    assert os.listdir(image / "ours") == []


# -- while somebody else changes the trees


@pytest.fixture
def swapped(disk: Callable[..., Path]) -> Path:
    """An image and a secret beside it; ``vol/b`` can be swapped for ``link``, which leads to the secret."""
    top = disk()
    for name in ("image/vol/a", "image/vol/b/c", "secret"):
        (top / name).mkdir(parents=True)
    (top / "secret/password").write_text("secret")
    (top / "secret/c").mkdir()
    (top / "secret/c/password").write_text("secret")
    for name in ("a/1", "b/e", "b/f", "b/c/g"):
        (top / "image/vol" / name).write_text("of the image")
    (top / "image/vol/b/link").symlink_to("f")
    (top / "image/link").symlink_to(top / "secret")
    os.mkfifo(top / "image/fifo")
    (top / "image/linked-file").symlink_to(top / "secret/password")
    return top


#: What is exchanged with what, when this has been copied.
SWAPS = {
    "directory for a link": ("image/vol/b", "image/link", "a/1"),
    "directory for a file": ("image/vol/b", "secret/password", "a/1"),
    "file for a link": ("image/vol/b/f", "image/linked-file", "b/e"),
    "file for a directory": ("image/vol/b/f", "secret/c", "b/e"),
    "file for a FIFO": ("image/vol/b/f", "image/fifo", "b/e"),
    "link for a file": ("image/vol/b/link", "secret/password", "b/f"),
    "the way back": ("image/vol/b/c", "secret/c", "b/c/g"),
    "new directory for a link": ("ours/a", "image/link", "mkdir"),
}


@pytest.mark.parametrize("what", SWAPS)
def test_what_is_swapped_in_the_middle_is_not_followed(what, swapped, monkeypatch):
    """At the worst moment: when the name has been listed, and before it is opened."""
    old, new, moment = SWAPS[what]
    contents, open_directory = InodeCopy.contents, copy_tree._open_directory

    def swap() -> None:
        syscalls.renameat2(f"{swapped}/{old}", f"{swapped}/{new}", syscalls.RENAME_EXCHANGE)

    def copy_contents(self: InodeCopy, source_fd: int, target_fd: int, info: os.stat_result) -> None:
        contents(self, source_fd, target_fd, info)
        if os.readlink(f"/proc/self/fd/{source_fd}").endswith(f"vol/{moment}"):
            swap()

    def open_new_directory(dir_fd: int, name: str, flags: int = 0) -> int:
        if moment == "mkdir" and name == "a" and not flags:  # the copy's
            swap()
        return open_directory(dir_fd, name, flags)

    monkeypatch.setattr(InodeCopy, "contents", copy_contents)
    monkeypatch.setattr(copy_tree, "_open_directory", open_new_directory)
    monkeypatch.setattr(copy_tree, "_KEPT", 0)
    copied = []
    emptied = module._Target.empty
    monkeypatch.setattr(
        module._Target, "empty", lambda self: (copied.append(digest(swapped / "ours")), emptied(self))[1]
    )
    with pytest.raises(HoldfastError) as failure:
        copy(swapped / "image", swapped / "ours")
    assert failure.value.code == "volume-copy"
    assert copied
    assert "password" not in "".join(copied[0])
    assert not {len("secret")} & {item[6][0] for item in copied[0].values() if isinstance(item[6], tuple)}
    assert list((swapped / "ours").iterdir()) == []
    if moment != "mkdir":
        swap()
    assert (swapped / "secret/password").read_text() == (swapped / "secret/c/password").read_text() == "secret"


SWAPPER = """
import sys
from holdfast.linux import syscalls
old, new = sys.argv[1:]
print("ready", flush=True)
while True:
    try:
        syscalls.renameat2(old, new, syscalls.RENAME_EXCHANGE)
    except FileNotFoundError:  # the copy has not made it yet
        pass
"""


@pytest.mark.parametrize("what", ["directory for a link", "file for a link", "new directory for a link"])
def test_races_do_not_lead_out(what, swapped):
    """Another process swaps all the time: a copy is right or fails, and nothing of the secret is ever in it."""
    old, new = (f"{swapped}/{name}" for name in SWAPS[what][:2])
    before = digest(swapped / "secret")
    argv = [sys.executable, "-c", SWAPPER, old, new]
    swapper = subprocess.Popen(
        argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    results = {"done": 0, "failed": 0}
    try:
        assert swapper.stdout is not None
        swapper.stdout.readline()
        for _ in range(200):
            results[race(swapped)] += 1
            os.kill(swapper.pid, signal.SIGSTOP)
            os.waitpid(swapper.pid, os.WUNTRACED)
            for name, item in digest(swapped / "ours").items():
                assert "password" not in name
                assert not isinstance(item[6], tuple) or item[6][0] == len("of the image")
            remove_tree_of(swapped / "ours")
            if not (swapped / "image/link").is_symlink() and what == "new directory for a link":
                remove_tree_of(swapped / "image/link")
                (swapped / "image/link").symlink_to(swapped / "secret")
            os.kill(swapper.pid, signal.SIGCONT)
    finally:
        swapper.kill()
        swapper.communicate()
    assert digest(swapped / "secret") == before
    assert sum(results.values()) == 200


def race(swapped: Path) -> str:
    try:
        copy(swapped / "image", swapped / "ours")
    except HoldfastError as error:
        assert error.code == "volume-copy", error
        return "failed"
    return "done"
