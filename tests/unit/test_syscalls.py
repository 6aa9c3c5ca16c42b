"""System calls that need no root, and how they fail."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from holdfast.linux import syscalls


def test_errors_name_the_call_and_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as failure:
        syscalls.openat2(syscalls.AT_FDCWD, f"{tmp_path}/nosuch", os.O_RDONLY, 0)
    assert failure.value.errno == errno.ENOENT
    assert failure.value.filename == f"{tmp_path}/nosuch"
    assert failure.value.strerror == "openat2: No such file or directory"


@pytest.mark.parametrize("path", ["a\0b", b"a\0b"])
def test_a_null_byte_does_not_make_another_path(tmp_path, path):
    """The kernel would stop reading there, and see a path that nobody meant."""
    (tmp_path / "a").write_text("")
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="embedded null byte") as failure:
            syscalls.openat2(fd, path, os.O_RDONLY, 0)
        assert failure.value.errno == errno.EINVAL
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="embedded null byte"):
        syscalls.mount("none", b"/nosuch\0x", "tmpfs")
    with pytest.raises(OSError, match="embedded null byte"):
        syscalls.umount("/nosuch\0x")


def test_when_something_was_made(tmp_path):
    (tmp_path / "link").symlink_to("/")
    before_ns = time.time_ns()
    (tmp_path / "new").touch()
    os.utime(tmp_path / "new", (0, 0))
    for path, flags in ((f"{tmp_path}/new", 0), (f"{tmp_path}/link", syscalls.AT_SYMLINK_NOFOLLOW)):
        device, inode, born_ns = syscalls.statx_birth(syscalls.AT_FDCWD, path, flags)
        status = os.lstat(path)
        assert (device, inode) == (status.st_dev, status.st_ino)
        assert abs(born_ns - before_ns) < 60 * 10**9
    assert syscalls.statx_birth(syscalls.AT_FDCWD, "/proc/self")[2] == 0


def test_openat2_stays_in_the_root(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("outside")
    (tmp_path / "in/link").symlink_to("../out")
    (tmp_path / "in/out").write_text("inside")
    fd = os.open(tmp_path / "in", os.O_PATH)
    try:
        found = syscalls.openat2(fd, "link", os.O_RDONLY, syscalls.RESOLVE_IN_ROOT)
        assert os.read(found, 99) == b"inside"
        assert not os.get_inheritable(found)
        os.close(found)
        for resolve, code in ((syscalls.RESOLVE_BENEATH, errno.EXDEV), (syscalls.RESOLVE_NO_SYMLINKS, errno.ELOOP)):
            with pytest.raises(OSError, match="openat2") as failure:
                syscalls.openat2(fd, "link", os.O_RDONLY, resolve)
            assert failure.value.errno == code
        made = syscalls.openat2(fd, b"new-\xff", os.O_CREAT | os.O_WRONLY, syscalls.RESOLVE_IN_ROOT, 0o640)
        assert os.fstat(made).st_mode & 0o777 == 0o640 & ~_umask()
        os.close(made)
    finally:
        os.close(fd)
    assert os.path.exists(os.fsencode(tmp_path / "in") + b"/new-\xff")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_fallocate_punches_holes(tmp_path):
    with open(tmp_path / "file", "wb+") as file:
        file.write(b"x" * 65536)
        file.flush()
        syscalls.fallocate(file.fileno(), syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE, 0, 32768)
        assert os.fstat(file.fileno()).st_size == 65536
        assert os.pread(file.fileno(), 2, 32767) == b"\0x"


def test_lengths_beyond_32_bits(tmp_path):
    with open(tmp_path / "file", "wb+") as file:
        syscalls.fallocate(file.fileno(), 0, 5 << 32, 4096)
        assert os.fstat(file.fileno()).st_size == (5 << 32) + 4096


def test_prctl_names_the_thread():
    names = []

    def name() -> None:
        syscalls.prctl(syscalls.PR_SET_NAME, b"holdfast-test")
        with open("/proc/thread-self/comm") as file:
            names.append(file.read().strip())

    thread = threading.Thread(target=name)
    thread.start()
    thread.join()
    assert names == ["holdfast-test"]


def test_each_thread_has_its_own_errno(tmp_path):
    """One thread's failure is not reported to another."""
    codes = {"missing": set(), "busy": set()}

    def missing() -> None:
        for _ in range(300):
            try:
                syscalls.umount(f"{tmp_path}/nosuch/x")
            except OSError as error:
                codes["missing"].add(error.errno)

    def bad() -> None:
        for _ in range(300):
            try:
                syscalls.fallocate(-1, 0, 0, 1)
            except OSError as error:
                codes["busy"].add(error.errno)

    threads = [threading.Thread(target=missing), threading.Thread(target=bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes["busy"] == {errno.EBADF}
    assert codes["missing"] <= {errno.ENOENT, errno.EPERM}
    assert len(codes["missing"]) == 1
