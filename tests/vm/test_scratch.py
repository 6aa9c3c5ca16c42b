"""Scratch disks: encrypted, and shared by the containers of a pod."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from holdfast.errors import InvalidInput, NotFound, Unsupported
from holdfast.pod.client import STDOUT
from holdfast.spec.annotations import ENCRYPT_SCRATCH, REUSE_SCRATCH
from tests.vm.support import assert_holds_nothing, output, sh, start

MIB = 1 << 20
SIZE = 64 * MIB
MARKER = "the marker of test_scratch, in plain text"


def scratch_fds(pod):
    """Descriptors of QEMU's unnamed files of about the size of our scratch disks."""
    folder = Path(f"/proc/{pod.inspect().qemu_pid}/fd")
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            status = os.stat(folder / name)
            if not status.st_nlink and SIZE <= status.st_size <= SIZE + MIB:
                yield folder / name


def holds(path, text):
    """Whether the data of a sparse file have ``text`` in them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:
                return False
            end = os.lseek(fd, start, os.SEEK_HOLE)
            if text.encode() in os.pread(fd, end - start, start):
                return True
    finally:
        os.close(fd)


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_host_s_file_holds_no_plain_text(shared_pod, encrypted):
    script = f"for i in $(seq 1000); do echo '{MARKER}'; done > /text; sync; echo written; read x; head -n1 /text"
    options = {"scratch_bytes": SIZE, "encrypt_scratch": encrypted}
    with start(shared_pod, script, name="c", stdin=True, **options) as session:
        session.wait_for(b"written")
        files = list(scratch_fds(shared_pod))
        assert files
        assert any(holds(file, MARKER) for file in files) is not encrypted
        assert any(holds(file, "LUKS") for file in files) is encrypted
        session.write(b"\n")
        assert session.wait() == 0
        assert MARKER.encode() in session.output[STDOUT]
    assert_holds_nothing(shared_pod)


def test_encrypted_by_annotation_and_closed_at_the_end(shared_pod):
    names = "cat /sys/block/dm-*/dm/name 2>/dev/null; true"
    found = output(sh(shared_pod, names, annotations={ENCRYPT_SCRATCH: "true"}, scratch_bytes=SIZE))
    assert found.startswith("dm-crypt-scsi-contr0-lun")
    assert output(sh(shared_pod, names)) == ""
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("encrypted", [True, False])
def test_its_size_is_a_limit(shared_pod, encrypted):
    script = (
        "df -m / | tail -n1; dd if=/dev/zero of=/big bs=1M count=100; echo $?; rm /big; echo room >/small && cat /small"
    )
    found = sh(shared_pod, script, scratch_bytes=SIZE, encrypt_scratch=encrypted)
    assert b"No space left" in found.stderr
    assert found.text.splitlines()[1:] == ["1", "room"]
    assert 50 < int(found.text.split()[1]) <= 64


# -- shared -----------------------------------------------------------------------------------------


def used_kib(pod, **options):
    return int(output(sh(pod, "df -k / | tail -n1", reuse_scratch=True, scratch_bytes=SIZE, **options)).split()[2])


@pytest.mark.parametrize("encrypted", [False, True])
def test_one_disk_with_a_folder_for_each(shared_pod, encrypted):
    options = {"reuse_scratch": True, "scratch_bytes": SIZE, "encrypt_scratch": encrypted}
    big = (
        "echo mine >/etc/mine; dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null; sync; echo up; read x; cat /etc/mine"
    )
    with (
        start(shared_pod, "echo up; cat", name="keeper", stdin=True, **options) as keeper,
        start(shared_pod, big, name="big", stdin=True, **options) as session,
    ):
        keeper.wait_for(b"up")
        session.wait_for(b"up")
        disks = [disk for disk in shared_pod.storage()["attachments"] if disk["kind"] == "scratch"]
        assert [disk["holders"] for disk in disks] == [["big", "keeper"]]
        assert used_kib(shared_pod, encrypt_scratch=encrypted) > 20 * 1024
        assert sh(shared_pod, "test -e /etc/mine", **options).status == 1
        session.write(b"\n")
        assert session.wait() == 0
        assert b"mine" in session.output[STDOUT]
        assert used_kib(shared_pod, encrypt_scratch=encrypted) < 5 * 1024  # its folder went with it
        keeper.end_input()
        assert keeper.wait() == 0
    assert_holds_nothing(shared_pod)


def test_shared_by_annotation_and_apart_from_one_of_another_kind(shared_pod):
    options = {"scratch_bytes": SIZE}
    annotations = {REUSE_SCRATCH: "true"}
    with start(shared_pod, "echo up; cat", name="a", stdin=True, annotations=annotations, **options) as one:
        one.wait_for(b"up")
        assert used_kib(shared_pod, encrypt_scratch=True) < 5 * 1024
        script = "mount | grep -o upperdir=[^,]*"
        mine = output(sh(shared_pod, script, annotations=annotations, name="b", **options))
        assert mine.endswith("/scratch/b/upper\n")
        own = output(sh(shared_pod, script, **options))
        assert "/scratch/" not in own
        one.end_input()
        one.wait()
    assert_holds_nothing(shared_pod)


# -- grown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_it_grows_while_it_is_written_to(shared_pod, shared):
    script = "echo kept >/kept; echo up; read x; dd if=/dev/zero of=/big bs=1M count=100 2>&1; cat /kept"
    options = {"scratch_bytes": SIZE, "reuse_scratch": shared}
    with start(shared_pod, script, name="c", stdin=True, **options) as session:
        session.wait_for(b"up")
        assert shared_pod.grow_scratch("c", "200M") == 200 * MIB
        assert shared_pod.grow_scratch("c", "200M") == 200 * MIB  # as after a failure in the middle
        (disk,) = (disk for disk in shared_pod.storage()["attachments"] if disk["kind"] == "scratch")
        assert disk["size_bytes"] == 200 * MIB
        with pytest.raises(InvalidInput):
            shared_pod.grow_scratch("c", SIZE)
        session.write(b"\n")
        assert session.wait() == 0
        assert b"100+0 records out" in session.output[STDOUT]
        assert session.output[STDOUT].endswith(b"kept\n")
    assert_holds_nothing(shared_pod)


def test_what_cannot_grow(shared_pod):
    with pytest.raises(NotFound):
        shared_pod.grow_scratch("nobody", "1G")
    with start(
        shared_pod, "echo up; read x", name="c", stdin=True, scratch_bytes=SIZE, encrypt_scratch=True
    ) as session:
        session.wait_for(b"up")
        with pytest.raises(Unsupported) as caught:
            shared_pod.grow_scratch("c", "1G")
        assert caught.value.code == "grow-unsupported"
        session.write(b"\n")
        session.wait()
