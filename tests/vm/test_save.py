"""Pods saved to a file, and restored: what goes on, what is refused, and that nothing is left."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import holdfast
from holdfast.errors import Corrupt, HoldfastError, InUse, InvalidInput, NotFound, Unsupported
from holdfast.machine import accelerator
from holdfast.pod import savefile, saving
from tests import images, leaks
from tests.vm.cli import answer, fails, text
from tests.vm.support import (
    BUSYBOX,
    DEADLINE_S,
    assert_holds_nothing,
    assert_nothing_held,
    output,
    python_program,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: Answers to each line that it gets in a pipe with how many it has got: what it knows is in its memory alone.
COUNTER = "mkfifo /in; n=0; while read line </in; do n=$((n+1)); echo $n >/count.new; mv /count.new /count; done"


def count(pod: holdfast.Pod) -> int:
    """Has the counter count, and returns how far it is."""
    script = "a=$(cat /count); echo x >/in; until [ $(cat /count) != $a ]; do :; done; cat /count"
    return int(output(pod.exec("c", ["sh", "-c", script])))


def start_counter(pod: holdfast.Pod, *mounts: str) -> None:
    pod.run(BUSYBOX, ["sh", "-c", f"echo 0 >/count; {COUNTER}"], name="c", mounts=mounts, detach=True)
    output(pod.exec("c", ["sh", "-c", "until [ -p /in ]; do :; done"]))


class Saved:
    """A pod with everything that can be saved, its file, and what it was made of."""

    def __init__(self, folder: Path, root: Path, data: Path) -> None:
        self.folder, self.root, self.data = folder, root, data
        self.file = folder / "saved"
        self.writable = images.make_disk(folder / "writable.raw", "ext4")
        self.share = folder / "share"
        self.share.mkdir()
        (self.share / "file").write_text("shared\n")
        self.read_only = images.make_disk(folder / "read-only.raw", "ext4", self.share)
        self.mounts = (
            f"type=disk,src={self.writable},dst=/disk", f"type=disk,src={self.read_only},dst=/ro,ro",
            f"type=bind,src={self.share},dst=/share,ro", "type=tmpfs,dst=/memory",
        )  # fmt: skip

    def restore(self, name: str | None = None) -> holdfast.Pod:
        return holdfast.restore(self.file, name, root=self.root, data=self.data)


@pytest.fixture(scope="module")
def saved(data: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder, root = tmp_path_factory.mktemp("saved"), run_folder / "saved"
    leaks.expect(root)
    with leaks.long_lived():
        made = Saved(folder, root, data)
        with holdfast.Pod("p", root=root, data=data) as pod:
            start_counter(pod, *made.mounts)
            assert count(pod) == 1
            output(pod.exec("c", ["sh", "-c", "for d in /disk /memory /root; do echo before >$d/file; done"]))
            pod.save(made.file)
            output(pod.exec("c", ["sh", "-c", "for d in /disk /memory /root; do echo after >$d/file; done"]))
            assert count(pod) == 2
    yield made
    assert_nothing_held(root)


def test_it_goes_on_from_where_it_was_saved(saved: Saved) -> None:
    with saved.restore("q") as pod:
        assert (pod.name, count(pod), count(pod)) == ("q", 2, 3)
        script = "cat /disk/file /memory/file /root/file /ro/file /share/file; hostname"
        assert output(pod.exec("c", ["sh", "-c", script])) == "before\n" * 3 + "shared\nshared\nc\n"
        output(pod.exec("c", ["sh", "-c", "echo mine >/disk/file; sync"]))
        assert output(pod.run(BUSYBOX, ["echo", "one more"])) == "one more\n"
        pod.kill("c", signal.SIGKILL)
        assert pod.wait("c") == 128 + signal.SIGKILL
        deadline = time.monotonic() + DEADLINE_S
        while pod.storage()["attachments"] and time.monotonic() < deadline:  # released after its end has been told
            pass
        assert_holds_nothing(pod)
    with saved.restore() as pod:  # its file, and so the disk in it, is as it was; and the user's own is not written to
        assert pod.name == "p"
        assert output(pod.exec("c", ["cat", "/disk/file"])) == "before\n"
    with holdfast.Pod(root=saved.root, data=saved.data) as pod:
        disk = f"type=disk,src={saved.writable},dst=/d"
        assert output(pod.run(BUSYBOX, ["cat", "/d/file"], mounts=[disk])) == "after\n"


def test_two_of_one_file_are_different_and_can_be_forked_and_saved(saved: Saved, tmp_path: Path) -> None:
    with saved.restore("a") as a, saved.restore("b") as b:
        uuids = {output(pod.exec("c", ["cat", "/proc/sys/kernel/random/uuid"])) for pod in (a, b)}
        assert len(uuids) == 2
        output(a.exec("c", ["sh", "-c", "echo a >/root/own"]))
        assert b.exec("c", ["cat", "/root/own"]).status
        (fork,) = a.fork(names=["f"])
        with fork:
            assert (count(fork), count(fork), count(a)) == (2, 3, 2)
            fork.save(tmp_path / "again", stop=True)
        with holdfast.restore(tmp_path / "again", "g", root=saved.root, data=saved.data) as again:
            assert (count(again), output(again.exec("c", ["cat", "/root/own"]))) == (4, "a\n")


def refused(saved: Saved, kind: type[HoldfastError], code: str) -> HoldfastError:
    with pytest.raises(kind) as caught:
        saved.restore("never")
    assert caught.value.code == code
    assert_nothing_held(saved.root)
    return caught.value


def test_what_it_reads_must_be_what_it_was(saved: Saved) -> None:
    away, times = saved.folder / "away", saved.read_only.stat()
    os.rename(saved.read_only, away)
    error = refused(saved, NotFound, "restore-source")
    assert f"{saved.read_only}, which container c has at /ro, is missing" in error.why
    saved.read_only.write_bytes(away.read_bytes())
    refused(saved, InvalidInput, "restore-source")  # it was written to since: another time
    os.utime(saved.read_only, ns=(times.st_atime_ns, times.st_mtime_ns))
    saved.restore("q").close()  # on another inode, the same in all that counts
    away.unlink()
    os.rename(saved.share, away)
    assert "which container c has at /share, is missing" in refused(saved, NotFound, "restore-source").why
    saved.share.mkdir()
    assert "is another directory now" in refused(saved, InvalidInput, "restore-source").why
    saved.share.rmdir()
    os.rename(away, saved.share)
    saved.restore("q").close()


def test_another_guest_layer_qemu_or_accelerator_is_refused_by_name(
    saved: Saved, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_data, saved.data = saved.data, own_data
    try:
        saved.restore("q").close()  # another data folder alone makes no difference
        (own_data / "layers").unlink()
        error = refused(saved, NotFound, "layer-not-found")
        assert ("sha256:" in error.subject, f"import {BUSYBOX} again" in error.hint) == (True, True)
        version = accelerator.cached_qemu_version(own_data)
        with monkeypatch.context() as patch:
            patch.setattr(accelerator, "cached_qemu_version", lambda _data: "QEMU 99")
            assert f"it needs {version}; this is QEMU 99" in refused(saved, Unsupported, "save-needs").why
        known = accelerator.known(own_data, accelerator.host_identity(version))
        assert known
        other = {"kvm": "tcg", "tcg": "kvm"}[known.accelerator]
        record = (own_data / "accelerator.json").read_text()
        (own_data / "accelerator.json").write_text(record.replace(f'"{known.accelerator}"', f'"{other}"'))
        assert f"it needs {known.accelerator.upper()}" in refused(saved, Unsupported, "save-needs").why
        for guest in (own_data / "guests").glob("*/guest.json"):
            guest.unlink()
        assert "it needs guest" in refused(saved, Unsupported, "save-needs").why
    finally:
        saved.data = saved_data


def test_a_damaged_file_is_refused(saved: Saved) -> None:
    """Every part is looked at: of the first byte of each one bit is changed."""
    with open(saved.file, "rb") as file:
        manifest, offsets = savefile.read(file.fileno())
    fd = os.open(saved.file, os.O_RDWR)
    try:
        for member, offset in zip(manifest.members, offsets, strict=True):
            if not member.data_bytes:
                continue
            (byte,) = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte ^ 1]), offset)
            assert f"{member.name} has changed" in refused(saved, Corrupt, "save-damaged").why
            os.pwrite(fd, bytes([byte]), offset)
    finally:
        os.close(fd)


def forge(saved: Saved, change: Callable[[dict[str, Any]], None], disk: bytes = b"") -> None:
    """Makes of the file one whose digests are right, with another record, or another last file of a disk."""
    fd = os.open(saved.file, os.O_RDONLY)
    fds = [fd]
    try:
        manifest, offsets = savefile.read(fd)
        members = []
        for member, offset in zip(manifest.members, offsets, strict=True):
            fds.append(os.memfd_create("part"))
            savefile.copy_in(fd, offset, member, fds[-1])
            if member.name == "record":
                record = msgspec.msgpack.decode(os.pread(fds[-1], member.size_bytes, 0))
                change(record)
                os.ftruncate(fds[-1], 0)
                os.pwrite(fds[-1], msgspec.msgpack.encode(record), 0)
            if disk and member is manifest.members[-1]:
                os.pwrite(fds[-1], disk, 0)
            members.append(savefile.describe(member.name, fds[-1]))
        with saving.NewFile(saved.file) as new:
            savefile.write(new.fd, msgspec.structs.replace(manifest, members=tuple(members)), fds[1:])
            new.publish()
    finally:
        for one in fds:
            os.close(one)


def rename_container(record: dict[str, Any]) -> None:
    processes = record["containers"]["processes"]
    processes["../../../../tmp/x"] = processes.pop("c")


def write_to_a_file_of_the_host(record: dict[str, Any]) -> None:
    disk = next(d for d in record["storage"]["disks"] if d["attachment"]["disk"]["read_only"])
    disk["attachment"]["disk"]["read_only"] = False


def take_no_slot(record: dict[str, Any]) -> None:
    record["storage"]["disks"][0]["attachment"]["slot"][1] = 64


def take_one_slot_twice(record: dict[str, Any]) -> None:
    first, second, *_ = record["storage"]["disks"]
    first["attachment"]["slot"] = second["attachment"]["slot"]


def have_a_share_more(record: dict[str, Any]) -> None:
    (share, _holders) = record["storage"]["shares"][0]
    share["key"][2] = "/etc"


def read_any_file_as_a_disk(record: dict[str, Any]) -> None:
    record["storage"]["disks"][0]["files"][0][0] = 99


def be_a_device(record: dict[str, Any]) -> None:
    record["storage"]["disks"][0]["files"][0][2] = True


def be_qcow2(record: dict[str, Any]) -> None:
    record["storage"]["disks"][-1]["files"][-1][1] = "qcow2"


def be_another_pod(record: dict[str, Any]) -> None:
    record["pod"] = "q"


@pytest.mark.parametrize(
    "change",
    [
        rename_container, write_to_a_file_of_the_host, take_no_slot, take_one_slot_twice, have_a_share_more,
        read_any_file_as_a_disk, be_a_device, be_another_pod,
    ],
)  # fmt: skip
def test_a_record_that_somebody_made_is_refused(saved: Saved, change: Callable[[dict[str, Any]], None]) -> None:
    original = saved.file.read_bytes()
    try:
        forge(saved, change)
        refused(saved, Corrupt, "save-damaged")
    finally:
        saved.file.write_bytes(original)


def test_no_disk_of_it_names_a_file_of_the_host(saved: Saved) -> None:
    """A qcow2 header may name a backing file, and a file for its data; QEMU would open the latter."""
    original = saved.file.read_bytes()
    try:
        for header in (struct.pack(">4sIQI", b"QFI\xfb", 3, 512, 11), struct.pack(">4sI64xQ", b"QFI\xfb", 3, 4)):
            forge(saved, be_qcow2, header)
            refused(saved, Corrupt, "save-damaged")
            saved.file.write_bytes(original)
    finally:
        saved.file.write_bytes(original)


def test_a_save_that_is_killed_leaves_nothing(data: Path, state_root: Path, tmp_path: Path) -> None:
    """The file has no name before it is complete; the pod goes on, and can be saved again."""
    (tmp_path / "saves").mkdir()
    file = tmp_path / "saves" / "f"
    program = f"""
