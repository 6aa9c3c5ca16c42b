"""The same bundle in runc, in runsc and in pods of both kinds: what a container sees of its mounts must be the same.

Where we mean to differ, the test says it: a share of the host never has devices or setuid programs, mounts are made
parents first, and a destination that leads out of the root is refused.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import holdfast
from tests import leaks
from tests.engines import Case, bind, pod, runc, runsc, tmpfs
from tests.kernel import namespace_pods

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.engines import Seen

pytestmark = pytest.mark.skipif(not shutil.which("runc"), reason="needs runc")

data = namespace_pods.data
KINDS = ("namespace", "vm")
#: Every share has these, whoever asks.
OF_SHARES = frozenset(("nosuid", "nodev"))


@pytest.fixture(scope="module")
def pods(data: Path, run_folder: Path) -> Iterator[dict[str, holdfast.Pod]]:
    root = run_folder / "oracles"
    leaks.expect(root)
    with leaks.long_lived():
        made = {kind: holdfast.Pod(isolation=kind, root=root, data=data) for kind in KINDS}
    yield made
    for one in made.values():
        one.remove()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text("of the host\n")
    return path


def ours(tmp_path: Path, case: Case, pods: dict[str, holdfast.Pod]) -> dict[str, Seen]:
    return {kind: pod(tmp_path / kind, case, of) for kind, of in pods.items()}


# -- options ----------------------------------------------------------------------------------------

BIND_OPTIONS = (
    "ro", "rw", "nosuid", "noexec", "nodev", "noatime", "nodiratime", "relatime", "norelatime", "strictatime",
    "ro,noexec", "ro,nosuid,nodev,noexec,noatime",
)  # fmt: skip
TMPFS_OPTIONS = (
    "rw", "ro", "size=1m", "size=64k,ro", "mode=711", "mode=1777,uid=5,gid=6", "nr_inodes=10", "noexec",
    "noexec,nosuid,nodev", "noatime",
)  # fmt: skip
PROPAGATION = ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
USE = "touch {0}/x && rm {0}/x; cp /bin/busybox {0}/b && {0}/b true; echo $?; rm -f {0}/b; stat -c '%a %u %g' {0}"


def used(count: int) -> str:
    """A script that uses the mounts /m0, /m1 and so on."""
    return "\n".join(f"echo {n}; {USE.format(f'/m{n}')}" for n in range(count))


def test_options_of_binds(pods, tmp_path, source):
    mounts = [bind(source, f"/m{n}", "rbind", *words.split(",")) for n, words in enumerate(BIND_OPTIONS)]
    case = Case(mounts, used(len(mounts)))
    theirs = runc(tmp_path, case)
    for kind, seen in ours(tmp_path, case, pods).items():
        assert seen.output == theirs.output, kind
        for mount in mounts:
            (mine,), (other,) = seen.at(mount["destination"]), theirs.at(mount["destination"])
            if kind == "namespace":  # a machine has 9p, which keeps times by itself
                assert mine.options == other.options | OF_SHARES, mount
            else:
                assert mine.options & {"ro", "noexec"} == other.options & {"ro", "noexec"}, mount


def test_options_of_tmpfs(pods, tmp_path):
    mounts = [tmpfs(f"/m{n}", *words.split(",")) for n, words in enumerate(TMPFS_OPTIONS)]
    case = Case(mounts, used(len(mounts)))
    theirs = runc(tmp_path, case)
    for kind, seen in ours(tmp_path, case, pods).items():
        assert seen.output == theirs.output, kind
        for mount in mounts:
            (mine,), (other,) = seen.at(mount["destination"]), theirs.at(mount["destination"])
            assert (mine.options, mine.data) == (other.options, other.data), (kind, mount)


@pytest.mark.parametrize("of", ["bind", "tmpfs"])
def test_propagation(pods, tmp_path, source, of):
    """A pod's own mount is what it may be a slave of, so that this alone is no difference."""
    mounts = [
        bind(source, f"/m{n}", "rbind", word) if of == "bind" else tmpfs(f"/m{n}", word)
        for n, word in enumerate(PROPAGATION)
    ]
    case = Case([*mounts, bind(source, "/none")])
    theirs = runc(tmp_path, case)
    for kind, seen in ours(tmp_path, case, pods).items():
        for mount in case.mounts:
            (mine,), (other,) = seen.at(mount["destination"]), theirs.at(mount["destination"])
            assert mine.propagation - {"master"} == other.propagation - {"master"}, (kind, mount)
            if "private" in mount["options"][-1]:
                assert mine.propagation == frozenset(), (kind, mount)


