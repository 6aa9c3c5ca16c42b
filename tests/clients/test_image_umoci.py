"""Images as real tools make them: imported, mounted as an overlay, and compared with what umoci unpacks."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import Exhausted
from holdfast.image.store import ImageStore
from tests.image_archives import Layout, entry, files_under, saved, tar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.image.records import Image

pytestmark = [
    pytest.mark.skipif(not shutil.which("umoci") or not shutil.which("skopeo"), reason="needs umoci and skopeo"),
    pytest.mark.skipif(
        "\terofs\n" not in Path("/proc/filesystems").read_text(),
        reason="the host's kernel has no erofs to look into disks",
    ),
]

# In a mount namespace of its own: whatever happens here, the mounts and loop devices go with the process.
_LOOK = """
import json, os, subprocess, sys
from holdfast.linux import syscalls
work, disks = sys.argv[1], sys.argv[2:]
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
lower = []
for number, disk in enumerate(disks):
    os.makedirs(f"{work}/{number}")
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", disk, f"{work}/{number}"], check=True)
    lower.insert(0, str(number))
os.makedirs(f"{work}/empty")
os.makedirs(f"{work}/merged")
os.chdir(work)
syscalls.mount("overlay", "merged", "overlay", syscalls.MS_RDONLY, "lowerdir=" + ":".join(["empty", *lower]))
from tests.clients.test_image_umoci import tree_of
os.chdir("/")
print(json.dumps(tree_of(f"{work}/merged")))
"""


def tree_of(top: str) -> dict[str, Any]:
    """Everything that two trees must agree in; the root's own metadata are not the overlay's to give."""
    found: dict[str, Any] = {}
    links: dict[int, str] = {}
    where = os.fsencode(top)
    for folder, folders, files in os.walk(where):
        folders.sort()
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            key = os.path.relpath(path, where).hex()
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            record: dict[str, Any] = {
                "name": os.path.relpath(path, where).decode("utf-8", "backslashreplace"),
                "mode": oct(info.st_mode),
                "owner": [info.st_uid, info.st_gid],
                "mtime_ns": info.st_mtime_ns,
                "xattrs": {
                    name: os.getxattr(path, name, follow_symlinks=False).hex()
                    for name in os.listxattr(path, follow_symlinks=False)
                    if not name.startswith("trusted.overlay.") and name != "user.rootlesscontainers"
                },
            }
            if kind == stat.S_IFREG:
                record["size"] = info.st_size
                with open(path, "rb") as file:
                    record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            elif kind == stat.S_IFLNK:
                record["target"] = os.readlink(path).hex()
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                record["rdev"] = info.st_rdev
            if info.st_nlink > 1 and kind != stat.S_IFDIR:
                record["first name"] = links.setdefault(info.st_ino, key)
            found[key] = record
    return found


def look(image: Image, work: Path) -> dict[str, Any]:
    """The tree of an image, as the kernel's erofs and overlayfs show it."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(work), *[layer.disk for layer in image.layers]],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "src")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def run(*arguments: str | Path, **more: Any) -> None:
    subprocess.run([str(argument) for argument in arguments], check=True, stdout=subprocess.DEVNULL, **more)


def unpacked(layout: Path, tag: str, to: Path) -> dict[str, Any]:
    """The tree of an image, as umoci unpacks it."""
    run("umoci", "unpack", "--image", f"{layout}:{tag}", to)
    return tree_of(str(to / "rootfs"))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    names = {key: (ours.get(key) or theirs[key])["name"] for key in ours.keys() | theirs.keys()}
    wrong = {names[key]: (ours.get(key), theirs.get(key)) for key in names if ours.get(key) != theirs.get(key)}
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Path]:
    """A layout with one image of four layers, made by umoci from trees that change as containers change them."""
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:v")
    run("umoci", "unpack", "--image", f"{layout}:v", bundle)
    root = bundle / "rootfs"

    def commit() -> None:
        run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:v", bundle)

    _first(root)
    commit()
    _second(root)
    commit()
    _third(root)
    commit()
    _fourth(root)
    commit()
    yield layout
    shutil.rmtree(bundle)


