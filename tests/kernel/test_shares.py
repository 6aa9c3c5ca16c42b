"""Shares: what the guest may see of the host, read-only for real, and taken away without touching a file of it."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, InvalidInput, NotFound
from holdfast.linux import syscalls
from holdfast.storage.export import ShareKey, clone_tree
from holdfast.storage.journal import Journal
from holdfast.storage.shares import Shares
from tests import leaks
from tests.fakes import FakeSandbox, Faulty, Mounted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """As the monitor has it: a tmpfs of its own, private."""
    path = tmp_path / "export"
    path.mkdir()
    syscalls.mount("none", str(path), "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=1m")
    syscalls.mount("none", str(path), "", syscalls.MS_PRIVATE)
    yield path
    syscalls.umount(str(path))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """The user's: a directory with a file in it, and with two file systems mounted below each other."""
    path = tmp_path / "host"
    for folder in (path, path / "sub", path / "sub/subsub"):
        folder.mkdir(exist_ok=True)
        if folder != path:
            syscalls.mount("none", str(folder), "tmpfs", data="size=64k")
        (folder / "file").write_text(f"in {folder.name}")
        if folder == path / "sub":
            (path / "sub/subsub").mkdir()
    yield path
    assert files(path) == ["file", "sub/file", "sub/subsub/file"]  # whatever the test did
    syscalls.umount(str(path / "sub/subsub"))
    syscalls.umount(str(path / "sub"))


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def key_of(path: Path, *, read_only: bool = False, recursive: bool = True) -> ShareKey:
    status = path.stat()
    return ShareKey(status.st_dev, status.st_ino, str(path), read_only, recursive)


@pytest.fixture
def run(export: Path, state_root: Path):
    """Runs a test with the shares of a pod on a fake machine."""

    def run(test: Callable[[Shares, Faulty, Journal], Awaitable[None]]) -> None:
        async def main() -> None:
            with Journal(state_root) as journal:
                sandbox = Faulty(FakeSandbox(str(export)))
                await test(Shares(sandbox, journal, "pod"), sandbox, journal)
                assert os.listdir(export) == []
                assert journal.held() == []
                assert sandbox.inner.mounts == {}

        asyncio.run(main())

    return run


def refused(code: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=os.strerror(code)):
        action()


# -- a detached copy --------------------------------------------------------------------------


def looked_at(tree: int, path: str = "") -> str:
    return os.readlink(f"/proc/self/fd/{tree}") if not path else Path(f"/proc/self/fd/{tree}/{path}").read_text()


def test_a_copy_is_detached(host):
    before = leaks.mounts()
    tree = clone_tree(key_of(host))
    try:
        assert leaks.mounts() == before
        assert looked_at(tree, "sub/subsub/file") == "in subsub"
        assert not os.get_inheritable(tree)
    finally:
        os.close(tree)


@pytest.mark.parametrize("where", [".", "sub", "sub/subsub"])
def test_read_only_is_read_only_in_every_mount_of_the_tree(host, where):
    tree = clone_tree(key_of(host, read_only=True))
    here = Path(f"/proc/self/fd/{tree}") / where
    try:
        refused(errno.EROFS, lambda: (here / "new").write_text("x"))
        refused(errno.EROFS, lambda: (here / "file").write_text("x"))
        refused(errno.EROFS, lambda: (here / "file").unlink())
        refused(errno.EROFS, lambda: (here / "file").chmod(0o777))
        refused(errno.EROFS, lambda: os.rename(here / "file", here / "other"))
    finally:
        os.close(tree)
    (host / where / "new").write_text("the host's own mounts are as they were")
    (host / where / "new").unlink()


def test_writable_is_writable_in_every_mount_of_the_tree(host):
    tree = clone_tree(key_of(host))
    try:
        for where in (".", "sub", "sub/subsub"):
            (Path(f"/proc/self/fd/{tree}") / where / "new").write_text("x")
            (host / where / "new").unlink()
    finally:
        os.close(tree)


def test_without_what_is_mounted_below(host):
    tree = clone_tree(key_of(host, recursive=False))
    try:
        assert os.listdir(f"/proc/self/fd/{tree}/sub") == []
    finally:
        os.close(tree)


def test_a_read_only_share_without_what_is_mounted_below(host):
    tree = clone_tree(key_of(host, read_only=True, recursive=False))
    try:
        refused(errno.EROFS, lambda: Path(f"/proc/self/fd/{tree}/sub/new").write_text("x"))
    finally:
        os.close(tree)


