"""Planning is pure, orders the steps, and finds every mistake that can be known before anything is touched."""

from __future__ import annotations

import copy
import os
import socket
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Exhausted, HoldfastError, InUse, InvalidInput, NotFound, Unsupported
from holdfast.spec.runtime import DISK_TYPES, spec_from_raw
from holdfast.storage import plan as plan_module
from holdfast.storage.plan import DirectoryRoot, LayeredRoot, PodSnapshot, plan_container
from holdfast.storage.steps import (
    CombineLayers,
    MakeMountPoints,
    MakeScratch,
    MountDisk,
    MountLayer,
    OverlayMount,
    RunContainer,
    ShareDirectory,
)
from holdfast.storage.survey import Source, look, survey

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.storage.steps import Plan

ROOT = LayeredRoot((("/layers/top", "sha256:" + "a" * 64), ("/layers/bottom", "sha256:" + "b" * 64)), 64 << 20)
DISK = Source("/disk", "file", device=1, inode=2, size_bytes=1 << 20, filesystem="ext4")
DIRECTORY = Source("/dir", "directory", device=1, inode=3)
FILE = Source("/file", "file", device=1, inode=4, size_bytes=5)
SOURCES = {source.path: source for source in (DISK, DIRECTORY, FILE)}


def document(*mounts: dict[str, Any]) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "args": ["/bin/sh", "-c", "x"]},
        "root": {"path": "rootfs", "readonly": True},
        "mounts": list(mounts),
        "hooks": {"prestart": [{"path": "/bin/true"}]},
        "windows": {"layerFolders": []},
        "linux": {"resources": {"pids": {"limit": 7}, "blockIO": {"weight": 10}, "network": {"classID": 1}}},
        "unknown": {"kept": [1, None]},
    }


def plan(*mounts: dict[str, Any], sources: dict[str, Source] | None = None, snapshot: PodSnapshot | None = None,
         root: LayeredRoot | DirectoryRoot = ROOT, raw: dict[str, Any] | None = None) -> Plan:  # fmt: skip
    raw = raw or document(*mounts)
    return plan_container("c", raw, spec_from_raw(raw), root, SOURCES if sources is None else sources, snapshot)


def disk(path: str = "/disk", destination: str = "/mnt", *options: str, kind: str = "virtual-disk") -> dict[str, Any]:
    return {"type": kind, "source": path, "destination": destination, "options": list(options)}


def bind(path: str = "/dir", destination: str = "/mnt", *options: str) -> dict[str, Any]:
    return {"type": "bind", "source": path, "destination": destination, "options": list(options)}


PROC = {"type": "proc", "source": "proc", "destination": "/proc"}
TMPFS = {"type": "tmpfs", "source": "tmpfs", "destination": "/tmp", "options": ["size=1m"]}


# -- what is planned --------------------------------------------------------------------------


def test_order_and_description():
    made = plan(PROC, disk(), bind(destination="/b"), bind("/file", "/f", "ro"), TMPFS)
    assert [type(step) for step in made.steps] == [
        MountLayer, MountLayer, MakeScratch, CombineLayers, MountDisk, ShareDirectory, ShareDirectory, RunContainer,
    ]  # fmt: skip
    assert made.describe() == [
        "attach layer aaaaaaaaaaaa read-only and mount it",
        "attach layer bbbbbbbbbbbb read-only and mount it",
        "make a scratch disk of 64 MiB and mount it",
        "combine 2 layers into a writable root filesystem",
        "attach raw disk /disk writable and mount its ext4",
        "share directory /dir writable",
        "share file /file read-only",
        "run /bin/sh -c x",
    ]
    assert (made.container, made.root) == ("c", "root")
    assert [rewrite.index for rewrite in made.rewrites] == [1, 2, 3]


