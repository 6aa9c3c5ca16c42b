"""The initial RAM disk's format: what cpio reads out of it, and that it is always the same bytes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess

import pytest

from holdfast.machine.cpio import Archive

needs_cpio = pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")


def example() -> Archive:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.folder("proc")
    archive.file("init", b"#!/bin/busybox sh\n", 0o755)
    archive.file("modules/odd.ko", b"x" * 4097)
    archive.file("empty", b"")
    archive.symlink("bin/sh", "busybox")
    return archive


def cpio(*argv: str, data: bytes, cwd=None) -> str:
    done = subprocess.run(["cpio", "--quiet", *argv], input=data, capture_output=True, check=True, cwd=cwd)
    return done.stdout.decode()


@needs_cpio
def test_cpio_lists_every_member_in_order():
    listed = cpio("-it", data=example().to_bytes()).split()
    assert listed == ["dev", "dev/console", "proc", "init", "modules", "modules/odd.ko", "empty", "bin", "bin/sh"]


@needs_cpio
def test_cpio_extracts_what_was_added(tmp_path):
    cpio("-id", "--no-preserve-owner", "-f", "dev/console", data=example().to_bytes(), cwd=tmp_path)
    assert (tmp_path / "init").read_bytes() == b"#!/bin/busybox sh\n"
    assert stat.S_IMODE((tmp_path / "init").stat().st_mode) & 0o700 == 0o700
    assert (tmp_path / "modules/odd.ko").read_bytes() == b"x" * 4097
    assert (tmp_path / "empty").read_bytes() == b""
    assert os.readlink(tmp_path / "bin/sh") == "busybox"
    assert (tmp_path / "proc").is_dir()


@needs_cpio
def test_devices_and_owners():
    lines = cpio("-itvn", data=example().to_bytes()).splitlines()
    console = next(line for line in lines if line.endswith("dev/console"))
    assert console.startswith("crw-------")
    assert console.split()[4:6] == ["5,", "1"]
    assert all(line.split()[2:4] == ["0", "0"] for line in lines)


def test_the_same_members_give_the_same_bytes():
    assert example().to_bytes() == example().to_bytes()


def test_every_part_is_aligned():
    assert len(example().to_bytes()) % 4 == 0


@pytest.mark.parametrize("name", ["", "/", "init", "TRAILER!!!", "a/TRAILER!!!"])
def test_refuses_names_that_cannot_be(name):
    archive = example()
    with pytest.raises(ValueError, match="member name"):
        archive.file(name, b"")


def test_folders_may_be_added_again():
    archive = example()
    before = archive.to_bytes()
    archive.folder("dev")
    assert archive.to_bytes() == before
