"""Requests to the device mapper, byte for byte as linux/dm-ioctl.h has them; its retries, on a made-up kernel."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from holdfast.errors import GuestFailed, InvalidInput, NotReleased, TimedOut
from holdfast.guest import dm, mapped

ROOT = "ab" * 32


class Kernel:
    """Answers each command with the next of ``errors`` (0: it works), then always works."""

    def __init__(self, monkeypatch, tmp_path, *errors):
        self.errors = list(errors)
        self.commands: list[int] = []
        (tmp_path / "control").touch()
        monkeypatch.setattr(dm, "CONTROL", str(tmp_path / "control"))
        monkeypatch.setattr(dm.fcntl, "ioctl", self.ioctl)

    def ioctl(self, _fd, number, request, _mutate):
        command = number & 0xFF
        assert number == 0xC138FD00 | command  # what the macro _IOWR makes of 312 bytes
        self.commands.append(command)
        error = self.errors.pop(0) if self.errors else 0
        if error:
            raise OSError(error, os.strerror(error))
        struct.pack_into("=Q", request, 40, os.makedev(253, 7))


def run(task, *, give_up_after=100):
    """Runs a task to its end; returns (result, seconds it would have slept)."""
    slept, step = 0.0, None
    for count in range(10_000):
        try:
            step = task.throw(TimedOut("request")) if count == give_up_after else next(task)
        except StopIteration as stop:
            return stop.value, slept
        assert step[0] == "sleep"
        slept += step[1]
    raise AssertionError("it never ends")


def test_a_request_is_what_the_header_says():
    raw = dm.message("name", dm.READ_ONLY, b"x" * 48)
    assert dm.HEADER.size == 312
    assert len(raw) == 312 + 48
    assert struct.unpack_from("=3I", raw) == (4, 0, 0)
    assert struct.unpack_from("=III", raw, 12) == (360, 312, 1)  # data_size, data_start, target_count
    assert struct.unpack_from("=I", raw, 28) == (1,)  # flags
    assert raw[48:52] == b"name"
    assert not any(raw[52:312])


def test_a_target_is_what_the_header_says():
    raw = dm.target("verity", 80, "1 8:0")
    assert len(raw) == 40 + 8
    assert struct.unpack("=QQiI16s", raw[:40]) == (0, 80, 0, 48, b"verity".ljust(16, b"\0"))
    assert raw[40:] == b"1 8:0\0\0\0"
    assert len(dm.target("verity", 80, "1234567")) == 48  # the terminating zero fits
    assert len(dm.target("verity", 80, "12345678")) == 56


@pytest.mark.parametrize("name", ["", "x" * 128, "a/b", "a\0b"])
def test_bad_names(name):
    with pytest.raises(InvalidInput):
        dm.message(name)


def test_create_is_create_load_resume(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, tmp_path)
    assert run(dm.create("x", b"", read_only=True)) == ("/dev/dm-7", 0)
    assert kernel.commands == [dm.DEV_CREATE, dm.TABLE_LOAD, dm.DEV_SUSPEND]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOENT, errno.ENXIO, errno.ENODEV])
def test_create_waits_for_a_device_that_is_coming(monkeypatch, tmp_path, code):
    kernel = Kernel(monkeypatch, tmp_path, code, 0, code)
    assert run(dm.create("x", b"", read_only=True)) == ("/dev/dm-7", 0.2)
    removed = [dm.DEV_CREATE, dm.TABLE_LOAD, dm.DEV_REMOVE]  # what a failed load has begun
    assert kernel.commands == [dm.DEV_CREATE, *removed, dm.DEV_CREATE, dm.TABLE_LOAD, dm.DEV_SUSPEND]


def test_create_says_at_its_deadline_what_the_kernel_said(monkeypatch, tmp_path):
    Kernel(monkeypatch, tmp_path, *[errno.ENXIO] * 50)
    with pytest.raises(GuestFailed) as caught:
        run(dm.create("x", b"", read_only=True), give_up_after=20)
    assert os.strerror(errno.ENXIO) in str(caught.value)


def test_create_does_not_try_again_what_is_wrong(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, tmp_path, 0, errno.EINVAL)
    with pytest.raises(GuestFailed):
        run(dm.create("x", b"", read_only=True))
    assert kernel.commands == [dm.DEV_CREATE, dm.TABLE_LOAD, dm.DEV_REMOVE]


def test_remove_tries_ten_times(monkeypatch, tmp_path):
    Kernel(monkeypatch, tmp_path, *[errno.EBUSY] * 9)
    assert run(dm.remove("x")) == (None, pytest.approx(0.09))
    kernel = Kernel(monkeypatch, tmp_path, *[errno.EBUSY] * 10)
    with pytest.raises(NotReleased):
        run(dm.remove("x"))
    assert len(kernel.commands) == 10


def test_remove_of_what_is_gone_is_success_and_of_what_is_wrong_is_not(monkeypatch, tmp_path):
    Kernel(monkeypatch, tmp_path, errno.ENXIO)
    assert run(dm.remove("x")) == (None, 0)
    Kernel(monkeypatch, tmp_path, errno.EPERM)
    with pytest.raises(GuestFailed):
        run(dm.remove("x"))


# -- verity tables ----------------------------------------------------------------------------------


def info(**changes):
    given = {
        "Ext4SizeInBytes": 40960, "Version": 1, "Algorithm": "sha256", "SuperBlock": True, "RootDigest": ROOT,
        "Salt": "00" * 32, "BlockSize": 4096,
    }  # fmt: skip
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_a_verity_table():
    root, table = mapped.verity_table("8:16", info())
    assert root == ROOT
    assert table[40:].rstrip(b"\0").decode() == f"1 8:16 8:16 4096 4096 10 11 sha256 {ROOT} {'00' * 32}"
    assert struct.unpack_from("=QQ", table) == (0, 80)


def test_what_is_left_out_has_its_default():
    _, table = mapped.verity_table(
        "8:16", info(SuperBlock=None, Salt=None, Version=None, Algorithm=None, BlockSize=None)
    )
    assert table[40:].rstrip(b"\0").decode() == f"1 8:16 8:16 4096 4096 10 10 sha256 {ROOT} -"


@pytest.mark.parametrize(
    "changes",
    [
        {"RootDigest": None}, {"RootDigest": "xyz"}, {"RootDigest": ROOT + " 1 ignore_corruption"}, {"RootDigest": 5},
        {"Salt": "00 -"}, {"Ext4SizeInBytes": None}, {"Ext4SizeInBytes": 5000}, {"Ext4SizeInBytes": -4096},
        {"Ext4SizeInBytes": True}, {"Ext4SizeInBytes": "4096"}, {"Version": 0.5}, {"Version": 2}, {"Algorithm": "md5"},
        {"BlockSize": 512},
    ],
)  # fmt: skip
def test_tables_that_are_refused(changes):
    with pytest.raises(InvalidInput) as caught:
        mapped.verity_table("8:16", info(**changes))
    assert caught.value.code == "verity-info"


def test_names_of_hcsshim_fit():
    dm.message(f"dm-verity-scsi-contr3-lun63-p128-{ROOT}")
