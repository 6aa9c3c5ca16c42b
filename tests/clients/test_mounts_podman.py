"""podman's words for mounts, understood by podman and by us: the container sees the same."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError
from holdfast.spec.mounts import parse_mount, parse_volume
from tests.engines import podman
from tests.images import busybox_tree
from tests.kernel import namespace_pods

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not (shutil.which("podman") and shutil.which("runc")), reason="needs podman and runc")

data, _, shared_pod = namespace_pods.FIXTURES
#: Point, options, kind and data of the mount at /m; how it looks; and whether it can be written to.
SCRIPT = (
    "grep ' /m ' /proc/self/mounts | cut -d' ' -f2-4; stat -c '%F %a %u %g' /m;"
    " touch /m/x 2>/dev/null && rm /m/x && echo writable; true"
)
VOLUMES = ("", ":ro", ":rw", ":noexec", ":ro,noexec", ":nosuid,nodev", ":rprivate", ":rslave", ":bind", ":rbind")
BINDS = ("", ",ro", ",readonly", ",ro=true", ",ro=false", ",bind-propagation=rprivate")
TMPFS = ("", ",ro", ",tmpfs-size=1m", ",tmpfs-mode=0700", ",tmpfs-size=1m,tmpfs-mode=0711", ",notmpcopyup")


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("theirs", "ours"):
        busybox_tree(tmp_path / name)
    return tmp_path / "theirs", tmp_path / "ours"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "file").write_text("of the host\n")
    return path


def both(tmp_path, pod, roots, option, words, script=SCRIPT):
    """What a container with one mount prints, theirs and ours; None for whom it refuses."""
    done = podman(tmp_path / "store", roots[0], [option, words], script)
    parse = parse_volume if option == "-v" else parse_mount
    try:
        ours = pod.run(rootfs=roots[1], args=["sh", "-c", script], mounts=[parse(words, cwd="/")]).text
    except HoldfastError:
        ours = None
    return done.stdout if done.returncode == 0 else None, ours


def same(theirs: str, ours: str, *, share: bool) -> bool:
    """As podman's, but that a share of ours has neither devices nor setuid programs."""
    if share:
        mine, other = ours.splitlines(), theirs.splitlines()
        words = [set(line.split(" ")[2].split(",")) for line in (mine[0], other[0])]
        return words[0] == words[1] | {"nosuid", "nodev"} and mine[1:] == other[1:]
    return theirs == ours


@pytest.mark.parametrize("options", VOLUMES)
def test_volumes(shared_pod, tmp_path, roots, source, options):
    theirs, ours = both(tmp_path, shared_pod, roots, "-v", f"{source}:/m{options}")
    assert same(theirs, ours, share=True), (theirs, ours)


@pytest.mark.parametrize("options", BINDS)
def test_binds(shared_pod, tmp_path, roots, source, options):
    theirs, ours = both(tmp_path, shared_pod, roots, "--mount", f"type=bind,src={source},dst=/m{options}")
    assert same(theirs, ours, share=True), (theirs, ours)


@pytest.mark.parametrize("options", TMPFS)
def test_tmpfs(shared_pod, tmp_path, roots, options):
    theirs, ours = both(tmp_path, shared_pod, roots, "--mount", f"type=tmpfs,destination=/m{options}")
    assert same(theirs, ours, share=False), (theirs, ours)


def test_a_tmpfs_has_what_the_image_has_there(shared_pod, tmp_path, roots):
    script = "cat /etc/passwd; ls -ld /etc | cut -c1-10; ls -l /etc/group | cut -c1-10; rm /etc/group && echo removed"
    theirs, ours = both(tmp_path, shared_pod, roots, "--mount", "type=tmpfs,dst=/etc", script)
    assert theirs == ours
    assert (roots[1] / "etc/group").exists()


def test_a_file(shared_pod, tmp_path, roots, source):
    script = "cat /m /a/b/c; stat -c '%F %a' /m"
    theirs, ours = both(tmp_path, shared_pod, roots, "-v", f"{source}/file:/m", script.replace(" /a/b/c", ""))
    assert theirs == ours == "of the host\nregular file 644\n"


@pytest.mark.parametrize("words", ["{source}/missing:/m", "{source}:m", "{source}:/m:bogus"])
def test_what_both_refuse(shared_pod, tmp_path, roots, source, words):
    assert both(tmp_path, shared_pod, roots, "-v", words.format(source=source)) == (None, None)


def test_a_read_only_root(shared_pod, tmp_path, roots):
    script = (
        "for d in / /run /tmp /var/tmp /etc /dev/shm; do touch $d/x 2>/dev/null && echo $d writable;"
        " stat -c '%n %a' $d; done; grep -E ' /(run|tmp|var/tmp) ' /proc/self/mounts | cut -d' ' -f2-4 | sort"
    )
    done = podman(tmp_path / "store", roots[0], ["--read-only"], script)
    assert shared_pod.run(rootfs=roots[1], args=["sh", "-c", script], read_only=True).text == done.stdout
    assert done.stdout.count("writable") == 4


def test_the_kernel_s_filesystems(shared_pod, tmp_path, roots):
    """podman's /dev is noexec, and its /dev/shm counts in thousands."""
    script = (
        "grep -E ' (/proc|/sys|/dev|/dev/pts|/dev/shm|/dev/mqueue) ' /proc/self/mounts | cut -d' ' -f1-4;"
        " ls -l /dev | sed 's/.* //'; ls -ld /dev/shm /dev/mqueue | cut -c1-10; ls -l /dev/null | cut -c1-30"
    )
    done = podman(tmp_path / "store", roots[0], [], script)
    theirs = done.stdout.replace("/dev tmpfs rw,nosuid,noexec", "/dev tmpfs rw,nosuid").replace("64000k", "65536k")
    assert shared_pod.run(rootfs=roots[1], args=["sh", "-c", script]).text == theirs
