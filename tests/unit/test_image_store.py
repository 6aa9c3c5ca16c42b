"""Imports: what is chosen, what is refused and leaves nothing, what is shared, what is removed."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Corrupt, Exhausted, HoldfastError, InvalidInput, NotFound, Unsupported
from holdfast.image import blobs, erofs, skopeo
from holdfast.image.layers import chain_ids
from holdfast.image.layout import host_architecture
from holdfast.image.records import Progress, RootDirectory
from holdfast.image.store import ImageStore
from tests.image_archives import Layout, entry, files_under, saved, sha256, tar

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners and device nodes: needs root"),
    pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="needs erofs-utils"),
]

ONE = tar(entry("./", "dir", mode=0o750, uid=7, mtime=3), entry("etc", "dir"), entry("etc/a", data=b"a" * 5000))
TWO = tar(entry("etc", "dir"), entry("etc/b", data=b"b"))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "data")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def test_an_image_is_kept(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    config = {
        "Entrypoint": ["/sh", "-c"],
        "Cmd": None,
        "Env": ["A=b"],
        "User": "1:2",
        "WorkingDir": "/w",
        "Volumes": {"/v": {}},
        "StopSignal": "SIGINT",
        "Labels": {"k": "v"},
        "ExposedPorts": {"80/tcp": {}},
        "Unknown": 1,
    }
    descriptor = layout.image(ONE, TWO, config=config, created="2020-01-01T00:00:00Z")
    image = store.import_path(layout.path, "host/name:tag")
    assert (image.name, image.digest) == ("host/name:tag", descriptor["digest"])
    assert image.config.entrypoint == ("/sh", "-c")
    assert image.config.cmd == ()
    assert image.config.env == ("A=b",)
    assert (image.config.user, image.config.working_dir, image.config.stop_signal) == ("1:2", "/w", "SIGINT")
    assert (image.config.volumes, image.config.exposed_ports) == (("/v",), ("80/tcp",))
    assert (image.config.labels, image.config.os) == ({"k": "v"}, "linux")
    assert image.root == RootDirectory(0o750, 7, 0, 3 * 10**9)
    for layer, tarball in zip(image.layers, (ONE, TWO), strict=True):
        assert layer.diff_id == sha256(tarball)
        assert layer.disk == str(tmp_path / f"data/layers/{sha256(tarball)[7:]}.erofs")
        assert layer.size_bytes == os.path.getsize(layer.disk)
        assert layer.size_bytes % 4096 == 0
    assert store.get("host/name:tag") == image
    assert store.list() == [image]
    assert store.inspect("host/name:tag")["size_bytes"] == sum(layer.size_bytes for layer in image.layers)
    assert json.dumps(store.inspect("host/name:tag"))


def test_the_folder_may_be_moved(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE)
    store.import_path(layout.path, "a")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert os.path.exists(ImageStore(tmp_path / "moved").get("a").layers[0].disk)


def test_the_same_layer_is_the_same_disk_byte_by_byte(layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, TWO)
    first, second = (ImageStore(tmp_path / name).import_path(layout.path, "a") for name in ("x", "y"))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert Path(one.disk).read_bytes() == Path(other.disk).read_bytes()


def test_layers_are_shared_and_go_with_the_last_image(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, tag="a")
    layout.image(ONE, TWO, tag="b")
    a = store.import_path(f"{layout.path}:a", "a")
    b = store.import_path(f"{layout.path}:b", "b")
    assert a.layers[0] == b.layers[0]
    store.remove("b")
    assert files_under(tmp_path / "data") == {"images/a.json", f"layers/{sha256(ONE)[7:]}.erofs"}
    store.remove("a")
    assert files_under(tmp_path / "data") == set()
    with pytest.raises(NotFound):
        store.remove("a")


def test_disks_in_use_stay(layout: Layout, tmp_path: Path) -> None:
    used: set[str] = set()
    store = ImageStore(tmp_path / "data", lambda: used)
    layout.image(ONE)
    used.add(store.import_path(layout.path, "a").layers[0].disk)
    store.remove("a")
    assert len(files_under(tmp_path / "data")) == 1
    used.clear()
    store.collect()
    assert files_under(tmp_path / "data") == set()


def test_layers_stay_while_somebody_imports(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE)
    store.import_path(layout.path, "a")
    fd = os.open(tmp_path / "data/images", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    store.remove("a")
    assert len(files_under(tmp_path / "data")) == 1
    os.close(fd)
    store.collect()
    assert files_under(tmp_path / "data") == set()


def test_a_damaged_record_removes_no_layers(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE)
    store.import_path(layout.path, "a")
    (tmp_path / "data/images/a.json").write_text("{")
    with pytest.raises(Corrupt):
        store.get("a")
    store.collect()
    assert len(files_under(tmp_path / "data")) == 2


def test_a_name_is_replaced(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, tag="a")
    layout.image(TWO, tag="b")
    store.import_path(f"{layout.path}:a", "x")
    image = store.import_path(f"{layout.path}:b", "x")
    assert store.list() == [image]
    assert len(files_under(tmp_path / "data")) == 2


def test_missing_images_say_how_to_get_one(store: ImageStore) -> None:
    with pytest.raises(NotFound) as caught:
        store.get("nothing")
    assert caught.value.code == "image-not-found"
    assert "holdfast image import" in caught.value.hint
    assert store.list() == []


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "%2e", ".hidden", "ä", "a" * 200])
def test_any_name_is_a_file_name(store: ImageStore, layout: Layout, tmp_path: Path, name: str) -> None:
    layout.image(ONE)
    store.import_path(layout.path, name)
    assert [image.name for image in store.list()] == [name]
    assert all(path.parent == tmp_path / "data/images" for path in (tmp_path / "data").rglob("*.json"))
    store.remove(name)
    assert files_under(tmp_path / "data") == set()


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "a" * 300])
def test_some_names_are_none(store: ImageStore, layout: Layout, name: str) -> None:
    layout.image(ONE)
    with pytest.raises(InvalidInput):
        store.import_path(layout.path, name)


def test_a_disk_that_is_gone_is_noticed(store: ImageStore, layout: Layout) -> None:
    layout.image(ONE)
    os.unlink(store.import_path(layout.path, "a").layers[0].disk)
    with pytest.raises(Corrupt, match="missing"):
        store.get("a")
    store.import_path(layout.path, "a")
    store.get("a")


# -- choosing


def test_one_of_several(store: ImageStore, layout: Layout) -> None:
    layout.image(ONE, tag="a")
    layout.image(TWO, tag="b")
    with pytest.raises(InvalidInput) as caught:
        store.import_path(layout.path, "x")
    assert caught.value.code == "which-image"
    assert f"{layout.path}:a, {layout.path}:b" in caught.value.hint
    with pytest.raises(InvalidInput):
        store.import_path(f"{layout.path}:c", "x")
    assert store.import_path(f"{layout.path}:b", "x").layers[0].diff_id == sha256(TWO)


def test_the_platform_of_the_host(store: ImageStore, layout: Layout) -> None:
    other = layout.image(ONE, architecture="other", platform={"os": "linux", "architecture": "other"})
    mine = layout.image(TWO, platform={"os": "linux", "architecture": host_architecture()})
    assert store.import_path(layout.path, "direct").layers[0].diff_id == sha256(TWO)
    nested = layout.blob(json.dumps({"schemaVersion": 2, "manifests": [other, mine]}).encode())
    layout.manifests = [{**nested, "mediaType": "application/vnd.oci.image.index.v1+json"}]
    layout.write_index()
    assert store.import_path(layout.path, "nested").layers[0].diff_id == sha256(TWO)
    layout.manifests = [other]
    layout.write_index()
    with pytest.raises(Unsupported) as caught:
        store.import_path(layout.path, "other")
    assert caught.value.code == "wrong-architecture"


def test_an_index_that_holds_itself_ends(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    item = layout.image(ONE)
    for _ in range(10):
        nested = layout.blob(json.dumps({"manifests": [item]}).encode())
        item = {**nested, "mediaType": "application/vnd.oci.image.index.v1+json"}
    layout.manifests = [item]
    layout.write_index()
    with pytest.raises(Unsupported):
        store.import_path(layout.path, "x")


# -- what is wrong


def damage(layout: Layout, how: str) -> None:
    descriptor = layout.image(ONE, TWO)
    manifest = json.loads(layout.blob_path(descriptor["digest"]).read_bytes())
    last = layout.blob_path(manifest["layers"][1]["digest"])
    config = layout.blob_path(manifest["config"]["digest"])
    raw = last.read_bytes()
    if how == "cut short":
        last.write_bytes(raw[:-10])
    elif how == "changed":
        last.write_bytes(raw[:-9] + b"x" + raw[-8:])
    elif how == "missing":
        last.unlink()
    elif how == "config changed":
        config.write_bytes(config.read_bytes().replace(b"linux", b"linuy"))
    elif how == "config no json":
        config.write_bytes(b"[")
    elif how == "index no json":
        (layout.path / "index.json").write_text("{")
    elif how == "blob is a fifo":
        last.unlink()
        os.mkfifo(last)
    elif how == "blob is a link to outside":
        outside = layout.path.parent / "outside"
        outside.write_bytes(raw)
        last.unlink()
        last.symlink_to(outside)
    elif how == "digest is a path":
        layout.manifests[0]["digest"] = "sha256:../../../etc/passwd"
        layout.write_index()


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("cut short", "digest-mismatch"),
        ("changed", "digest-mismatch"),
        ("missing", "incomplete-image"),
        ("config changed", "digest-mismatch"),
        ("config no json", "digest-mismatch"),
        ("index no json", "bad-layout"),
        ("blob is a fifo", "bad-layout"),
        ("blob is a link to outside", "incomplete-image"),
        ("digest is a path", "bad-digest"),
    ],
)
def test_damage_is_found_and_leaves_nothing(
    store: ImageStore, layout: Layout, tmp_path: Path, how: str, code: str
) -> None:
    damage(layout, how)
    with pytest.raises(HoldfastError) as caught:
        store.import_path(layout.path, "x")
    assert caught.value.code == code
    assert not (tmp_path / "data").exists() or files_under(tmp_path / "data") == set()


def wrong_diff_id(layer: bytes) -> Any:
    return lambda data: gzip.compress(data + bytes(512) if data == layer else data)


@pytest.mark.parametrize(
    ("layers", "pack", "kind", "code"),
    [
        ([ONE, TWO], wrong_diff_id(TWO), Corrupt, "digest-mismatch"),
        ([ONE, TWO], lambda data: gzip.compress(data)[:-20], Corrupt, "bad-gzip"),
        ([ONE, TWO], lambda data: gzip.compress(data) + b"rubbish", Corrupt, "bad-gzip"),
        ([ONE, b"x" * 2000], gzip.compress, Corrupt, "bad-archive"),
        ([ONE, tar(entry("f", data=b"x" * 2000))[:1500]], gzip.compress, Corrupt, "bad-archive"),
        ([ONE, tar(entry("../x"))], gzip.compress, InvalidInput, "archive-escapes"),
        ([ONE, tar(entry("a", "link", linkname="b"))], gzip.compress, Corrupt, "bad-archive"),
        ([ONE, tar(entry("a" * 300))], gzip.compress, HoldfastError, "import-failed"),
        ([ONE, tar(entry("/".join(["x" * 250] * 20)))], gzip.compress, Unsupported, "layer-not-possible"),
    ],
    ids=[
        "diff id",
        "gzip cut",
        "gzip tail",
        "no tar",
        "tar cut",
        "climbs",
        "link to nothing",
        "long name",
        "long path",
    ],
)
def test_bad_layers_leave_nothing(
    store: ImageStore,
    layout: Layout,
    tmp_path: Path,
    layers: list[bytes],
    pack: Any,
    kind: type[HoldfastError],
    code: str,
) -> None:
    layout.image(*layers, pack=pack)
    with pytest.raises(kind) as caught:
        store.import_path(layout.path, "x")
    assert caught.value.code == code
    assert files_under(tmp_path / "data") == set()


def test_what_was_there_stays_when_an_import_fails(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, tag="good")
    layout.image(ONE, b"x" * 2000, tag="bad")
    image = store.import_path(f"{layout.path}:good", "x")
    before = files_under(tmp_path / "data")
    with pytest.raises(Corrupt):
        store.import_path(f"{layout.path}:bad", "x")
    assert files_under(tmp_path / "data") == before
    assert store.get("x") == image


def test_layer_types_that_are_not_known(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, media_type="application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
    with pytest.raises(Unsupported):
        store.import_path(layout.path, "x")
    assert not (tmp_path / "data").exists()


def test_no_image_at_all(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "tar").write_bytes(tar(entry("f")))
    os.mkfifo(tmp_path / "fifo")
    for name in ("empty", "file", "tar", "fifo"):
        with pytest.raises(InvalidInput) as caught:
            store.import_path(tmp_path / name, "x")
        assert caught.value.code == "bad-layout"
    with pytest.raises(NotFound):
        store.import_path(tmp_path / "none", "x")
    assert not (tmp_path / "data").exists()


# -- forms


def members_of_many(layer: bytes) -> bytes:
    return b"".join(gzip.compress(layer[at : at + 700]) for at in range(0, len(layer), 700)) + bytes(100)


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        members_of_many,
        bytes,
        pytest.param(
            lambda data: subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout,
            marks=pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd"),
        ),
    ],
    ids=["gzip", "gzip of many members", "uncompressed", "zstd"],
)
def test_compressions(store: ImageStore, layout: Layout, pack: Any) -> None:
    layout.image(ONE, TWO, pack=pack, media_type="application/vnd.oci.image.layer.v1.tar")
    assert len(store.import_path(layout.path, "x").layers) == 2


def test_zstd_without_zstd(store: ImageStore, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(ONE, pack=lambda data: b"\x28\xb5\x2f\xfd" + data)
    monkeypatch.setattr(blobs.shutil, "which", lambda name: None)
    monkeypatch.setattr(blobs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported) as caught:
        store.import_path(layout.path, "x")
    assert "install zstd" in caught.value.hint
    assert files_under(tmp_path / "data") == set()


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs zstd")
def test_damaged_zstd(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, pack=lambda data: b"\x28\xb5\x2f\xfd" + data)
    with pytest.raises(Corrupt):
        store.import_path(layout.path, "x")
    assert files_under(tmp_path / "data") == set()


def test_archives(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, TWO)
    plain = layout.archive(tmp_path / "plain.tar")
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    images = [store.import_path(path, "x") for path in (layout.path, plain, packed)]
    assert images[0] == images[1] == images[2]


def test_docker_save(store: ImageStore, tmp_path: Path) -> None:
    path = saved(tmp_path / "saved.tar", ONE, TWO, ONE, link_last=True)
    image = store.import_path(f"{path}:x/y:z", "x")
    assert [layer.diff_id for layer in image.layers] == [sha256(ONE), sha256(TWO), sha256(ONE)]
    assert store.import_path(f"{path}:z", "x") == image
    with pytest.raises(InvalidInput):
        store.import_path(f"{path}:other", "x")


def test_a_saved_archive_cut_short_anywhere(tmp_path: Path) -> None:
    whole = saved(tmp_path / "saved.tar", ONE, TWO).read_bytes()
    last = whole.index(b"manifest.json")
    for size in (100, 600, 3000, last - 512, last + 600):
        (tmp_path / "cut").write_bytes(whole[:size])
        store = ImageStore(tmp_path / f"data{size}")
        with pytest.raises(HoldfastError):
            store.import_path(tmp_path / "cut", "x")
        assert not (tmp_path / f"data{size}").exists()


# -- progress, interruption, crashes, company


def test_progress(store: ImageStore, layout: Layout) -> None:
    layout.image(ONE, TWO)
    events: list[Progress] = []
    store.import_path(layout.path, "x", events.append)
    for layer in (ONE, TWO):
        mine = [event for event in events if event.layer == sha256(layer)]
        assert {event.kind for event in mine} == {"read", "disk", "done"}
        assert mine[-1].kind == "done"
        assert mine[-1].bytes_done == mine[-1].bytes_total == len(gzip.compress(layer))
    events.clear()
    store.import_path(layout.path, "y", events.append)
    assert {event.kind for event in events} == {"present"}


def test_what_progress_raises_stops_the_import(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, TWO)

    def stop(event: Progress) -> None:
        if event.kind == "disk":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_path(layout.path, "x", stop)
    assert files_under(tmp_path / "data") == set()


def test_a_full_disk(store: ImageStore, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.image(ONE)
    monkeypatch.setattr(os, "fchmod", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exhausted) as caught:
        store.import_path(layout.path, "x")
    assert caught.value.code == "disk-full"
    assert files_under(tmp_path / "data") == set()


_CRASH = """
import os, signal, sys
from pathlib import Path
from holdfast.image.store import ImageStore
def die(event):
    if event.kind == "disk":
        os.kill(os.getpid(), signal.SIGKILL)
