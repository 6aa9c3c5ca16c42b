"""Named volumes: made and removed by one rename, grown and replayed by who is alone with them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.cli.options import (
    AttachOptions,
    VolumeCreateOptions,
    VolumeGrowOptions,
    VolumeRemoveOptions,
    parse,
)
from holdfast.errors import Corrupt, Exhausted, HoldfastError, InUse, InvalidInput, NotFound
from holdfast.spec.runtime import Mount, spec_from_raw
from holdfast.storage import volume_disks, volumes
from holdfast.storage.attachments import Attachments, Disk
from holdfast.storage.journal import Journal
from holdfast.storage.plan import LayeredRoot, PodSnapshot, plan_container
from holdfast.storage.steps import MountDisk
from holdfast.storage.survey import survey
from holdfast.storage.volume_disks import replay, tenancy
from holdfast.storage.volumes import Holder, Volumes, find, name_of, resolve
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(data: Path, root: Path) -> Volumes:
    return Volumes(data, root)


@pytest.fixture
def journal(root: Path) -> Iterator[Journal]:
    with Journal(root) as journal:
        yield journal


class Pod:
    """A live pod, as far as a journal can tell, that has a disk."""

    def __init__(self, journal: Journal, name: str, disk: Path | str, *, writable: bool) -> None:
        folder = journal.pods_folder / name
        folder.mkdir()
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._journal, self._name = journal, name
        status = os.stat(disk)
        journal.lease(name, status.st_dev, status.st_ino, str(disk), writable=writable)

    def die(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            self.die()
        self._journal.collect(self._name)


def left(data: Path, root: Path) -> tuple[list[str], list[str]]:
    return sorted(os.listdir(data / "volumes")), os.listdir(root / "pods") if root.exists() else []


def tool(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def make_dirty(disk: Path) -> None:
    """Marks it as one that was not unmounted."""
    tool("/sbin/debugfs", "-w", "-R", "feature needs_recovery", disk)


# -- made, shown, removed ---------------------------------------------------------------------------


def test_made_shown_and_removed(store, data, root):
    made = store.create("db", "64M", {"of": "me"})
    assert made == store.inspect("db") == store.list()[0]
    assert (made.name, made.size_bytes, made.filesystem, made.labels) == ("db", 64 * MIB, "ext4", {"of": "me"})
    assert made.holders == ()
    assert made.used_bytes < 8 * MIB  # sparse
    header = tool("/sbin/dumpe2fs", "-h", made.path)
    assert "has_journal" in header
    assert "Reserved block count:     0\n" in header
    tool("/sbin/e2fsck", "-fn", made.path)
    assert "lost+found" not in tool("/sbin/debugfs", "-R", "ls /", made.path)
    assert os.stat(made.path).st_mode & 0o777 == 0o600
    store.create("a")
    assert [(one.name, one.size_bytes) for one in store.list()] == [("a", 10 << 30), ("db", 64 * MIB)]
    store.remove("db")
    store.remove("a")
    assert store.list() == []
    assert left(data, root) == ([], [])


def test_looking_makes_nothing(store, data, root):
    assert store.list() == []
    with pytest.raises(NotFound) as caught:
        store.inspect("db")
    assert caught.value.code == "volume-not-found"
    assert "holdfast volume create db" in caught.value.hint
    for act in (lambda: store.remove("db"), lambda: store.grow("db", "1G")):
        with pytest.raises(NotFound):
            act()
    store.remove("db", missing_ok=True)
    assert not data.exists()
    assert not root.exists()


@pytest.mark.parametrize("name", ["", ".new-x", "-v", "_v", "a/b", "..", "a b", "a\n", "é", "v" * 256, "a\0"])
def test_bad_names(store, data, name):
    for act in (store.create, store.inspect, store.remove, lambda name: store.grow(name, "1G")):
        with pytest.raises(InvalidInput) as caught:
            act(name)
        assert caught.value.code == "volume-name"
    assert not data.exists()


@pytest.mark.parametrize("size", [0, -1, 16 * MIB - 4096, (16 << 40) + 1, "15M", "17T"])
def test_bad_sizes(store, data, size):
    with pytest.raises(InvalidInput) as caught:
        store.create("v", size)
    assert caught.value.code == "volume-size"
    assert not data.exists()


def test_of_many_who_make_one_name_one_does(store, data):
    outcomes: list[str] = []

    def one() -> None:
        try:
            outcomes.append(store.create("v", "16M").name)
        except InUse as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["v", *["volume-exists"] * 3]
    assert os.listdir(data / "volumes") == ["v"]


def test_a_failure_leaves_nothing(store, data, monkeypatch):
    for argv, code in ((("/nosuch",), "tool-not-found"), (("/bin/false",), "volume-failed")):
        monkeypatch.setattr(volume_disks, "_MKE2FS", argv)
        with pytest.raises(HoldfastError) as caught:
            store.create("v", "16M")
        assert caught.value.code == code
    monkeypatch.setattr(volume_disks, "_MKE2FS", ("/bin/sh", "-c", "echo No space left on device; exit 1"))
    with pytest.raises(Exhausted):
        store.create("v", "16M")
    assert os.listdir(data / "volumes") == []


def test_what_a_dead_maker_leaves_is_swept_by_the_next(store, data):
    """It was killed as it was formatting: nobody ever saw its volume."""
    program = (
        f"import sys, os, signal; sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path; from holdfast.storage import volumes\n"
        "volumes.format_disk = lambda path, *_: (path.touch(), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"volumes.Volumes(Path({str(data)!r}), Path('/nonexistent')).create('v')"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    (temporary,) = os.listdir(data / "volumes")
    assert temporary.startswith(".new-")
    assert store.list() == []
    store.create("v", "16M")
    assert os.listdir(data / "volumes") == ["v"]


def test_who_is_at_work_is_not_swept(store, data):
    with store._at_work():
        (data / "volumes/.new-x").mkdir()
        store.create("v", "16M")
        assert sorted(os.listdir(data / "volumes")) == [".new-x", "v"]
    store.create("w", "16M")
    assert sorted(os.listdir(data / "volumes")) == ["v", "w"]


def test_a_damaged_record_is_said_and_does_not_keep_the_volume(store, data):
    path = store.create("v", "16M").path
    for content in (b"", b"{}", b"[1]"):
        (data / "volumes/v/volume.json").write_bytes(content)
        with pytest.raises(Corrupt) as caught:
            store.list()
        assert caught.value.code == "volume-damaged"
        assert path in caught.value.hint
    store.remove("v")
    assert os.listdir(data / "volumes") == []


# -- who has them -----------------------------------------------------------------------------------


def test_holders_are_the_live_ones(store, journal, data, tmp_path):
    disk = store.create("v", "16M").path
    os.symlink(data, tmp_path / "link")
    other = tmp_path / "link/volumes/v/disk"  # the same file by another path
    with Pod(journal, "a", disk, writable=False), Pod(journal, "b", other, writable=False) as b:
        assert set(store.inspect("v").holders) == {Holder("a", "reading"), Holder("b", "reading")}
        for act in (lambda: store.remove("v", missing_ok=True), lambda: store.grow("v", "32M")):
            with pytest.raises(InUse) as caught:
                act()
            assert caught.value.code == "volume-in-use"
            assert {"pod a has it for reading", "pod b has it for reading"} == set(caught.value.why.split(", "))
        b.die()
        assert store.inspect("v").holders == (Holder("a", "reading"),)
    with Pod(journal, "c", disk, writable=True) as c:
        assert store.list()[0].holders == (Holder("c", "writing"),)
        c.die()
        store.remove("v")  # what the dead had is free
    assert store.list() == []


def test_growing_one_that_a_pod_writes_to_asks_that_pod(data, root, journal):
    asked: list[Any] = []
    store = Volumes(data, root, lambda *what: asked.append(what))
    disk = store.create("v", "64M").path
    with Pod(journal, "a", disk, writable=True):
        store.grow("v", "128M")
        assert asked == [("a", disk, 128 * MIB)]
        with pytest.raises(InvalidInput):
            store.grow("v", "32M")
    with Pod(journal, "a", disk, writable=False), pytest.raises(InUse):
        store.grow("v", "128M")
    assert len(asked) == 1


def test_nobody_gets_it_while_it_is_grown(store, root, journal, data):
    disk = store.create("v", "16M").path
    with tenancy(root, disk) as (fd, _):
        status = os.fstat(fd)
        with pytest.raises(InUse):
            journal.lease("p", status.st_dev, status.st_ino, disk, writable=False)
        assert store.inspect("v").holders == ()
        for act in (lambda: store.remove("v"), lambda: store.grow("v", "32M")):
            with pytest.raises(InUse) as caught:
                act()
            assert caught.value.code == "volume-in-use"
    journal.lease("p", status.st_dev, status.st_ino, disk, writable=False)
    assert left(data, root) == (["v"], [])


def test_qemu_s_locks_count_too(store, data, root):
    """As for a machine of another state root, of whose leases this journal knows nothing."""
    disk = store.create("v", "16M").path
    with open(disk, "rb") as file:
        byte = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, byte)
        with pytest.raises(InUse) as caught:
            store.remove("v")
        assert "another state root" in caught.value.why
    store.remove("v")
    assert left(data, root) == ([], [])


def test_a_program_at_work_keeps_it_after_the_death_of_who_started_it(store, root, journal):
    disk = store.create("v", "16M").path
    program = (
        f"import sys, os; sys.path[:] = {sys.path!r}; os.dup2(0, 8); os.dup2(1, 9)\n"
        "from pathlib import Path; from holdfast.storage import volume_disks as disks\n"
        f"with disks.tenancy(Path({str(root)!r}), {disk!r}) as (fd, lock_fd):\n"
        "    script = 'echo up >&9; read x <&8; kill -9 $PPID; read x <&8'\n"
        "    disks._tool('work', 'v', ['/bin/sh', '-c', script], fd, lock_fd, 8, 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(3) == b"up\n"
        process.stdin.write(b"\n")
        assert process.wait() == -signal.SIGKILL
        assert journal.is_alive(os.listdir(journal.pods_folder)[0])
        with pytest.raises(InUse):
            store.remove("v")
        process.stdin.write(b"\n")
        assert process.stdout.read(1) == b""  # it is ending: one file after the other is closed
    (tenant,) = os.listdir(journal.pods_folder)
    with open(journal.pods_folder / tenant / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for it to be free
    assert not journal.is_alive(tenant)
    assert journal.collect(tenant)
    assert os.listdir(journal.pods_folder) == []
    store.remove("v")


def test_one_that_goes_between_being_opened_and_leased_is_not_attached(store, data, journal, monkeypatch):
    """What a container would write to a file that has no name any more would be nowhere."""
    disk = Disk(store.create("v", "16M").path, "disk", read_only=False)
    lease = journal.lease

    def too_late(pod: str, *which: Any, **access: Any) -> None:
        store.remove("v")
        lease(pod, *which, **access)

    monkeypatch.setattr(journal, "lease", too_late)

    async def attach() -> None:
        machine = FakeSandbox("")
        with pytest.raises(NotFound) as caught:
            await Attachments(machine, journal, "p").attach(disk, "c")
        assert caught.value.code == "source-not-found"
        assert (journal.leases(), journal.held(), machine.disks) == ([], [], {})

    asyncio.run(attach())


# -- the disk ---------------------------------------------------------------------------------------


def test_grown(store, data, root):
    store.create("v", "64M")
    grown = store.grow("v", "1G")
    assert (grown.size_bytes, grown.used_bytes < 8 * MIB) == (1 << 30, True)
    assert store.grow("v", 1 << 30).size_bytes == 1 << 30  # again
    assert "Block count:              262144\n" in tool("/sbin/dumpe2fs", "-h", grown.path)
    tool("/sbin/e2fsck", "-fn", grown.path)
    assert "lost+found" not in tool("/sbin/debugfs", "-R", "ls /", grown.path)
    for size in ("64M", (1 << 30) - 4096):
        with pytest.raises(InvalidInput) as caught:
            store.grow("v", size)
        assert caught.value.code == "volume-size"
    assert left(data, root) == (["v"], [])


def test_one_that_was_grown_half_way_is_grown_the_rest(store):
    path = store.create("v", "64M").path
    os.truncate(path, 128 * MIB)
    store.grow("v", "128M")
    assert "Block count:              32768\n" in tool("/sbin/dumpe2fs", "-h", path)


def test_a_damaged_one_does_not_grow(store):
    path = store.create("v", "64M").path
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(bytes(1024))
    with pytest.raises(Corrupt) as caught:
        store.grow("v", "128M")
    assert caught.value.code == "volume-damaged"
    assert os.stat(path).st_size == 64 * MIB


def test_a_clean_one_is_not_written_to_before_it_is_read(store, root):
    path = store.create("v", "16M").path
    before = os.stat(path).st_mtime_ns
    replay(root, path)
    assert os.stat(path).st_mtime_ns == before
    assert not root.exists()


def test_the_journal_is_replayed_once_for_many_readers(store, root, data):
    path = store.create("v", "16M").path
    make_dirty(data / "volumes/v/disk")
    errors: list[BaseException] = []

    def one() -> None:
        try:
            replay(root, path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert "needs_recovery" not in tool("/sbin/dumpe2fs", "-h", path)
    assert left(data, root) == (["v"], [])


def test_one_that_is_written_to_is_not_replayed(store, root, journal, data):
    path = store.create("v", "16M").path
    make_dirty(data / "volumes/v/disk")
    with Pod(journal, "a", path, writable=True):
        with pytest.raises(InUse) as caught:
            replay(root, path)
        assert "pod a" in caught.value.why
    assert "needs_recovery" in tool("/sbin/dumpe2fs", "-h", path)


# -- the command line -------------------------------------------------------------------------------


def test_the_command_line():
    def command(*argv: str) -> object:
        return parse(["volume", *argv], environ={}, cwd="/").command

    assert command("create", "v") == VolumeCreateOptions("v", None, {})
    assert command("create", "v", "--size", "1G", "--label", "a=b") == VolumeCreateOptions("v", 1 << 30, {"a": "b"})
    assert command("grow", "v", "--size", "2G") == VolumeGrowOptions("v", 2 << 30)
    assert command("remove", "-f", "v", "w") == VolumeRemoveOptions(("v", "w"), True)
    for argv in (["create"], ["create", "v", "--label", "a"], ["grow", "v"], ["grow", "v", "--size", "much"]):
        with pytest.raises(InvalidInput):
            command(*argv)
    mounts = parse(["attach", "p", "-v", "v:/d:ro"], environ={}, cwd="/").command
    assert isinstance(mounts, AttachOptions)
    assert mounts.mounts == ({"destination": "/d", "type": "volume", "source": "v", "options": ["ro"]},)


# -- for pods ---------------------------------------------------------------------------------------


def test_names_of_paths(data):
    assert name_of(data, f"{data}/volumes/v/disk") == "v"
    for path in ("scratch of c", "", "/", f"{data}/volumes/v", f"{data}/volumes/.new-x/disk", f"{data}/layers/v/disk"):
        assert name_of(data, path) == ""


def test_resolved(store, data):
    store.create("v", "16M")
    bind = Mount("/b", "bind", "/b")
    mounts = resolve((bind, Mount("/d", "volume", "v", ("ro",))), data)
    assert mounts == (bind, Mount("/d", "volume", str(find(data, "v")), ("ro",)))
    for source, code in (("w", "volume-not-found"), ("", "volume-name"), ("/etc/passwd", "volume-name")):
        with pytest.raises(HoldfastError) as caught:
            resolve((Mount("/d", "volume", source),), data)
        assert caught.value.code == code


def plan(data: Path, *mounts: tuple[str, ...], snapshot: PodSnapshot | None = None) -> list[MountDisk]:
    """The disks that a container gets that mounts the volume v with options, at one place each."""
    named = [
        {"destination": f"/d{index}", "type": "volume", "source": "v", "options": list(options)}
        for index, options in enumerate(mounts)
    ]
    raw = {"ociVersion": "1.0.2", "process": {"cwd": "/", "args": ["x"]}, "root": {"path": "r"}, "mounts": named}
    spec = spec_from_raw(raw)
    spec = msgspec.structs.replace(spec, mounts=resolve(spec.mounts, data))
    sources = survey(spec.mounts, (volumes.KIND,))
    made = plan_container("c", raw, spec, LayeredRoot((("/l", ""),), 0), sources, snapshot)
    return [step for step in made.steps if isinstance(step, MountDisk)]


def test_planned_as_one_disk(store, data):
    store.create("v", "16M")
    (disk,) = plan(data, ("ro",), ("rw",), ("noexec", "nosuid"))
    assert (disk.read_only, disk.disk_format, disk.filesystem, disk.options) == (False, "raw", "ext4", ())
    (disk,) = plan(data, ("ro",), ("ro", "nodev"))
    assert disk.read_only


def test_planned_as_the_pod_has_it(store, data):
    path = store.create("v", "16M").path
    key = (os.stat(path).st_dev, os.stat(path).st_ino)
    (disk,) = plan(data, ("ro",), snapshot=PodSnapshot(disks={key: True}))
    assert not disk.read_only  # the container's view is
    with pytest.raises(InUse):
        plan(data, ("rw",), snapshot=PodSnapshot(disks={key: False}))


def test_what_a_guest_writes_to_the_beginning_decides_nothing(store, data):
    """A header of qcow2 would name other files of the host."""
    path = store.create("v", "16M").path
    with open(path, "r+b") as file:
        file.write(b"QFI\xfb" + bytes(508))
    (disk,) = plan(data, ("rw",))
    assert (disk.disk_format, disk.filesystem) == ("raw", "ext4")