def test_a_root_filesystem_without_writes():
    made = plan(root=LayeredRoot((("/layers/top", ""),), 0))
    assert [type(step) for step in made.steps] == [MountLayer, CombineLayers, RunContainer]
    assert made.describe()[:2] == [
        "attach layer /layers/top read-only and mount it",
        "combine 1 layer into a read-only root filesystem",
    ]


def test_a_root_filesystem_that_is_a_directory():
    made = plan(root=DirectoryRoot("/dir", read_only=False))
    assert made.steps[0] == ShareDirectory("root", "/dir", 1, 3, False)
    assert made.rewritten({"root": "/run/mounts/shares/m0"})["root"]["path"] == "/run/mounts/shares/m0"


def test_a_directory_that_is_written_to_gets_mount_points_until_nobody_has_it():
    mounts = (
        PROC, TMPFS, bind("/file", "/tmp/in/it"), bind("/dir", "a/../b/"), bind("/file", "/b/c", "overlay"),
        bind("/file", "f", "overlay"), disk("/disk", "/d", "ro"), disk("/disk", "blockdev:///dev/d", "ro"),
        {"type": "bind", "source": "sandbox:///s", "destination": "/s"},
        {"type": "bind", "source": "uvm:///etc", "destination": "/u"},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/run", "options": ["mode=700,size=1m", "mode=0710"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/x", "options": ["mode=rwx"]},
    )  # fmt: skip
    made = plan(*mounts, root=DirectoryRoot("/dir", read_only=False))
    [step] = [step for step in made.steps if isinstance(step, MakeMountPoints)]
    assert (step.path, step.device, step.inode) == ("/dir", 1, 3)
    assert step.describe() == "make the mount points that /dir lacks"
    assert [(p.path, p.directory, p.mode) for p in step.points] == [
        ("proc", True, 0o755), ("tmp", True, 0o1777), ("b", True, 0o755), ("f", False, 0o755), ("d", True, 0o755),
        ("s", True, 0o755), ("run", True, 0o710), ("x", True, 0o1777),
    ]  # fmt: skip
    assert made.steps.index(step) > max(i for i, s in enumerate(made.steps) if isinstance(s, OverlayMount))
    assert not any(isinstance(step, MakeMountPoints) for step in plan(*mounts[:2]).steps)


def test_a_tmp_in_memory_is_a_mount_point_too():
    raw = document(PROC)
    root = DirectoryRoot("/dir", read_only=False)
    made = plan_container("c", raw, spec_from_raw(raw), root, SOURCES, tmp=True)
    [step] = [step for step in made.steps if isinstance(step, MakeMountPoints)]
    assert [(p.path, p.mode) for p in step.points] == [("proc", 0o755), ("tmp", 0o1777)]


def test_a_directory_that_is_not_written_to_gets_its_mount_points_above_it():
    made = plan(root=DirectoryRoot("/dir", read_only=True))
    assert made.steps[:2] == (ShareDirectory("tree", "/dir", 1, 3, True), CombineLayers("root", ("tree",)))
    assert made.rewritten({"root": "/run/gcs/c/c/rootfs"})["root"]["readonly"] is True


def test_one_layer_twice_is_one_layer():
    """overlayfs refuses a lower directory that is there twice; the upper one hides the lower anyway."""
    top, bottom = ROOT.layers
    made = plan(root=LayeredRoot((top, bottom, top), 64 << 20))
    assert [step.path for step in made.steps if isinstance(step, MountLayer)] == ["/layers/top", "/layers/bottom"]


def test_steps_are_data():
    made = plan(disk(), bind("/file"))
    for step in made.steps:
        assert msgspec.json.decode(msgspec.json.encode(step), type=type(step)) == step
        assert hash(step)


@pytest.mark.parametrize(
    "option",
    ["ro", "RO", "rO", "readonly", "ReadOnly", "read-only", "readonly=true", "rro", "ro=1", "rw,ro", "ro,rw"],
)
@pytest.mark.parametrize("what", ["disk", "share"])
def test_read_only_in_any_spelling(what, option):
    made = plan(disk("/disk", "/m", option) if what == "disk" else bind("/dir", "/m", option))
    step = made.steps[-2]
    assert step.read_only
    assert made.rewrites[0].options == ("rbind", "ro")


