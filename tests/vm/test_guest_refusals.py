"""What a guest does not do though it is asked: raw requests to its agent, past all that the host would check before.

After every refusal the guest is as it was: its mount table is the same, nothing holds the disk, and what
is on the disk is what was there.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import GuestFailed, HoldfastError, InUse, InvalidInput, Unsupported
from holdfast.image import erofs, verity
from holdfast.machine.sandbox import Slot
from tests import leaks
from tests.images import make_disk
from tests.vm.test_disk_kinds import partitioned
from tests.vm.test_machine import cloned

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from holdfast.machine.vm import VirtualMachine

MIB = 1 << 20
SLOT = Slot(2, 7)  # neither field is what an absent one means
PATH = "/run/mounts/scsi/m0"
VERITY = {"RootDigest": "00" * 32, "Ext4SizeInBytes": MIB, "SuperBlock": True}
#: What the probe of superblocks knows and the guest's kernel does not, with no tool to make it: offset, and the magic.
UNKNOWN = {
    "btrfs": (0x10040, b"_BHRfS_M"),
    "f2fs": (1024, b"\x10\x20\xf5\xf2"),
    "exfat": (3, b"EXFAT   "),
    "ntfs": (3, b"NTFS    "),
    "vfat": (82, b"FAT32   "),
}
#: What the kernel knows, and what can be nobody's filesystem: the magic of one, with nothing behind it.
MAGICS = {
    "squashfs": (0, b"hsqs"),
    "xfs": (0, b"XFSB"),
    "iso9660": (0x8001, b"CD001"),
    "luks": (0, b"LUKS\xba\xbe"),
    "swap": (4086, b"SWAPSPACE2"),
}


class Guest:
    """One clone for all tests of this file; its loop runs only while something is asked."""

    def __init__(self, runner: asyncio.Runner, machine: VirtualMachine) -> None:
        self.runner = runner
        self.machine = machine

    def modify(self, action: str, kind: str, **settings: Any) -> Any:
        request = {"RequestType": action, "ResourceType": kind, "Settings": settings}
        return self.runner.run(self.machine.request("modify", request, 20))

    def mounts(self) -> str:
        return self.runner.run(self.machine.request("mounts", {}, 5))["mountinfo"]

    def plug(self, disk: Path, *, read_only: bool = False) -> None:
        fd = os.open(disk, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            self.runner.run(self.machine.plug_disk(SLOT, fd, "raw", read_only, False))
        finally:
            os.close(fd)

    def add(self, **settings: Any) -> Any:
        return self.modify(
            "Add", "MappedVirtualDisk", MountPath=PATH, Controller=SLOT.controller, Lun=SLOT.lun, **settings
        )

    def remove(self) -> None:
        self.modify("Remove", "MappedVirtualDisk", MountPath=PATH, Controller=SLOT.controller, Lun=SLOT.lun)

    def eject(self) -> None:
        """The guest lets go only of what nothing uses, a device above the disk included."""
        self.modify("Remove", "SCSIDevice", Controller=SLOT.controller, Lun=SLOT.lun)
        self.runner.run(self.machine.unplug_disk(SLOT))
        assert self.plugged() == set()

    def plugged(self) -> set[Slot]:
        return self.runner.run(self.machine.plugged())


@pytest.fixture(scope="module")
def one_guest(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("guest")
    with asyncio.Runner() as runner:
        clone = cloned(data, folder)
        with leaks.long_lived():
            machine = runner.run(clone.__aenter__())
        yield Guest(runner, machine)
        runner.run(clone.__aexit__(None, None, None))


@pytest.fixture
def guest(one_guest: Guest) -> Iterator[Guest]:
    """The clone, with nothing in its slots; what a test that failed has left there does not fail the next one."""
    yield one_guest
    if one_guest.plugged():
        one_guest.remove()
        one_guest.eject()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Disks by what is on them."""
    folder = tmp_path_factory.mktemp("disks")
    made = {"ext4": make_disk(folder / "ext4", "ext4"), "blank": folder / "blank"}
    made["blank"].write_bytes(bytes(MIB))
    made["partitioned"] = partitioned(folder / "partitioned", made["ext4"])
    for name, (offset, magic) in {**UNKNOWN, **MAGICS}.items():
        made[name] = folder / name
        made[name].write_bytes((bytes(offset) + magic).ljust(MIB, b"\0"))
    return made


