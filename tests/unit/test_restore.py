"""What a restored pod mounts again: made from the specification, saved, compared, each difference named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput, NotFound
from holdfast.spec.hints import Hint
from holdfast.spec.runtime import Mount
from holdfast.spec.tree import container_tree
from holdfast.storage.plan import DirectoryRoot, LayeredRoot
from holdfast.storage.restore import (
    SavedContainer,
    SavedMount,
    SavedPod,
    canonical_options,
    check_same,
    check_sources,
    differences,
    saved_container,
    saved_pod,
)
from holdfast.storage.survey import Source, lasting, look

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = LayeredRoot((("/l/2", "sha256:22"), ("/l/1", "sha256:11")), 1 << 20)
HINT = Hint("vol", "/host/vol", "tmpfs", "pod", ("size=1m", "noexec"))
HOST_HINT = Hint("dir", "/host/dir", "bind", "shared")
#: As a survey sees them, and :func:`lasting` leaves them.
SOURCES = {
    "/host/dir": Source("/host/dir", "directory", device=1, inode=10, size_bytes=4096),
    "/host/other": Source("/host/other", "directory", device=1, inode=11),
    "/host/file": Source("/host/file", "file", size_bytes=77),
    "/host/root": Source("/host/root", "directory", device=1, inode=14),
}
MOUNTS = (
    Mount("/other", "bind", "/host/other", ("rbind", "ro")),
    Mount("/sub", "bind", "/host/dir/sub", ("rbind",)),
    Mount("/file", "bind", "/host/file", ("bind", "nosuid")),
    Mount("/disk", "virtual-disk", "/host/disk", ("rw", "x-holdfast.partition=1")),
    Mount("/vol", "bind", "/host/vol/a/", ("rbind", "noexec", "ro")),
    Mount("/huge", "bind", "hugepages://2M/h", ("rbind",)),
    Mount("/scratch", "tmpfs", "tmpfs", ("size=1m", "nosuid")),
)


def container(name: str = "app", mounts: tuple[Mount, ...] = MOUNTS, root: Any = LAYERS, **tmp: Any) -> SavedContainer:
    return saved_container(name, root, container_tree(mounts, **tmp), SOURCES, (HINT, HOST_HINT), (HINT,))


def pod(**what: Any) -> SavedPod:
    return saved_pod([container(**what)], (HINT, HOST_HINT))


def changed(index: int, **fields: Any) -> SavedPod:
    mounts = list(MOUNTS)
    mounts[index] = msgspec.structs.replace(mounts[index], **fields)
    return pod(mounts=tuple(mounts))


# What is recorded


def test_root_first_then_the_whole_tree() -> None:
    found = container()
    assert [mount.name for mount in found.mounts] == [
        "/", "/proc", "/sys", "/dev", "/dev/pts",
        "/other", "/sub", "/file", "/disk", "/vol", "/huge", "/scratch",
    ]  # fmt: skip
    assert found.hints == (HINT,)
    by_name = {mount.name: mount for mount in found.mounts}
    assert by_name["/"] == SavedMount("/", "layers", "machine", layers=("sha256:22", "sha256:11"))
    assert by_name["/proc"].contents == by_name["/dev/pts"].contents == "kernel"
    assert by_name["/dev"].contents == by_name["/scratch"].contents == "machine"
    assert by_name["/vol"] == SavedMount(
        "/vol", "bind", "machine", ("ro", "noexec", "rbind"), volume="vol", sub_path="a"
    )  # fmt: skip
    assert by_name["/huge"] == SavedMount(
        "/huge", "bind", "machine", ("rbind",), volume="hugepages-2M", sub_path="h"
    )  # fmt: skip
    assert by_name["/other"] == SavedMount("/other", "bind", "host", ("ro", "rbind"), "/host/other", 1, 11)
    assert by_name["/sub"] == SavedMount("/sub", "bind", "host", ("rbind",), volume="dir", sub_path="sub")
    assert by_name["/file"] == SavedMount("/file", "bind", "host", ("nosuid", "bind"), "/host/file")
    assert by_name["/disk"] == SavedMount(
        "/disk", "virtual-disk", "machine", ("x-holdfast.partition=1",), "/host/disk"
    )  # fmt: skip
    assert [mount.name for _, mount in pod().of_host()] == ["/other", "/sub", "/file"]


@pytest.mark.parametrize(("options", "contents"), [(("ro",), "host"), ((), "machine")])
def test_a_named_volume_is_told_by_its_name(options: tuple[str, ...], contents: str) -> None:
    found = container(mounts=(Mount("/v", "volume", "db", options),)).mounts[-1]
    assert (found.kind, found.contents, found.source) == ("volume", contents, "db")


def test_what_lasts_of_a_source(tmp_path: Path) -> None:
    """Devices are numbered anew when the host starts; a file may be replaced while the pod runs."""
    (tmp_path / "file").touch()
    folder = look(str(tmp_path))
    assert lasting(folder) == msgspec.structs.replace(folder, device=os.statvfs(tmp_path).f_fsid)
    for source in (look(str(tmp_path / "file")), look("/dev/null")):
        disk = lasting(source, disk=True)
        assert (disk.kind, disk.device, disk.inode) == (source.kind, 0, 0)
    assert lasting(look(str(tmp_path / "file"))).inode == 0
    assert lasting(look("/dev/null")) == look("/dev/null")
    assert lasting(msgspec.structs.replace(folder, path=str(tmp_path / "gone"))).kind == "unreadable"


@pytest.mark.parametrize(
    ("root", "options", "kind", "contents"),
    [
        (msgspec.structs.replace(LAYERS, scratch_bytes=0), ("ro",), "layers", "machine"),
        (DirectoryRoot("/host/root", read_only=True), ("ro",), "directory", "host"),
        (DirectoryRoot("/host/root", read_only=False), (), "directory", "host"),
    ],
)
def test_root(root: Any, options: tuple[str, ...], kind: str, contents: str) -> None:
    found = container(root=root).mounts[0]
    assert (found.kind, found.options, found.contents) == (kind, options, contents)


@pytest.mark.parametrize("image_tmp", ["missing", "empty", "not-empty", "not-a-directory"])
@pytest.mark.parametrize("below", [(), (Mount("/tmp/x", "tmpfs", "tmpfs"),)])
def test_tmp_is_expected_where_it_was_mounted(image_tmp: str, below: tuple[Mount, ...]) -> None:
    """Defect of the reference: a restore expected a tmpfs whenever /tmp was not in the specification."""
    found = container(mounts=below, image_tmp=image_tmp)
    expected = image_tmp in ("missing", "empty") and not below
    assert any(mount.name == "/tmp" for mount in found.mounts) == expected


def test_tmpfs_hint_shared_with_the_outside_is_an_ordinary_mount() -> None:
    outside = msgspec.structs.replace(HINT, share="shared", source="/host/dir")
    tree = container_tree([Mount("/d", "bind", "/host/dir", ("rbind",))])
    found = saved_container("a", LAYERS, tree, SOURCES, [outside]).mounts[-1]
    assert (found.contents, found.volume, found.inode) == ("host", "", 10)


def test_devices_are_told_apart() -> None:
    disks = tuple(Mount("blockdev://", "virtual-disk", path) for path in ("/host/a", "/host/b"))
    assert [mount.name for mount in container(mounts=disks).mounts[5:]] == [
        "blockdev:// /host/a",
        "blockdev:// /host/b",
    ]


@pytest.mark.parametrize("kind", ["missing", "dangling link", "unreadable"])
def test_nothing_is_recorded_of_what_is_gone(kind: str) -> None:
    tree = container_tree([Mount("/d", "bind", "/host/x", ("rbind",))])
    with pytest.raises(NotFound, match=f"app: /d: its source /host/x is {kind}") as caught:
        saved_container("app", LAYERS, tree, {"/host/x": Source("/host/x", kind)})
    assert caught.value.code == "source-not-found"
    with pytest.raises(NotFound, match="was not looked at"):
        saved_container("app", LAYERS, tree, {})


# The record


def test_a_record_has_one_order() -> None:
    saved = saved_pod([container("b"), container("a", root=DirectoryRoot("/host/root", True))], (HOST_HINT, HINT))
    assert [one.name for one in saved.containers] == ["a", "b"]
    assert [hint.name for hint in saved.hints] == ["dir", "vol"]


def test_a_record_from_before_containers_had_hints() -> None:
    """A manifest that is read must be the same bytes when it is written again."""
    data = b'{"hints":[],"containers":[{"name":"c","mounts":[]}],"version":1}'
    assert msgspec.json.encode(msgspec.json.decode(data, type=SavedPod)) == data


NAMES = st.text(min_size=1, max_size=5)
RECORDS = st.builds(
    SavedPod,
    st.lists(st.builds(Hint, NAMES, NAMES, st.just("bind"), st.just("pod")), max_size=2).map(tuple),
    st.lists(
        st.builds(
            SavedContainer,
            NAMES,
            st.lists(
                st.builds(SavedMount, NAMES, NAMES, st.sampled_from(["machine", "kernel", "host"])), max_size=3
            ).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
)


@given(RECORDS)
def test_every_record_comes_back_and_is_what_it_was(record: SavedPod) -> None:
    assert msgspec.json.decode(msgspec.json.encode(record), type=SavedPod) == record
    assert list(differences(record, record)) == []


# Comparing


@pytest.mark.parametrize(
    "same",
    [
        {"mounts": tuple(reversed(MOUNTS))},
        {"mounts": (Mount("/other", "bind", "/elsewhere", ("ro",)), *MOUNTS)},
        {"mounts": (*MOUNTS[:6], Mount("/scratch/", "tmpfs", "none", ("nosuid,relatime", "rw", "size=1024k")))},
    ],
)
def test_what_makes_no_difference(same: dict[str, Any]) -> None:
    check_same(pod(), pod(**same))


def test_path_of_the_same_thing_may_change() -> None:
    moved = {**SOURCES, "/moved": msgspec.structs.replace(SOURCES["/host/other"], path="/moved", size_bytes=99)}
    mounts = [msgspec.structs.replace(m, source="/moved") if m.destination == "/other" else m for m in MOUNTS]
    now = saved_pod(
        [saved_container("app", LAYERS, container_tree(mounts), moved, (HINT, HOST_HINT))], (HINT, HOST_HINT)
    )  # fmt: skip
    check_same(pod(), now)


def test_path_of_what_has_no_other_identity_may_not() -> None:
    """FUSE filesystems have no id, and all roots of them inode 1."""

    def at(path: str) -> SavedPod:
        sources = {path: Source(path, "directory", device=0, inode=1)}
        return saved_pod([saved_container("app", LAYERS, container_tree([Mount("/m", "bind", path)]), sources)])

    check_same(at("/one"), at("/one"))
    with pytest.raises(InvalidInput, match="source was /one"):
        check_same(at("/one"), at("/two"))


DIFFERENT: list[tuple[SavedPod, str]] = [
    (pod(mounts=MOUNTS[1:]), "container app: the mount at /other is missing"),
    (pod(mounts=(*MOUNTS, Mount("/new", "tmpfs"))), "container app: the mount at /new was not there"),
    (pod(image_tmp="empty"), "container app: the mount at /tmp was not there"),
    (changed(0, options=("rbind",)), "the mount at /other: options was ro,rbind, is rbind"),
    (changed(0, options=("bind", "ro")), "the mount at /other: options was ro,rbind, is ro,bind"),
    (
        changed(0, source="/host/root"),
        "the mount at /other: source was /host/other (device 1, inode 11), is /host/root (device 1, inode 14)",
    ),
    (changed(3, source="/host/else"), "the mount at /disk: source was /host/disk, is /host/else"),
    (
        changed(3, options=("rw", "x-holdfast.partition=2")),
        "the mount at /disk: options was x-holdfast.partition=1, is",
    ),
    (changed(6, options=("size=2m", "nosuid")), "the mount at /scratch: options was nosuid,size=1048576, is"),
    (changed(6, type="ramfs"), "the mount at /scratch: kind was tmpfs, is ramfs"),
    (changed(4, source="/host/vol/b"), "the mount at /vol: sub_path was a, is b"),
    (changed(4, source="/host/file"), "the mount at /vol: volume was vol, is none"),
    (changed(2, source="/host/root"), "the mount at /file: source was /host/file, is /host/root (device 1, inode 14)"),
    (changed(5, source="hugepages://1G/h"), "the mount at /huge: volume was hugepages-2M, is hugepages-1G"),
    (pod(root=msgspec.structs.replace(LAYERS, scratch_bytes=0)), "the mount at /: options was none, is ro"),
    (pod(root=msgspec.structs.replace(LAYERS, encrypted=True)), "the mount at /: options was none, is encrypted"),
    (pod(root=msgspec.structs.replace(LAYERS, shared=True)), "the mount at /: options was none, is shared-scratch"),
    (
        pod(root=msgspec.structs.replace(LAYERS, layers=LAYERS.layers[1:])),
        "the mount at /: layers was sha256:22,sha256:11, is sha256:11",
    ),
    (pod(root=DirectoryRoot("/host/root", False)), "the mount at /: kind was layers, is directory"),
    (pod(name="other"), "container app is missing"),
    (saved_pod([container(), container("two")], (HINT, HOST_HINT)), "container two was not there"),
    (saved_pod([container()], (HOST_HINT,)), "hint vol is missing"),
    (saved_pod([container()], (HINT, HOST_HINT, Hint("x", "/x", "bind", "pod"))), "hint x was not there"),
    (
        saved_pod([container()], (msgspec.structs.replace(HINT, source="/host/else"), HOST_HINT)),
        "hint vol: source was /host/vol, is /host/else",
    ),
    (
        saved_pod([container()], (msgspec.structs.replace(HINT, options=("size=2m",)), HOST_HINT)),
        "hint vol: options was noexec,size=1m, is size=2m",
    ),
]


@pytest.mark.parametrize(("now", "said"), DIFFERENT)
def test_difference_is_refused_with_its_name(now: SavedPod, said: str) -> None:
    """Reports on the reference: a mount more or less was ignored, or failed with "cannot allocate memory"."""
    with pytest.raises(InvalidInput) as caught:
        check_same(pod(), now, "pod1")
    assert caught.value.code == "restore-differs"
    assert said in caught.value.why
    assert "pod1" in str(caught.value)


def test_order_of_a_hints_options_makes_no_difference() -> None:
    turned = msgspec.structs.replace(HINT, options=HINT.options[::-1])
    check_same(pod(), saved_pod([container()], (turned, HOST_HINT)))


def test_all_differences_at_once() -> None:
    found = list(differences(pod(), pod(mounts=(MOUNTS[1], Mount("/new", "tmpfs")))))
    assert len(found) == 7, found
    assert found == sorted(found)


# What the host has


#: As they are recorded of what a pod holds.
HELD = SavedPod(
    containers=(
        SavedContainer(
            "app",
            (
                SavedMount("/dir", "bind", "host", ("rbind",), "/host/dir", 1, 10),
                SavedMount("/file", "bind", "host", ("rbind",), "/host/file"),
                SavedMount("/disk", "virtual-disk", "host", ("ro",), "/host/disk", size_bytes=1 << 20),
            ),
        ),
    )
)


def seen(path: str = "", **fields: Any) -> dict[str, Source]:
    found = {**SOURCES, "/host/disk": Source("/host/disk", "file", size_bytes=1 << 20)}
    return {**found, path: msgspec.structs.replace(found[path], **fields)} if path else found


def test_host_has_all() -> None:
    check_sources(HELD, seen())
    check_sources(HELD, seen("/host/dir", size_bytes=1))  # of a folder it means nothing
    check_sources(HELD, seen("/host/file", size_bytes=1))  # whoever writes to it makes it another one


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"inode": 99}, "another directory now (device 1, inode 10 before, device 1, inode 99 now)"),
        ({"device": 9}, "another directory now (device 1, inode 10 before, device 9, inode 10 now)"),
        ({"kind": "file", "inode": 5}, "another file now"),
    ],
)
def test_another_thing_at_the_path(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_sources(HELD, seen("/host/dir", **fields), subject="pod1")
    assert caught.value.code == "restore-source"
    assert "/host/dir, which container app has at /dir, is" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "dangling link", "unreadable"])
def test_missing_on_the_host(kind: str) -> None:
    with pytest.raises(NotFound) as caught:
        check_sources(HELD, seen("/host/file", kind=kind, why="No such file"))
    assert caught.value.code == "restore-source"
    assert f"/host/file, which container app has at /file, is {kind}: No such file" in str(caught.value)
    with pytest.raises(NotFound, match="is missing"):
        check_sources(HELD, {})


def test_a_disk_must_have_its_size() -> None:
    with pytest.raises(InvalidInput, match="at /disk, has 512 bytes now, 1048576 before"):
        check_sources(HELD, seen("/host/disk", size_bytes=512))


def test_missing_and_changed_are_told_together() -> None:
    now = {**seen("/host/dir", inode=9), "/host/file": Source("/host/file", "missing")}
    with pytest.raises(InvalidInput, match=r"another directory.*/host/file, which"):
        check_sources(HELD, now)


# Options


@pytest.mark.parametrize(
    ("options", "kind", "canonical"),
    [
        ((), "bind", ("rbind",)),
        (("bind",), "bind", ("bind",)),
        (("rw", "relatime", "dev", "exec", "suid", "async", "defaults"), "tmpfs", ()),
        (("RO", "nodev,noexec"), "tmpfs", ("ro", "nodev", "noexec")),
        (("rro", "rnosuid"), "bind", ("ro", "rro", "nosuid", "rnosuid", "rbind")),
        (("rprivate", "rslave", "rprivate"), "bind", ("rbind", "rslave", "rprivate")),
        (("mode=01777", "size=2k", "size=1k"), "tmpfs", ("mode=1777", "size=1024")),
        (("size=0", "mode=x"), "tmpfs", ("mode=x", "size=0")),
        (("cache=strict", "mode=x"), "cifs", ("cache=strict", "mode=x")),
        (("x-systemd.automount", "x-holdfast.format=raw"), "virtual-disk", ("x-holdfast.format=raw",)),
    ],
)
def test_canonical_options(options: tuple[str, ...], kind: str, canonical: tuple[str, ...]) -> None:
    assert sorted(canonical_options(options, kind)) == sorted(canonical)


FLAGS = ["ro", "noexec", "nosuid", "rnodev", "noatime", "size=1m", "mode=700", "uid=1"]


@given(st.lists(st.sampled_from(FLAGS), unique=True).flatmap(st.permutations), st.sampled_from(["bind", "tmpfs"]))
def test_order_of_options_makes_no_difference(words: list[str], kind: str) -> None:
    canonical = canonical_options(words, kind)
    assert canonical == canonical_options(sorted(words), kind)
    assert canonical_options(canonical, kind) == canonical