def test_another_file_is_there_now(host, tmp_path):
    key = key_of(host)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(InvalidInput, match="another file") as failure:
        clone_tree(key._replace(path=str(tmp_path / "link")))
    assert failure.value.code == "source-changed"
    with pytest.raises(NotFound) as failure:
        clone_tree(key._replace(path=str(tmp_path / "nosuch")))
    assert failure.value.code == "source-not-found"
    with pytest.raises(InvalidInput):
        clone_tree(key._replace(device=key.device + 1))


def test_mounts_do_not_spread(host, export):
    """Neither what is mounted in the share later reaches the host, nor the other way round."""
    syscalls.mount("none", str(host / "sub"), "", syscalls.MS_SHARED)
    target = export / "0"
    target.mkdir()
    tree = clone_tree(key_of(host))
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, str(target), syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)
    try:
        (host / "sub/later").mkdir()
        syscalls.mount("none", str(host / "sub/later"), "tmpfs")
        assert str(target / "sub/later") not in leaks.mounts().values()
        syscalls.umount(str(host / "sub/later"))
        syscalls.mount("none", str(target / "sub/later"), "tmpfs")
        assert str(host / "sub/later") not in leaks.mounts().values()
    finally:
        syscalls.umount(str(target), syscalls.MNT_DETACH)
        (host / "sub/later").rmdir()
        target.rmdir()


# -- shares of a pod --------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory(run, host, export, read_only):
    async def test(shares: Shares, sandbox: Faulty, journal: Journal) -> None:
        share = await shares.add(key_of(host, read_only=read_only), "a", file=False)
        assert share.guest_path == "/run/mounts/shares/m0"
        assert sandbox.inner.mounts[share.guest_path].read_only == read_only
        assert files(export / "0") == ["file", "sub/file", "sub/subsub/file"]
        assert [(row.kind, row.object, row.state) for row in journal.held()] == [("share", str(host), "held")]
        if read_only:
            refused(errno.EROFS, lambda: (export / "0/sub/new").write_text("x"))
        await shares.remove(share, "a")
        await shares.remove(share, "a")

    run(test)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_alone(run, host, export, read_only):
    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        share = await shares.add(key_of(host / "file", read_only=read_only), "a", file=True)
        assert share.guest_path == "/run/mounts/shares/m0/file"
        assert files(export / "0") == ["file"]  # nothing beside it
        assert (export / "0/file").read_text() == "in host"
        if read_only:
            refused(errno.EROFS, lambda: (export / "0/file").write_text("x"))
        else:
            (export / "0/file").write_text("written through")
            assert (host / "file").read_text() == "written through"
        await shares.remove(share, "a")
        assert (host / "file").exists()

    run(test)


@pytest.mark.parametrize("name", ["with blank", "new\nline", "-dash", "ünïcode", ".hidden", "\\134"])
def test_odd_names(run, tmp_path, export, name):
    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        (tmp_path / name).write_text("odd")
        share = await shares.add(key_of(tmp_path / name), "a", file=True)
        assert (export / "0" / name).read_text() == "odd"
        await shares.remove(share, "a")
        assert (tmp_path / name).read_text() == "odd"

    run(test)


def test_holders_and_numbers(run, host, tmp_path):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        first = await shares.add(key_of(host), "a", file=False)
        again = await shares.add(key_of(host), "b", file=False)
        other = await shares.add(key_of(host, read_only=True), "b", file=False)
        assert first == again
        assert (first.number, other.number) == (0, 1)
        assert [(share.number, holders) for share, holders in shares.items()] == [(0, ["a", "b"]), (1, ["b"])]
        await shares.remove(first, "a")
        assert sandbox.steps.count("Remove MappedDirectory") == 0
        await shares.remove(first, "b")
        (tmp_path / "more").mkdir()
        more = await shares.add(key_of(tmp_path / "more"), "c", file=False)
        assert more.number == 2  # never one that was used: a guest's cache may remember what that was
        await shares.remove(more, "c")
        await shares.remove(other, "b")

    run(test)


def test_swapped_after_planning(run, host, tmp_path):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        (tmp_path / "dir").mkdir()
        key = key_of(tmp_path / "dir")
        (tmp_path / "dir").rmdir()
        (tmp_path / "dir").symlink_to(host)
        with pytest.raises(InvalidInput, match="another file"):
            await shares.add(key, "a", file=False)
        assert sandbox.steps == []

    run(test)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("file", [False, True])