@pytest.mark.parametrize("option", ["rw", "readonly=false", "row", "roo", "errors=remount-ro", "noatime"])
def test_what_is_not_read_only(option):
    assert not plan(disk("/disk", "/m", option)).steps[-2].read_only


@pytest.mark.parametrize("filesystem", ["erofs", "squashfs", "iso9660"])
def test_filesystems_that_cannot_be_written(filesystem):
    source = msgspec.structs.replace(DISK, filesystem=filesystem)
    assert plan(disk(), sources={"/disk": source}).steps[-2].read_only


def test_options_go_where_they_work():
    """The filesystem's to the mount of the disk; the flags to the container's bind as well."""
    made = plan(disk("/disk", "/m", "noexec", "data=ordered", "rshared", "ro"))
    assert made.steps[-2].options == ("noexec", "data=ordered", "rshared")
    assert made.rewrites[0].options == ("rbind", "ro", "noexec", "rshared")
    made = plan(bind("/dir", "/m", "bind", "nosuid"))
    assert not made.steps[-2].recursive
    assert made.rewrites[0].options == ("bind", "rw", "nosuid")
    assert plan(bind("/dir", "/m", "rbind")).steps[-2].recursive


def test_a_bind_by_its_options_alone():
    made = plan({"type": "none", "source": "/dir", "destination": "/m", "options": ["rbind"]})
    assert isinstance(made.steps[-2], ShareDirectory)


def test_the_same_thing_twice_is_one_step():
    made = plan(disk("/disk", "/a"), disk("/disk", "/b"), bind("/dir", "/c"), bind("/dir", "/d"))
    assert [step.id for step in made.steps[4:-1]] == ["m0", "m2"]
    assert [rewrite.step for rewrite in made.rewrites] == ["m0", "m0", "m2", "m2"]
    differing = plan(bind("/dir", "/c"), bind("/dir", "/d", "ro"))
    assert [step.id for step in differing.steps[4:-1]] == ["m0", "m1"]


# -- purity -----------------------------------------------------------------------------------


def test_rewriting_changes_a_copy():
    raw = document(PROC, disk("/disk", "/m", "ro"), bind())
    before = copy.deepcopy(raw)
    made = plan(raw=raw)
    rewritten = made.rewritten({"root": "/r", "m1": "/run/mounts/scsi/m0", "m2": "/run/mounts/shares/m0"})
    assert raw == before
    assert rewritten["mounts"] == [
        PROC,
        {"type": "bind", "source": "/run/mounts/scsi/m0", "destination": "/m", "options": ["rbind", "ro"]},
        {"type": "bind", "source": "/run/mounts/shares/m0", "destination": "/mnt", "options": ["rbind", "rw"]},
    ]
    assert rewritten["root"] == {"path": "/r", "readonly": True}
    assert rewritten["linux"]["cgroupsPath"] == "/c"
    assert rewritten["unknown"] == {"kept": [1, None]}
    assert "hooks" not in rewritten
    assert rewritten["linux"]["resources"] == {"pids": {"limit": 7}}
    assert "windows" not in rewritten
    rewritten["mounts"][0]["type"] = "changed"
    assert raw == before
    assert made.rewritten({"root": "/r", "m1": "/1", "m2": "/2"})["mounts"][0] == PROC


a_mount = st.fixed_dictionaries(
    {"destination": st.sampled_from(["/a", "/b", ""])},
    optional={
        "type": st.sampled_from(["bind", "virtual-disk", "physical-disk", "tmpfs", "volume", "", "proc"]),
        "source": st.sampled_from(["/disk", "/dir", "/file", "/nosuch", "relative", ""]),
        "options": st.lists(
            st.sampled_from(["ro", "rbind", "bind", "nosuid", "x=y", "shared", "readonly=maybe"]), max_size=3
        ),
    },
)  # fmt: skip


