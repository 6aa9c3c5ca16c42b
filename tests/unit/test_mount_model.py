"""A mount as data, and what its options mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import HoldfastError, InvalidInput, Unsupported
from holdfast.linux import syscalls
from holdfast.mounts import Mount, features, idmap, overlay, request, table

SOURCE = Path(__file__).resolve().parents[2] / "src"


def test_json_has_the_shape_of_containerd():
    mount = Mount("overlay", "overlay", "/x", ["lowerdir=/a:/b", "ro"])
    text = '{"Type": "overlay", "Source": "overlay", "Target": "/x", "Options": ["lowerdir=/a:/b", "ro"]}'
    assert json.dumps(mount.to_dict()) == text
    assert Mount.from_dict(json.loads(text)) == mount
    assert Mount.from_dict({"type": "bind", "source": "/a", "options": None}) == Mount("bind", "/a")
    assert hash(Mount.from_dict(mount.to_dict())) == hash(mount)


@pytest.mark.parametrize(
    "record",
    [
        {"Type": 1}, {"Options": "ro"}, {"Options": [1]}, {"Typo": "x"}, {"Type": "a", "type": "b"},
        {"Source": "a\0b"}, {"Options": ["ro"] * 1001},
    ],
)  # fmt: skip
def test_what_is_no_mount(record):
    with pytest.raises(InvalidInput):
        Mount.from_dict(record)


def test_a_mount_does_not_change():
    options = ["volatile", "lowerdir=/a:/b"]
    mount = Mount("overlay", "overlay", "", options)
    options.clear()
    assert mount.options == ("volatile", "lowerdir=/a:/b")
    with pytest.raises(AttributeError):
        mount.source = "x"  # type: ignore[misc]
    with pytest.raises(InvalidInput):
        Mount("bind", "/a", "/b", "ro,nosuid")


def test_read_only_of_a_bound_tree_is_for_all_of_it():
    wanted = request.read(Mount("bind", "/a", "", ["rbind", "ro", "nosuid"]))
    assert wanted.recursive == syscalls.MS_RDONLY
    assert wanted.flags & syscalls.MS_NOSUID
    assert not request.read(Mount("bind", "/a", "", ["bind", "ro"])).recursive


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("bind", ["size=1m"], InvalidInput),
        ("bind", ["loop"], InvalidInput),
        ("ext4", ["bind", "errors=panic"], InvalidInput),
        ("format/mkdir/overlay", [], Unsupported),
        ("mkfs/ext4", [], Unsupported),
        ("overlay", ["X-containerd.mkdir.path=/a"], Unsupported),
        ("bind", ["X-mount.idmap=/proc/1/ns/user"], Unsupported),
        ("bind", ["uidmap=0:1000:1"], InvalidInput),
        ("bind", ["uidmap=0:1000:1", "gidmap=0:-1:1"], InvalidInput),
        ("bind", ["uidmap=0:1000:0", "gidmap=0:1000:1"], InvalidInput),
        ("bind", ["uidmap=0:1000", "gidmap=0:1000:1"], InvalidInput),
        ("bind", ["uidmap=1:4294967295:1", "gidmap=0:1000:1"], InvalidInput),
    ],
)
def test_options_that_cannot_be_right(kind, options, error):
    with pytest.raises(error):
        request.read(Mount(kind, "/a", "/b", options))


def test_id_maps_of_several_lines():
    maps, rest = idmap.take(["ro", "uidmap=0:1000:1", "1:2000:5", "gidmap=0:1:2", "noexec", "uidmap=9:9:9"])
    assert maps is not None
    assert maps.uids == ((0, 1000, 1), (1, 2000, 5), (9, 9, 9))
    assert maps.gids == ((0, 1, 2),)
    assert rest == ["ro", "noexec"]


def test_removing_maps_leaves_no_second_one():
    """containerd deletes options from the list that it walks over, and of two in a row leaves one."""
    assert idmap.take(["uidmap=0:1:2", "gidmap=0:1:2", "x"])[1] == ["x"]


def test_attributes_only_make_a_mount_stricter():
    for flag in (syscalls.MS_RDONLY, syscalls.MS_NODEV, syscalls.MS_NOSUID | syscalls.MS_NOSYMFOLLOW):
        assert request.attributes(flag)[1] == 0
    assert request.attributes(syscalls.MS_STRICTATIME) == (
        syscalls.MOUNT_ATTR_STRICTATIME,
        syscalls.MOUNT_ATTR__ATIME,
    )


_NAMES = st.text(st.sampled_from('ab:,\\ "='), min_size=1, max_size=8)


@given(st.lists(_NAMES, min_size=1, max_size=5), _NAMES)
def test_names_of_layers_survive(lowers, upper):
    words = overlay.options(lowers, upper, "w")
    found, rest = overlay.parse(words)
    assert found == lowers
    assert overlay.unescape(rest[0].partition("=")[2]) == upper


def test_layers_that_cannot_be():
    with pytest.raises(InvalidInput, match="501 layers: overlayfs takes 500"):
        overlay.parse(["lowerdir=" + ":".join(["/a"] * 501)])
    with pytest.raises(InvalidInput, match="without a name"):
        overlay.parse(["lowerdir=/a::/b"])


def test_paths_are_compared_by_their_parts():
    """A string's beginning is not a folder: /a/root2 is not in /a/root."""
    assert table.is_within("/a/root/x", "/a/root")
    assert table.is_within("/a/root", "/a/root")
    assert table.is_within("/a", "/")
    assert not table.is_within("/a/root2", "/a/root")


def test_escapes_of_the_mount_table():
    assert table._plain(rb"/a\040b\134c\011") == "/a b\\c\t"
    assert table._plain(b"/a\\134040") == "/a\\040"


def test_features_are_asked_once():
    asked = []
    one = features.Feature("x", "1.0", "use", "fallback", lambda: bool(asked.append(1)) or True)
    assert one
    assert one
    assert asked == [1]


def test_features_are_in_the_manual():
    text = (SOURCE.parent / "docs" / "mounts.md").read_text()
    for feature in features.ALL:
        assert f"| {feature.name} | {feature.kernel} | {feature.use} | {feature.fallback} |" in text


def test_import_is_light():
    """Usable on its own: nothing but the standard library, and little of that before something is mounted."""
    script = (
        "import sys; sys.path.append(sys.argv[1]); before = set(sys.modules); import holdfast.mounts as m; "
        "m.Mount, m.Root, m.mount, m.mount_all, m.unmount, m.unmount_all, m.unmount_recursive, m.temporary, m.recover; "
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(SOURCE)], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "holdfast.mounts.mounting" in loaded
    heavy = {"msgspec", "apsw", "asyncio", "contextlib", "dataclasses", "inspect", "pathlib", "subprocess", "typing"}
    assert not heavy & set(loaded)
    rooms = {name.split(".")[1] for name in loaded if name.startswith("holdfast.")}
    assert rooms == {"errors", "linux", "mounts"}


def test_names_are_loaded_when_they_are_used():
    import holdfast.mounts

    assert callable(holdfast.mounts.unmount)
    with pytest.raises(AttributeError, match="nosuch"):
        holdfast.mounts.nosuch  # noqa: B018


def test_the_root_directory_is_never_unmounted():
    """containerd once unmounted everything that it found below ``""``."""
    from holdfast.mounts import unmount, unmount_all, unmount_recursive

    for call in (unmount, unmount_all, unmount_recursive):
        for target in ("/", "//", "/.", "/.."):
            with pytest.raises(HoldfastError, match="root directory"):
                call(target)
        assert not call("")
