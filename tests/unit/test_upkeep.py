"""Whether a template is of use, and removing those that are not, with records made by hand."""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from holdfast.errors import InUse, NotFound
from holdfast.machine import guest_image, template, upkeep
from holdfast.machine.config import MachineConfig
from holdfast.machine.guest_image import GuestImage, Survey
from holdfast.machine.upkeep import Present

if TYPE_CHECKING:
    from pathlib import Path

QEMU, OLD_QEMU = "QEMU emulator version 7.2", "QEMU emulator version 7.1"


def make_guest(name: str) -> GuestImage:
    return GuestImage(name, "", "", "", "", "", "", [], {}, Survey("", "", {}, "", []))


GUEST, OLD_GUEST = make_guest("1" * 32), make_guest("2" * 32)
NOW = Present(GUEST, QEMU, "tcg")


def save(
    data: Path, guest: GuestImage = GUEST, qemu: str = QEMU, memory_bytes: int = 1 << 20, **changes: object
) -> str:
    """Writes a template with nothing in it; returns its key."""
    config = MachineConfig(guest, "tcg", memory_bytes, 1, qemu)
    folder = data / "templates" / config.key
    folder.mkdir(parents=True)
    (folder / "ram").write_bytes(b"x" * 8192)
    (folder / "state").write_bytes(b"state")
    (data / "templates" / f".{config.key}.lock").touch()
    status = (folder / "ram").stat()
    record = template.Template(
        template.FORMAT_VERSION, config.key, guest.id, "tcg", memory_bytes, 1, False, qemu,
        hashlib.sha256(b"state").hexdigest(), (status.st_size, status.st_mtime_ns, status.st_ino),
    )  # fmt: skip
    (folder / "template.json").write_bytes(msgspec.json.encode(msgspec.to_builtins(record) | changes))
    return config.key


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(upkeep, "present", lambda _data: NOW)
    monkeypatch.setattr(guest_image, "find", lambda _data: GUEST)
    return tmp_path


def stale(data: Path) -> dict[str, str]:
    return {one.key: one.stale for one in upkeep.survey(data)}


def test_why_it_is_of_no_use(data, monkeypatch):
    good = save(data)
    reasons = {
        save(data, OLD_GUEST): "its guest is 222222222222, not 111111111111",
        save(data, qemu=OLD_QEMU): f"it was saved by {OLD_QEMU}, and this is {QEMU}",
        save(data, memory_bytes=2 << 20, version=1): "its format is version 1, not 2",
        save(data, memory_bytes=3 << 20, state_sha256="0"): "its device state has changed since it was saved",
        save(data, memory_bytes=4 << 20, cpus=2): "it was saved by another version of Holdfast",
    }
    assert stale(data) == {good: "", **reasons}
    for now, why in (
        (Present(None, QEMU, "tcg"), "no guest is built from this host's files as they are now"),
        (Present(GUEST, "", ""), "QEMU is not installed"),
        (Present(GUEST, QEMU, "kvm"), "it is for TCG, and this host uses KVM"),
        (Present(GUEST, QEMU, ""), ""),
    ):
        monkeypatch.setattr(upkeep, "present", lambda _data, now=now: now)
        assert stale(data)[good] == why


def test_what_is_removed_and_what_stays(data):
    good, old, used = save(data), save(data, OLD_GUEST), save(data, OLD_GUEST, memory_bytes=2 << 20)
    for name in (GUEST.id, OLD_GUEST.id, "3" * 32):
        (data / "guests" / name).mkdir(parents=True)
    freed = upkeep.collect(data, {used}, ())
    assert [(one.kind, one.object) for one in freed] == [("template", old), ("guest", "3" * 32)], "a pod's guest stays"
    assert freed[0].bytes >= 8192
    assert sorted(os.listdir(data / "templates")) == sorted((f".{good}.lock", good, f".{used}.lock", used))
    assert upkeep.collect(data, {used}, ()) == []
    assert [one.object for one in upkeep.collect(data, (), {OLD_GUEST.id})] == [used]
    assert [one.object for one in upkeep.collect(data, (), ())] == [OLD_GUEST.id]


def test_nothing_at_all(tmp_path):
    assert upkeep.survey(tmp_path / "none") == upkeep.collect(tmp_path / "none", (), ()) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_being_built_or_started_from_stays(data, monkeypatch):
    monkeypatch.setattr(upkeep, "_REMOVE_SECONDS", 0)
    key = save(data, OLD_GUEST)
    new = data / "templates" / f".{key}.new-1"
    new.mkdir()
    (new / "ram").write_bytes(b"x" * 8192)
    for operation in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        lock_fd = template.try_lock(data / "templates", key, operation)
        try:
            assert upkeep.collect(data, (), ()) == []
            with pytest.raises(InUse) as caught:
                upkeep.remove(data, key)
            assert caught.value.code == "template-busy"
        finally:
            os.close(lock_fd)
    assert upkeep.remove(data, key) >= 2 * 8192
    assert os.listdir(data / "templates") == []
    with pytest.raises(NotFound):
        upkeep.remove(data, key)


def test_a_lock_that_went_with_its_template_is_none(tmp_path):
    """Who has opened it before takes the one that is there now."""
    first = template.try_lock(tmp_path, "a", fcntl.LOCK_EX)
    assert template.try_lock(tmp_path, "a", fcntl.LOCK_SH) == -1
    (tmp_path / ".a.lock").unlink()
    second = template.try_lock(tmp_path, "a", fcntl.LOCK_EX)
    assert second >= 0
    assert template.try_lock(tmp_path, "a", fcntl.LOCK_EX) == -1
    for fd in (first, second):
        os.close(fd)


def test_leftovers_of_a_template_that_is_there(data):
    key = save(data)
    new = data / "templates" / f".{key}.new-1"
    new.mkdir()
    (new / "state").write_bytes(b"x" * 100)
    (freed,) = upkeep.collect(data, (), ())
    assert (freed.kind, freed.object) == ("leftover", key)
    assert (data / "templates" / key).is_dir()
