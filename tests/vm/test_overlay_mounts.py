"""A writable overlay over a mount (``-v SRC:DST:O``): what the container writes is its own, and the source stays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, InvalidInput, Unsupported
from holdfast.pod.client import STDOUT
from holdfast.storage.volumes import Volumes
from tests.images import is_clean, make_bundle, make_disk, run
from tests.vm.support import assert_holds_nothing, output, running, sh, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
CHANGE = "echo new > /m/new; echo more >> /m/file; rm /m/sub/gone; mkdir /m/sub/dir; chmod 700 /m/sub; mv /m/a /m/b"
SEE = "cd /m; find . | sort; cat file new; stat -c %a sub"
SEEN = [".", "./b", "./file", "./new", "./sub", "./sub/dir", "from the source", "more", "new", "700"]


def fill(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("from the source\n")
    (folder / "sub/gone").write_text("gone\n")
    (folder / "a").write_text("a\n")


def state(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """All that a change would change."""
    found = []
    for where, folders, files in os.walk(folder):
        folders.sort()
        for name in [".", *sorted(files)]:
            path = os.path.join(where, name)
            info = os.stat(path)
            with open(path, "rb") if name != "." else open(os.devnull, "rb") as file:
                found.append((path, info.st_mode, info.st_ctime_ns, file.read()))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "source")
    return tmp_path / "source"


def over(source: object, destination: str = "/m", *options: str) -> dict[str, Any]:
    """As an engine would write it."""
    return {
        "type": "bind", "source": str(source), "destination": destination, "options": ["rbind", "overlay", *options]
    }  # fmt: skip


def test_a_directory(shared_pod, folder):
    before = state(folder)
    assert output(sh(shared_pod, f"{CHANGE}; {SEE}", mounts=[over(folder)])).splitlines() == SEEN
    assert state(folder) == before
    assert output(sh(shared_pod, "cat /m/file; ls /m", mounts=[over(folder)])) == "from the source\na\nfile\nsub\n"
    assert_holds_nothing(shared_pod)


def test_it_is_shared_read_only_and_its_place_is_told(shared_pod, folder):
    with running(shared_pod, "c", [f"type=bind,src={folder},dst=/m,overlay"]):
        storage = shared_pod.storage()
        assert [share["read_only"] for share in storage["shares"]] == [True]
        [view] = [volume for volume in storage["volumes"] if volume["type"] == "overlay"]
        assert (view["volume"], view["holders"]) == ("/m", ["c"])
    assert_holds_nothing(shared_pod)


def test_the_root_looks_like_the_source_s(shared_pod, folder):
    os.chown(folder, 7, 8)
    os.chmod(folder, 0o2751)
    os.utime(folder, ns=(10**18, 10**18))
    text = output(sh(shared_pod, "stat -c '%a %u %g %Y' /m", mounts=[over(folder)]))
    assert text == "2751 7 8 1000000000\n"


def test_a_file_alone(shared_pod, folder):
    os.chown(folder / "file", 7, 8)
    os.chmod(folder / "file", 0o640)
    script = "stat -c '%a %u %g' /etc/one; echo more >> /etc/one; cat /etc/one"
    before = state(folder)
    text = output(sh(shared_pod, script, mounts=[over(folder / "file", "/etc/one")]))
    assert text == "640 7 8\nfrom the source\nmore\n"
    assert state(folder) == before
    assert_holds_nothing(shared_pod)


@pytest.fixture
def mounted(folder: Path) -> Iterator[Path]:
    """A directory with a mount in it, and one in that: on a file."""
    run("mount", "-t", "tmpfs", "none", folder / "sub")
    try:
        (folder / "sub/inner").write_text("inner\n")
        (folder / "sub/one").touch()
        run("mount", "--bind", folder / "file", folder / "sub/one")
        yield folder
    finally:
        run("umount", "-R", folder / "sub")


def test_what_is_mounted_in_the_source_is_covered_too(mounted, pod):
    """overlayfs itself would show the empty place where it is mounted.  The pod is the later, or would not see it."""
    before = state(mounted)
    script = "cd /m/sub; cat inner one; echo x > inner; echo y > one; echo z > new; ls"
    assert output(sh(pod, script, mounts=[over(mounted)])).split() == [
        "inner", "from", "the", "source", "inner", "new", "one",
    ]  # fmt: skip
    assert state(mounted) == before
    assert_holds_nothing(pod)


def test_two_of_one_source_and_two_containers(shared_pod, folder):
    """Each has its own; one that is mounted below another is seen there, and leaves no mount point."""
    before = state(folder)
    mounts = [over(folder, "/m"), over(folder, "/n"), over(folder / "sub", "/m/below")]
    with start(shared_pod, "echo up; read x; ls /m /n", name="w", stdin=True, mounts=mounts) as one:
        one.wait_for(b"up")
        script = "touch /m/mine; rm /m/below/gone; ls /m /n /m/below"
        assert output(sh(shared_pod, script, mounts=mounts)).split() == [
            "/m:", "a", "below", "file", "mine", "sub", "/m/below:", "/n:", "a", "file", "sub",
        ]  # fmt: skip
        one.write(b"\n")
        assert one.wait() == 0
        assert b"mine" not in one.output[STDOUT]
    assert state(folder) == before


TOO_BIG = "dd if=/dev/zero of=/m/big bs=1M count=80 2>&1 | grep -o 'No space left'; stat -c %s /m/big"


@pytest.mark.parametrize("reuse_scratch", [False, True])
def test_what_is_written_goes_to_the_scratch_disk(shared_pod, folder, reuse_scratch):
    text = output(sh(shared_pod, TOO_BIG, mounts=[over(folder)], reuse_scratch=reuse_scratch))
    assert text == f"{80 * MIB}\n"
    assert sorted(os.listdir(folder)) == ["a", "file", "sub"]
    assert_holds_nothing(shared_pod)


def test_without_a_scratch_disk_it_goes_to_a_little_memory(shared_pod, folder, tmp_path):
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", TOO_BIG], root={"readonly": True})
    told, size = output(shared_pod.run(bundle=bundle, mounts=[over(folder)])).splitlines()
    assert told == "No space left"
    assert 60 * MIB < int(size) <= 64 * MIB
    assert sorted(os.listdir(folder)) == ["a", "file", "sub"]
    assert_holds_nothing(shared_pod)


def test_a_root_that_is_a_directory(shared_pod, folder, tmp_path):
    bundle = make_bundle(tmp_path / "b", ["sh", "-c", f"{CHANGE}; {SEE}"])
    before = state(folder)
    assert output(shared_pod.run(bundle=bundle, mounts=[over(folder)])).splitlines() == SEEN
    assert state(folder) == before
    assert_holds_nothing(shared_pod)


def test_a_disk(shared_pod, tmp_path, folder):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    before = disk.read_bytes()
    mounts = [{**over(disk), "type": "virtual-disk", "options": ["overlay"]}]
    text = output(sh(shared_pod, f"{CHANGE}; rmdir /m/lost+found 2>&1; {SEE}", mounts=mounts))
    assert text.splitlines() == SEEN
    assert disk.read_bytes() == before
    assert is_clean(disk)
    assert_holds_nothing(shared_pod)


def test_a_named_volume(shared_pod, data):
    Volumes(data, shared_pod.root).create("over-it", 16 * MIB)
    try:
        mounts = ["type=volume,src=over-it,dst=/m"]
        assert sh(shared_pod, "echo kept > /m/file", mounts=mounts).status == 0
        mounts = ["type=volume,src=over-it,dst=/m,overlay"]
        assert output(sh(shared_pod, "echo more >> /m/file; cat /m/file", mounts=mounts)) == "kept\nmore\n"
        assert output(sh(shared_pod, "cat /m/file", mounts=mounts)) == "kept\n"
        assert_holds_nothing(shared_pod)
    finally:
        Volumes(data, shared_pod.root).remove("over-it")


def test_a_volume_of_the_pod(pod):
    hint = {f"dev.holdfast.mount.v.{k}": v for k, v in (("source", "/v"), ("type", "tmpfs"), ("share", "pod"))}
    plain = {"type": "tmpfs", "source": "/v", "destination": "/m"}
    assert sh(pod, "echo all > /m/file", mounts=[plain], annotations=hint).status == 0
    script = "echo mine >> /m/file; cat /m/file"
    assert output(sh(pod, script, mounts=[{**plain, "options": ["overlay"]}], annotations=hint)) == "all\nmine\n"
    assert output(sh(pod, script, mounts=[over("sandbox://x")])) == "mine\n"
    assert output(sh(pod, "cat /m/file", mounts=[{**plain, "options": ["ro"]}], annotations=hint)) == "all\n"
    assert output(sh(pod, "ls /m", mounts=[over("sandbox://x", "/m", "ro")])) == ""
    assert_holds_nothing(pod)


def test_flags_hold_and_read_only_needs_none(shared_pod, folder):
    text = output(sh(shared_pod, "grep ' /m ' /proc/mounts", mounts=[over(folder, "/m", "noexec", "nosuid")]))
    assert text.split()[2] == "overlay"
    assert {"rw", "noexec", "nosuid"} <= set(text.split()[3].split(","))
    script = "grep -c ' /m overlay' /proc/mounts; touch /m/x 2>&1 | grep -o Read-only"
    assert output(sh(shared_pod, script, mounts=[over(folder, "/m", "ro")])).split() == ["0", "Read-only"]


@pytest.mark.parametrize(
    "mount",
    [
        over("/usr", "/m", "upperdir=/tmp/u", "workdir=/tmp/w"),
        {"type": "tmpfs", "source": "tmpfs", "destination": "/m", "options": ["overlay"]},
        {**over("/dev/null", "blockdev:///dev/x"), "type": "physical-disk"},
    ],
    ids=["upperdir", "tmpfs", "blockdev"],
)
def test_what_cannot_be(shared_pod, mount):
    with pytest.raises(InvalidInput) as caught:
        sh(shared_pod, "true", mounts=[mount])
    assert caught.value.code == "mount-option"
    assert_holds_nothing(shared_pod)


def test_not_on_a_container_that_runs(shared_pod, folder):
    with running(shared_pod, "c"):
        with pytest.raises(Unsupported) as caught:
            shared_pod.attach(f"type=bind,src={folder},dst=/m,overlay", container="c")
        assert caught.value.code == "mount-option"
    assert_holds_nothing(shared_pod)


def test_a_start_that_fails_leaves_nothing(shared_pod, folder):
    with pytest.raises(HoldfastError):
        shared_pod.run("tests/busybox", ["/no/such/program"], mounts=[over(folder)])
    assert output(sh(shared_pod, "ls /m", mounts=[over(folder)])) == "a\nfile\nsub\n"
    assert_holds_nothing(shared_pod)
