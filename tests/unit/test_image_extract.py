"""One layer as a tree: what overlayfs must find there, and that nothing is written anywhere else."""

from __future__ import annotations

import io
import os
import stat
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import Corrupt, HoldfastError, InvalidInput, Unsupported
from holdfast.image import lower
from holdfast.image.blobs import Region
from holdfast.image.extract import Extraction
from holdfast.image.layout import PlannedLayer
from holdfast.image.tarstream import TarStream
from tests.image_archives import entry, sha256, tar

if TYPE_CHECKING:
    import tarfile
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and device nodes need root")


class Tree:
    """Extracts layers below ``tmp_path``, with a sentinel beside each."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.path = tmp_path / "tree"
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/sentinel").write_text("untouched")
        self._fds: list[int] = []

    def extract(self, layer: bytes, *below: bytes) -> Tree:
        """``below``: the layers under it, topmost first."""
        self.path.mkdir()
        with Extraction(str(self.path), "test") as extraction:
            extraction.write(TarStream(iter([layer]), "test"))
            self.dependent = lower.depends(extraction)
            lower.fill(extraction, [self._planned(item) for item in below], lambda: None)
            extraction.finish(bottom=not below)
        return self

    def _planned(self, layer: bytes) -> PlannedLayer:
        fd = os.memfd_create("layer", os.MFD_CLOEXEC)
        self._fds.append(fd)
        os.write(fd, layer)
        return PlannedLayer(sha256(layer), Region(fd, 0, len(layer), "below"), "")

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def stat(self, name: str) -> os.stat_result:
        return os.lstat(self.path / name)

    def kind(self, name: str) -> str:
        try:
            info = self.stat(name)
        except FileNotFoundError:
            return "nothing"
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            return "whiteout"
        return {
            stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link", stat.S_IFCHR: "char",
            stat.S_IFBLK: "block", stat.S_IFIFO: "fifo",
        }[stat.S_IFMT(info.st_mode)]  # fmt: skip

    def opaque(self, name: str) -> bool:
        return "trusted.overlay.opaque" in os.listxattr(self.path / name, follow_symlinks=False)

    def untouched(self) -> bool:
        return (
            (self.folder / "outside/sentinel").read_text() == "untouched"
            and {path.name for path in self.folder.iterdir()} <= {"tree", "outside"}
            and os.listdir(self.folder / "outside") == ["sentinel"]
        )


@pytest.fixture
def tree(tmp_path: Path):
    made = Tree(tmp_path)
    yield made
    assert made.untouched()
    made.close()


NS = "1700000000.123456789"


def test_metadata_are_kept(tree: Tree) -> None:
    capability = b"\x01\x00\x00\x02\x00\x04" + bytes(14)
    tree.extract(
        tar(
            entry("./", "dir", mode=0o1711, uid=5, gid=6, pax_headers={"mtime": NS}),
            entry("d", "dir", mode=0o2750, uid=3000000000, gid=70000, pax_headers={"mtime": NS}),
            entry("d/f", data=b"hello", mode=0o6755, uid=70000, gid=3000000000,
                  pax_headers={"mtime": NS, "SCHILY.xattr.user.a": "b",
                               "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")}),
            entry("l", "symlink", linkname="/nowhere/../x", uid=9, pax_headers={"mtime": NS}),
            entry("p", "fifo", mode=0o622, uid=4),
            entry("c", "char", mode=0o666, devmajor=1, devminor=3),
            entry("b", "block", mode=0o660, devmajor=8, devminor=300, gid=6),
        )
    )  # fmt: skip
    root, d, f = tree.stat("."), tree.stat("d"), tree.stat("d/f")
    assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid, root.st_mtime_ns) == (
        0o1711,
        5,
        6,
        1700000000123456789,
    )
    assert (stat.S_IMODE(d.st_mode), d.st_uid, d.st_gid, d.st_mtime_ns) == (
        0o2750,
        3000000000,
        70000,
        1700000000123456789,
    )
    assert (stat.S_IMODE(f.st_mode), f.st_uid, f.st_gid, f.st_mtime_ns) == (
        0o6755,
        70000,
        3000000000,
        1700000000123456789,
    )
    assert os.getxattr(tree.path / "d/f", "user.a") == b"b"
    assert os.getxattr(tree.path / "d/f", "security.capability") == capability
    assert os.readlink(tree.path / "l") == "/nowhere/../x"
    assert (tree.stat("l").st_uid, tree.stat("l").st_mtime_ns) == (9, 1700000000123456789)
    assert [tree.kind(name) for name in "pcb"] == ["fifo", "char", "block"]
    assert tree.stat("b").st_rdev == os.makedev(8, 300)
    assert stat.S_IMODE(tree.stat("p").st_mode) == 0o622


def test_sparse_files_keep_their_holes(tree: Tree) -> None:
    headers = {"GNU.sparse.map": "0,4096,10485760,2", "GNU.sparse.size": "20971520"}
    tree.extract(tar(entry("s", data=b"x" * 4096 + b"yz", pax_headers=headers), entry("after", data=b"after")))
    info = tree.stat("s")
    assert info.st_size == 20971520
    assert info.st_blocks * 512 < 1 << 16
    with open(tree.path / "s", "rb") as file:
        assert file.read(4097) == b"x" * 4096 + b"\0"
        file.seek(10485760)
        assert file.read(3) == b"yz\0"
    assert (tree.path / "after").read_bytes() == b"after"


def test_sparse_1_0_as_tar_writes_it(tree: Tree) -> None:
    """The map stands in front of the data, in blocks of its own."""
    body = b"2\n0\n4\n1000\n4\n".ljust(512, b"\0") + b"headtail"
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "real",
        "GNU.sparse.realsize": "1004",
    }
    tree.extract(tar(entry("GNUSparseFile.0/real", data=body, pax_headers=headers), entry("after", data=b"x")))
    assert (tree.path / "real").read_bytes() == b"head" + bytes(996) + b"tail"
    assert (tree.path / "after").read_bytes() == b"x"


def test_holes_without_end(tree: Tree) -> None:
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 36)}
    with pytest.raises(Unsupported, match="holes"):
        tree.extract(tar(entry("s", data=b"x", pax_headers=headers), entry("t", data=b"x", pax_headers=headers)))


def test_hard_links(tree: Tree) -> None:
    tree.extract(
        tar(
            entry("a", data=b"x", mode=0o600),
            entry("d/b", "link", linkname="a", mode=0o777),
            entry("l", "symlink", linkname="a"),
            entry("m", "link", linkname="l"),
            entry("a", "link", linkname="a"),
            entry("d/b", "link", linkname="./a"),
        )
    )
    assert tree.stat("a").st_ino == tree.stat("d/b").st_ino
    assert stat.S_IMODE(tree.stat("a").st_mode) == 0o600
    assert tree.stat("m").st_ino == tree.stat("l").st_ino


def test_a_hard_link_to_what_comes_later_or_never(tree: Tree) -> None:
    tree.extract(tar(entry("b", "link", linkname="a"), entry("a", data=b"x")))
    assert tree.stat("a").st_ino == tree.stat("b").st_ino


def test_a_hard_link_through_links_in_a_circle(tree: Tree) -> None:
    with pytest.raises(Corrupt, match="links in a circle"):
        tree.extract(tar(entry("a", "symlink", linkname="a"), entry("b", "link", linkname="a/b")))


def test_a_hard_link_to_nothing(tree: Tree) -> None:
    with pytest.raises(Corrupt, match="in no layer"):
        tree.extract(tar(entry("b", "link", linkname="a")), tar(entry("other")))


def test_a_hard_link_to_a_file_below_brings_it_up(tree: Tree) -> None:
    below = tar(entry("o", data=b"old"), entry("d", "dir", mode=0o700), entry("d/a", "link", linkname="o", mode=0o640))
    tree.extract(tar(entry("b", "link", linkname="d/a")), tar(entry("unrelated")), below)
    assert (tree.path / "b").read_bytes() == b"old"
    assert tree.stat("d/a").st_ino == tree.stat("b").st_ino
    assert stat.S_IMODE(tree.stat("d").st_mode) == 0o700
    assert tree.dependent


def test_a_deleted_file_below_is_no_target(tree: Tree) -> None:
    with pytest.raises(Corrupt, match="in no layer"):
        tree.extract(tar(entry("b", "link", linkname="d/a")), tar(entry(".wh.d")), tar(entry("d/a", data=b"x")))


@pytest.mark.parametrize("first", ["file", "dir", "symlink", "fifo"])
@pytest.mark.parametrize("second", ["file", "dir", "symlink", "fifo"])
def test_the_last_entry_of_a_name_wins(tree: Tree, first: str, second: str) -> None:
    def one(kind: str, mtime: int) -> tuple[tarfile.TarInfo, bytes]:
        return entry("x", kind, linkname="y" if kind == "symlink" else "", mtime=mtime, uid=mtime)

    tree.extract(tar(one(first, 1), *([entry("x/sub/f", data=b"1")] if first == "dir" else []), one(second, 2)))
    assert tree.kind("x") == second.replace("symlink", "link")
    assert (tree.stat("x").st_mtime, tree.stat("x").st_uid) == (2, 2)
    if first == second == "dir":
        assert tree.kind("x/sub/f") == "file"


def test_a_file_in_the_way_of_a_directory_goes(tree: Tree) -> None:
    tree.extract(tar(entry("a", data=b"x"), entry("a/b/c", data=b"y"), entry("a/b", data=b"z"), entry("a/b/d")))
    assert tree.kind("a/b/d") == "file"


def test_parents_that_are_not_listed(tree: Tree) -> None:
    tree.extract(tar(entry("s", "dir", mode=0o2777, gid=7), entry("s/a/b/f")))
    for name in ("s/a", "s/a/b"):
        info = tree.stat(name)
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns) == (0o755, 0, 0, 0)
    assert tree.dependent


def test_parents_that_are_not_listed_are_as_below(tree: Tree) -> None:
    below = tar(entry("tmp", "dir", mode=0o1777, uid=3, pax_headers={"mtime": NS, "SCHILY.xattr.user.k": "v"}))
    tree.extract(tar(entry("tmp/a")), tar(entry("unrelated", "dir")), below)
    info = tree.stat("tmp")
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_mtime_ns) == (0o1777, 3, 1700000000123456789)
    assert os.getxattr(tree.path / "tmp", "user.k") == b"v"


def test_parents_below_that_were_deleted_in_between_do_not_count(tree: Tree) -> None:
    below = tar(entry("d", "dir", mode=0o700), entry("d/e", "dir", mode=0o700))
    tree.extract(tar(entry("d/e/f")), tar(entry("d/.wh..wh..opq"), entry("d", "dir", mode=0o711)), below)
    assert stat.S_IMODE(tree.stat("d").st_mode) == 0o711
    assert stat.S_IMODE(tree.stat("d/e").st_mode) == 0o755


def test_a_link_below_shows_through(tree: Tree) -> None:
    """``lib/new`` on top of ``lib -> usr/lib`` belongs into ``usr/lib``."""
    below = tar(entry("usr/lib", "dir", mode=0o711), entry("lib", "symlink", linkname="usr/lib"))
    tree.extract(tar(entry("lib/sub/new", data=b"x"), entry("lib/.wh.old")), below)
    assert tree.kind("lib") == "nothing"
    assert (tree.path / "usr/lib/sub/new").read_bytes() == b"x"
    assert tree.kind("usr/lib/old") == "whiteout"
    assert stat.S_IMODE(tree.stat("usr/lib").st_mode) == 0o711


def test_whiteouts(tree: Tree) -> None:
    tree.extract(tar(entry("d", "dir", mtime=5), entry("d/.wh.gone"), entry("implied/.wh.x")), tar(entry("d/gone")))
    assert tree.kind("d/gone") == "whiteout"
    assert tree.kind("implied/x") == "whiteout"
    assert tree.kind("d/.wh.gone") == "nothing"
    assert tree.stat("d").st_mtime == 5


@pytest.mark.parametrize("order", [1, -1])
def test_what_a_layer_deletes_and_brings_is_brought(tree: Tree, order: int) -> None:
    pairs = [
        [entry(".wh.f"), entry("f", data=b"new")],
        [entry(".wh.d"), entry("d/x", data=b"new")],
        [entry("o/.wh..wh..opq"), entry("o", "dir", mode=0o700, mtime=3), entry("o/y")],
    ]
    tree.extract(
        tar(*[item for pair in pairs for item in pair[::order]]), tar(entry("f"), entry("d/old"), entry("o/z"))
    )
    assert tree.kind("f") == "file"
    assert tree.opaque("d")
    assert tree.opaque("o")
    assert not tree.opaque(".")
    assert (stat.S_IMODE(tree.stat("o").st_mode), tree.stat("o").st_mtime) == (0o700, 3)


def test_no_whiteouts_where_nothing_can_be_below(tree: Tree) -> None:
    """overlayfs would list them: it filters only directories that it merges."""
    tree.extract(tar(entry("o/.wh.x"), entry("o/sub/.wh.y"), entry("o/.wh..wh..opq")), tar(entry("o/z")))
    assert tree.kind("o/x") == "nothing"
    assert tree.kind("o/sub/y") == "nothing"


def test_no_whiteouts_at_the_bottom(tree: Tree) -> None:
    tree.extract(tar(entry(".wh.x"), entry("f")))
    assert os.listdir(tree.path) == ["f"]


def test_bookkeeping_of_aufs_is_left_out(tree: Tree) -> None:
    tree.extract(tar(entry(".wh..wh.plnk", "dir"), entry(".wh..wh.aufs"), entry(".wh..wh.plnk/1.2")))
    assert tree.kind(".wh..wh.aufs") == "nothing"


def test_xattrs_that_steer_overlayfs_are_left_out(tree: Tree) -> None:
    headers = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.fine": "1"}
    tree.extract(tar(entry("d", "dir", pax_headers=headers)))
    assert os.listxattr(tree.path / "d") == ["user.fine"]


def test_an_xattr_that_does_not_fit(tree: Tree) -> None:
    with pytest.raises(Unsupported) as caught:
        tree.extract(tar(entry("f", pax_headers={"SCHILY.xattr.user.big": "x" * 66000})))
    assert caught.value.code == "xattr-not-possible"


def test_names_that_are_not_utf8_and_paths_too_long_for_the_kernel(tree: Tree) -> None:
    deep = "/".join(["y" * 200] * 30)
    tree.extract(tar(entry("\udcff\udce4"), entry(f"{deep}/f", data=b"deep")))
    assert b"\xff\xe4" in os.listdir(os.fsencode(tree.path))
    here = os.open(tree.path, os.O_PATH)
    for part in deep.split("/"):
        below = os.open(part, os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    assert os.stat("f", dir_fd=here).st_size == 4
    os.close(here)


def test_an_archive_named_by_absolute_paths(tree: Tree) -> None:
    tree.extract(tar(entry("/etc/passwd", data=b"x")))
    assert tree.kind("etc/passwd") == "file"


@pytest.mark.parametrize("name", ["../outside/x", "a/../../outside/x", ".wh...", "a/.wh..", ".wh."])
def test_climbing_is_refused(tree: Tree, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        tree.extract(tar(entry(name)))
    assert caught.value.code == "archive-escapes"


@pytest.mark.parametrize(
    "target", ["../outside", "/outside", "../../../../../..{outside}", "{outside}", "/proc/self/cwd"]
)
@pytest.mark.parametrize("chain", [False, True])
def test_links_that_lead_out_lead_in(tree: Tree, target: str, chain: bool) -> None:
    outside = str(tree.folder / "outside")
    links = [entry("l", "symlink", linkname=target.format(outside=outside))]
    if chain:
        links.append(entry("m", "symlink", linkname="x/../l"))
        links.append(entry("x", "dir"))
    via = "m" if chain else "l"
    tree.extract(
        tar(
            *links,
            entry(f"{via}/sentinel", data=b"changed"),
            entry(f"{via}/new", "dir", mode=0o777),
            entry(f"{via}/.wh.sentinel"),
            entry(f"{via}/sub/.wh..wh..opq"),
            entry("h", "link", linkname=f"{via}/sentinel"),
            entry(f"{via}/n", "char", devmajor=1, devminor=1),
        ),
        tar(entry("below")),
    )
    assert tree.stat("h").st_size == 7


def test_a_directory_that_becomes_a_link_to_outside(tree: Tree) -> None:
    """The parent that is kept open must not outlive its name, nor may its time be set elsewhere."""
    outside = str(tree.folder / "outside")
    before = os.stat(outside).st_mtime_ns
    tree.extract(
        tar(
            entry("d", "dir", mtime=1),
            entry("d/a"),
            entry("d", "symlink", linkname=outside),
            entry("d/sentinel", data=b"changed"),
            entry("d", "dir", mtime=2),
            entry("d/b"),
        )
    )
    assert os.stat(outside).st_mtime_ns == before
    assert sorted(os.listdir(tree.path / "d")) == ["b"]


def test_a_directory_replaced_below_itself(tree: Tree) -> None:
    with pytest.raises(Corrupt):
        tree.extract(tar(entry("d/a/f", data=b"x"), entry("d", "link", linkname="d/a/f")))


_NAME = st.lists(st.sampled_from(["a", "b", "l", ".wh.a", ".wh..wh..opq", "..", "."]), min_size=1, max_size=3).map(
    "/".join
)
_ENTRY = st.tuples(
    _NAME,
    st.sampled_from(["file", "dir", "symlink", "link", "fifo"]),
    st.sampled_from(["a", "../outside", "/", "l/b", "a/b", "b/../../outside/sentinel"]),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(_ENTRY, max_size=8), st.lists(_ENTRY, max_size=5))
def test_any_archive_is_extracted_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    above: list[tuple[str, str, str]],
    below: list[tuple[str, str, str]],
) -> None:
    def made(items: list[tuple[str, str, str]]) -> bytes:
        return tar(
            *[
                entry(name, kind, b"x" if kind == "file" else b"", linkname=target if "link" in kind else "")
                for name, kind, target in items
            ]
        )

    tree = Tree(tmp_path_factory.mktemp("any"))
    try:
        tree.extract(made(above), made(below))
    except HoldfastError:
        pass
    finally:
        assert tree.untouched()
        tree.close()


def test_payload_in_any_chunks(tmp_path: Path) -> None:
    data = tar(entry("a", data=os.urandom(5000)), entry("b", data=b"b" * 513), entry("c", data=b""))
    out = []
    for size in (1, 7, 512, 1 << 20):
        folder = tmp_path / str(size)
        folder.mkdir()
        source = io.BytesIO(data)
        with Extraction(str(folder), "test") as extraction:
            extraction.write(TarStream(iter(partial(source.read, size), b""), "test"))
        out.append([(folder / name).read_bytes() for name in "abc"])
    assert all(item == out[0] for item in out)
