"""What bad input gets: one clear error with a stable code, and nothing left of the attempt."""

from __future__ import annotations

import gc
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import (
    Corrupt,
    Exhausted,
    HoldfastError,
    InUse,
    InvalidInput,
    NotFound,
    Unsupported,
)
from holdfast.image.store import ImageStore
from tests.image_archives import Layout, entry, tar
from tests.images import make_bundle, make_disk, run
from tests.vm.support import assert_holds_nothing, assert_nothing_held, output, running, sh

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20


# -- things that are wrong, each made in a folder of its own ---------------------------------------


def zeros(path: Path) -> Path:
    path.write_bytes(bytes(MIB))
    return path


def noise(path: Path) -> Path:
    path.write_bytes(b"\xa5\x5a\x3c\x99" * (MIB // 4))
    return path


def swap(path: Path) -> Path:
    zeros(path)
    run("mkswap", path)
    return path


def luks(path: Path) -> Path:
    path.write_bytes(b"LUKS\xba\xbe\x00\x02" + bytes(MIB - 8))
    return path


def ragged(path: Path) -> Path:
    make_disk(path, "ext4")
    os.truncate(path, 16 * MIB - 100)
    return path


def nothing(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def broken_ext4(path: Path) -> Path:
    """A superblock that is recognised, and nothing behind it that could be mounted."""
    make_disk(path, "ext4")
    with open(path, "r+b") as file:
        file.seek(2048)
        file.write(b"\xff" * 65536)
    return path


def dependent_qcow2(path: Path) -> Path:
    base = make_disk(path.with_name("base"), "ext4")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    return path


def qcow2_with_data_file(path: Path) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data", path, "16M")
    return path


def truncated_qcow2(path: Path) -> Path:
    raw = make_disk(path.with_name("raw"), "ext4")
    run("qemu-img", "convert", "-O", "qcow2", raw, path)
    os.truncate(path, 4096)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def dangling(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


def looping(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def unix_socket(path: Path) -> Path:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
    return path


def absent(path: Path) -> Path:
    return path


def character_device(path: Path) -> Path:
    os.mknod(path, 0o020600, os.makedev(1, 3))
    return path


SOURCES = [
    ("bind", absent, NotFound, "source-not-found", "No such file"),
    ("bind", dangling, NotFound, "source-dangling", "link to nothing"),
    ("bind", looping, InvalidInput, "source-unreadable", "symbolic links"),
    ("bind", unix_socket, Unsupported, "source-kind", "socket"),
    ("bind", fifo, Unsupported, "source-kind", "FIFO"),
    ("bind", character_device, Unsupported, "source-kind", "character device"),
    ("disk", absent, NotFound, "source-not-found", "No such file"),
    ("disk", dangling, NotFound, "source-dangling", "link to nothing"),
    ("disk", folder, InvalidInput, "source-kind", "directory"),
    ("disk", fifo, InvalidInput, "source-kind", "FIFO"),
    ("disk", unix_socket, InvalidInput, "source-kind", "socket"),
    ("disk", character_device, InvalidInput, "source-kind", "character device"),
    ("disk", zeros, InvalidInput, "no-filesystem", "no known filesystem"),
    ("disk", noise, InvalidInput, "no-filesystem", "no known filesystem"),
    ("disk", swap, InvalidInput, "no-filesystem", "swap"),
    ("disk", luks, InvalidInput, "no-filesystem", "luks"),
    ("disk", ragged, InvalidInput, "disk-size", "sectors"),
    ("disk", nothing, InvalidInput, "disk-size", "0 bytes"),
    ("disk", broken_ext4, HoldfastError, "mount-failed", "ext4"),
    ("disk", dependent_qcow2, Unsupported, "disk-format", "another file"),
    ("disk", qcow2_with_data_file, Unsupported, "disk-format", "another file"),
    ("disk", truncated_qcow2, HoldfastError, "no-filesystem", ""),
    ("physical-disk", zeros, InvalidInput, "source-kind", "not a block device"),
    ("physical-disk", absent, NotFound, "source-not-found", "No such file"),
]


@pytest.mark.parametrize(("kind", "make", "error", "code", "words"), SOURCES)
def test_sources(shared_pod, tmp_path, kind, make, error, code, words):
    """Through a container and by hot attach; a good mount beside the bad one is let go of, too."""
    source = make(tmp_path / "the-source")
    before = source.read_bytes() if source.is_file() else b""
    good = make_disk(tmp_path / "good", "ext4")
    mounts = [f"type=disk,src={good},dst=/good", f"type={kind},src={source},dst=/d"]
    with pytest.raises(error) as caught:
        sh(shared_pod, "true", mounts=mounts, name="bad")
    assert str(source) in str(caught.value)
    assert caught.value.exit_status == 125
    assert (not code or caught.value.code == code) and words in str(caught.value)  # noqa: PT018
    assert caught.value.code not in ("internal", "failed")
    assert caught.value.causes == ()
    assert_holds_nothing(shared_pod)
    with pytest.raises(error) as caught:
        shared_pod.attach(f"type={kind},src={source}")
    assert not code or caught.value.code == code
    assert_holds_nothing(shared_pod)
    if before:  # never formatted, never repaired
        assert source.read_bytes() == before
    assert output(sh(shared_pod, "echo well", mounts=mounts[:1], name="bad")) == "well\n"


@pytest.mark.parametrize(
    ("mount", "code"),
    [
        ("type=bind,dst=/d", "mount-option"),
        ("type=bind,src=/usr", "mount-option"),
        ("type=disk,dst=/d", "mount-option"),
        ("type=bind,src=/usr,dst=relative", "mount-option"),
        ("type=bind,src=/usr,dst=/", "mount-option"),
        ("type=rocket,src=/usr,dst=/d", "mount-option"),
        ("type=bind,src=/usr,dst=/d,ro=perhaps", "mount-option"),
        ("type=bind,src=/usr,dst=/d,ro,rw", "mount-option"),
        ("type=tmpfs,dst=/d,size=much", "bad-size"),
        ("type=volume,src=v,dst=/d", "volume-not-found"),
        ("type=image,src=i,dst=/d", "mount-type"),
        ({"type": "bind", "destination": "/d"}, "spec-invalid"),
        ({"type": "bind", "destination": "", "source": "/usr"}, "spec-invalid"),
        ({"type": "virtual-disk", "destination": "/d", "source": ""}, "spec-invalid"),
        ({"type": "bind", "destination": "/d", "source": 7}, "spec-invalid"),
        ({"type": "bind", "destination": "/d", "source": "/a\0b"}, "spec-invalid"),
        ({"destination": "/d", "source": "/usr"}, "spec-invalid"),
        ({"type": "bind", "destination": "/d", "source": "/usr", "options": "ro"}, "spec-invalid"),
        ({"type": "no-such-filesystem", "destination": "/d", "source": "none"}, "runtime-failed"),
    ],
)  # fmt: skip
def test_mounts(shared_pod, mount, code):
    with pytest.raises(HoldfastError) as caught:
        sh(shared_pod, "true", mounts=[mount])
    if code != "bad-size":
        assert caught.value.code == code
    assert caught.value.exit_status == 125
    assert_holds_nothing(shared_pod)


# -- bundles and images ---------------------------------------------------------------------------


def change(**changes: Any) -> Callable[[Path], object]:
    return lambda path: make_bundle(path, ["true"], **changes)


def write_config(text: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        make_bundle(path, ["true"])
        (path / "config.json").write_bytes(text)

    return make


def remove(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        make_bundle(path, ["true"])
        os.rename(path / name, path / f"no-{name}")

    return make


@pytest.mark.parametrize(
    ("make", "error", "code"),
    [
        (lambda _path: None, NotFound, "bundle-not-found"),
        (lambda path: path.write_text("a file"), InvalidInput, "bundle-not-a-directory"),
        (remove("config.json"), NotFound, "spec-not-found"),
        (remove("rootfs"), NotFound, "rootfs-not-found"),
        (write_config(b"{"), InvalidInput, "spec-not-json"),
        (write_config(b"\xff\xfe"), InvalidInput, "spec-not-json"),
        (write_config(b"[" * 100000), InvalidInput, "spec-not-json"),
        (write_config(b"[]"), InvalidInput, "spec-invalid"),
        (write_config(b"{}"), InvalidInput, "spec-invalid"),
        (change(ociVersion="2.0.0"), Unsupported, "spec-version"),
        (change(ociVersion=1), InvalidInput, "spec-invalid"),
        (change(process=None), InvalidInput, "spec-invalid"),
        (change(process={"args": []}), InvalidInput, "spec-invalid"),
        (change(process={"args": "true"}), InvalidInput, "spec-invalid"),
        (change(process={"cwd": "relative"}), InvalidInput, "spec-invalid"),
        (change(process={"user": {"uid": -1}}), InvalidInput, "spec-invalid"),
        (change(mounts=[{"destination": "/d", "type": "bind"}]), InvalidInput, "spec-invalid"),
        (change(mounts={}), InvalidInput, "spec-invalid"),
        (change(linux={"namespaces": [{"type": "rocket"}]}), InvalidInput, "spec-invalid"),
        (change(root={"path": "config.json"}), InvalidInput, "rootfs-not-a-directory"),
    ],
)
def test_bundles(shared_pod, tmp_path, make, error, code):
    bundle = tmp_path / "the-bundle"
    make(bundle)
    with pytest.raises(error) as caught:
        shared_pod.run(bundle=bundle)
    assert caught.value.code == code
    assert caught.value.exit_status == 125
    assert str(bundle) in str(caught.value) or "c-" in str(caught.value)
    assert_holds_nothing(shared_pod)


def test_an_image_that_is_not_there(shared_pod):
    with pytest.raises(NotFound) as caught:
        shared_pod.run("no/such:image", ["true"])
    assert (caught.value.code, caught.value.exit_status) == ("image-not-found", 125)
    assert "no/such:image" in str(caught.value)
    assert "holdfast image import" in caught.value.hint
    assert_holds_nothing(shared_pod)


def wrong_digest(layout: Layout) -> None:
    layer = json.loads(layout.blob_path(layout.manifests[0]["digest"]).read_bytes())["layers"][0]
    path = layout.blob_path(layer["digest"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(layout: Layout) -> None:
    layer = json.loads(layout.blob_path(layout.manifests[0]["digest"]).read_bytes())["layers"][0]
    path = layout.blob_path(layer["digest"])
    os.truncate(path, path.stat().st_size // 2)


def lost(layout: Layout) -> None:
    layer = json.loads(layout.blob_path(layout.manifests[0]["digest"]).read_bytes())["layers"][0]
    layout.blob_path(layer["digest"]).unlink()


def as_is(_layout: Layout) -> None:
    pass


@pytest.mark.parametrize(
    ("entries", "harm", "error"),
    [
        ([entry("f", data=os.urandom(100000))], wrong_digest, Corrupt),
        ([entry("f", data=os.urandom(100000))], cut_short, Corrupt),
        ([entry("f")], lost, HoldfastError),
        ([entry("../../out", data=b"out")], as_is, InvalidInput),
        ([entry("a/../../out", data=b"out")], as_is, InvalidInput),
        ([entry("l", "link", linkname="../../../../../../etc/passwd")], as_is, HoldfastError),
    ],
)
def test_images(tmp_path, entries, harm, error):
    layout = Layout(tmp_path / "layout")
    layout.image(tar(*entries))
    harm(layout)
    data = tmp_path / "data"
    with pytest.raises(error) as caught:
        ImageStore(data).import_path(layout.path, "bad")
    assert caught.value.exit_status == 125
    assert caught.value.code != "internal"
    assert [path for path in data.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entries",
    [
        [entry("l", "symlink", linkname="/outside"), entry("l/out", data=b"out")],
        [entry("l", "symlink", linkname="../../../../outside"), entry("l/out", data=b"out")],
        [entry("a", "symlink", linkname="b"), entry("b", "symlink", linkname="/outside"), entry("a/out", data=b"out")],
    ],
)
def test_archives_that_climb_through_links_stay_inside(tmp_path, entries):
    """A link is the image's own business: what is written through it lands in the image, or is refused."""
    layout = Layout(tmp_path / "layout")
    layout.image(tar(entry("outside", "dir"), *entries))
    try:
        ImageStore(tmp_path / "data").import_path(layout.path, "odd")
    except HoldfastError as error:
        assert error.code != "internal"
    assert not os.path.lexists("/outside")
    assert not (tmp_path / "outside").exists()


# -- who else has it ------------------------------------------------------------------------------


def test_a_disk_writable_twice(shared_pod, data, state_root, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4")
    writable, read_only = f"type=disk,src={disk},dst=/d", f"type=disk,src={disk},dst=/e,ro"
    with pytest.raises(InUse) as caught:
        sh(shared_pod, "true", mounts=[writable, read_only])
    refused = [caught.value]
    with running(shared_pod, "holder", [writable]):
        # The containers of a pod may share a disk, in one way; another pod may not have it at all.
        assert sh(shared_pod, "true", mounts=[writable]).status == 0
        with pytest.raises(InUse) as caught:
            sh(shared_pod, "true", mounts=[read_only])
        refused.append(caught.value)
        with holdfast.Pod(root=shared_pod.root, data=data) as other:
            for mount in (writable, read_only):
                with pytest.raises(InUse) as caught:
                    sh(other, "true", mounts=[mount])
                refused.append(caught.value)
                assert shared_pod.name in caught.value.why
            assert_holds_nothing(other)
    for error in refused:
        assert (error.code, error.exit_status) == ("disk-in-use", 125)
        assert str(disk) in str(error)
    assert_holds_nothing(shared_pod)
    with running(shared_pod, "reader", [read_only]), holdfast.Pod(root=shared_pod.root, data=data) as other:
        assert sh(other, "ls /e", mounts=[read_only]).status == 0  # readers share
        with pytest.raises(InUse):
            sh(other, "true", mounts=[writable])
    assert sh(shared_pod, "echo x > /d/x", mounts=[writable]).status == 0


def test_more_disks_than_slots(shared_pod, tmp_path):
    """Known before anything is attached."""
    content = tmp_path / "content"
    content.mkdir()
    small = make_disk(tmp_path / "disk", "erofs", content).read_bytes()
    mounts = []
    for number in range(254):
        (tmp_path / f"d{number}").write_bytes(small)
        mounts.append(f"type=disk,src={tmp_path}/d{number},dst=/d{number},ro")
    with pytest.raises(Exhausted) as caught:
        sh(shared_pod, "true", mounts=mounts)
    assert (caught.value.code, caught.value.exit_status) == ("no-free-slot", 125)
    assert "257 disks needed, 256" in str(caught.value)
    assert_holds_nothing(shared_pod)


# -- names, sizes, room ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "x" * 65, "ä", "a\nb"])
def test_names(shared_pod, data, state_root, name):
    if name:
        with pytest.raises(InvalidInput) as caught:
            holdfast.Pod(name, root=state_root, data=data)
        assert caught.value.code == "bad-name"
        with pytest.raises(InvalidInput) as caught:
            sh(shared_pod, "true", name=name)
        assert_holds_nothing(shared_pod)
    assert not (state_root / "pods").exists() or os.listdir(state_root / "pods") == []


def test_a_state_root_too_deep_for_a_socket(data, state_root):
    with pytest.raises(InvalidInput) as caught:
        holdfast.Pod(root=state_root / ("deep" * 25), data=data)
    assert caught.value.code == "path-too-long"


@pytest.mark.parametrize("size", [1, 15 * MIB, 1 << 60])
def test_scratch_sizes(shared_pod, size):
    with pytest.raises(InvalidInput) as caught:
        sh(shared_pod, "true", scratch_bytes=size)
    assert caught.value.code == "scratch-size"
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("options", [{"isolation": "rocket"}, {"cpus": 0}, {"cpus": 100000}, {"memory": "much"}])
def test_pods_that_cannot_be(data, state_root, options):
    with pytest.raises(HoldfastError) as caught:
        holdfast.Pod(root=state_root, data=data, **options)
    assert caught.value.code not in ("internal", "failed")
    assert caught.value.exit_status == 125
    if (state_root / "pods").exists():
        assert_nothing_held(state_root)


def test_a_full_disk_for_templates(own_data, state_root):
    (own_data / "templates").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64m", "none", own_data / "templates")
    try:
        with pytest.raises(Exhausted) as caught:
            holdfast.Pod(root=state_root, data=own_data)
        assert caught.value.code == "disk-full"
        assert "templates" in str(caught.value) or str(own_data) in str(caught.value)
        assert [name for name in os.listdir(own_data / "templates") if not name.endswith(".lock")] == []
    finally:
        run("umount", own_data / "templates")
    assert_nothing_held(state_root)


def test_a_full_disk_for_scratch(own_data, data, state_root):
    os.symlink(data / "templates", own_data / "templates")
    (own_data / "scratch").unlink()
    (own_data / "scratch").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=100k", "none", own_data / "scratch")
    try:
        with holdfast.Pod(root=state_root, data=own_data) as pod:
            with pytest.raises(Exhausted) as caught:
                sh(pod, "true")
            assert (caught.value.code, caught.value.exit_status) == ("disk-full", 125)
            assert_holds_nothing(pod)
            run("mount", "-o", "remount,size=200m", own_data / "scratch")
            assert output(sh(pod, "echo room")) == "room\n"
    finally:
        run("umount", own_data / "scratch")
    assert_nothing_held(state_root)


def test_a_full_disk_under_a_container(own_data, data, state_root):
    """The machine ends before the guest is told of a failed write: it would go on with data that is nowhere."""
    os.symlink(data / "templates", own_data / "templates")
    (own_data / "scratch").unlink()
    (own_data / "scratch").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "none", own_data / "scratch")
    try:
        with holdfast.Pod(root=state_root, data=own_data) as pod, pytest.raises(Exhausted) as caught:
            sh(pod, "dd if=/dev/zero of=/big bs=1M count=64; sync; md5sum /big")
        assert caught.value.code == "disk-full"
        assert caught.value.exit_status == 125
    finally:
        run("umount", own_data / "scratch")
    assert_nothing_held(state_root)


def test_a_full_disk_for_the_journal(data, state_root):
    run("mount", "-t", "tmpfs", "-o", "size=16k", "none", state_root)
    try:
        with pytest.raises(HoldfastError) as caught:
            holdfast.Pod(root=state_root, data=data)
        assert caught.value.exit_status == 125
        assert str(state_root) in str(caught.value)
        assert caught.value.code in ("disk-full", "journal-unusable")
        del caught  # the error's frames keep the half-open journal
        gc.collect()
    finally:
        run("umount", state_root)
