"""Files shared alone: followed when the host replaces them, and never anything else shown in their place."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import Exhausted
from holdfast.linux import syscalls
from holdfast.storage import follow
from holdfast.storage.export import ShareKey, identify
from holdfast.storage.journal import Journal
from holdfast.storage.shares import Shares
from tests.fakes import FakeSandbox, Faulty

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

REFRESH = "Update MappedDirectory"


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """As the monitor has it: shared, with a read-only slave that QEMU serves."""
    path, served = tmp_path / "export", tmp_path / "served"
    path.mkdir()
    served.mkdir()
    syscalls.mount("none", str(path), "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=1m")
    syscalls.mount("none", str(path), "", syscalls.MS_PRIVATE)
    syscalls.mount("none", str(path), "", syscalls.MS_SHARED)
    syscalls.mount(str(path), str(served), "", syscalls.MS_BIND)
    syscalls.mount("none", str(served), "", syscalls.MS_SLAVE)
    syscalls.mount("none", str(served), "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    yield path
    syscalls.umount(str(served))
    syscalls.umount(str(path))


@pytest.fixture
def served(export: Path) -> Path:
    return export.parent / "served"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    path = tmp_path / "host"
    path.mkdir()
    (path / "file").write_text("first")
    (path / "other").write_text("other")
    (tmp_path / "secret").write_text("secret")
    return path


def key_of(path: Path, *, read_only: bool = False, cache: str = "mmap") -> ShareKey:
    status = path.stat()
    return ShareKey(status.st_dev, status.st_ino, str(path), read_only, recursive=True, cache=cache)


def replace(path: Path, text: str) -> None:
    """As editors do it."""
    new = path.with_name(".new")
    new.write_text(text)
    os.rename(new, path)


async def followed(sandbox: Faulty, action: Callable[[], object]) -> None:
    """Does something on the host and waits until the export has followed."""
    fault = sandbox.hold(REFRESH)
    action()
    async with asyncio.timeout(10):
        await fault.reached.wait()
    fault.proceed.set()


@pytest.fixture
def run(export: Path, state_root: Path):
    """Runs a test with the shares of a pod on a fake machine."""

    def run(test: Callable[[Shares, Faulty], Awaitable[None]]) -> None:
        async def main() -> None:
            with Journal(state_root) as journal:
                sandbox = Faulty(FakeSandbox(str(export)))
                shares = Shares(sandbox, journal, "pod")
                await test(shares, sandbox)
                for share, holders in shares.items():
                    for holder in holders:
                        await shares.remove(share, holder)
                assert os.listdir(export) == []
                assert journal.held() == []

        asyncio.run(main())

    return run


@pytest.mark.parametrize("read_only", [False, True])
def test_gap_a_file_replaced_by_rename_is_still_served(run, host, served, read_only):
    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file", read_only=read_only), "a", file=True)
        for text in ("second", "third"):
            await followed(sandbox, lambda text=text: replace(host / "file", text))
            assert (served / "0/file").read_text() == text
            assert os.listdir(served) == ["0"]
            assert os.listdir(served / "0") == ["file"]
        if read_only:
            with pytest.raises(OSError, match="Read-only"):
                (served / "0/file").write_text("x")
        else:
            (served / "0/file").write_text("from the guest")
            assert (host / "file").read_text() == "from the guest"

    run(test)


def test_a_file_that_is_gone_does_not_exist_until_it_is_back(run, host, served):
    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        await followed(sandbox, (host / "file").unlink)
        assert os.listdir(served / "0") == []
        await followed(sandbox, lambda: (host / "file").write_text("back"))
        assert (served / "0/file").read_text() == "back"
        await followed(sandbox, lambda: os.rename(host / "file", host / "away"))
        assert os.listdir(served / "0") == []
        await followed(sandbox, lambda: os.link(host / "other", host / "file"))
        assert (served / "0/file").read_text() == "other"
        await followed(sandbox, (host / "file").unlink)  # removing a share whose file is gone is the end of this test

    run(test)


def test_no_moment_is_between_the_old_file_and_the_new_one(run, host, served):
    """Not even one in which the name is missing, or stands for the empty file that the mount covers."""
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        root = os.open(served, os.O_PATH)
        try:
            while not stop.is_set():
                try:
                    fd = os.open("0/file", os.O_RDONLY, dir_fd=root)
                except OSError as error:
                    seen.add(str(error))
                    continue
                seen.add(os.read(fd, 100).decode())
                os.close(fd)
        finally:
            os.close(root)

    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            for number in range(200):
                await followed(sandbox, lambda number=number: replace(host / "file", f"file {number}"))
        finally:
            stop.set()
            thread.join()
        assert seen <= {"first", *(f"file {number}" for number in range(200))}
        assert len(seen) > 10

    run(test)


def make_link(path: Path) -> None:
    os.symlink("../secret", path)


def make_absolute_link(path: Path) -> None:
    os.symlink(path.parent.parent / "secret", path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 3))


@pytest.mark.parametrize("make", [make_link, make_absolute_link, os.mkdir, os.mkfifo, make_socket, make_device])
def test_only_a_regular_file_takes_a_file_s_place(run, host, served, make, monkeypatch):
    """A guest that has the directory as well could put a link there: to a file that it must not see."""

    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        monkeypatch.chdir(host)
        make(host / ".new")

        def swap() -> None:
            (host / "file").unlink()
            os.rename(host / ".new", host / "file")

        await followed(sandbox, swap)
        assert os.listdir(served / "0") == []

    run(test)


def test_a_directory_on_the_way_that_becomes_a_link_is_not_followed(run, host, served, tmp_path):
    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/file").write_text("elsewhere")
        os.rename(host, tmp_path / "moved")
        os.symlink("elsewhere", host)
        await followed(sandbox, lambda: replace(tmp_path / "moved/file", "where it always was"))
        assert (served / "0/file").read_text() == "where it always was"

    run(test)


def test_a_file_that_the_machine_has_open_is_replaced(run, host, served):
    """Who has the old one open keeps it; nothing of it stays mounted."""

    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        with open(served / "0/file") as file:
            await followed(sandbox, lambda: replace(host / "file", "second"))
            assert file.read() == "first"
            assert (served / "0/file").read_text() == "second"

    run(test)


def test_two_files_of_one_directory_and_the_directory_both_ways(run, host, served):
    async def test(shares: Shares, sandbox: Faulty) -> None:
        one = await shares.add(key_of(host / "file"), "a", file=True)
        two = await shares.add(key_of(host / "other", read_only=True), "a", file=True)
        await shares.add(key_of(host), "a", file=False)
        await shares.add(key_of(host, read_only=True), "a", file=False)
        assert (one.guest_path, two.guest_path) == ("/run/mounts/shares/m0/file", "/run/mounts/shares/m1/other")
        await followed(sandbox, lambda: replace(host / "other", "new other"))
        assert [(served / f"{n}").joinpath(name).read_text() for n, name in ((0, "file"), (1, "other"), (2, "other"))] \
            == ["first", "new other", "new other"]  # fmt: skip
        (served / "2/made").write_text("x")
        with pytest.raises(OSError, match="Read-only"):
            (served / "3/made").write_text("x")
        await shares.remove(two, "a")
        await followed(sandbox, lambda: replace(host / "file", "new file"))  # the other's watch has not gone with it
        assert (served / "0/file").read_text() == "new file"

    run(test)


def test_a_replaced_file_is_still_the_same_share(run, host):
    async def test(shares: Shares, sandbox: Faulty) -> None:
        first = await shares.add(key_of(host / "file"), "a", file=True)
        await followed(sandbox, lambda: replace(host / "file", "second"))
        assert await shares.add(key_of(host / "file"), "b", file=True) == first
        assert [holders for _, holders in shares.items()] == [["a", "b"]]

    run(test)


def test_identity(host, tmp_path):
    """The directory, however it is spelled, the names of it, how it is mounted, and the way it is shared."""
    (tmp_path / "link").symlink_to(host)
    (tmp_path / "file").symlink_to(host / "file")
    (tmp_path / "bound").mkdir()
    syscalls.mount(str(host), str(tmp_path / "bound"), "", syscalls.MS_BIND)
    try:
        same = {identify(key_of(path), file=False) for path in (host, tmp_path / "link", host / "../host")}
        assert len(same) == 1
        files = [host / "file", tmp_path / "link/file", tmp_path / "file"]
        assert len({identify(key_of(path), file=True) for path in files}) == 1
        others = [
            identify(key_of(host, read_only=True), file=False), identify(key_of(host, cache="none"), file=False),
            identify(key_of(host / "file"), file=True), identify(key_of(host / "other"), file=True),
            identify(key_of(host / "file", read_only=True), file=True),
            identify(key_of(tmp_path / "bound"), file=False),
        ]  # fmt: skip
        assert len({*same, *others}) == 1 + len(others)
    finally:
        syscalls.umount(str(tmp_path / "bound"))


def test_no_device_can_be_opened_through_a_share(run, host, served):
    os.mknod(host / "null", 0o20666, os.makedev(1, 3))

    async def test(shares: Shares, _sandbox: Faulty) -> None:
        await shares.add(key_of(host), "a", file=False)
        with pytest.raises(PermissionError):
            os.open(served / "0/null", os.O_RDONLY)
        with open("/proc/self/mountinfo") as file:
            (mount,) = [line for line in map(str.split, file) if line[4] == str(served / "0")]
        assert {"nosuid", "nodev"} <= set(mount[5].split(","))

    run(test)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC])
def test_a_host_that_has_no_more_watches(run, host, monkeypatch, code):
    """Said, rather than a file that is silently not followed; and nothing is left of the try."""

    async def test(shares: Shares, sandbox: Faulty) -> None:
        def refuse(*_: object) -> int:
            raise OSError(code, os.strerror(code))

        name = "inotify_init1" if code == errno.EMFILE else "inotify_add_watch"
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, name, refuse)
            with pytest.raises(Exhausted, match=r"fs\.inotify\.max_user") as failure:
                await shares.add(key_of(host / "file"), "a", file=True)
        assert failure.value.code == "no-inotify"
        assert sandbox.steps == []
        await shares.add(key_of(host / "file"), "a", file=True)

    run(test)


def test_what_could_not_be_shown_is_tried_again(run, host, served, monkeypatch):
    monkeypatch.setattr(follow, "_AGAIN_SECONDS", 0.01)

    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        exchange, failures = syscalls.renameat2, iter([OSError(errno.ENOMEM, "Cannot allocate memory")] * 2)

        def fail_twice(*arguments: object) -> None:
            with contextlib.suppress(StopIteration):
                raise next(failures)
            exchange(*arguments)

        monkeypatch.setattr(syscalls, "renameat2", fail_twice)
        await followed(sandbox, lambda: replace(host / "file", "second"))
        assert (served / "0/file").read_text() == "second"

    run(test)


def test_a_guest_that_is_slow_to_hear_of_it(run, host, served):
    """However often the file is replaced meanwhile, one request waits for it, not one for each."""

    async def test(shares: Shares, sandbox: Faulty) -> None:
        await shares.add(key_of(host / "file"), "a", file=True)
        first = sandbox.hold(REFRESH)
        replace(host / "file", "second")
        async with asyncio.timeout(10):
            await first.reached.wait()
        for number in range(100):
            replace(host / "file", f"file {number}")
            shares._export._follower._read()
        assert (served / "0/file").read_text() == "file 99"
        last = sandbox.hold(REFRESH)
        first.proceed.set()
        async with asyncio.timeout(10):
            await last.reached.wait()
        last.proceed.set()
        await asyncio.gather(*shares._refreshing)
        assert sandbox.steps.count(REFRESH) == 2

    run(test)
