"""Empty qcow2 files, as qemu-img sees them."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from holdfast.machine.qcow2 import write_empty

SIZES = [512, 4096, 65536, (512 << 20) - 512, 512 << 20, (512 << 20) + 512, 10 << 30, 1 << 40, 16 << 40]


def qemu_img(*arguments: str) -> dict[str, object]:
    done = subprocess.run(["qemu-img", *arguments, "--output=json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("size_bytes", SIZES)
def test_it_is_an_empty_disk(tmp_path, size_bytes):
    path = tmp_path / "disk"
    with open(path, "xb+") as file:
        write_empty(file.fileno(), size_bytes)
    info = qemu_img("info", "-f", "qcow2", str(path))
    assert (info["virtual-size"], info["format"]) == (size_bytes, "qcow2")
    assert "backing-filename" not in info
    check = qemu_img("check", "-f", "qcow2", str(path))
    assert check["check-errors"] == 0
    assert not {"corruptions", "leaks", "allocated-clusters"} & check.keys() or not check.get("allocated-clusters")
    assert os.stat(path).st_blocks * 512 <= 1 << 20


@pytest.mark.parametrize("size_bytes", [64 << 10, 1 << 30])
def test_what_is_written_to_it_is_there(tmp_path, size_bytes):
    """At its beginning and at its very end; what is not is what is below."""
    base, top = tmp_path / "base", tmp_path / "top"
    with open(base, "xb") as file:
        file.truncate(size_bytes)
        os.pwrite(file.fileno(), b"below" * 100, 4096)
    with open(top, "xb+") as file:
        write_empty(file.fileno(), size_bytes)
    backing = {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    disk = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}, "backing": backing}
    before = base.read_bytes() if size_bytes < 1 << 20 else b""
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 0 512", "-c", f"write -P 9 {size_bytes - 512} 512", f"json:{json.dumps(disk)}"],
        check=True, capture_output=True,
    )  # fmt: skip
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(disk)}", flat], check=True)
    with open(flat, "rb") as file:
        fd = file.fileno()
        assert os.pread(fd, 512, 0) == b"\7" * 512
        assert os.pread(fd, 500, 4096) == b"below" * 100
        assert os.pread(fd, 512, size_bytes - 512) == b"\t" * 512
    assert not before or base.read_bytes() == before
    assert qemu_img("check", "-f", "qcow2", str(top))["check-errors"] == 0