def _first(root: Path) -> None:
    for folder in ("bin", "etc/opt", "usr/lib/deep/deeper", "var/log", "tmp", "srv/gone/below"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "lib").symlink_to("usr/lib")
    (root / "bin/sh").write_bytes(os.urandom(100_000))
    (root / "bin/sh").chmod(0o4755)
    os.link(root / "bin/sh", root / "bin/bash")
    os.link(root / "bin/sh", root / "usr/lib/deep/shell")
    os.setxattr(root / "bin/sh", "security.capability", b"\x01\x00\x00\x02\x00\x04" + bytes(14))
    for number in range(50):
        (root / f"usr/lib/deep/f{number}").write_bytes(b"%d" % number * number * 100)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    os.setxattr(root / "etc/passwd", "user.note", b"\xff\x00x")
    os.chown(root / "etc/passwd", 70000, 3000000000)
    os.utime(root / "etc/passwd", ns=(1, 1234567890123456789))
    os.symlink("/etc/../etc/passwd", root / "etc/link")
    os.utime(root / "etc/link", ns=(5, 5 * 10**9), follow_symlinks=False)
    with open(os.fsencode(root) + b"/etc/\xff\xe4 name", "wb") as file:
        file.write(b"not utf-8")
    os.mknod(root / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "etc/disk", stat.S_IFBLK | 0o640, os.makedev(259, 1000))
    os.mkfifo(root / "etc/fifo", 0o622)
    with open(root / "var/sparse", "wb") as file:
        file.truncate(50 << 20)
        file.seek(10 << 20)
        file.write(b"in the middle")
    (root / "srv/gone/below/x").write_text("x")
    (root / "var/log/becomes").write_text("file")


def _second(root: Path) -> None:
    shutil.rmtree(root / "srv/gone")
    (root / "etc/fifo").unlink()
    (root / "usr/lib/deep/f7").unlink()
    (root / "usr/lib/new").write_text("through the link as well")
    (root / "bin/sh").chmod(0o755)
    (root / "var/log/becomes").unlink()
    (root / "var/log/becomes").mkdir(mode=0o2750)
    (root / "var/log/becomes/x").write_text("1")
    os.utime(root / "etc/opt", ns=(1, 999999999))


def _third(root: Path) -> None:
    shutil.rmtree(root / "var/log/becomes")
    os.symlink("..", root / "var/log/becomes")
    shutil.rmtree(root / "usr/lib/deep/deeper")
    (root / "usr/lib/deep/deeper").write_text("a file now")
    (root / "srv/gone").mkdir()
    (root / "srv/gone/new").write_text("back")
    os.removexattr(root / "etc/passwd", "user.note")


def _fourth(root: Path) -> None:
    (root / "lib").unlink()
    (root / "lib").mkdir()
    (root / "lib/own").write_text("own")
    (root / "etc/fifo").write_text("no fifo any more")


def test_a_layout_is_what_umoci_unpacks(built: Path, tmp_path: Path) -> None:
    image = ImageStore(tmp_path / "data").import_path(f"{built}:v", "image")
    assert len(image.layers) == 4
    same(look(image, tmp_path / "look"), unpacked(built, "v", tmp_path / "theirs"))


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "gzipped", "zstd", "uncompressed"])
def test_every_form_gives_the_same_disks(built: Path, tmp_path: Path, form: str) -> None:
    plain = ImageStore(tmp_path / "plain").import_path(built, "image")
    path = tmp_path / "copy"
    if form == "zstd":
        run("skopeo", "copy", "-q", "--dest-compress-format", "zstd", f"oci:{built}:v", f"dir:{tmp_path / 'dir'}")
        run("skopeo", "copy", "-q", f"dir:{tmp_path / 'dir'}", f"oci:{path}:v")
    elif form == "uncompressed":
        run("skopeo", "copy", "-q", "--dest-decompress", f"oci:{built}:v", f"dir:{tmp_path / 'dir'}")
        run("skopeo", "copy", "-q", "--dest-oci-accept-uncompressed-layers", f"dir:{tmp_path / 'dir'}", f"oci:{path}:v")
    else:
        kind = "oci-archive" if form == "oci-archive" else "docker-archive"
        run("skopeo", "copy", "-q", f"oci:{built}:v", f"{kind}:{path}:host/name:v")
    if form == "gzipped":
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    copied = ImageStore(tmp_path / "copied").import_path(path, "image")
    assert [layer.diff_id for layer in copied.layers] == [layer.diff_id for layer in plain.layers]
    for one, other in zip(plain.layers, copied.layers, strict=True):
        assert Path(one.disk).read_bytes() == Path(other.disk).read_bytes()
    assert copied.config == plain.config