ImageStore(Path(sys.argv[1])).import_path(sys.argv[2], "x", die)
"""


def child(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )


def test_a_crash_is_swept_by_the_next_import(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.image(ONE, TWO, tag="x")
    layout.image(TWO, tag="other")
    assert child(_CRASH, tmp_path / "data", f"{layout.path}:x").wait() == -signal.SIGKILL
    assert any("/.making-" in f"/{name}" for name in files_under(tmp_path / "data"))
    store.import_path(f"{layout.path}:other", "y")
    assert files_under(tmp_path / "data") == {"images/y.json", f"layers/{sha256(TWO)[7:]}.erofs"}


_IMPORT = """
import sys
from pathlib import Path
from holdfast.image.store import ImageStore
sys.stdin.read()
ImageStore(Path(sys.argv[1])).import_path(sys.argv[2], sys.argv[3])
"""


def test_several_at_once(layout: Layout, tmp_path: Path) -> None:
    """Processes and threads, all of the same image: each layer is made once, and all get it."""
    layout.image(ONE, TWO, tar(entry("etc/c")))
    read_fd, write_fd = os.pipe()
    children = []
    for number in range(3):
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", _IMPORT, str(tmp_path / "data"), str(layout.path), f"p{number}"],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
                stdin=read_fd,
            )
        )
    os.close(read_fd)
    os.close(write_fd)
    made: list[str] = []

    def work(name: str) -> None:
        ImageStore(tmp_path / "data").import_path(
            layout.path, name, lambda event: made.append(event.layer) if event.kind == "done" else None
        )

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in children] == [0, 0, 0]
    assert len(made) == len(set(made)) <= 3
    images = ImageStore(tmp_path / "data").list()
    assert len(images) == 6
    assert len({image.layers for image in images}) == 1
    assert len(files_under(tmp_path / "data")) == 6 + 3


# -- the disk itself


def test_the_root_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.chmod(tmp_path / "tree", 0o1751)
    os.chown(tmp_path / "tree", 3000000000, 70000)
    os.utime(tmp_path / "tree", ns=(1, -5 * 10**9 + 7))
    erofs.make(str(tmp_path / "tree"), str(tmp_path / "disk"), "seed")
    assert erofs.read_root(str(tmp_path / "disk")) == RootDirectory(0o1751, 3000000000, 70000, -5 * 10**9 + 7)
    (tmp_path / "none").write_bytes(bytes(8192))
    with pytest.raises(Corrupt):
        erofs.read_root(str(tmp_path / "none"))


def test_the_disk_is_sound(tmp_path: Path) -> None:
    """The checksum of the superblock is right after its time was cleared."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/f").write_text("x")
    erofs.make(str(tmp_path / "tree"), str(tmp_path / "disk"), "seed")
    done = subprocess.run(["fsck.erofs", str(tmp_path / "disk")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_mkfs(store: ImageStore, layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout.image(ONE)
    monkeypatch.setattr(erofs.shutil, "which", lambda name: None)
    with pytest.raises(Unsupported) as caught:
        store.import_path(layout.path, "x")
    assert "erofs-utils" in caught.value.hint
    assert files_under(tmp_path / "data") == set()


def test_chain_ids_are_those_of_the_specification() -> None:
    first, second = sha256(b"1"), sha256(b"2")
    expected = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    assert chain_ids([first, second]) == [first, expected]


# -- skopeo


def test_pull_failures_have_skopeos_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/skopeo"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho first >&2\necho "no $6 here" >&2\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    store = ImageStore(tmp_path / "data")
    with pytest.raises(HoldfastError) as caught:
        store.pull("alpine:3", "x")
    assert caught.value.code == "pull-failed"
    assert caught.value.why == "no docker://alpine:3 here"
    assert files_under(tmp_path / "data") == set()


@pytest.mark.parametrize("reference", ["", "--help", "a\nb"])
def test_bad_references(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        skopeo.fetch(reference, tmp_path)