def refused(guest: Guest, disk: Path, kind: type[HoldfastError], code: str, **settings: Any) -> HoldfastError:
    """Asks for a disk, which is refused; checks that nothing has come of it; takes the disk out again."""
    before, contents = guest.mounts(), hashlib.sha256(disk.read_bytes()).digest()
    guest.plug(disk, read_only=bool(settings.get("ReadOnly")))
    for _ in range(2):  # what is refused once is refused for the same reason again
        with pytest.raises(kind) as caught:
            guest.add(**settings)
        assert caught.value.code == code
        assert guest.mounts() == before
    guest.eject()
    assert hashlib.sha256(disk.read_bytes()).digest() == contents
    return caught.value


@pytest.mark.parametrize(
    ("disk", "settings"),
    [
        ("blank", {"BlockDev": True, "Encrypted": True}),
        ("ext4", {"BlockDev": True, "ReadOnly": True, "VerityInfo": VERITY}),
        ("blank", {"Encrypted": True, "ReadOnly": True}),
        ("partitioned", {"Encrypted": True, "Partition": 1}),
        ("ext4", {"VerityInfo": VERITY}),
        ("blank", {"VerityInfo": VERITY, "Encrypted": True, "ReadOnly": True}),
        ("ext4", {"VerityInfo": "of another shape", "ReadOnly": True}),
    ],
    ids=["device, encrypted", "device, verified", "encrypted, read-only", "encrypted, partition", "verified, writable",
         "verified, encrypted", "verified by nonsense"],
)  # fmt: skip
def test_mappings_that_make_no_sense(guest, disks, disk, settings):
    """A device that was asked to be checked or encrypted, and is handed out as it is, would be believed to be that."""
    assert PATH in str(refused(guest, disks[disk], Unsupported, "mapping-unsupported", **settings))


@pytest.mark.parametrize("disk", ["ext4", "luks", "squashfs"])
def test_only_a_blank_disk_is_encrypted(guest, disks, disk):
    refused(guest, disks[disk], InUse, "disk-not-blank", Encrypted=True)


@pytest.mark.parametrize(
    ("disk", "asked"), [("ext4", "xfs"), ("squashfs", "ext4"), ("btrfs", "ext4"), ("ext4", "no such filesystem")]
)
def test_another_filesystem_than_was_asked_for(guest, disks, disk, asked):
    """It is not even tried: a filesystem that a disk does not say it holds may be anything."""
    error = refused(guest, disks[disk], GuestFailed, "wrong-filesystem", Filesystem=asked)
    assert f"it holds {disk}, not {asked}" in str(error)


@pytest.mark.parametrize("disk", list(UNKNOWN))
def test_filesystems_that_the_guest_s_kernel_does_not_know(guest, disks, disk):
    assert f" as {disk}" in str(refused(guest, disks[disk], Unsupported, "filesystem-unsupported"))


@pytest.mark.parametrize("disk", ["blank", "luks", "swap", "partitioned"])
def test_no_filesystem(guest, disks, disk):
    """Nothing is formatted that was not made for it, whatever else the request says."""
    error = refused(guest, disks[disk], GuestFailed, "no-filesystem", EnsureFilesystem=True)
    assert "mkfs" in error.hint


@pytest.mark.parametrize("disk", ["squashfs", "xfs", "iso9660"])
def test_a_filesystem_that_is_none(guest, disks, disk):
    """The first of its kind: its module is loaded for nothing.  The error has the kernel's own word for it."""
    error = refused(guest, disks[disk], GuestFailed, "mount-failed", ReadOnly=True)
    assert "(errno " in error.why


