"""Which volumes an image has, where they lead, and what of it can be told without being root."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.mounts.copy_up import Volume, copy_up, plan_volumes, resolve_volumes
from holdfast.mounts.root import Root

if TYPE_CHECKING:
    from pathlib import Path


def paths(*names: str, windows: bool = False) -> list[str]:
    return [volume.path for volume in plan_volumes(names, windows=windows)]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/vol", "/vol"),
        ("/vol/", "/vol"),
        ("//vol//sub/.", "/vol/sub"),
        ("relvol", "/relvol"),
        ("./v", "/v"),
        ("../../v", "/v"),
        ("/vol/../outer", "/outer"),
        ("/vol/../../../../outer", "/outer"),
        ("/a/b/../../c", "/c"),
        ("/with space/\n", "/with space/\n"),
        ("/\udcff", "/\udcff"),
        ("/...", "/..."),
    ],
)
def test_paths_are_cleaned(name, path):
    assert plan_volumes([name]) == [Volume(path, path, (name,))]


@pytest.mark.parametrize("name", ["C:/x", "c:/x", "D:\\x", "C:x"])
def test_a_drive_prefix_means_nothing_to_linux_images(name):
    """containerd read the Linux volume ``C:/x`` from ``/x``."""
    assert plan_volumes([name]) == [Volume(f"/{name}", f"/{name}", (name,))]


@pytest.mark.parametrize(
    ("name", "path", "source"),
    [
        ("C:/x", "/x", "/x"),
        ("c:\\x\\y", "/x/y", "/x/y"),
        ("\\x", "/x", "/x"),
        ("/x", "/x", "/x"),
        ("C:\\a\\..\\x", "/x", "/x"),
        ("C:x", "/x", "/x"),
        ("d:\\x", "D:/x", None),
        ("E:/x/../y", "E:/y", None),
    ],
)
def test_drives_of_windows_images(name, path, source):
    assert plan_volumes([name], windows=True) == [Volume(path, source, (name,))]


def test_names_of_windows_differ_in_more_than_case():
    (volume,) = plan_volumes(["C:\\Data", "c:/data", "\\DATA"], windows=True)
    assert volume.names == ("C:\\Data", "\\DATA", "c:/data")
    assert paths("/Data", "/data") == ["/Data", "/data"]


def test_one_place_is_one_volume():
    assert plan_volumes(["/b", "/a/", "/a", "/x/../a"]) == [
        Volume("/a", "/a", ("/a", "/a/", "/x/../a")),
        Volume("/b", "/b", ("/b",)),
    ]


def test_parents_come_first_whatever_order_the_image_gives():
    expected = ["/b", "/z", "/a/x", "/b/a", "/b/a/c", "/z/y/x"]
    assert paths("/z/y/x", "/b/a/c", "/a/x", "/b/a", "/z", "/b") == expected
    assert paths(*expected) == expected


@pytest.mark.parametrize("name", ["", "/", ".", "/..", "a/..", "/a\0b", "/" + "x" * 5000, "/\ud800"])
def test_what_no_volume_can_be_called(name):
    with pytest.raises(InvalidInput) as failure:
        plan_volumes([name])
    assert failure.value.code == "bad-path"


@pytest.mark.parametrize("name", ["C:", "C:\\", "c:/.", "\\"])
def test_the_root_of_a_windows_image_is_no_volume(name):
    with pytest.raises(InvalidInput, match="root of the container"):
        plan_volumes([name], windows=True)


@given(st.lists(st.text(alphabet="ab./\\:C", min_size=1, max_size=8), max_size=6), st.booleans())
def test_a_plan_does_not_depend_on_order_and_is_clean(names, windows):
    try:
        volumes = plan_volumes(names, windows=windows)
    except InvalidInput:
        return
    assert volumes == plan_volumes(list(reversed(names)), windows=windows)
    assert sorted(name for volume in volumes for name in volume.names) == sorted(names)
    seen: list[str] = []
    for volume in volumes:
        assert volume.source is None or volume.source.startswith("/")
        assert not {"", ".", ".."} & set(volume.path.split("/")[1:])
        assert not any(earlier.startswith(volume.path + "/") for earlier in seen)
        seen.append(volume.path)
    assert len(set(seen)) == len(seen)


# -- where they lead

#: Links of a tree, its root, a path, and where that leads: containerd's table for its RootPath.
TABLE = {
    "1": ({"fs/a/d": "/b"}, "", "fs/a/d/c/data", "/b/c/data"),
    "2": ({"fs/i": "a"}, "", "fs/i", "/fs/a"),
    "3": ({"linkdir": "realdir"}, "linkdir", "foo/bar", "/foo/bar"),
    "4": ({"fs/a/d": "/b"}, "", "fs/a/d", "/b"),
    "5": ({"fs/a/e": "../b"}, "", "fs/a/e/c/data", "/fs/b/c/data"),
    "5b": ({"fs/a/e": "../b"}, "fs/a", "e", "/b"),
    "6": ({"fs/a/f": "../../../../test"}, "", "fs/a/f", "/test"),
    "6b": ({"fs/a/f": "../../../../test"}, "fs", "a/f", "/test"),
    "7": ({"fs/b/h": "../g", "fs/g": "../../../../../../../../../../../../root"}, "", "fs/b/h", "/root"),
    "8": ({"fs/j/k": "../i/a"}, "fs/j", "k", "/i/a"),
    "13": ({"root": "root2", "root2/foo": "../bar"}, "root", "foo", "/bar"),
    "17": (
        {
            "root": "root2", "root2/a": "r/s", "root2/r": "../root/t", "root2/root/t/s/b": "/../u", "root2/u/c": ".",
            "root2/u/x/y": "../v", "root2/u/v": "/../w",
        },
        "root", "a/b/c/x/y/z", "/w/z",
    ),
    "18": ({"root/slash": "/", "root/sym": "/idontexist/../slash"}, "root", "sym/file", "/file"),
    "19": ({"root/sym": "/foo/bar", "root/hello": "/sym/../baz"}, "root", "hello", "/foo/baz"),
}  # fmt: skip
CIRCLES = {
    "14": ({"root/foo": "foo"}, "foo"),
    "15": ({"root/bar": "foo", "root/foo": "bar"}, "foo"),
    "16": ({"root/bar": "baz", "root/baz": "../bak", "root/bak": "/bar"}, "bar"),
}


def make_links(top: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).symlink_to(target)
        if name in ("root", "linkdir"):  # the root itself
            (top / target).mkdir(parents=True)


@pytest.mark.parametrize("case", TABLE)
def test_paths_lead_where_the_engines_say(tmp_path, case):
    links, top, path, expected = TABLE[case]
    make_links(tmp_path, links)
    with Root(str(tmp_path / top)) as root:
        assert resolve_volumes(root, plan_volumes([path])) == [Volume(expected, expected, (path,))]


@pytest.mark.parametrize("case", CIRCLES)
def test_links_in_a_circle(tmp_path, case):
    links, path = CIRCLES[case]
    make_links(tmp_path, links)
    with Root(str(tmp_path / "root")) as root:
        for use in (lambda: resolve_volumes(root, plan_volumes([path])), lambda: copy_up(root, path, -1)):
            with pytest.raises(InvalidInput) as failure:
                use()
            assert failure.value.code == "volume-loop"


@pytest.mark.parametrize("target", ["/", "../..", "/nosuch/.."])
def test_a_link_to_the_root_is_no_volume(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with Root(str(tmp_path)) as root, pytest.raises(InvalidInput, match="leads to the root"):
        resolve_volumes(root, plan_volumes(["/link"]))


def test_names_that_lead_to_one_place_are_one_volume(tmp_path):
    """containerd stacked two mounts on it, and chance decided which was seen."""
    (tmp_path / "vol/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("/vol")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/link").symlink_to("../link/new")
    with Root(str(tmp_path)) as root:
        found = resolve_volumes(root, plan_volumes(["/vol", "/link", "/far/link", "/link/new", "/link/sub", "/a/b"]))
    assert found == [
        Volume("/vol", "/vol", ("/link", "/vol")),
        Volume("/a/b", "/a/b", ("/a/b",)),
        Volume("/vol/new", "/vol/new", ("/far/link", "/link/new")),
        Volume("/vol/sub", "/vol/sub", ("/link/sub",)),
    ]


def test_order_is_that_of_the_real_places(tmp_path):
    (tmp_path / "deep/er/dir").mkdir(parents=True)
    (tmp_path / "l").symlink_to("deep/er/dir")
    (tmp_path / "z/a").mkdir(parents=True)
    (tmp_path / "z/a/up").symlink_to("/deep")
    with Root(str(tmp_path)) as root:
        found = resolve_volumes(root, plan_volumes(["/l/x", "/z/a/up"]))
    assert [volume.path for volume in found] == ["/deep", "/deep/er/dir/x"]


def test_other_drives_are_nowhere_in_the_image(tmp_path):
    with Root(str(tmp_path)) as root:
        found = resolve_volumes(root, plan_volumes(["D:\\x", "C:\\x"], windows=True))
    assert found == [Volume("/x", "/x", ("C:\\x",)), Volume("D:/x", None, ("D:\\x",))]


# -- what there is to copy


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root filesystem beside which there is something that is none of its business."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/secret").write_text("of the host")
    root = tmp_path / "image"
    (root / "etc").mkdir(parents=True)
    (root / "etc/own").write_text("of the image")
    (root / "file").write_text("x")
    (root / "link").symlink_to("/etc")
    (root / "esc").symlink_to("../../../../../etc")
    (root / "dangling").symlink_to("/nosuch")
    (root / "host").symlink_to(tmp_path / "etc")
    (root / "tofile").symlink_to("file")
    return root


@pytest.fixture
def target(tmp_path: Path) -> int:
    """A new volume, open."""
    (tmp_path / "volume").mkdir()
    fd = os.open(tmp_path / "volume", os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("path", ["/etc", "etc/", "/link", "/esc", "/../etc", "/link/../etc"])
def test_links_are_followed_inside_the_image(image, target, path):
    with Root(str(image)) as root:
        outcome = copy_up(root, path, target)
    assert (outcome.found, outcome.entries, outcome.data_bytes) == (True, 1, len("of the image"))
    assert os.listdir(f"/proc/self/fd/{target}") == ["own"]


@pytest.mark.parametrize("path", ["/nosuch", "/nosuch/below", "/dangling", "/dangling/x", "/host", "/etc/nosuch"])
def test_what_is_missing_is_skipped(image, target, path):
    before = os.stat(target)
    root_fd = os.open(image, os.O_PATH)
    try:
        outcome = copy_up(root_fd, path, target)
    finally:
        os.close(root_fd)
    assert not outcome.found
    assert str(outcome) == "nothing to copy"
    assert os.stat(target) == before


@pytest.mark.parametrize("path", ["/file", "/tofile", "/file/below", "/etc/own"])
def test_a_file_is_no_volume(image, target, path):
    with Root(str(image)) as root:
        for use in (lambda: copy_up(root, path, target), lambda: resolve_volumes(root, plan_volumes([path]))):
            with pytest.raises(InvalidInput, match="has a file there") as failure:
                use()
            assert failure.value.code == "volume-not-directory"


@pytest.mark.parametrize("path", ["/a\0b", "/\ud800", "/" + "x" * 300])
def test_a_path_that_cannot_be(image, target, path):
    with Root(str(image)) as root, pytest.raises(InvalidInput) as failure:
        copy_up(root, path, target)
    assert failure.value.code == "bad-path"


def test_a_volume_with_something_in_it_is_refused_untouched(image, target, tmp_path):
    (tmp_path / "volume/old").write_text("kept")
    before = os.stat(target)
    with Root(str(image)) as root, pytest.raises(InvalidInput, match="not empty: old") as failure:
        copy_up(root, "/etc", target)
    assert failure.value.code == "volume-not-empty"
    assert os.stat(target) == before
    assert (tmp_path / "volume/old").read_text() == "kept"


def test_a_volume_inside_of_what_is_copied_into_it(image):
    """It would be copied into itself for ever."""
    (image / "etc/sub/volume").mkdir(parents=True)
    fd = os.open(image / "etc/sub/volume", os.O_PATH)
    try:
        with Root(str(image)) as root, pytest.raises(Exception, match="lies inside what is copied") as failure:
            copy_up(root, "/etc", fd)
        assert failure.value.code == "volume-copy"
        assert failure.value.subject == "/etc/sub/volume"
    finally:
        os.close(fd)
    assert list((image / "etc/sub/volume").iterdir()) == []
