"""Hash trees for dm-verity, checked by the tool that everybody else makes and checks them with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.cli.options import RunOptions, parse
from holdfast.errors import Corrupt, InvalidInput, Unsupported
from holdfast.image import erofs, verity
from holdfast.image.records import Layer, Verity
from holdfast.image.store import ImageStore
from holdfast.pod.requests import container_request
from holdfast.spec import annotations
from holdfast.storage.plan import DirectoryRoot, LayeredRoot
from holdfast.storage.protect import Protection, protect
from holdfast.storage.steps import MakeScratch, MountLayer
from tests.image_archives import entry, saved, tar

needs_veritysetup = pytest.mark.skipif(not shutil.which("veritysetup", path="/usr/sbin:/sbin"), reason="no veritysetup")
#: One block has no tree; 128 fill a block of hashes, and 128 * 128 fill two levels.
SIZES = (1, 2, 128, 129, 128 * 128 + 1)


def make_disk(path, blocks):
    with open(path, "wb") as file:
        for number in range(blocks):
            file.write(number.to_bytes(4, "little") * 1024)
    fd = os.open(path, os.O_RDWR)
    try:
        return verity.append(fd, "seed")
    finally:
        os.close(fd)


@needs_veritysetup
@pytest.mark.parametrize("blocks", SIZES)
def test_veritysetup_agrees(tmp_path, blocks):
    disk = tmp_path / "disk"
    made = make_disk(disk, blocks)
    command = ["/usr/sbin/veritysetup", "verify", disk, disk, made.root_hash, f"--hash-offset={made.hash_offset_bytes}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(disk, "r+b") as file:  # it does look
        file.seek(blocks * 4096 - 1)
        file.write(b"x")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("blocks", SIZES)
def test_what_was_appended_is_read_again(tmp_path, blocks):
    disk = tmp_path / "disk"
    made = make_disk(disk, blocks)
    assert made.data_blocks == blocks
    assert made.hash_offset_bytes == blocks * 4096
    assert os.path.getsize(disk) == 4096 * (blocks + 1 + verity.tree_blocks(blocks))
    assert verity.read(str(disk)) == made


@given(st.integers(1, 10**12))
def test_the_size_tells_how_much_is_data(blocks):
    assert verity._data_blocks(blocks + 1 + verity.tree_blocks(blocks)) == blocks


def test_the_same_data_gives_the_same_bytes(tmp_path):
    assert make_disk(tmp_path / "a", 200) == make_disk(tmp_path / "b", 200)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 131])
def test_a_disk_without_a_tree(tmp_path, blocks):
    (tmp_path / "disk").write_bytes(bytes(4096 * blocks))
    assert verity.read(str(tmp_path / "disk")) is None


def test_a_damaged_superblock(tmp_path):
    disk = tmp_path / "disk"
    make_disk(disk, 10)
    with open(disk, "r+b") as file:
        file.seek(10 * 4096 + 32)
        file.write(b"md5\0\0\0")
    with pytest.raises(Corrupt):
        verity.read(str(disk))


def test_a_layer_disk_has_one_and_is_still_an_erofs(tmp_path):
    (tmp_path / "tree").mkdir(mode=0o750)
    (tmp_path / "tree/file").write_bytes(os.urandom(100_000))
    size = erofs.make(str(tmp_path / "tree"), str(tmp_path / "disk"), "seed")
    found = verity.read(str(tmp_path / "disk"))
    assert found is not None
    assert size == os.path.getsize(tmp_path / "disk") > found.hash_offset_bytes > 100_000
    assert erofs.read_root(str(tmp_path / "disk")).mode == 0o750


def test_a_record_from_before_still_loads():
    old = msgspec.json.decode(b'{"diff_id": "sha256:1", "disk": "x", "size_bytes": 4096}', type=Layer)
    assert old.verity is None


def test_an_image_from_before_is_made_again_by_another_import(tmp_path):
    store = ImageStore(tmp_path / "data")
    archive = saved(tmp_path / "archive", tar(entry("file", data=b"x" * 9000)))
    (layer,) = store.import_path(archive, "image").layers
    assert layer.verity is not None
    assert verity.read(layer.disk) == layer.verity
    # As an earlier Holdfast left it: no tree, and a record that does not know of any.
    before = Path(layer.disk).read_bytes()
    os.chmod(layer.disk, 0o600)
    os.truncate(layer.disk, layer.verity.hash_offset_bytes)
    record = next((tmp_path / "data/images").glob("*.json"))
    document = json.loads(record.read_bytes())
    del document["layers"][0]["verity"]
    record.write_text(json.dumps(document))
    assert store.get("image").layers[0].verity is None
    with pytest.raises(Unsupported):
        container_request("c", tmp_path / "data", image="image", args=["true"], verity=True)
    assert store.import_path(archive, "image").layers == (layer,)
    assert Path(layer.disk).read_bytes() == before


# -- who wants it -----------------------------------------------------------------------------------


def root_of(*disks):
    return LayeredRoot(tuple((str(disk), "sha256:1") for disk in disks), 1 << 26)


def test_verity_of_what_has_no_tree_says_to_import_again(tmp_path):
    (tmp_path / "old").write_bytes(bytes(8192))
    with pytest.raises(Unsupported) as caught:
        protect(root_of(tmp_path / "old"), Protection(verity=True), {}, {str(tmp_path / "old"): None}, "image")
    assert (caught.value.code, caught.value.hint) == ("no-hash-tree", "import the image again")


@pytest.mark.parametrize(
    ("text", "wanted"), [("true", True), ("1", True), ("TRUE", True), ("false", False), ("0", False)]
)
def test_annotations_say_it_too(tmp_path, text, wanted):
    made = make_disk(tmp_path / "disk", 3)
    given = {annotations.VERITY: text, annotations.ENCRYPT_SCRATCH: text, annotations.REUSE_SCRATCH: text}
    root = protect(root_of(tmp_path / "disk"), Protection(), given, {}, "image")
    assert isinstance(root, LayeredRoot)
    assert root.verity == ({str(tmp_path / "disk"): made} if wanted else {})
    assert (root.encrypted, root.shared) == (wanted, wanted)


def test_an_option_wins_over_its_annotation():
    given = {annotations.ENCRYPT_SCRATCH: "true"}
    root = protect(root_of("/x"), Protection(encrypt_scratch=False), given, {}, "image")
    assert isinstance(root, LayeredRoot)
    assert not root.encrypted


def test_a_malformed_annotation_does_not_turn_protection_off():
    with pytest.raises(InvalidInput) as caught:
        protect(root_of("/x"), Protection(), {annotations.ENCRYPT_SCRATCH: "yes"}, {}, "image")
    assert caught.value.code == "annotation"


def test_a_folder_of_the_host_cannot_be_protected():
    folder = DirectoryRoot("/x", False)
    for wanted in (Protection(verity=True), Protection(encrypt_scratch=True)):
        with pytest.raises(InvalidInput) as caught:
            protect(folder, wanted, {}, {}, "bundle")
        assert caught.value.code == "root-is-a-folder"
    assert protect(folder, Protection(reuse_scratch=True), {}, {}, "bundle") == folder


# -- what a plan and a command line say of it ---------------------------------------------------------


def test_steps_tell():
    tree = Verity("ab" * 32, "00" * 32, 10, 40960)
    assert MountLayer("l", "/x", "sha256:" + "1" * 64, tree).describe() == (
        "attach layer 111111111111 read-only, verify it by root hash abababababab and mount it"
    )
    assert "verify" not in MountLayer("l", "/x", "sha256:" + "1" * 64).describe()
    assert MakeScratch("s", 64 << 20, True).describe() == "make a scratch disk of 64 MiB, encrypt it and mount it"
    assert MakeScratch("s", 64 << 20, True, True).describe() == (
        "mount the pod's encrypted scratch disk (64 MiB if it is new) and make a folder on it"
    )


def test_options_of_the_command():
    line = parse(["run", "--verity", "--encrypt-scratch", "--reuse-scratch", "image"], environ={}, cwd="/")
    run = line.command
    assert isinstance(run, RunOptions)
    assert (run.verity, run.encrypt_scratch, run.reuse_scratch) == (True, True, True)