@given(st.lists(a_mount, max_size=4))
def test_whatever_is_asked_for_nothing_is_changed(mounts):
    """Planned or refused: the document and the sources are as before, and a refusal is one of ours."""
    raw = document(*mounts)
    before = copy.deepcopy(raw)
    sources = {**SOURCES, "/nosuch": Source("/nosuch", "missing", why="No such file or directory")}
    seen = copy.deepcopy(sources)
    try:
        made = plan(raw=raw, sources=sources)
    except HoldfastError:
        pass
    else:
        paths = {step.id: f"/guest/{step.id}" for step in made.steps}
        rewritten = made.rewritten(paths)
        assert len(rewritten["mounts"]) == len(raw["mounts"])
        for rewrite in made.rewrites:
            assert rewritten["mounts"][rewrite.index]["source"] == paths[rewrite.step]
    assert raw == before
    assert sources == seen


def test_nothing_is_opened(monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("planning touches nothing")

    for name in ("open", "stat", "lstat", "readlink", "scandir"):
        monkeypatch.setattr(os, name, forbidden)
    plan(disk(), bind(), bind("/file"))


# -- bad input --------------------------------------------------------------------------------


def replaced(**changes: Any) -> dict[str, Source]:
    return {"/disk": msgspec.structs.replace(DISK, **changes)}


@pytest.mark.parametrize(
    ("mount", "sources", "kind", "code", "says"),
    [
        pytest.param(bind(""), None, InvalidInput, "mount-incomplete", "a source and a destination", id="no source"),
        pytest.param(
            disk(""), None, InvalidInput, "mount-incomplete", "a source and a destination", id="disk without source"
        ),
        pytest.param(bind("/dir", ""), None, InvalidInput, "mount-incomplete", "a source and", id="no destination"),
        pytest.param(
            disk("/disk", ""), None, InvalidInput, "mount-incomplete", "a source and", id="disk without destination"
        ),
        pytest.param(bind("dir"), None, InvalidInput, "mount-source", "not an absolute path", id="relative"),
        pytest.param(
            disk(),
            {"/disk": Source("/disk", "missing", why="No such file or directory")},
            NotFound,
            "source-not-found",
            "No such file",
            id="missing",
        ),
        pytest.param(
            disk(),
            {"/disk": Source("/disk", "dangling link")},
            NotFound,
            "source-dangling",
            "link to nothing",
            id="dangling",
        ),
        pytest.param(
            disk(),
            {"/disk": Source("/disk", "unreadable", why="Permission denied")},
            InvalidInput,
            "source-unreadable",
            "Permission denied",
            id="unreadable",
        ),
        pytest.param(bind(), {"/dir": Source("/dir", "socket")}, Unsupported, "source-kind", "a socket", id="socket"),
        pytest.param(bind(), {"/dir": Source("/dir", "FIFO")}, Unsupported, "source-kind", "a FIFO", id="FIFO"),
        pytest.param(
            bind(), {"/dir": Source("/dir", "character device")}, Unsupported, "source-kind", "a character", id="device"
        ),
        pytest.param(
            disk(), replaced(kind="socket"), InvalidInput, "source-kind", "a socket, not a disk", id="disk: socket"
        ),
        pytest.param(disk(), replaced(kind="FIFO"), InvalidInput, "source-kind", "a FIFO, not a disk", id="disk: FIFO"),
        pytest.param(
            disk(), replaced(kind="directory"), InvalidInput, "source-kind", "a directory", id="disk: directory"
        ),
        pytest.param(
            disk(kind="physical-disk"),
            replaced(),
            InvalidInput,
            "source-kind",
            "not a block device",
            id="physical: file",
        ),
        pytest.param(
            disk(kind="physical-disk"),
            replaced(kind="block device", mounted=True),
            InUse,
            "disk-in-use",
            "the host, or another pod, uses this device",
            id="physical: mounted",
        ),
        pytest.param(
            disk(), replaced(filesystem=""), InvalidInput, "no-filesystem", "no known filesystem", id="no filesystem"
        ),
        pytest.param(disk(), replaced(filesystem="luks"), InvalidInput, "no-filesystem", "it holds luks", id="luks"),
        pytest.param(disk(), replaced(filesystem="swap"), InvalidInput, "no-filesystem", "it holds swap", id="swap"),
        pytest.param(disk(), replaced(size_bytes=0), InvalidInput, "disk-size", "0 bytes", id="empty"),
        pytest.param(
            disk(), replaced(size_bytes=1000), InvalidInput, "disk-size", "whole number of sectors", id="odd size"
        ),
        pytest.param(
            disk(),
            replaced(disk_format="qcow2 with another file"),
            Unsupported,
            "disk-format",
            "another file",
            id="qcow2",
        ),
        pytest.param({**bind(), "type": "image"}, None, Unsupported, "mount-type", "image", id="image"),
        pytest.param(
            bind("/dir", "/m", "ro=perhaps"), None, InvalidInput, "mount-option", "neither true nor false", id="option"
        ),
    ],
)
def test_bad_mounts(mount, sources, kind, code, says):
    with pytest.raises(kind, match=says) as failure:
        plan(PROC, mount, sources=sources)
    assert type(failure.value) is kind
    assert failure.value.code == code
    if code not in ("mount-option",):
        assert failure.value.subject.startswith("mounts[1]")


def test_a_qcow2_of_unknown_contents_is_the_guests_to_judge():
    source = replaced(disk_format="qcow2", filesystem="")
    assert plan(disk(), sources=source).steps[-2].disk_format == "qcow2"


@pytest.mark.parametrize(
    "mounts",
    [
        (disk("/disk", "/a"), disk("/disk", "/b", "ro")),
        (disk("/disk", "/a", "ro"), disk("/disk", "/b")),
        (disk("/disk", "/a"), disk("/disk", "/b", "noatime")),
        (disk("/disk", "/a"), disk("/link", "/b")),
    ],
    ids=["writable and read-only", "read-only and writable", "writable twice", "writable by two names"],
)
def test_one_writer(mounts):
    sources = {"/disk": DISK, "/link": msgspec.structs.replace(DISK, path="/link")}
    with pytest.raises(InUse, match="open for writing and a second time") as failure:
        plan(*mounts, sources=sources)
    assert failure.value.code == "disk-in-use"


def test_any_number_of_readers():
    sources = {"/disk": DISK, "/link": msgspec.structs.replace(DISK, path="/link")}
    made = plan(
        disk("/disk", "/a", "ro"), disk("/link", "/b", "ro"), disk("/disk", "/c", "ro", "nodev"), sources=sources
    )
    assert len(made.rewrites) == 3


@pytest.mark.parametrize(
    ("theirs", "options", "refused"),
    [(True, ["ro"], True), (True, [], False), (False, [], True), (False, ["ro"], False)],
)
def test_what_the_pod_has_already(theirs, options, refused):
    snapshot = PodSnapshot(disks={(1, 2): theirs})
    if refused:
        with pytest.raises(InUse):
            plan(disk("/disk", "/m", *options), snapshot=snapshot)
    else:
        plan(disk("/disk", "/m", *options), snapshot=snapshot)


def test_slots():
    plan(disk(), snapshot=PodSnapshot(free_slots=4))
    with pytest.raises(Exhausted, match="4 disks needed, 3 SCSI slots free") as failure:
        plan(disk(), snapshot=PodSnapshot(free_slots=3))
    assert failure.value.code == "no-free-slot"
    many = [disk(f"/d{n}", f"/m{n}") for n in range(254)]
    sources = {f"/d{n}": msgspec.structs.replace(DISK, path=f"/d{n}", inode=n) for n in range(254)}
    with pytest.raises(Exhausted, match="257 disks needed, 256"):
        plan(*many, sources=sources)
    plan(*many[:-1], sources=sources)


def test_what_is_attached_already_needs_no_slot():
    snapshot = PodSnapshot(free_slots=1, disks={(1, 2): True}, layers=frozenset((path, "") for path, _ in ROOT.layers))
    plan(disk(), snapshot=snapshot)
    with pytest.raises(Exhausted, match="1 disks needed, 0"):
        plan(disk(), snapshot=msgspec.structs.replace(snapshot, free_slots=0))


def test_one_disk_mounted_in_two_ways_needs_one_slot():
    plan(disk("/disk", "/a", "ro"), disk("/disk", "/b", "ro", "nodev"), snapshot=PodSnapshot(free_slots=4))


def test_shares_need_no_slot():
    plan(bind(), bind("/file", "/f"), root=DirectoryRoot("/dir", False), snapshot=PodSnapshot(free_slots=0))


def test_names_in_use():
    with pytest.raises(InUse, match="the pod has one of this name"):
        plan(snapshot=PodSnapshot(containers=frozenset({"c"})))


def test_no_process():
    raw = document()
    del raw["process"]
    with pytest.raises(InvalidInput, match="no process"):
        plan(raw=raw)


@pytest.mark.parametrize(
    ("root", "code"),
    [
        (LayeredRoot((), 64 << 20), "no-layers"),
        (LayeredRoot(ROOT.layers, 1), "scratch-size"),
        (LayeredRoot(ROOT.layers, 1 << 60), "scratch-size"),
        (DirectoryRoot("/file", False), "not-found"),
    ],
)
def test_bad_roots(root, code):
    with pytest.raises(HoldfastError) as failure:
        plan(root=root)
    assert failure.value.code == code


def test_scratch_sizes_are_whole_blocks():
    [scratch] = [
        step for step in plan(root=LayeredRoot(ROOT.layers, (16 << 20) + 1)).steps if isinstance(step, MakeScratch)
    ]
    assert scratch.size_bytes == (16 << 20) + 4096


def test_nothing_is_planned_for_what_the_runtime_does_itself():
    assert plan_module.mount_step(0, spec_from_raw(document(PROC)).mounts[0], {}, []) is None


# -- with real sources ------------------------------------------------------------------------


def test_with_a_survey(tmp_path: Path):
    ext4 = bytearray(1 << 16)
    ext4[1024 + 56 : 1024 + 58] = b"\x53\xef"
    (tmp_path / "disk").write_bytes(ext4)
    (tmp_path / "dir").mkdir()
    (tmp_path / "empty").write_bytes(bytes(4096))
    (tmp_path / "dangling").symlink_to("nosuch")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))

        def planned(*mounts: dict[str, Any]) -> Plan:
            raw = document(*mounts)
            return plan(raw=raw, sources=survey(spec_from_raw(raw).mounts, DISK_TYPES))

        made = planned(disk(f"{tmp_path}/disk"), bind(f"{tmp_path}/dir", "/b"), bind(f"{tmp_path}/disk", "/c", "ro"))
        status = (tmp_path / "disk").stat()
        assert (made.steps[4].device, made.steps[4].inode) == (status.st_dev, status.st_ino)
        for name, code in (
            ("nosuch", "source-not-found"), ("dangling", "source-dangling"),
            ("fifo", "source-kind"), ("socket", "source-kind"),
        ):  # fmt: skip
            for mount in (bind, disk):
                with pytest.raises(HoldfastError) as failure:
                    planned(mount(f"{tmp_path}/{name}"))
                assert failure.value.code == code
        with pytest.raises(InvalidInput, match="no known filesystem"):
            planned(disk(f"{tmp_path}/empty"))
    assert look(str(tmp_path / "dir")).kind == "directory"
    (tmp_path / "socket").unlink()
    (tmp_path / "fifo").unlink()
