"""Paths of an untrusted tree stay in it."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls
from holdfast.mounts.root import Root, remove_tree, split


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A tree with a sentinel beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/sentinel").write_text("untouched")
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def untouched(inside: Path) -> bool:
    outside = inside.parent / "outside"
    return [path.name for path in outside.iterdir()] == ["sentinel"] and (
        outside / "sentinel"
    ).read_text() == "untouched"


def test_makes_opens_reads_renames_and_removes(inside: Path) -> None:
    with Root(str(inside)) as root:
        root.mkdir(b"a")
        root.mkdir_all(b"a/b/c").close()
        root.write(b"a/b/c/f", b"one")
        root.write(b"a/b/c/f", b"two")
        root.link(b"a/b/c/f", b"/a/g")
        root.symlink(b"/a/g", b"l")
        root.mknod(b"p", stat.S_IFIFO | 0o600)
        root.rename(b"a/g", b"a/h")
        assert root.listdir() == [b"a", b"l", b"p"]
        assert root.readlink(b"l") == b"/a/g"
        assert not root.exists(b"a/g")
        assert not root.exists(b"l/x")
        assert root.exists(b"l")
        assert root.stat(b"/").st_ino == inside.stat().st_ino
        with root.open(b"a/h") as file:
            assert os.read(file.fileno(), 10) == b"two"
        root.remove_tree(b"a/b")
        root.unlink(b"l")
        root.remove(b"p")
        root.remove(b"a/h")
        root.remove(b"a")
        assert root.listdir() == []


def test_takes_a_descriptor_and_leaves_it_open(inside: Path) -> None:
    fd = os.open(inside, os.O_PATH)
    try:
        root = Root(fd)
        root.mkdir(b"x")
        root.close()
        root.close()
        assert os.listdir(f"/proc/self/fd/{fd}") == ["x"]
        with pytest.raises(ValueError, match="closed"):
            root.fileno()
    finally:
        os.close(fd)


@pytest.mark.parametrize("target", ["/outside", "../outside", "../../../../outside", "/../outside/."])
def test_links_to_outside_end_inside(inside: Path, target: str) -> None:
    (inside / "l").symlink_to(target)
    (inside / "abs").symlink_to(inside.parent / "outside")
    with Root(str(inside)) as root:
        with pytest.raises(FileNotFoundError):
            root.write(b"l/sentinel", b"changed")
        with pytest.raises(FileNotFoundError):
            root.resolve(b"abs/sentinel")
        root.mkdir_all(b"l/new").close()
        root.write(b"l/sentinel", b"mine")
        assert (inside / "outside/sentinel").read_text() == "mine"
        assert (inside / "outside/new").is_dir()
        root.remove_tree(b"l")
    assert untouched(inside)


def test_the_last_component_is_not_followed(inside: Path) -> None:
    (inside / "f").write_text("f")
    (inside / "l").symlink_to("f")
    with Root(str(inside)) as root:
        with pytest.raises(OSError, match="symbolic links"):
            root.open(b"l")
        with pytest.raises(FileExistsError):
            root.create(b"l")
        root.link(b"l", b"m")
        assert stat.S_ISLNK(root.stat(b"m").st_mode)
        with root.resolve(b"l", os.O_RDONLY) as file:
            assert os.read(file.fileno(), 2) == b"f"


@pytest.mark.parametrize("path", [b"", b"/", b".", b"..", b"a/..", b"a/.", b"a\0b"])
def test_refuses_what_has_no_last_component(path: bytes) -> None:
    with pytest.raises(InvalidInput):
        split(path)


def test_dotdot_stops_at_the_root(inside: Path) -> None:
    with Root(str(inside)) as root:
        root.write(b"../../f", b"")
        assert root.listdir() == [b"f"]


def test_makes_the_targets_of_dangling_links_and_says_what_it_made(inside: Path) -> None:
    (inside / "a").symlink_to("/b/../c")
    (inside / "b").mkdir()
    (inside / "loop").symlink_to("loop")
    made: list[bytes] = []
    with Root(str(inside)) as root:
        root.mkdir_all(b"a/d/e", 0o700, made).close()
        assert made == [b"b/../c", b"a/d", b"a/d/e"]
        assert (inside / "c/d/e").is_dir()
        with pytest.raises(OSError, match="symbolic links"):
            root.mkdir_all(b"loop/x")
        root.write(b"f", b"")
        with pytest.raises(NotADirectoryError):
            root.mkdir_all(b"f/x")


def test_paths_longer_than_the_kernel_takes(inside: Path) -> None:
    part = b"x" * 200
    path = b"/".join([part] * 50)
    with Root(str(inside)) as root:
        root.mkdir_all(path).close()
        root.write(path + b"/f", b"deep")
        with root.open(path + b"/f") as file:
            assert os.read(file.fileno(), 10) == b"deep"
        root.mkdir_all(path + b"/d").close()
        with pytest.raises(OSError, match="too long"):
            root.resolve(b"y" * 5000)
        root.remove_tree(part)
        assert root.listdir() == []


def test_removes_trees_of_any_depth_and_width(tmp_path: Path) -> None:
    with Root(str(tmp_path)) as root:
        with root.mkdir_all(b"t") as top:
            fd = os.dup(top.fileno())
        for _ in range(3000):
            os.mkdir(b"d", dir_fd=fd)
            below = os.open(b"d", os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        for number in range(200):
            root.mkdir_all(b"t/wide/%d/x" % number).close()
            root.symlink(b"/", b"t/wide/%d/l" % number)
        root.remove_tree(b"t")
        root.remove_tree(b"t")
        assert root.listdir() == []
        root.write(b"f", b"")
        with pytest.raises(NotADirectoryError):
            remove_tree(root.fileno(), b"f/g")


def test_a_rename_race_never_leads_outside(inside: Path) -> None:
    """A directory and a link to outside keep changing places while we write through the name."""
    (inside / "dir").mkdir()
    (inside / "evil").symlink_to("../outside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(inside / "dir", inside / "spare")
            os.rename(inside / "evil", inside / "dir")
            os.rename(inside / "dir", inside / "evil")
            os.rename(inside / "spare", inside / "dir")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        with Root(str(inside)) as root:
            for _ in range(500):
                try:
                    root.write(b"dir/sentinel", b"changed")
                    root.unlink(b"dir/sentinel")
                except OSError:
                    continue
    finally:
        stop.set()
        thread.join()
    assert untouched(inside)


@pytest.mark.parametrize("action", ["mkdir_all", "create", "remove_tree", "rename", "symlink"])
def test_no_race_leads_anything_outside(inside: Path, action: str) -> None:
    """As above, one directory deeper, with everything that makes or removes a name."""
    (inside / "dir/sub").mkdir(parents=True)
    (inside / "evil").symlink_to("../outside")
    (inside.parent / "outside/sub").mkdir()
    (inside.parent / "outside/sub/precious").write_text("kept")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            syscalls.renameat2(str(inside / "dir"), str(inside / "evil"), syscalls.RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    done = 0
    try:
        with Root(str(inside)) as root:
            actions = {
                "mkdir_all": lambda: root.mkdir_all(b"dir/sub/made/below").close(),
                "create": lambda: root.create(b"dir/sub/made").close(),
                "remove_tree": lambda: None,
                "rename": lambda: root.rename(b"dir/sub", b"dir/made"),
                "symlink": lambda: root.symlink(b"/", b"dir/sub/made"),
            }
            for number in itertools.count():
                if number >= 300 and done:
                    break
                for step in (actions[action], lambda: root.remove_tree(b"dir/sub/made")):
                    try:
                        step()
                        done += 1
                    except OSError:
                        continue
                if action == "rename":
                    try:
                        root.rename(b"dir/made", b"dir/sub")
                    except OSError:
                        continue
                elif action == "remove_tree":
                    try:
                        root.remove_tree(b"dir/sub")
                        root.mkdir_all(b"dir/sub").close()
                    except OSError:
                        continue
    finally:
        stop.set()
        thread.join()
    assert done
    outside = inside.parent / "outside"
    assert sorted(path.name for path in outside.iterdir()) == ["sentinel", "sub"]
    assert [path.name for path in (outside / "sub").iterdir()] == ["precious"]
    assert (outside / "sub/precious").read_text() == "kept"


# The table of continuity's fs.RootPath, which walks by name: (links, root, path, where it leads; None: too many links).
# Where it answers for a name that does not exist, openat2(2) says ENOENT: so everything exists here.
_ROOT_PATHS = [
    ({"fs/a/d": "/b"}, "", "fs/a/d/c/data", "b/c/data"),
    ({"fs/i": "a"}, "", "fs/i", "fs/a"),
    ({"linkdir": "realdir"}, "linkdir", "foo/bar", "realdir/foo/bar"),
    ({"fs/a/d": "/b"}, "", "fs/a/d", "b"),
    ({"fs/a/e": "../b"}, "", "fs/a/e/c/data", "fs/b/c/data"),
    ({"fs/a/e": "../b"}, "fs/a", "e", "fs/a/b"),
    ({"fs/a/f": "../../../../test"}, "", "fs/a/f", "test"),
    ({"fs/a/f": "../../../../test"}, "fs", "a/f", "fs/test"),
    ({"fs/b/h": "../g", "fs/g": "../" * 12 + "root"}, "", "fs/b/h", "root"),
    ({"fs/j/k": "../i/a"}, "fs/j", "k", "fs/j/i/a"),
    ({"foo": "/"}, "", "foo", ""),
    ({"foo": "/../../"}, "", "foo", ""),
    ({"foo": "../../"}, "", "foo", ""),
    ({"bar/foo": "baz/target"}, "", "bar/foo", "bar/baz/target"),
    ({"root": "root2", "root2/foo": "../bar"}, "root", "foo", "root2/bar"),
    ({"root/foo": "foo"}, "root", "foo", None),
    ({"bar": "foo", "foo": "bar"}, "", "foo", None),
    ({"root/bar": "baz", "root/baz": "../bak", "root/bak": "/bar"}, "root", "bar", None),
    ({"root/slash": "/", "root/sym": "/slash/../slash"}, "root", "sym/file", "root/file"),
    ({"root/sym": "/foo/bar", "root/hello": "/sym/../baz"}, "root", "hello", "root/foo/baz"),
]


@pytest.mark.parametrize(("links", "root", "path", "where"), _ROOT_PATHS)
def test_paths_lead_where_those_of_containerd_do(
    inside: Path, links: dict[str, str], root: str, path: str, where: str | None
) -> None:
    if where:
        (inside / where).mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).symlink_to(target)
    for name in ("root2", "realdir", "root/foo/bar" if "root/sym" in links else "x"):
        (inside / name).mkdir(parents=True, exist_ok=True)
    with Root(str(inside / root)) as opened:
        if where is None:
            with pytest.raises(OSError, match="symbolic links"):
                opened.resolve(os.fsencode(path))
        else:
            with opened.resolve(os.fsencode(path)) as found:
                assert os.path.samestat(os.stat(found.fileno()), os.stat(inside / where))
    assert untouched(inside)


_PART = st.sampled_from([b"a", b"b", b"l", b"m", b"..", b".", b"", b"\xff"])


@settings(max_examples=60, deadline=None)
@given(
    links=st.dictionaries(
        st.sampled_from([b"l", b"m"]), st.lists(_PART, min_size=1, max_size=5).map(b"/".join), max_size=2
    ),
    path=st.lists(_PART, min_size=1, max_size=6).map(b"/".join),
)
def test_no_path_and_no_link_leads_outside(
    tmp_path_factory: pytest.TempPathFactory, links: dict[bytes, bytes], path: bytes
) -> None:
    inside = tmp_path_factory.mktemp("tree") / "in"
    (inside / "a").mkdir(parents=True)
    (inside.parent / "outside").mkdir()
    (inside.parent / "outside/sentinel").write_text("untouched")
    with Root(str(inside)) as root:
        for name, target in links.items():
            if target:
                root.symlink(target, name)
        for action in (
            lambda: root.mkdir_all(path).close(),
            lambda: root.write(path + b"/sentinel", b"changed"),
            lambda: root.symlink(b"/", path),
            lambda: root.remove_tree(path),
        ):
            try:
                action()
            except (OSError, InvalidInput):
                continue
    assert untouched(inside)
    assert {path.name for path in inside.parent.iterdir()} == {"in", "outside"}


def test_imports_little() -> None:
    """It runs in the guest, where every module costs."""
    heavy = {"pathlib", "typing", "dataclasses", "re", "contextlib", "enum"}
    code = (
        "import sys; before = set(sys.modules); import holdfast.mounts.root; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "holdfast.mounts.root" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