@pytest.mark.parametrize("options", ["bogus", "size=x", "mode=9"])
def test_options_that_the_kernel_refuses(pods, tmp_path, options):
    case = Case([tmpfs("/t", options)])
    assert runc(tmp_path, case).refused
    for kind, seen in ours(tmp_path, case, pods).items():
        assert seen.refused, kind
        assert "nvalid argument" in seen.why


# -- size ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("runsc"), reason="needs runsc")
def test_a_size_holds(pods, tmp_path):
    script = "dd if=/dev/zero of=/t/x bs=4k count=100 2>&1 | head -n 1; stat -c %s /t/x; rm /t/x; echo room > /t/y"
    case = Case([tmpfs("/t", "size=64k")], script)
    theirs = runc(tmp_path, case).output
    assert theirs == "dd: error writing '/t/x': No space left on device\n65536\n"
    assert runsc(tmp_path, case).output == theirs
    assert {seen.output for seen in ours(tmp_path, case, pods).values()} == {theirs}


# -- order --------------------------------------------------------------------------------------------


ORDERS = {
    "in a tmpfs": lambda source: [tmpfs("/a"), bind(source, "/a/b")],
    "in a bind": lambda source: [bind(source, "/a"), tmpfs("/a/sub/deep")],
    "in a tmpfs in a bind": lambda source: [bind(source, "/a"), tmpfs("/a/sub"), bind(source / "sub", "/a/sub/c")],
    "twice, the tmpfs last": lambda source: [bind(source, "/a"), tmpfs("/a")],
    "twice, the bind last": lambda source: [tmpfs("/a"), bind(source, "/a")],
}


@pytest.mark.skipif(not shutil.which("runsc"), reason="needs runsc")
@pytest.mark.parametrize("order", ORDERS)
def test_order(pods, tmp_path, source, order):
    case = Case(ORDERS[order](source), "cd /a; find . -maxdepth 2 | sort")
    theirs = runc(tmp_path, case).output
    assert theirs
    assert runsc(tmp_path, case).output == theirs
    assert {seen.output for seen in ours(tmp_path, case, pods).values()} == {theirs}


@pytest.mark.skipif(not shutil.which("runsc"), reason="needs runsc")
def test_a_parent_that_comes_later_hides_nothing(pods, tmp_path, source):
    """runc makes mounts as they are listed and hides the first; runsc, and we, make parents first."""
    case = Case([bind(source, "/a/b"), tmpfs("/a")], "cd /a; find . -maxdepth 2 | sort")
    theirs = runsc(tmp_path, case).output
    assert theirs == ".\n./b\n./b/file\n./b/sub\n"
    assert runc(tmp_path, case).output == ".\n"
    assert {seen.output for seen in ours(tmp_path, case, pods).values()} == {theirs}


# -- destinations -------------------------------------------------------------------------------------


def link(target: str):
    return lambda root: (root / "link").symlink_to(target)


def file(root: Path) -> None:
    (root / "file").write_text("x")


def real(root: Path) -> None:
    (root / "real").mkdir()
    link("real")(root)


DESTINATIONS = {
    "link to a directory": ("/link", real),
    "absolute link": ("/link", link("/etc")),
    "link that climbs": ("/link", link("../../../../etc")),
    "below a link": ("/link/x/y", link("/mnt")),
    "below a link that climbs": ("/link/x", link("../../../mnt")),
    "link to nothing": ("/link", link("/nowhere/at/all")),
    "link in a circle": ("/link", link("link")),
    "dots": ("/mnt/./q//r/", lambda _root: None),
    "dots that stay inside": ("/mnt/../etc/q", lambda _root: None),
    "relative": ("mnt/rel", lambda _root: None),
    "file": ("/file", file),
    "below a file": ("/file/x", file),
}