def test_a_guest_that_fails(run, host, after, file):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        path = host / "file" if file else host
        sandbox.fail("Add MappedDirectory", after=after)
        with pytest.raises(HoldfastError, match="injected") as failure:
            await shares.add(key_of(path), "a", file=file)
        assert failure.value.causes == ()
        share = await shares.add(key_of(path), "a", file=file)
        assert share.number == 1
        for _ in range(2):
            sandbox.fail("Remove MappedDirectory", after=after)
            with pytest.raises(HoldfastError, match="injected"):
                await shares.remove(share, "a")
        await shares.remove(share, "a")

    run(test)


def test_a_failure_that_cannot_be_undone_keeps_its_number(run, host, tmp_path):
    async def test(shares: Shares, sandbox: Faulty, journal: Journal) -> None:
        sandbox.fail("Add MappedDirectory", after=True)  # the guest has it, and its answer is lost
        sandbox.fail("Remove MappedDirectory")
        with pytest.raises(HoldfastError, match="also: Remove MappedDirectory: injected"):
            await shares.add(key_of(host), "a", file=False)
        assert [row.state for row in journal.held()] == ["releasing"]
        (tmp_path / "other").mkdir()
        other = await shares.add(key_of(tmp_path / "other"), "a", file=False)
        assert other.number == 1
        assert await shares.retry() == []
        await shares.remove(other, "a")

    run(test)


def test_a_file_that_the_machine_still_has_open(run, host, export):
    """It goes at once: with ``cache=loose`` Linux keeps a file open that was written to, long after its last user."""

    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        share = await shares.add(key_of(host / "file"), "a", file=True)
        with open(export / "0/file") as file:
            await shares.remove(share, "a")
            assert file.read() == "in host"
        assert (host / "file").read_text() == "in host"

    run(test)


def test_a_directory_that_the_machine_still_has_open(run, host, export):
    """Its tree goes at once; who has something of it open keeps that, and no name leads there any more."""

    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        share = await shares.add(key_of(host), "a", file=False)
        with open(export / "0/sub/file") as file:
            await shares.remove(share, "a")
            assert file.read() == "in sub"
        assert files(host) == ["file", "sub/file", "sub/subsub/file"]

    run(test)


def test_something_in_the_way(run, host, export):
    """What is not ours in the export is not removed, and stops the removal rather than being deleted with it."""

    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        (export / "0").mkdir()
        (export / "0/somebody's").write_text("kept")
        with pytest.raises(FileExistsError) as failure:
            await shares.add(key_of(host), "a", file=False)
        assert (export / "0/somebody's").read_text() == "kept"
        assert failure.type is FileExistsError
        (export / "0/somebody's").unlink()
        assert await shares.retry() == []

    run(test)


def test_no_room_in_the_export(run, host, export):
    async def test(shares: Shares, _sandbox: Faulty, _journal: Journal) -> None:
        syscalls.mount("none", str(export), "", syscalls.MS_REMOUNT, "size=1m,nr_inodes=2")
        (export / "filler").touch()
        with pytest.raises(OSError, match="No space left"):
            await shares.add(key_of(host / "file"), "a", file=True)
        (export / "filler").unlink()

    run(test)


def test_death(run, host, export):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        share = await shares.add(key_of(host), "a", file=False)
        sandbox.inner.die()
        await shares.remove(share, "a")
        assert "Remove MappedDirectory" not in sandbox.steps

    run(test)


# -- many at once -----------------------------------------------------------------------------


def folders(tmp_path: Path, count: int) -> list[Path]:
    paths = [tmp_path / f"folder{number}" for number in range(count)]
    for path in paths:
        path.mkdir()
        (path / "file").write_text(path.name)
    return paths


def test_many_with_one_request(run, tmp_path, export):
    async def test(shares: Shares, sandbox: Faulty, journal: Journal) -> None:
        paths = folders(tmp_path, 3)
        (tmp_path / "alone").write_text("alone")
        wanted = [(key_of(path, read_only=path.name == "folder1"), False) for path in paths]
        made = await shares.add_all([*wanted, (key_of(tmp_path / "alone"), True)], "a")
        assert sandbox.steps == ["Add MappedDirectory"]
        where = ["/run/mounts/shares/b0/0", "/run/mounts/shares/b0/1", "/run/mounts/shares/b0/2"]
        assert [share.guest_path for share in made] == [*where, "/run/mounts/shares/m3/alone"]
        assert sorted(files(export)) == ["3/alone", "b0/0/file", "b0/1/file", "b0/2/file"]
        assert [row.state for row in journal.held()] == ["held"] * 4
        (export / "b0/0/file").write_text("written through")
        assert (paths[0] / "file").read_text() == "written through"
        for refuse in (export / "b0/1/new", export / "b0/new"):  # the group itself is nobody's to write to
            refused(errno.EROFS, lambda: refuse.write_text("x"))  # noqa: B023  called here
        await shares.remove(made[1], "a")
        assert sorted(files(export)) == ["3/alone", "b0/0/file", "b0/2/file"]
        await shares.remove_all(made, "a")
        assert sandbox.steps == ["Add MappedDirectory", "Remove MappedDirectory", "Remove MappedDirectory"]
        assert [(path / "file").exists() for path in paths] == [True] * 3

    run(test)


