"""The container's own tree: what is added, what is left out, in what order, and sources that the pod has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.spec.default import default_mounts
from holdfast.spec.runtime import Mount, spec_from_raw
from holdfast.spec.tree import (
    HUGE_PAGES,
    PodSource,
    TreeMount,
    check_destination,
    container_tree,
    parse_source,
    tmp_mount,
)


def bind(destination: str, source: str = "/src") -> Mount:
    return Mount(destination, "bind", source, ("rbind",))


def targets(*mounts: Mount) -> list[str]:
    return [mount.target for mount in container_tree(mounts).mounts]


MANDATORY = ["/proc", "/sys", "/dev", "/dev/pts"]


# What is added


def test_mandatory_mounts_come_first_in_this_order() -> None:
    tree = container_tree([bind("/data")])
    assert [mount.target for mount in tree.mounts] == [*MANDATORY, "/data"]
    assert [mount.mount.type for mount in tree.mounts] == ["proc", "sysfs", "tmpfs", "devpts", "bind"]
    assert [mount.index for mount in tree.mounts] == [None, None, None, None, 0]


@pytest.mark.parametrize(
    ("mount", "target"),
    [
        (Mount("/proc", "proc", "proc"), "/proc"),
        (Mount("/proc/", "proc", "proc"), "/proc"),
        (Mount("//x/../sys", "sysfs", "sysfs"), "/sys"),
        (bind("/sys"), "/sys"),
        (Mount("/dev", "devtmpfs", "d"), "/dev"),
        (Mount("/dev/pts/.", "devpts", "d"), "/dev/pts"),
    ],
)
def test_mandatory_mount_that_the_specification_has(mount: Mount, target: str) -> None:
    found = targets(bind("/a"), mount)
    assert found.count(target) == 1
    assert sorted(found) == sorted(["/a", *MANDATORY])


def test_mounts_below_proc_and_sys_come_after_them() -> None:
    assert targets(bind("/sys/fs/x"), bind("/proc/acpi")) == [*MANDATORY, "/sys/fs/x", "/proc/acpi"]


def test_what_engines_write_stays_as_it_is() -> None:
    spec = spec_from_raw({"ociVersion": "1.0.2", "mounts": default_mounts()})
    tree = container_tree(spec.mounts, image_tmp="not-empty")
    assert [mount.mount for mount in tree.mounts] == list(spec.mounts)
    assert tree.raw_mounts(default_mounts()) == default_mounts()
    assert not tree.warnings


def test_raw_mounts_keep_what_no_record_knows() -> None:
    raw = [{"destination": "/a/b", "type": "bind", "source": "/s", "options": ["rbind"], "future": 1},
           {"destination": "/a", "type": "tmpfs"}]  # fmt: skip
    tree = container_tree(spec_from_raw({"ociVersion": "1.0.2", "mounts": raw}).mounts)
    assert tree.raw_mounts(raw)[4:] == [raw[1], raw[0]]
    assert tree.raw_mounts(raw)[0] == {
        "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"],
    }  # fmt: skip


# /dev


@pytest.mark.parametrize(
    "name", ["fd", "stdin", "stdout", "stderr", "null", "zero", "full", "random", "urandom", "ptmx"]
)
@pytest.mark.parametrize("below", ["", "/", "/x"])
def test_devices_of_the_runtime_are_left_alone(name: str, below: str) -> None:
    tree = container_tree([bind(f"/dev/{name}{below}")])
    assert [mount.target for mount in tree.mounts] == MANDATORY
    assert len(tree.warnings) == 1
    assert f"left out mounts[0] /src at /dev/{name}" in tree.warnings[0]


@pytest.mark.parametrize("name", ["fd-foo", "nullx", "stdin2", "fuse", "mqueue", "shm", "shm/x"])
def test_other_names_in_dev_are_the_specifications(name: str) -> None:
    tree = container_tree([bind(f"/dev/{name}")])
    assert [mount.target for mount in tree.mounts] == [*MANDATORY, f"/dev/{name}"]
    assert not tree.warnings


@pytest.mark.parametrize(
    ("mount", "kept"),
    [
        (bind("/dev"), False),
        (bind("/dev/"), False),
        (Mount("/dev", "tmpfs", "tmpfs", ("size=1m",)), True),
        (bind("/dev/pts"), False),
        (bind("/dev/pts/0"), False),
        (Mount("/dev/pts", "devpts", "devpts", ("gid=7",)), True),
        (Mount("/dev/shm", "tmpfs", "shm", ("size=1m",)), True),
        (Mount("/dev/shm", "proc", "proc"), False),
    ],
)
def test_overrides_in_dev(mount: Mount, kept: bool) -> None:
    """A bind at /dev broke the reference; a tmpfs or devpts there is how engines say size and group."""
    tree = container_tree([mount])
    assert (TreeMount(mount, 0) in tree.mounts) == kept
    assert bool(tree.warnings) != kept
    assert {"/dev", "/dev/pts"} <= {found.target for found in tree.mounts}


def test_disk_shown_as_a_device_is_no_mount() -> None:
    disks = [Mount("blockdev:///dev/null", "virtual-disk", "/d1"), Mount("blockdev://", "virtual-disk", "/d2"),
             Mount("blockdev://", "virtual-disk", "/d3")]  # fmt: skip
    tree = container_tree(disks)
    assert [mount.mount for mount in tree.mounts[4:]] == disks
    assert not tree.warnings


# Order


def test_child_before_its_parent() -> None:
    """Defect of the reference: the parent hid it."""
    assert targets(bind("/a/b/c"), bind("/x"), bind("/a"), bind("/a/b"))[4:] == ["/a", "/a/b", "/a/b/c", "/x"]


def test_order_is_by_path_not_by_its_length() -> None:
    """Defect of the reference: sorting by the length of a path is no order, and was not stable beyond twelve."""
    mounts = [bind(f"/{name}") for name in ("zzzzzz", "y", "xxx", *(f"n{i:03}" for i in reversed(range(300))))]
    assert targets(*mounts)[4:] == [mount.destination for mount in mounts]
    assert targets(bind("/longer-name"), bind("/a/b"), bind("/a"))[4:] == ["/longer-name", "/a", "/a/b"]


def test_later_of_two_at_one_place() -> None:
    tree = container_tree([bind("/a", "/one"), bind("/a/b"), bind("/a/", "/two")])
    assert [(mount.target, mount.mount.source) for mount in tree.mounts[4:]] == [("/a", "/two"), ("/a/b", "/src")]
    assert tree.warnings == ("left out mounts[0] /one at /a: mounts[2] is there",)


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(PATHS, max_size=12))
def test_order_is_stable_and_parents_come_first(paths: list[str]) -> None:
    found = targets(*[bind(path) for path in paths])[4:]
    assert sorted(found) == sorted(set(paths)), "each place once"
    for index, path in enumerate(found):
        assert not any(path.startswith(later + "/") for later in found[index + 1 :])
    assert targets(*[bind(path) for path in found])[4:] == found, "in order already: nothing moves"
    kept = [path for index, path in enumerate(paths) if path not in paths[index + 1 :]]
    if not any(path.startswith(later + "/") for i, path in enumerate(kept) for later in kept[i + 1 :]):
        assert found == kept, "nothing has to move: nothing does"


# Destinations


@pytest.mark.parametrize(
    ("destination", "why"),
    [
        ("", "is empty"),
        ("/", "is the root itself"),
        (".", "is the root itself"),
        ("/.", "is the root itself"),
        ("//", "is the root itself"),
        ("/a/..", "is the root itself"),
        ("..", "leads out"),
        ("/..", "leads out"),
        ("/../etc", "leads out"),
        ("a/../../b", "leads out"),
        ("/a\0b", "holds a NUL"),
    ],
)
def test_bad_destination(destination: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        check_destination(destination)
    assert caught.value.code == "mount-destination"
    with pytest.raises(InvalidInput) as caught:
        container_tree([bind("/ok"), bind(destination)])
    assert "mounts[1] /src at" in str(caught.value)


@pytest.mark.parametrize(
    ("destination", "clean"),
    [("/a/b/", "/a/b"), ("//a", "/a"), ("/a/./b/../c", "/a/c"), ("a/b", "/a/b"), ("./a", "/a"), ("/..a", "/..a")],
)
def test_destination(destination: str, clean: str) -> None:
    assert check_destination(destination) == clean
    assert targets(bind(destination))[-1] == clean


@given(st.text("/.a\0", max_size=8))
def test_clean_destinations_are_below_the_root_and_stay_as_they_are(text: str) -> None:
    try:
        clean = check_destination(text)
    except InvalidInput:
        return
    assert clean.startswith("/")
    assert clean != "/"
    assert ".." not in clean.split("/")
    assert check_destination(clean) == clean


@pytest.mark.parametrize(("kind", "said"), [("none", "its type is none"), ("", "its type is missing")])
def test_type_that_is_none(kind: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        container_tree([Mount("/a", kind, "x", ("ro",))])
    assert caught.value.code == "mount-type"
    assert targets(Mount("/a", kind, "/x", ("ro", "bind")))[-1] == "/a"


def test_type_that_is_not_known_is_the_kernels_to_judge() -> None:
    assert container_tree([Mount("/a", "ext5", "/dev/x")]).mounts[-1].mount.type == "ext5"


# /tmp


@pytest.mark.parametrize(
    ("policy", "image", "made"),
    [
        ("auto", "missing", True),
        ("auto", "empty", True),
        ("auto", "not-empty", False),
        ("auto", "not-a-directory", False),
        ("tmpfs", "missing", True),
        ("tmpfs", "empty", True),
        ("tmpfs", "not-empty", True),
        ("rootfs", "missing", False),
        ("rootfs", "empty", False),
        ("rootfs", "not-empty", False),
        ("rootfs", "not-a-directory", False),
    ],
)
def test_tmp(policy: str, image: str, made: bool) -> None:
    found = tmp_mount([bind("/data")], policy, image)  # type: ignore[arg-type]
    assert found == (Mount("/tmp", "tmpfs", "tmpfs", ("mode=1777",)) if made else None)


def test_tmpfs_where_a_file_is() -> None:
    with pytest.raises(InvalidInput) as caught:
        tmp_mount([], "tmpfs", "not-a-directory")
    assert caught.value.code == "tmp-not-a-directory"


@pytest.mark.parametrize("destination", ["/tmp", "/tmp/", "//tmp", "/x/../tmp", "tmp"])
@pytest.mark.parametrize("policy", ["auto", "tmpfs", "rootfs"])
def test_tmp_that_is_mounted_however_it_is_spelled(policy: str, destination: str) -> None:
    """Defect of the reference: ``/tmp/`` was not seen, and mounted over."""
    assert tmp_mount([bind(destination)], policy, "empty") is None  # type: ignore[arg-type]


def test_mount_below_tmp_means_that_it_is_not_empty() -> None:
    assert tmp_mount([bind("/tmp/x")], "auto", "missing") is None
    assert tmp_mount([bind("/tmpx")], "auto", "missing") is not None
    tree = container_tree([bind("/tmp/x")], tmp="tmpfs", image_tmp="not-empty")
    assert [mount.target for mount in tree.mounts][4:] == ["/tmp", "/tmp/x"]


def test_tmp_of_the_tree_comes_last_and_has_a_size() -> None:
    tree = container_tree([bind("/a")], image_tmp="empty", tmp_bytes=1 << 20)
    assert tree.mounts[-1] == TreeMount(Mount("/tmp", "tmpfs", "tmpfs", ("mode=1777", "size=1048576")))
    assert "/tmp" not in [mount.target for mount in container_tree([bind("/a")]).mounts]


# Sources that the pod has


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("sandbox://logs/app", PodSource("sandbox", "logs/app")),
        ("sandbox:///logs//app/", PodSource("sandbox", "logs/app")),
        ("sandbox://a/../b", PodSource("sandbox", "b")),
        ("sandbox-tmp:///x", PodSource("sandbox-tmp", "x")),
        ("hugepages://2M/a", PodSource("hugepages", "a", "2M")),
        ("hugepages://1G/a/b", PodSource("hugepages", "a/b", "1G")),
        ("uvm:///etc/ssl", PodSource("uvm", "etc/ssl")),
        ("/sandbox://x", None),
        ("sandbox:/x", None),
        ("sandboxes://x", None),
        ("SANDBOX://x", None),
        ("evd://type/path", None),
        ("/data", None),
        ("", None),
    ],
)
def test_source(text: str, source: PodSource | None) -> None:
    assert parse_source(text) == source
    assert container_tree([bind("/a", text)]).mounts[-1] == TreeMount(bind("/a", text), 0, source)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sandbox://", "names no path (sandbox://PATH)"),
        ("sandbox:///.", "names no path"),
        ("sandbox://../x", "leads out"),
        ("sandbox:///../sandboxMountsX", "leads out"),
        ("sandbox-tmp://a/../..", "leads out"),
        ("sandbox://a\0b", "holds a NUL"),
        ("hugepages://", "'nothing' is no size of huge pages (2M or 1G)"),
        ("hugepages://2M", "names no path (hugepages://2M/PATH)"),
        ("hugepages://2M/", "names no path"),
        ("hugepages://4K/a", "'4K' is no size"),
        ("hugepages://2m/a", "'2m' is no size"),
        ("hugepages://2MB/a", "'2MB' is no size"),
        ("hugepages://2M/../1G/a", "leads out"),
        ("uvm://", "names no path"),
        ("uvm:///", "names no path"),
        ("uvm:///../etc", "leads out"),
    ],
)
def test_bad_source(text: str, why: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        container_tree([bind("/a", text)])
    assert caught.value.code == "pod-source"
    assert why in str(caught.value)
    assert "mounts[0]" in str(caught.value)


def test_volume_of_a_source() -> None:
    assert [(s.volume, s.options) for s in map(PodSource, ["sandbox", "sandbox-tmp"], ["a", "a"])] == [
        ("sandbox", ()),
        ("sandbox-tmp", ()),
    ]
    huge = PodSource("hugepages", "a", "1G")
    assert (huge.volume, huge.options) == ("hugepages-1G", ("pagesize=1G",))


def test_only_binds_have_such_sources() -> None:
    assert container_tree([Mount("/a", "tmpfs", "sandbox://")]).mounts[-1].pod_source is None


PARTS = st.lists(st.text("ab. ", min_size=1).filter(lambda part: part not in (".", "..")), min_size=1)


@given(st.sampled_from(["sandbox", "sandbox-tmp", "hugepages", "uvm"]), PARTS, st.sampled_from(list(HUGE_PAGES)))
def test_parse_reads_what_text_says(kind: str, parts: list[str], size: str) -> None:
    source = PodSource(kind, "/".join(parts), size if kind == "hugepages" else "")  # type: ignore[arg-type]
    assert parse_source(str(source)) == source