def test_a_tree_of_a_real_system(tmp_path: Path) -> None:
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:v")
    run("umoci", "unpack", "--image", f"{layout}:v", bundle)
    for folder in ("/usr/lib/python3.11/json", "/usr/lib/python3.11/lib-dynload", "/etc/alternatives"):
        run("cp", "-a", folder, bundle / "rootfs")
    run("umoci", "repack", "--image", f"{layout}:v", bundle)
    image = ImageStore(tmp_path / "data").import_path(layout, "image")
    same(look(image, tmp_path / "look"), unpacked(layout, "v", tmp_path / "theirs"))


def test_layers_that_lean_on_those_below(tmp_path: Path) -> None:
    """No tool that writes directories writes such layers, but tools that write archives do."""
    layout = Layout(tmp_path / "layout")
    layout.image(
        tar(
            entry("tmp", "dir", mode=0o1777, uid=3, mtime=9),
            entry("usr", "dir", mtime=8),
            entry("usr/lib", "dir", mode=0o711, mtime=9),
            entry("usr/lib/old", data=b"old", mtime=9),
            entry("usr/lib/gone", data=b"gone", mtime=9),
            entry("lib", "symlink", linkname="usr/lib", mtime=9),
            entry("opq", "dir", mtime=9),
            entry("opq/hidden"),
            entry("new", "dir", mtime=4),
            entry("new/old"),
        ),
        tar(
            entry("tmp/a", mtime=9),
            entry("lib/new", data=b"new", mtime=9),
            entry("lib/.wh.gone"),
            entry("hard", "link", linkname="usr/lib/old"),
            entry("opq/kept", mtime=9),
            entry("opq/.wh..wh..opq"),
            entry(".wh.new"),
            entry("new", "dir", mtime=5),
        ),
        tag="v",
    )
    store = ImageStore(tmp_path / "data")
    image = store.import_path(layout.path, "image")
    assert ".on-" in image.layers[1].disk
    assert ".on-" not in image.layers[0].disk
    ours, theirs = look(image, tmp_path / "look"), unpacked(layout.path, "v", tmp_path / "theirs")
    same(ours, theirs)
    assert store.import_path(layout.path, "again").layers == image.layers


def test_a_layer_that_hides_everything_below(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.image(
        tar(entry("a", mtime=1)), tar(entry(".wh..wh..opq"), entry("b", mtime=1)), tar(entry("c", mtime=1)), tag="v"
    )
    image = ImageStore(tmp_path / "data").import_path(layout.path, "image")
    assert [item["name"] for item in look(image, tmp_path / "look").values()] == ["b", "c"]


def test_saved_by_docker_with_twins(tmp_path: Path) -> None:
    layer = tar(entry("d", "dir", mtime=1), entry("d/f", data=b"x", mtime=1))
    path = saved(tmp_path / "image.tar", layer, tar(entry("g", mtime=1)), layer, link_last=True)
    image = ImageStore(tmp_path / "data").import_path(f"{path}:x/y:z", "image")
    assert image.layers[0] == image.layers[2]
    assert len(image.layers) == 3


def test_pull_goes_through_skopeo(built: Path, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "data")
    assert store.pull(f"oci:{built}:v", "image").layers == store.import_path(built, "other").layers
    assert len(files_under(tmp_path / "data")) == 4 + 2


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.image(tar(entry("small", data=b"x")), tar(entry("f", data=os.urandom(4 << 20))))
    data = tmp_path / "data"
    data.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", data)
    try:
        failures = []
        for size in ("2m", "6m"):
            run("mount", "-o", f"remount,size={size}", data)
            with pytest.raises(Exhausted) as caught:
                ImageStore(data).import_path(layout.path, "image")
            assert caught.value.code == "disk-full"
            assert files_under(data) == set()
            failures.append(caught.value.what)
        assert failures == ["import layer", "make layer disk"]
        run("mount", "-o", "remount,size=10m", data)
        ImageStore(data).import_path(layout.path, "image")
    finally:
        run("umount", data)