@pytest.mark.parametrize(
    ("destination", "what"),
    [(name, what) for name in DESTINATIONS for what in ("tmpfs", "bind")]
    + [(name, "file") for name in ("link to nothing", "dots", "file", "below a link that climbs")],
)
def test_destinations(pods, tmp_path, source, destination, what):
    """In the same place, or refused by both; and never anywhere on the host."""
    where, lay = DESTINATIONS[destination]
    mount = {"tmpfs": tmpfs(where), "bind": bind(source, where), "file": bind(source / "file", where)}[what]
    case = Case([mount], lay=lay)
    theirs = runc(tmp_path, case)
    places = [one.point for one in theirs.mounts if one.kind != "proc" and one.point != "/"]
    for kind, seen in ours(tmp_path, case, pods).items():
        assert seen.refused == theirs.refused, (kind, seen.why, theirs.why)
        standard = {"/dev", "/dev/pts", "/sys", "/tmp", "/proc"}  # a container always has them
        assert [one.point for one in seen.mounts if one.point not in standard | {"/"}] == places, kind


@pytest.mark.parametrize("where", ["/../../mnt", "/mnt/../../x"])
def test_a_destination_that_climbs_out_is_refused(pods, tmp_path, where):
    """runc takes it for one inside; who writes it means something else."""
    for kind, seen in ours(tmp_path, Case([tmpfs(where)]), pods).items():
        assert seen.refused, kind
        assert "leads out of the container's root" in seen.why


@pytest.mark.parametrize("pair", ["file on a directory", "directory on a file", "file on a file", "file on a link"])
def test_kinds_of_source_and_destination(pods, tmp_path, source, pair):
    what, where = {
        "file on a directory": (source / "file", "/mnt"), "directory on a file": (source, "/etc/passwd"),
        "file on a file": (source / "file", "/etc/passwd"), "file on a link": (source / "file", "/etc/link"),
    }[pair]  # fmt: skip
    case = Case([bind(what, where)], "cat /etc/passwd", lambda root: (root / "etc/link").symlink_to("passwd"))
    theirs = runc(tmp_path, case)
    for kind, seen in ours(tmp_path, case, pods).items():
        assert (seen.refused, seen.output) == (theirs.refused, theirs.output), kind


def test_a_source_that_is_missing(pods, tmp_path, source):
    case = Case([bind(source / "missing", "/m")])
    assert runc(tmp_path, case).refused
    for seen in ours(tmp_path, case, pods).values():
        assert seen.refused
        assert f"{source}/missing" in seen.why


# -- the root filesystem --------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("runsc"), reason="needs runsc")
def test_mount_points_that_a_read_only_root_lacks(pods, tmp_path, source):
    """They are there, for all; and with us the bundle's root filesystem is afterwards as it was, unlike with runc."""
    script = "ls -ld /absent/deep /t /etc/new | cut -c1-10; touch /x; touch /absent/y; touch /t/z; cat /etc/new"
    mounts = [bind(source, "/absent/deep"), tmpfs("/t"), bind(source / "file", "/etc/new")]
    case = Case(mounts, script, read_only=True)
    theirs = runc(tmp_path, case)
    assert runsc(tmp_path, case).output.splitlines()[:3] == theirs.output.splitlines()[:3]
    for kind, seen in ours(tmp_path, case, pods).items():
        assert seen.output == theirs.output, kind
        root = tmp_path / kind / "pod/rootfs"
        assert not (root / "absent").exists()
        assert not (root / "etc/new").exists()
    assert (tmp_path / "runc/rootfs/absent/deep").is_dir()


@pytest.mark.parametrize("mode", [0o700, 0o1777, 0o2755])
def test_a_tmpfs_on_a_directory_of_the_image(pods, tmp_path, mode):
    """runc gives it the directory's mode; crun, in the machine, the one of a tmpfs."""

    def lay(root: Path) -> None:
        (root / "there").mkdir()
        (root / "there").chmod(mode)

    case = Case([tmpfs("/there")], "stat -c %a /there", lay)
    seen = ours(tmp_path, case, pods)
    assert seen["namespace"].output == runc(tmp_path, case).output == f"{mode:o}\n"
    assert seen["vm"].output == "1777\n"


def test_copying_up(pods, tmp_path):
    case = Case(
        [tmpfs("/etc", "tmpcopyup")], "ls -l /etc | cut -c1-10; cat /etc/passwd; echo own > /etc/own; cat /etc/own"
    )
    theirs = runc(tmp_path, case).output
    assert "root:x:0:0" in theirs
    assert {seen.output for seen in ours(tmp_path, case, pods).values()} == {theirs}
