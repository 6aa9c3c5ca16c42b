"""What the agent undoes when a mount of several steps fails: the mount, and never what is on it.

The agent's own code, with this host's kernel: a folder, bound, is what it takes for a disk, so that everything that
happens to its contents can be seen.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, NotReleased
from holdfast.guest import disk_mounts, disks, layers, mounting, shares, upper
from holdfast.linux import syscalls
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENTS = {"file": "kept", "folder/below": "kept, too"}
PROPAGATION = syscalls.MS_SHARED | syscalls.MS_SLAVE | syscalls.MS_PRIVATE | syscalls.MS_UNBINDABLE


class Faults:
    """The system calls, of which some fail.

    Attributes:
        mount_flags: mount(2) with any of these fails.
        umount, attributes: whether umount2(2) fails, and mount_setattr(2).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mount_flags = 0
        self.umount = self.attributes = False
        self._set_attributes = syscalls.mount_setattr
        monkeypatch.setattr(syscalls, "mount_setattr", self._do_set_attributes)
        self._mount, self._umount = syscalls.mount, syscalls.umount
        monkeypatch.setattr(syscalls, "mount", self._do_mount)
        monkeypatch.setattr(syscalls, "umount", self._do_umount)

    def heal(self) -> None:
        self.mount_flags, self.umount, self.attributes = 0, False, False

    def _do_set_attributes(self, *arguments: Any, **attributes: Any) -> None:
        if self.attributes:
            raise OSError(errno.EINVAL, "injected")
        self._set_attributes(*arguments, **attributes)

    def _do_mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        if flags & self.mount_flags:
            raise OSError(errno.EINVAL, "injected")
        self._mount(source, target, fstype, flags, data)

    def _do_umount(self, target: str, flags: int = 0) -> None:
        if self.umount:
            raise OSError(errno.EBUSY, "injected")
        self._umount(target, flags)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "7"
    for name, text in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mounts" / "m0"


@pytest.fixture
def faults(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Nothing fails yet; and ``source`` is the disk in every slot, and the share of its number."""

    really_mount = mounting.mount

    def wait_for_disk(*_place: int) -> Any:
        return str(source)
        yield

    def mount(device: str, target: str, fstype: str, flags: int, data: str) -> None:
        if fstype != "ext4":
            really_mount(device, target, fstype, flags, data)
            return
        assert device == str(source)
        syscalls.mount(device, target, "", flags | syscalls.MS_BIND)

    monkeypatch.setattr(disks, "wait_for_disk", wait_for_disk)
    monkeypatch.setattr(disks, "prove_unused", lambda *_place: iter(()))
    monkeypatch.setattr(mounting, "filesystem_of", lambda _device, _asked="": "ext4")
    monkeypatch.setattr(mounting, "mount", mount)
    monkeypatch.setattr(shares, "_mount_export", lambda _cache: str(source.parent))
    made = Faults(monkeypatch)
    yield made
    made.heal()


class Children:
    """The agent's other processes; what they would do takes nothing away."""

    def call(self, _action: Any) -> Any:
        return 0
        yield


CHILDREN: Any = Children()


def complete(task: Any) -> Any:
    """Runs a task of the agent that waits for nothing."""
    try:
        while True:
            next(task)
    except StopIteration as end:
        return end.value


def add_disk(target: Path, *options: str) -> Any:
    return complete(disk_mounts.add({"MountPath": str(target), "Options": list(options)}, CHILDREN))


def add_share(target: Path) -> Any:
    return complete(shares.add({"MountPath": str(target), "ShareName": "7", "ReadOnly": True}, CHILDREN))


def add_root(target: Path, layer: Path) -> Any:
    settings = {"ContainerRootPath": str(target), "Layers": [{"Path": str(layer)}]}
    return complete(layers.add(settings, CHILDREN))


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def is_mounted(path: Path) -> bool:
    return str(path) in leaks.mounts().values()


@pytest.mark.parametrize("option", ["shared", "rshared", "slave", "rprivate", "unbindable"])
def test_a_propagation_that_fails(source, target, faults, option):
    faults.mount_flags = PROPAGATION
    with pytest.raises((OSError, HoldfastError), match="injected"):
        add_disk(target, option)
    assert not is_mounted(target)
    assert not target.exists()
    assert contents(source) == CONTENTS
    faults.heal()
    add_disk(target, option)
    assert contents(target) == CONTENTS
    complete(disk_mounts.remove({"MountPath": str(target)}, CHILDREN))
    assert contents(source) == CONTENTS


def test_a_share_that_cannot_be_made_read_only(source, target, faults):
    """It is made so before it is anywhere."""
    faults.attributes = True
    with pytest.raises(HoldfastError, match="injected"):
        add_share(target)
    assert not is_mounted(target)
    assert not target.exists()
    assert contents(source) == CONTENTS


def test_a_root_that_fails(source, target, faults, tmp_path, monkeypatch):
    """The memory for its mount points goes, too."""
    monkeypatch.setattr(upper, "_PLACES", str(tmp_path / "places"))
    with pytest.raises(HoldfastError):
        add_root(target, source / "missing")
    assert not target.exists()
    assert os.listdir(tmp_path / "places") == []
    add_root(target, source)
    assert contents(target) == CONTENTS
    complete(layers.remove({"ContainerRootPath": str(target)}, CHILDREN))
    assert os.listdir(tmp_path / "places") == []
    assert contents(source) == CONTENTS


@pytest.mark.parametrize("kind", ["disk", "share"])
def test_what_cannot_be_undone_stays_as_it_is(source, target, faults, kind):
    """Whoever removes a mount point that is still mounted, recursively, removes what is on the disk."""
    faults.umount = True
    if kind == "disk":
        faults.mount_flags = PROPAGATION
        with pytest.raises(NotReleased):
            add_disk(target, "shared")
    else:
        add_share(target)
    assert is_mounted(target)
    remove = {"disk": disk_mounts, "share": shares}[kind].remove
    settings = {"MountPath": str(target)}
    with pytest.raises(NotReleased):
        complete(remove(settings, CHILDREN))
    assert contents(source) == contents(target) == CONTENTS
    faults.heal()
    complete(remove(settings, CHILDREN))
    assert not target.exists()
    assert contents(source) == CONTENTS


def test_what_lies_under_a_mount_that_failed_stays(source, target, faults):
    target.mkdir(parents=True)
    (target / "here before").write_text("not ours")
    faults.mount_flags = PROPAGATION
    with pytest.raises((OSError, HoldfastError), match="injected"):
        add_disk(target, "shared")
    assert not is_mounted(target)
    assert os.listdir(target) == ["here before"]
    assert contents(source) == CONTENTS