import sys
import holdfast
from holdfast.pod import savefile
def stop_here(fd, member, target_fd, copy=savefile.copy_out):
    found = copy(fd, member, target_fd)
    if member.name == "ram":
        print("half", flush=True)
        sys.stdin.read()
    return found
savefile.copy_out = stop_here
holdfast.Pod.open("p", root={str(state_root)!r}, data={str(data)!r}).save({str(file)!r})
"""
    with holdfast.Pod("p", root=state_root, data=data) as pod:
        start_counter(pod)
        process = subprocess.Popen(python_program(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            assert process.stdout.readline() == b"half\n"
            process.kill()
            process.wait(DEADLINE_S)
        assert os.listdir(file.parent) == []
        assert count(pod) == 1
        pod.save(file)
        assert os.listdir(file.parent) == ["f"]
    assert_nothing_held(state_root)


def test_a_restore_that_is_killed_leaves_nothing(saved: Saved) -> None:
    program = f"""
import sys
import holdfast
from holdfast.pod import savefile
def stop_here(fd, offset, member, target_fd, copy=savefile.copy_in):
    copy(fd, offset, member, target_fd)
    if member.name.startswith("disks/"):
        print("half", flush=True)
        sys.stdin.read()
savefile.copy_in = stop_here
holdfast.restore({str(saved.file)!r}, "q", root={str(saved.root)!r}, data={str(saved.data)!r}, detached=True)
"""
    before = sorted(os.listdir(saved.data / "scratch"))
    process = subprocess.Popen(python_program(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"half\n"
        process.kill()
        process.wait(DEADLINE_S)
    assert sorted(os.listdir(saved.data / "scratch")) == before
    assert_nothing_held(saved.root)


@pytest.mark.parametrize("detached", [False, True])
def test_a_disk_that_another_pod_writes_to_is_refused(saved: Saved, detached: bool) -> None:
    with holdfast.Pod("w", root=saved.root, data=saved.data) as writer:
        writer.attach(f"type=disk,src={saved.read_only}", mounted=False)
        with pytest.raises(InUse, match="pod w has"):
            holdfast.restore(saved.file, "q", root=saved.root, data=saved.data, detached=detached)
        assert os.listdir(saved.root / "pods") == ["w"]
    assert_nothing_held(saved.root)


def test_a_pod_that_cannot_be_saved_goes_on(pod: holdfast.Pod, tmp_path: Path) -> None:
    start_counter(pod, f"type=bind,src={tmp_path},dst=/share")
    with pytest.raises(Unsupported) as caught:
        pod.save(tmp_path / "f")
    assert (caught.value.code, str(tmp_path) in caught.value.subject) == ("not-forkable", True)
    with pytest.raises(InvalidInput):
        pod.save(tmp_path / "no-folder/f")
    assert os.listdir(tmp_path) == []
    assert count(pod) == 1


@pytest.mark.usefixtures("data")
def test_the_commands(state_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "f"
    text("run", "-d", "--name", "web", BUSYBOX, "sh", "-c", "echo kept >/file; sleep 1000")
    text("exec", "web", "sh", "-c", "until [ -s /file ]; do :; done")
    assert text("pod", "save", "web", file) == f"{file}\n"
    assert fails("pod", "restore", file)["code"] == "pod-exists"
    assert answer("pod", "save", "--stop", "web", file) == {"pod": "web", "file": str(file)}
    assert answer("ps") == []
    assert text("pod", "restore", file) == "web\n"
    assert answer("pod", "restore", file, "--name", "two")["name"] == "two"
    for name in ("web", "two"):
        assert text("exec", f"{name}/web", "cat", "/file") == "kept\n"
    assert answer("audit") == {"clean": True, "findings": []}
    text("pod", "remove", "-f", "web", "two")
    assert fails("pod", "restore", tmp_path / "none")["code"] == "save-not-found"
    assert fails("pod", "restore", tmp_path)["code"] == "not-a-file"
    assert fails("pod", "save", "none", file)["code"] == "pod-not-found"
    assert_nothing_held(state_root)