@pytest.mark.parametrize(
    "options",
    [["remount"], ["bind"], ["rbind"], ["remount", "bind", "rshared"], ["rslave", "no-such-option"]],
    ids=",".join,
)
def test_options_that_make_no_new_mount(guest, disks, options):
    """Flags that mean another mount than this one: the kernel refuses; what is undone is not the disk's contents."""
    refused(guest, disks["ext4"], GuestFailed, "mount-failed", Options=options)


def test_what_was_refused_is_no_hindrance(guest, disks, tmp_path):
    """The same place takes the same disk when it is asked for rightly: once that was refused, and once it was there."""
    disk = make_disk(tmp_path / "disk", "ext4")
    guest.plug(disk)
    for wrong in ({"VerityInfo": VERITY}, {"Encrypted": True}, {"Filesystem": "xfs"}, {"Options": ["no-such-option"]}):
        with pytest.raises(HoldfastError):
            guest.add(**wrong)
        assert guest.add(Filesystem="ext4")["path"] == PATH
        with pytest.raises(HoldfastError):  # and what is mounted there stays when that is refused
            guest.add(**wrong)
        assert guest.mounts().count(f" {PATH} ") == 1
        guest.remove()
    guest.eject()


def test_a_refusal_takes_nothing_from_what_is_mounted_there(guest, tmp_path):
    """A failed request unmakes what was mapped for its mount point, which must not be what somebody else has there."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("text\n")
    disk = tmp_path / "disk"
    erofs.make(str(tmp_path / "tree"), str(disk), "seed")
    tree = verity.read(str(disk))
    info = {"RootDigest": tree.root_hash, "Salt": tree.salt, "Ext4SizeInBytes": tree.hash_offset_bytes}
    right = {"ReadOnly": True, "VerityInfo": {**info, "SuperBlock": True}}
    guest.plug(disk, read_only=True)
    device = guest.add(**right)["device"]
    before = guest.mounts()
    assert device in before
    for wrong, code in (
        (right, "path-in-use"),
        ({"VerityInfo": right["VerityInfo"]}, "mapping-unsupported"),
        ({"ReadOnly": True, "VerityInfo": {"RootDigest": "no hash"}}, "verity-info"),
        ({"ReadOnly": True}, "path-in-use"),
        ({"ReadOnly": True, "BlockDev": True}, "path-in-use"),
    ):
        with pytest.raises(HoldfastError) as caught:
            guest.add(**wrong)
        assert caught.value.code == code
        assert guest.mounts() == before
    guest.remove()
    assert device not in guest.mounts()
    guest.eject()


def test_an_encrypted_disk_is_let_go_of_when_it_cannot_be_mounted(guest, tmp_path):
    """Encrypted already, with a filesystem on it, and then not what was asked for: what was made goes again."""
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(32 * MIB)
    before = guest.mounts()
    guest.plug(disk)
    with pytest.raises(GuestFailed) as caught:
        guest.add(Encrypted=True, Filesystem="xfs")
    assert caught.value.code == "wrong-filesystem"
    assert guest.mounts() == before
    guest.eject()


@pytest.mark.parametrize(
    ("action", "kind"),
    [("Add", "Rocket"), ("Add", ""), ("Add", "mappedvirtualdisk"), ("Add", "NetworkNamespace"), ("Add", "SCSIDevice"),
     ("Launch", "MappedVirtualDisk"), ("PreAdd", "CombinedLayers"), ("Update", "VPMemDevice"),
     ("Remove", "VPCIDevice")],
)  # fmt: skip
def test_unknown_resources_are_named(guest, action, kind):
    """Not to do what was asked is no option: the host must learn of it, and of what."""
    before = guest.mounts()
    with pytest.raises(InvalidInput) as caught:
        guest.modify(action, kind, MountPath=PATH)
    assert (caught.value.code, caught.value.subject) == ("unknown-resource", kind)
    assert repr(action) in caught.value.why
    assert guest.mounts() == before