def test_many_of_which_others_hold_some(run, tmp_path, export):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        keys = [(key_of(path), False) for path in folders(tmp_path, 4)]
        first = await shares.add_all(keys[:3], "a")
        second = await shares.add_all(keys[1:], "b")
        assert first[1:] == second[:2]
        assert [share.number for share in second] == [1, 2, 3]
        await shares.remove_all(first, "a")
        assert sorted(files(export)) == ["3/file", "b0/1/file", "b0/2/file"]
        await shares.remove_all(second, "b")

    run(test)


def test_one_of_many_that_is_gone_takes_the_others_back(run, tmp_path, export):
    async def test(shares: Shares, sandbox: Faulty, journal: Journal) -> None:
        paths = folders(tmp_path, 3)
        keys = [(key_of(path), False) for path in paths]
        (paths[1] / "file").unlink()
        paths[1].rmdir()
        with pytest.raises(NotFound):
            await shares.add_all(keys, "a")
        assert sandbox.steps == []
        paths[1].mkdir()
        keys[1] = (key_of(paths[1]), False)
        why = "refused by the test"
        publish, failed = shares._export.publish, []

        def fails_once(place, key, identity, replaced) -> None:
            if key.path == str(paths[1]) and not failed:
                failed.append(place)
                raise InvalidInput(why)
            publish(place, key, identity, replaced)

        shares._export.publish = fails_once
        with pytest.raises(InvalidInput, match=why):
            await shares.add_all(keys, "a")
        assert os.listdir(export) == []
        assert journal.held() == []
        assert [share.number for share in await shares.add_all(keys, "a")] == [3, 4, 5]
        await shares.remove_all([share for share, _ in shares.items()], "a")

    run(test)


@pytest.mark.parametrize("after", [False, True])
def test_a_guest_that_fails_with_many(run, tmp_path, export, after):
    async def test(shares: Shares, sandbox: Faulty, journal: Journal) -> None:
        keys = [(key_of(path), False) for path in folders(tmp_path, 3)]
        sandbox.fail("Add MappedDirectory", after=after)
        with pytest.raises(HoldfastError, match="injected") as failure:
            await shares.add_all(keys, "a")
        assert failure.value.causes == ()
        assert os.listdir(export) == []
        assert journal.held() == []
        made = await shares.add_all(keys, "a")
        sandbox.fail("Remove MappedDirectory", after=after)
        with pytest.raises(HoldfastError, match="injected"):
            await shares.remove_all(made, "a")
        assert [row.state for row in journal.held()] == ["releasing"] * 3
        await shares.remove_all(made, "a")

    run(test)


def test_a_guest_that_refuses_one_of_many(run, tmp_path, export):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        keys = [(key_of(path), False) for path in folders(tmp_path, 3)]
        sandbox.inner.mounts["/run/mounts/shares/b0/1"] = Mounted("share", "in the way")
        sandbox.fail("Remove MappedDirectory")
        with pytest.raises(HoldfastError, match=r"something else is mounted there.*also: Remove MappedDirectory: inj"):
            await shares.add_all(keys, "a")
        assert await shares.retry() == []

    run(test)


@pytest.mark.parametrize("answer", [{}, {"results": []}, {"results": [{}, 7]}, {"results": "ab"}])
def test_a_guest_that_answers_nonsense(run, tmp_path, answer):
    async def test(shares: Shares, sandbox: Faulty, _journal: Journal) -> None:
        real = sandbox.inner.request
        keys = [(key_of(path), False) for path in folders(tmp_path, 2)]

        async def lies(method, params, seconds):
            result = await real(method, params, seconds)
            return answer if params["RequestType"] == "Add" else result

        sandbox.inner.request = lies
        with pytest.raises(HoldfastError, match="not one result for each"):
            await shares.add_all(keys, "a")

    run(test)
