"""Every kind of mount that the library makes, compared with mount(8) and findmnt(8) where these do the same.

``test_mount_refused.py`` runs this file again on a kernel without the new calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.mounts import (
    Mount,
    Root,
    features,
    mount_all,
    overlay,
    records,
    table,
    unmount,
    unmount_all,
    unmount_recursive,
)  # fmt: skip
from holdfast.mounts import mount as make
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Ground:
    """Folders to mount on, and a folder for records; everything is unmounted at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = str(folder / "records")

    def __call__(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mount(self, kind: str, source: object, target: Path, *options: str, **more: object) -> str:
        return make(Mount(kind, str(source), str(target), options), records=self.records, **more)  # type: ignore[arg-type]

    def unmount(self, target: Path) -> None:
        assert unmount(str(target), records=self.records)

    def tmpfs(self, name: str) -> Path:
        path = self(name)
        syscalls.mount("none", str(path), "tmpfs")
        return path


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    found = Ground(tmp_path)
    yield found
    unmount_recursive(str(tmp_path), lazy=True, records=found.records)
    assert not os.path.exists(found.records)


def found(target: Path, columns: str = "FSTYPE,VFS-OPTIONS,PROPAGATION") -> dict[str, str]:
    """What findmnt says of the mount on top of a path."""
    text = subprocess.run(
        ["findmnt", "--json", "--mountpoint", str(target), "-o", columns], capture_output=True, text=True, check=True
    ).stdout
    return dict(json.loads(text)["filesystems"][-1])


def by_mount8(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def is_refused(path: Path) -> bool:
    try:
        path.touch()
    except OSError as error:
        assert "Read-only" in str(error)
        return True
    path.unlink()
    return False


# -- bind


@pytest.mark.parametrize(
    "options",
    [
        [], ["ro"], ["nosuid", "nodev"], ["ro", "noexec", "noatime"], ["nodiratime", "relatime"],
        ["nosymfollow"], ["ro", "rshared"], ["rslave"], ["unbindable"], ["private"],
    ],
    ids=",".join,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bind", "rbind"])
def test_bind_is_as_mount8_makes_it(ground, kind, options):
    source = ground.tmpfs("source")
    ours, theirs = ground("ours"), ground("theirs")
    ground.mount("bind", source, ours, kind, *options)
    by_mount8("-o", ",".join([kind, *options]), source, theirs)
    assert found(ours) == found(theirs)


def test_strict_times_of_a_bind_mount(ground):
    """mount(8) says nothing and leaves it at relatime."""
    ground.mount("bind", ground.tmpfs("source"), ground("t"), "strictatime")
    assert found(ground("t"))["vfs-options"] == "rw"


def test_bind_of_a_file(ground):
    (ground("source") / "file").write_text("text")
    target = ground("t") / "target"
    target.touch()
    ground.mount("bind", ground("source") / "file", target, "ro")
    assert target.read_text() == "text"
    with pytest.raises(OSError, match="Read-only"):
        target.write_text("x")
    ground.unmount(target)
    assert target.read_text() == ""


def test_bind_keeps_what_the_source_has(ground):
    source = ground("source")
    syscalls.mount("none", str(source), "tmpfs", syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOATIME)
    ground.mount("bind", source, ground("t"), "ro")
    assert found(ground("t"))["vfs-options"] == "ro,nodev,noexec,noatime"


def test_a_read_only_tree_is_so_with_its_sub_mounts(ground):
    """runc, containerd and mount(8) leave what is mounted below writable."""
    source = ground.tmpfs("source")
    below = ground.tmpfs("source/below")
    deeper = ground.tmpfs("source/below/deeper")
    syscalls.mount("none", str(below), "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_NOEXEC)
    target = ground("t")
    ground.mount("bind", source, target, "rbind", "ro")
    for path in ("x", "below/x", "below/deeper/x"):
        assert is_refused(target / path)
        assert not is_refused(source / path)
    assert found(target / "below")["vfs-options"] == "ro,noexec,relatime"
    assert not is_refused(deeper / "x")


def test_read_only_without_its_sub_mounts(ground):
    """``bind`` does not take them along."""
    source = ground.tmpfs("source")
    ground.tmpfs("source/below")
    (source / "below/file").touch()
    ground.mount("bind", source, ground("t"), "bind", "ro")
    assert os.listdir(ground("t") / "below") == []


def test_flags_for_a_whole_tree(ground):
    source = ground.tmpfs("source")
    ground.tmpfs("source/below")
    ground.mount("bind", source, ground("t"), "rbind", "rnosuid", "noexec")
    assert found(ground("t"))["vfs-options"] == "rw,nosuid,noexec,relatime"
    assert found(ground("t") / "below")["vfs-options"] == "rw,nosuid,relatime"


def test_locked_flags_are_kept_in_a_user_namespace(ground):
    """In a less privileged namespace a remount that leaves one out is refused (runc #1229, moby #22994)."""
    source, target = ground("source"), ground("t")
    flags = syscalls.MS_NODEV | syscalls.MS_NOEXEC | syscalls.MS_NOSUID | syscalls.MS_NOATIME
    syscalls.mount("none", str(source), "tmpfs", flags)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            ground.mount("bind", source, target, "rbind", "ro")
            line = next(one for one in open("/proc/self/mountinfo").read().splitlines() if f" {target} " in one)
            code = 0 if line.split()[5] == "ro,nosuid,nodev,noexec,noatime" else 2
            # What came with the namespace is locked: containerd takes the kernel's EINVAL for "not mounted".
            try:
                unmount(str(source), records=ground.records)
                code = 3
            except HoldfastError as error:
                code = code or (0 if "locked" in str(error) else 4)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_bind_that_cannot_be_read_only_is_not_left_writable(ground, monkeypatch):
    """The mount goes again when what was asked for it cannot be had."""
    source = ground.tmpfs("source")
    monkeypatch.setattr("holdfast.mounts.request._ATTRIBUTES", {syscalls.MS_NODEV: syscalls.MOUNT_ATTR_NODEV})
    monkeypatch.setattr("holdfast.mounts.request.OF_MOUNT", syscalls.MS_NODEV)
    with pytest.raises(HoldfastError, match="can be written to"):
        ground.mount("bind", source, ground("t"), "ro")
    assert not os.path.ismount(ground("t"))


# -- filesystems


def test_tmpfs_is_as_mount8_makes_it(ground):
    ours, theirs = ground("ours"), ground("theirs")
    options = ["size=64k", "mode=0711", "nosuid", "noexec", "uid=7"]
    ground.mount("tmpfs", "some-name", ours, *options)
    by_mount8("-t", "tmpfs", "-o", ",".join(options), "some-name", theirs)
    columns = "SOURCE,FSTYPE,OPTIONS,PROPAGATION"
    assert found(ours, columns) == found(theirs, columns)
    ground.unmount(ours)


@pytest.mark.parametrize("kind", ["proc", "sysfs", "mqueue", "devpts", "ramfs", "cgroup2"])
def test_any_filesystem_of_the_kernel(ground, kind):
    ground.mount(kind, kind, ground("t"), "ro", "nosuid", "nodev", "noexec")
    assert found(ground("t"))["fstype"] == kind
    assert found(ground("t"))["vfs-options"] == "ro,nosuid,nodev,noexec,relatime"
    ground.unmount(ground("t"))


def test_remount_and_propagation_alone(ground):
    target = ground.tmpfs("t")
    ground.mount("", "none", target, "remount", "ro", "size=64k")
    assert is_refused(target / "x")
    ground.mount("", "none", target, "remount", "rw")
    ground.mount("none", "none", target, "remount", "bind", "nosuid")
    ground.mount("none", "none", target, "remount", "bind", "ro")
    assert found(target)["vfs-options"] == "ro,nosuid,relatime"
    ground.mount("", "", target, "rshared")
    assert found(target)["propagation"] == "shared"
    ground.mount("", "", target, "rprivate", "shared", "slave")
    assert found(target)["propagation"] == "private"
    assert len(table.at(str(target))) == 1


def test_stacked(ground):
    target = ground("t")
    for number in range(5):
        ground.mount("tmpfs", "none", target)
        (target / str(number)).touch()
    assert os.listdir(target) == ["4"]
    ground.unmount(target)
    assert os.listdir(target) == ["3"]
    assert unmount_all(str(target), records=ground.records) == 4
    assert unmount_all(str(target), records=ground.records) == 0


# -- loop


def image(path: Path, kind: str = "ext4") -> Path:
    if kind == "ext4":
        subprocess.run(["mke2fs", "-q", "-t", "ext4", str(path), "4M"], check=True, capture_output=True)
    else:
        tree = path.parent / "tree"
        tree.mkdir(exist_ok=True)
        subprocess.run(["mkfs.erofs", "--quiet", str(path), str(tree)], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("kind", ["ext4", ""])
def test_loop(ground, kind):
    disk = image(ground("disks") / ("disk" + "x" * 100))
    target = ground("t")
    ground.mount(kind, disk, target, "loop")
    assert found(target)["fstype"] == "ext4"
    assert not is_refused(target / "x")
    assert len(leaks.loops_of(disk)) == 1
    ground.unmount(target)
    assert leaks.no_loop_of(disk)


def test_a_read_only_loop_device(ground):
    disk = image(ground("disks") / "disk", "erofs")
    disk.chmod(0o400)
    ground.mount("erofs", disk, ground("t"), "loop", "ro")
    (device,) = leaks.loops_of(disk)
    with open(f"/sys/block/{os.path.basename(device)}/ro") as file:
        assert file.read() == "1\n"
    ground.unmount(ground("t"))
    assert leaks.no_loop_of(disk)


def test_a_loop_device_that_is_still_open_goes_when_it_is_closed(ground):
    disk = image(ground("disks") / "disk")
    ground.mount("ext4", disk, ground("t"), "loop")
    (device,) = leaks.loops_of(disk)
    with open(device, "rb"):
        ground.unmount(ground("t"))
    assert leaks.no_loop_of(disk)


def test_a_loop_device_is_freed_only_from_its_own_file(ground):
    """By now it may be somebody else's."""
    from holdfast.mounts import loop

    disk = image(ground("disks") / "disk")
    device = subprocess.run(
        ["losetup", "--find", "--show", str(disk)], capture_output=True, text=True, check=True
    ).stdout.strip()
    info = disk.stat()
    try:
        loop.let_go(device, [info.st_dev, info.st_ino + 1])
        assert leaks.loops_of(disk) == [device]
    finally:
        loop.let_go(device, [info.st_dev, info.st_ino])
    assert leaks.no_loop_of(disk)
    loop.let_go(device, [info.st_dev, info.st_ino])
    loop.let_go("/dev/nosuch", [1, 2])


def test_a_loop_mount_that_fails_leaves_no_device(ground):
    disk = ground("disks") / "disk"
    disk.write_bytes(b"\0" * (1 << 20))
    for kind, options in (("ext4", ["loop"]), ("ext4", ["loop", "ro"]), ("nosuchfs", ["loop"]), ("", ["loop"])):
        with pytest.raises(HoldfastError):
            ground.mount(kind, disk, ground("t"), *options)
        assert leaks.no_loop_of(disk)
        assert not os.path.exists(ground.records)
    with pytest.raises(NotFound, match="nosuch"):
        ground.mount("ext4", disk.parent / "nosuch", ground("t"), "loop")


# -- overlay


@pytest.mark.parametrize("name", ["l", "odd:, \\name", "x" * 200, "y" * 250 + "/" + "z" * 100])
@pytest.mark.parametrize("count", [2, 128, 500])
def test_overlay(ground, name, count):
    """However many layers, whatever their names are, and however many pages those would take: the first is on top."""
    layers = [ground(f"layers/{name}{number}") for number in range(count)]
    for number, layer in enumerate(layers):
        (layer / "top").write_text(str(number))
        (layer / f"own{number}").touch()
    upper, work = ground("upper:, \\x"), ground("work:, \\x")
    words = overlay.options(map(str, layers), str(upper), str(work))
    target = ground("t")
    ground.mount("overlay", "overlay", target, *words)
    assert (target / "top").read_text() == "0"
    assert len(os.listdir(target)) == count + 1
    (target / "new").touch()
    assert (upper / "new").exists()
    assert not os.path.exists(ground.records)  # links, if any were needed, are gone already
    ground.unmount(target)


def test_overlay_without_an_upper_folder(ground):
    for name in "ab":
        (ground(name) / "file").write_text(name)
    target = ground("t")
    ground.mount("overlay", "overlay", target, f"lowerdir={ground('a')}:{ground('b')}", "ro")
    assert (target / "file").read_text() == "a"
    assert is_refused(target / "x")
    ground.unmount(target)


def test_one_layer_too_many(ground):
    with pytest.raises(InvalidInput, match="500"):
        ground.mount("overlay", "overlay", ground("t"), "lowerdir=" + ":".join([str(ground("a"))] * 501))


def test_an_overlay_that_fails_leaves_nothing(ground):
    layers = [str(ground(f"layers/{'x' * 200}{number}")) for number in range(100)] + [str(ground.folder / "nosuch")]
    with pytest.raises(NotFound, match="nosuch"):
        ground.mount("overlay", "overlay", ground("t"), *overlay.options(layers))
    assert not os.path.exists(ground.records)


# -- other owners

MAPS = ("uidmap=0:1000:65536", "gidmap=0:2000:65536")


def mapped(ground: Ground, *mount: object) -> bool:
    """Makes a mount with other owners; whether this kernel has such: else the error must say so."""
    if features.IDMAP:
        ground.mount(*mount, *MAPS)  # type: ignore[arg-type]
        return True
    with pytest.raises(Unsupported):
        ground.mount(*mount, *MAPS)  # type: ignore[arg-type]
    assert not os.path.exists(ground.records)
    return False


def owner(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_uid, info.st_gid


def test_bind_with_other_owners(ground):
    """containerd forgets the owners of a bind mount that is read-only."""
    source, target = ground.tmpfs("source"), ground("t")
    below = ground.tmpfs("source/below")
    os.chown(below, 5, 6)
    if mapped(ground, "bind", source, target, "rbind", "ro"):
        assert owner(target) == (1000, 2000)
        assert owner(target / "below") == (1005, 2006)
        assert is_refused(target / "below/x")


def test_loop_with_other_owners(ground):
    disk = image(ground("disks") / "disk")
    if mapped(ground, "ext4", disk, ground("t"), "loop"):
        assert owner(ground("t")) == (1000, 2000)
        ground.unmount(ground("t"))
    assert leaks.no_loop_of(disk)


def test_overlay_with_other_owners(ground):
    """Its layers have them, since overlayfs itself cannot; the copies that this takes are gone at once."""
    layers = [ground(f"layers/{number}") for number in range(50)]
    alone = ground.tmpfs("alone")
    for layer in (*layers, alone):
        (layer / f"of-{layer.name}").touch()
    before = leaks.mounts()
    words = overlay.options([*map(str, layers), str(alone)], str(ground("upper")), str(ground("work")))
    if mapped(ground, "overlay", "overlay", ground("t"), *words):
        assert len(leaks.mounts()) == len(before) + 1
        assert not os.path.exists(ground.records)
        assert len(os.listdir(ground("t"))) == 51
        assert owner(ground("t") / "of-49") == (1000, 2000)
        assert owner(ground("t") / "of-alone") == (1000, 2000)
        ground.unmount(ground("t"))
    assert (layers[0] / "of-0").exists()


def test_what_has_no_mapped_mounts(ground):
    with pytest.raises(Unsupported):
        ground.mount("proc", "proc", ground("t"), *MAPS)
    assert not os.path.ismount(ground("t"))


def test_a_user_namespace_of_the_callers(ground):
    from holdfast.mounts import idmap

    maps, _ = idmap.take(["uidmap=0:7:1", "gidmap=0:8:1"])
    assert maps
    source = ground.tmpfs("source")
    with idmap.user_namespace(maps) as namespace:
        if features.IDMAP:
            ground.mount("bind", source, ground("t"), userns_fd=namespace.fileno())
            assert owner(ground("t")) == (7, 8)


def test_the_child_of_a_user_namespace_keeps_nothing_open(ground, monkeypatch):
    """A descriptor that it inherits would keep somebody's mount busy (containerd #12139: 2204 mounts left)."""
    from holdfast.mounts import idmap

    maps, _ = idmap.take(MAPS)
    assert maps
    kept = []

    def look(fd: int) -> OwnedFd:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith("_map"):
            kept.append(os.listdir(f"{os.path.dirname(path)}/fd"))
        return OwnedFd(fd)

    monkeypatch.setattr(idmap, "OwnedFd", look)
    with open(ground("t") / "file", "w"):
        idmap.user_namespace(maps).close()
    assert [len(fds) for fds in kept] == [2, 2]


# -- where


def test_a_target_under_a_root_does_not_leave_it(ground):
    """As containerd's Mount.Target: a path below the root, resolved in it."""
    root = ground("root")
    (ground("root/inside/d")).mkdir(exist_ok=True)
    outside = ground("outside")
    (root / "link").symlink_to("/inside")
    (root / "up").symlink_to("../../../outside")
    one = Mount("tmpfs", "none", "/link/d")
    assert make(one, str(root), records=ground.records) == str(root / "inside/d")
    with Root(str(root)) as opened:
        assert make(one, opened, records=ground.records) == str(root / "inside/d")
    assert unmount_all(str(root / "inside/d"), records=ground.records) == 2
    with pytest.raises(NotFound):
        make(Mount("bind", str(outside), "up"), str(root), records=ground.records)
    assert not os.path.ismount(outside)


def test_a_target_that_others_swap_does_not_lead_out_of_its_root(ground):
    """A directory on the way and a link to outside keep changing places while we mount below it."""
    root, outside = ground("root"), ground("outside/below").parent
    ground("root/dir/below")
    (root / "evil").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            syscalls.renameat2(str(root / "dir"), str(root / "evil"), syscalls.RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    made = 0
    try:
        for options in [["ro"], []] * 60:
            try:
                make(Mount("bind", str(outside), "dir/below", ["rbind", *options]), str(root), records=ground.records)
                made += 1
            except HoldfastError:
                pass
    finally:
        stop.set()
        thread.join()
    if os.path.islink(root / "dir"):
        syscalls.renameat2(str(root / "dir"), str(root / "evil"), syscalls.RENAME_EXCHANGE)
    # Whether any got through meanwhile is chance; this one does, so that what is looked at can be found.
    make(Mount("bind", str(outside), "dir/below", ["rbind"]), str(root), records=ground.records)
    made += 1
    assert not table.within(str(outside))
    assert not is_refused(outside / "x")
    assert unmount_all(str(root / "dir/below"), records=ground.records) == made


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [("", InvalidInput, "absolute"), ("relative", InvalidInput, "absolute"), ("link", InvalidInput, "it leads to"),
     ("nosuch", NotFound, "nosuch"), ("file", HoldfastError, "Not a directory")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_targets_that_cannot_be(ground, kind, target, error, text):
    ground("d").joinpath("file").touch()
    (ground("d") / "link").symlink_to(ground("real"))
    where = str(ground("d") / target) if target in ("link", "nosuch", "file") else target
    with pytest.raises(error, match=text):
        make(Mount(kind, str(ground("source")), where), records=ground.records)
    assert not os.path.ismount(ground("real"))


def test_all_or_nothing(ground):
    """containerd's All stops at the first error and leaves what it has made."""
    disk = image(ground("disks") / "disk")
    mounts = [
        Mount("tmpfs", "none", str(ground("a"))),
        Mount("ext4", str(disk), str(ground("b")), ["loop"]),
        Mount("bind", str(ground("a")), str(ground("b"))),
        Mount("nosuchfs", "none", str(ground("c"))),
    ]
    before = leaks.mounts()
    with pytest.raises(Unsupported, match=r"number 4\) nosuchfs"):
        mount_all(mounts, records=ground.records)
    assert leaks.mounts() == before
    assert leaks.no_loop_of(disk)
    assert mount_all(mounts[:3], records=ground.records) == [one.target for one in mounts[:3]]
    assert unmount_recursive(str(ground.folder), records=ground.records)
    assert leaks.no_loop_of(disk)


@pytest.mark.parametrize(
    ("mount", "text"),
    [
        (("tmpfs", "none", ["nosuchoption=1"]), "Invalid argument"),
        (("nosuchfs", "none", []), "does not know this filesystem"),
        (("bind", "/nosuch/source", []), "/nosuch/source"),
        (("ext4", "/dev/null", []), "Block device required"),
        (("fuse.nosuch", "x", []), "mount"),
    ],
    ids=["option", "filesystem", "source", "device", "helper"],
)
def test_errors_say_what_and_why(ground, mount: tuple[str, str, list[str]], text):
    kind, source, options = mount
    with pytest.raises(HoldfastError, match=text) as failure:
        ground.mount(kind, source, ground("t"), *options)
    assert kind in str(failure.value)
    assert not os.path.ismount(ground("t"))


def test_the_kernels_own_words(ground):
    if features.FSOPEN:
        with pytest.raises(HoldfastError, match="Unknown parameter 'nosuch'"):
            ground.mount("tmpfs", "none", ground("t"), "nosuch=1")


def test_no_descriptor_is_inherited(ground, monkeypatch):
    """One that a child keeps would keep a mount busy (containerd #12139)."""
    seen: list[str] = []

    def look(_point: str) -> None:
        words = ["ls", "-l", "/proc/self/fd"]
        seen.append(subprocess.run(words, capture_output=True, text=True, check=True, close_fds=False).stdout)

    monkeypatch.setattr(records, "reached", look)
    ground.mount("ext4", image(ground("disks") / "disk"), ground("t"), "loop")
    assert len(seen) >= 4
    assert not any("loop" in text or str(ground.folder) in text for text in seen)
