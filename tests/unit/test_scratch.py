"""Scratch disks: formatted once for each size, copied without a name."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, InvalidInput, NotFound, TimedOut
from holdfast.storage import scratch
from holdfast.storage.scratch import MAX_BYTES, MIN_BYTES, copy, prepare, whole_blocks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (MIN_BYTES, MIN_BYTES),
        (MIN_BYTES + 1, MIN_BYTES + 4096),
        (MAX_BYTES, MAX_BYTES),
        (MIN_BYTES - 4095, MIN_BYTES),
        (MAX_BYTES - 1, MAX_BYTES),
    ],
)
def test_sizes(asked, given):
    assert whole_blocks(asked) == given


@pytest.mark.parametrize("asked", [0, -1, -(20 << 20), MIN_BYTES - 4096, MAX_BYTES + 1, 1 << 70])
def test_bad_sizes(asked, tmp_path):
    with pytest.raises(InvalidInput, match="16M to 16T") as failure:
        prepare(tmp_path, asked)
    assert failure.value.code == "scratch-size"
    assert os.listdir(tmp_path) == []


def test_prepared_once(tmp_path: Path, monkeypatch):
    path = prepare(tmp_path, MIN_BYTES)
    assert path == tmp_path / "scratch" / f"{MIN_BYTES}.ext4"
    status = path.stat()
    assert status.st_size == MIN_BYTES
    assert status.st_blocks * 512 < MIN_BYTES // 8  # sparse
    assert status.st_mode & 0o777 == 0o600
    monkeypatch.setattr(scratch, "_MKE2FS", "/nosuch")
    assert prepare(tmp_path, MIN_BYTES - 1) == path
    assert path.stat().st_ino == status.st_ino


def test_many_prepare_at_once(tmp_path):
    failures = []

    def one() -> None:
        try:
            prepare(tmp_path, MIN_BYTES)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path / "scratch") == [f"{MIN_BYTES}.ext4"]


def test_a_copy_is_a_file_without_a_name(tmp_path):
    prepared = prepare(tmp_path, MIN_BYTES)
    fd, other = copy(prepared), copy(prepared)
    try:
        for number in (fd, other):
            status = os.fstat(number)
            assert status.st_nlink == 0
            assert status.st_size == MIN_BYTES
            assert status.st_blocks * 512 < MIN_BYTES // 8
            assert not os.get_inheritable(number)
            assert os.pread(number, MIN_BYTES, 0) == prepared.read_bytes()
        assert os.fstat(fd).st_ino != os.fstat(other).st_ino
        assert os.listdir(tmp_path / "scratch") == [prepared.name]
        os.pwrite(fd, b"x", 12345)
        assert os.pread(other, 1, 12345) == b"\0"
        assert prepared.read_bytes()[12345] == 0
    finally:
        os.close(fd)
        os.close(other)


@pytest.mark.parametrize("size", [MIN_BYTES, 1 << 30, 1 << 40])
def test_it_is_a_filesystem(tmp_path, size):
    fd = copy(prepare(tmp_path, size))
    try:
        # 1 T is sparse here, and mke2fs has left most of it to the first mount.
        done = subprocess.run(
            ["/sbin/dumpe2fs", "-h", f"/proc/self/fd/{fd}"], pass_fds=[fd], capture_output=True, text=True, check=False
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    assert "has_journal" not in done.stdout
    assert "Filesystem state:         clean" in done.stdout
    assert "Reserved block count:     0\n" in done.stdout


def test_without_mke2fs(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_MKE2FS", "/nosuch")
    with pytest.raises(NotFound, match="e2fsprogs") as failure:
        prepare(tmp_path, MIN_BYTES)
    assert failure.value.code == "tool-not-found"
    assert os.listdir(tmp_path / "scratch") == []


def test_a_mke2fs_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_OPTIONS", ("--nosuch",))
    with pytest.raises(HoldfastError, match="format scratch disk") as failure:
        prepare(tmp_path, MIN_BYTES)
    assert failure.value.code == "scratch-failed"
    assert os.listdir(tmp_path / "scratch") == []


def test_a_mke2fs_that_hangs(tmp_path, monkeypatch):
    def hang(*_args: object, **more: object) -> None:
        raise subprocess.TimeoutExpired("mke2fs", more["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(TimedOut, match="not done within 120 s"):
        prepare(tmp_path, MIN_BYTES)
    assert os.listdir(tmp_path / "scratch") == []


def test_a_source_that_became_shorter_does_not_hang(tmp_path, monkeypatch):
    prepared = prepare(tmp_path, MIN_BYTES)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with pytest.raises(OSError, match="shorter"):
        copy(prepared)
