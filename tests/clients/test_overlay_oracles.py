"""``-v SRC:DST:O`` beside podman's, and beside runsc's overlay over all: the same is seen, and the source stays."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from holdfast.spec.mounts import parse_volume
from tests.images import busybox_tree, make_bundle, run
from tests.kernel import namespace_pods
from tests.vm.support import output, sh

if TYPE_CHECKING:
    from pathlib import Path

data, _, shared_pod = namespace_pods.FIXTURES
#: What it is told of its own; limits that a host without CAP_SYS_RESOURCE has, too.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
SCRIPT = """
cd /m
echo more >> file; rm gone; mv plain moved; mkdir dir; chmod 700 sub; ln -s file link; echo x > opaque/new
rm -r deep; mkdir deep; chown 9:9 owned; rmdir /m 2>/dev/null; mv sub renamed 2>/dev/null; ln moved hard
find . | sort | while read name; do stat -c '%n %F %a %u %g' "$name"; done
stat -c %h file moved hard
cat file moved link
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "source"
    for name in ("sub", "opaque", "deep/deeper"):
        (top / name).mkdir(parents=True)
    for name in ("file", "gone", "plain", "owned", "opaque/old", "deep/deeper/f"):
        (top / name).write_text(f"{name}\n")
    os.chown(top, 7, 8)
    os.chmod(top, 0o2755)
    return top


@pytest.fixture
def podman(tmp_path: Path):
    """A function that runs a script in podman, with a volume; everything of podman's is below the test's folder."""
    own = tmp_path / "podman"
    busybox_tree(own / "root")

    def run_podman(volume: str) -> str:
        # The path must be a short one: it has sockets below it.
        with tempfile.TemporaryDirectory() as short:
            where = ("--root", own / "store", "--runroot", short, "--storage-driver", "vfs")
            command = ["podman", *where, "--cgroup-manager", "cgroupfs", "--runtime", shutil.which("runc") or "crun"]
            options = ["--rm", "--network", "none", *LIMITS, "-v", volume, "--rootfs", own / "root"]
            return run(*command, "run", *options, "sh", "-c", SCRIPT).stdout

    return run_podman


def names(top: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(where, name), top) for where, d, f in os.walk(top) for name in d + f)


@pytest.mark.skipif(not shutil.which("podman"), reason="needs podman")
def test_the_same_is_seen_as_with_podman(shared_pod, podman, source):
    before = names(source)
    theirs = podman(f"{source}:/m:O")
    ours = output(sh(shared_pod, SCRIPT, mounts=[parse_volume(f"{source}:/m:O", cwd="/")]))
    assert ours == theirs
    assert "./moved regular" in ours
    assert names(source) == before


@pytest.mark.skipif(not shutil.which("runsc"), reason="needs runsc")
def test_the_same_is_seen_as_with_runsc(shared_pod, source, tmp_path):
    source.chmod(0o755)  # runsc does not give a new link its directory's group
    before = names(source)
    mount = {"destination": "/m", "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", SCRIPT], mounts=[mount])
    options = ["--network=none", "--platform=ptrace", "--ignore-cgroups", "--overlay"]
    with tempfile.TemporaryDirectory() as short:
        command = ["runsc", "--root", short, *options, "run", "--bundle", bundle, f"overlay-{os.getpid()}"]
        # It makes a root filesystem of its folder for temporary files as a user who cannot enter ours.
        theirs = run(*command, env={**os.environ, "TMPDIR": "/tmp"}).stdout
    assert names(source) == before
    assert output(sh(shared_pod, SCRIPT, mounts=[parse_volume(f"{source}:/m:O", cwd="/")])) == theirs
    assert names(source) == before
