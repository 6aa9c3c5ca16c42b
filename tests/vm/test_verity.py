"""Layers that the guest checks: what is not what was imported gives an error, and never data."""

from __future__ import annotations

import os
import shutil

import msgspec
import pytest

from holdfast.errors import Corrupt
from holdfast.image import erofs, verity
from holdfast.pod.client import STDERR, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec.annotations import VERITY
from tests.vm.support import BUSYBOX, Session, assert_holds_nothing, output, running, sh, start

MIB = 1 << 20
#: A container sees the guest's block devices here, and with them the names of mapped ones.
MAPPED = "cat /sys/block/dm-*/dm/name 2>/dev/null; true"


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A layer disk with a file of random bytes; and those bytes."""
    folder = tmp_path_factory.mktemp("layer")
    data = os.urandom(MIB)
    (folder / "tree").mkdir()
    (folder / "tree/data").write_bytes(data)
    erofs.make(str(folder / "tree"), str(folder / "disk"), "seed")
    return folder / "disk", data


def flip(layer, to, offset):
    """A copy of the layer's disk with one bit changed."""
    shutil.copyfile(layer[0], to)
    with open(to, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    return to


def run_on(pod, disk, imported, script, *, check=True):
    """Runs a script with ``disk`` as the image's top layer, checked by what was recorded of it when it was imported."""
    stdio = Stdio(0, STDOUT, STDERR)
    request = container_request("c", pod.data, image=BUSYBOX, args=["sh", "-c", script], stdio=stdio, verity=check)
    trees = {**request.root.verity, str(disk): verity.read(str(imported))} if check else {}
    root = msgspec.structs.replace(
        request.root, layers=((str(disk), "sha256:test"), *request.root.layers), verity=trees
    )  # fmt: skip
    with Session(pod, "run", msgspec.structs.replace(request, root=root)) as session:
        status = session.wait()
        return status, bytes(session.output[STDOUT]), bytes(session.output[STDERR])


def test_layers_are_checked_and_let_go_of(shared_pod):
    names = output(sh(shared_pod, MAPPED, verity=True)).split()
    image = container_request("x", shared_pod.data, image=BUSYBOX, verity=True)
    hashes = {tree.root_hash for tree in image.root.verity.values()}
    assert len(names) == len(hashes) == 2
    assert {name.rpartition("-")[2] for name in names} == hashes
    assert all(name.startswith("dm-verity-scsi-contr0-lun") and "-p0-" in name for name in names)
    # 2109: the request to unmount says nothing of verity.
    assert output(sh(shared_pod, MAPPED)) == ""
    assert_holds_nothing(shared_pod)


def test_by_annotation(shared_pod):
    assert "dm-verity" in output(sh(shared_pod, MAPPED, annotations={VERITY: "true"}))


def test_containers_with_and_without_it_side_by_side(shared_pod):
    """A disk that is checked for one must not be served unchecked to it because another has it so."""
    with running(shared_pod, "plain"), start(shared_pod, "echo up; read x", name="a", stdin=True, verity=True) as one:
        one.wait_for(b"up")
        assert len(shared_pod.storage()["attachments"]) == 6
        assert len(output(sh(shared_pod, MAPPED, verity=True)).split()) == 2  # shared with the other that is checked
        one.end_input()
        one.wait()
    assert_holds_nothing(shared_pod)


def test_a_good_disk_reads_as_it_is(shared_pod, layer):
    disk, data = layer
    status, out, _ = run_on(shared_pod, disk, disk, "cat /data")
    assert (status, out) == (0, data)


def test_a_flipped_bit_gives_an_error_and_no_data(shared_pod, layer, tmp_path):
    disk, data = layer
    offset = disk.read_bytes().index(data[MIB // 2 : MIB // 2 + 64])
    bad = flip(layer, tmp_path / "bad", offset)
    assert run_on(shared_pod, bad, disk, "cat /data", check=False)[1] != data  # unchecked, nobody notices
    status, out, err = run_on(shared_pod, bad, disk, "cat /data")
    assert status == 1
    assert b"Input/output error" in err
    assert data.startswith(out)
    assert len(out) <= MIB // 2
    block = (MIB // 2) // 4096
    script = (
        f"dd if=/data bs=4096 count=1 skip={block} 2>&1 >/tmp/x; wc -c </tmp/x; dd if=/data bs=4096 count=1 | wc -c"
    )
    _, out, _ = run_on(shared_pod, bad, disk, script)
    assert b"Input/output error" in out
    assert out.split()[-2:] == [b"0", b"4096"]  # not one byte of the bad block; the others are as good as ever


def test_a_flipped_bit_in_the_hash_tree(shared_pod, layer, tmp_path):
    disk, data = layer
    bad = flip(layer, tmp_path / "bad", os.path.getsize(disk) - 4096)  # the last level; the superblock is not read
    status, out, err = run_on(shared_pod, bad, disk, "cat /data")
    assert (status, b"Input/output error" in err) == (1, True)
    assert data.startswith(out)


def test_a_flipped_bit_in_the_filesystem_s_own_block(shared_pod, layer, tmp_path):
    bad = flip(layer, tmp_path / "bad", 1024 + 70)
    with pytest.raises(Corrupt) as caught:
        run_on(shared_pod, bad, layer[0], "true")
    assert caught.value.code == "verity-failed"
    assert "import the image again" in caught.value.hint
    assert_holds_nothing(shared_pod)
    assert output(sh(shared_pod, MAPPED)) == ""


@pytest.mark.parametrize("size", [MIB, 100])
def test_another_disk_in_its_place(shared_pod, layer, tmp_path, size):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/data").write_bytes(os.urandom(size))
    erofs.make(str(tmp_path / "tree"), str(tmp_path / "disk"), "other")
    with pytest.raises(Corrupt) as caught:
        run_on(shared_pod, tmp_path / "disk", layer[0], "true")
    assert caught.value.code == "verity-failed"
    assert_holds_nothing(shared_pod)
