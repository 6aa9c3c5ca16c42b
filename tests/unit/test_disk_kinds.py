"""Kinds of disks: formats, partitions, devices, and who may have them open."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.errors import HoldfastError, InUse, InvalidInput, NotReleased, Unsupported
from holdfast.guest import block_devices
from holdfast.spec import disk_options
from holdfast.spec.mounts import parse_mount
from holdfast.spec.runtime import Mount
from holdfast.storage.attachments import Attachments, Disk
from holdfast.storage.disk_formats import identity, needs_parent, plain, probe_format
from holdfast.storage.disk_mounts import DiskMounts
from holdfast.storage.journal import Journal
from holdfast.storage.mount_plan import mount_step
from holdfast.storage.survey import Source, look
from tests.fakes import FakeSandbox, Faulty

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from holdfast.storage.steps import MountDisk

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img here")
MIB = 1 << 20


def qemu_img(path: Path, kind: str, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *options, path, "4M"], check=True)
    return path


def found(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return probe_format(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


# -- formats --------------------------------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("raw", (), "raw"),
        ("qcow2", (), "qcow2"),
        ("vpc", ("-o", "subformat=dynamic"), "vhd"),
        ("vpc", ("-o", "subformat=fixed"), "vhd"),
        ("vhdx", (), "vhdx"),
        ("vhdx", ("-o", "subformat=fixed"), "vhdx"),
    ],
)
def test_formats_are_known_by_their_own_signatures(tmp_path, kind, options, expected):
    disk = qemu_img(tmp_path / "disk", kind, *options)
    assert found(disk) == expected
    assert look(str(disk), as_disk=True).disk_format == expected


def vhd_footer(kind: int) -> bytes:
    body = bytearray(b"conectix".ljust(512, b"\0"))
    struct.pack_into(">I", body, 60, kind)
    struct.pack_into(">I", body, 64, ~sum(body) & 0xFFFFFFFF)
    return bytes(body)


def test_a_vhd_that_needs_another(tmp_path):
    (tmp_path / "disk").write_bytes(vhd_footer(4) + bytes(4096))
    assert (found(tmp_path / "disk"), plain(found(tmp_path / "disk"))) == ("vhd with another file", "vhd")
    assert needs_parent(found(tmp_path / "disk"))


@pytest.mark.parametrize("damage", [b"conectiX", b"conectix\1"])
def test_eight_letters_at_a_raw_disks_end_make_no_vhd(tmp_path, damage):
    footer = damage + vhd_footer(2)[len(damage) :]
    (tmp_path / "disk").write_bytes(bytes(4096) + footer)
    assert found(tmp_path / "disk") == "raw"
    (tmp_path / "disk").write_bytes(bytes(4096) + vhd_footer(2))
    assert found(tmp_path / "disk") == "vhd"


@needs_qemu_img
def test_a_vhdx_that_needs_another(tmp_path):
    disk = qemu_img(tmp_path / "disk", "vhdx")
    with open(disk, "r+b") as file:
        data = file.read(4 * MIB)
        start = data.index(b"metadata")
        file.seek(start + 64 * 1024 + 4)  # the file parameters come first in the region
        assert file.read(4) == bytes(4)
        file.seek(-4, os.SEEK_CUR)
        file.write(struct.pack("<I", 2))
    assert found(disk) == "vhdx with another file"


@pytest.mark.parametrize("head", [b"vhdxfile", b"QFI\xfb", b"conectix", b""])
def test_a_file_that_is_only_a_beginning(tmp_path, head):
    (tmp_path / "disk").write_bytes(head)
    assert found(tmp_path / "disk") == ("vhdx" if head == b"vhdxfile" else "raw")


def test_hostile_vhdx_tables_end(tmp_path):
    data = bytearray(4 * MIB)
    data[:8] = b"vhdxfile"
    data[192 << 10 : (192 << 10) + 12] = b"regi" + struct.pack("<II", 0, 0xFFFFFFFF)
    (tmp_path / "disk").write_bytes(data)
    assert found(tmp_path / "disk") == "vhdx"


def test_a_block_device_is_the_same_by_every_node():
    def status(mode: int, inode: int) -> os.stat_result:
        return os.stat_result((mode, inode, 5, 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 4096, 8, 0x810))

    first, second = (identity(status(stat.S_IFBLK | 0o600, inode)) for inode in (7, 8))
    assert first == second
    assert identity(status(stat.S_IFREG, 7)) == (5, 7)


# -- options --------------------------------------------------------------------------------------


def test_what_a_mount_says_of_a_disk():
    text = (
        'type=disk,src=/d,dst=/m,ro,format=vpc,partition=2,access=individual,propagation=rslave,noatime,"options=a,b=c"'
    )
    mount = parse_mount(text, cwd="/")
    taken = disk_options.take(mount["options"], "x")
    assert (taken.disk_format, taken.partition, taken.access) == ("vhd", 2, "individual")
    assert taken.options == ("ro", "noatime", "rslave", "a", "b=c")


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("dst=blockdev:///dev/x", "blockdev:///dev/x"),
        ("dst=/dev/x,mount=none", "blockdev:///dev/x"),
        ("mount=none", "blockdev://"),
        ("dst=blockdev://", "blockdev://"),
    ],
)
def test_a_device_instead_of_a_mount(text, destination):
    mount = parse_mount(f"type=disk,src=/d,{text}", cwd="/", destination_needed=False)
    assert mount["destination"] == destination


@pytest.mark.parametrize(
    "text",
    ["format=vmdk", "partition=0", "partition=x", "partition=1000", "access=none", "mount=no", "propagation=odd",
     "dst=blockdev://dev/x"],
)  # fmt: skip
def test_values_that_are_none(text):
    with pytest.raises(InvalidInput) as caught:
        parse_mount(f"type=disk,src=/d,{text}" + ("" if "dst" in text else ",dst=/m"), cwd="/")
    assert caught.value.code == "mount-option"


def test_an_unknown_option_of_ours():
    with pytest.raises(InvalidInput, match=r"x-holdfast\.colour"):
        disk_options.take(["x-holdfast.colour=red"], "x")


# -- plans ----------------------------------------------------------------------------------------


def step(options: tuple[str, ...] = (), *, destination: str = "/m", **source: Any) -> MountDisk:
    seen = Source("/d", "file", device=1, inode=2, size_bytes=4096, **{"filesystem": "ext4", **source})
    made = mount_step(0, Mount(destination, "virtual-disk", "/d", options), {"/d": seen}, [])
    assert made is not None
    return made  # type: ignore[return-value]


def test_what_is_planned_for_a_partition():
    made = step(("x-holdfast.partition=3", "noatime"), filesystem="")
    assert (made.partition, made.filesystem, made.options) == (3, "", ("noatime",))
    assert "partition 3" in made.describe()


def test_the_format_that_is_asked_for():
    assert step(disk_format="vhdx", filesystem="").disk_format == "vhdx"
    forced = step(("x-holdfast.format=raw",), disk_format="qcow2 with another file", filesystem="")
    assert (forced.disk_format, forced.filesystem) == ("raw", "")
    with pytest.raises(InvalidInput, match="no vhdx image but raw"):
        step(("x-holdfast.format=vhdx",))


@pytest.mark.parametrize("kind", ["qcow2", "vhd", "vhdx"])
def test_what_needs_another_file_is_not_opened(kind):
    with pytest.raises(Unsupported, match=f"this {kind} image refers to another file") as caught:
        step(disk_format=f"{kind} with another file", filesystem="")
    assert caught.value.code == "disk-format"


def test_what_is_planned_for_a_device():
    made = step(destination="blockdev:///dev/x", filesystem="")
    assert (made.block_dev, made.filesystem, made.options) == (True, "", ())
    assert "show its device" in made.describe()


@pytest.mark.parametrize("destination", ["blockdev://x", "blockdev:///", "blockdev:///dev/..", "blockdev:///dev"])
def test_places_where_no_device_can_be(destination):
    with pytest.raises(InvalidInput) as caught:
        step(destination=destination)
    assert caught.value.code == "blockdev-destination"


def test_a_share_is_no_device():
    with pytest.raises(InvalidInput, match="only a disk"):
        mount_step(0, Mount("blockdev:///dev/x", "bind", "/d"), {"/d": Source("/d", "directory")}, [])


def test_who_may_write_is_alone():
    assert step(("ro", "x-holdfast.access=individual")).access == "individual"
    with pytest.raises(InvalidInput) as caught:
        step(("x-holdfast.access=group",))
    assert caught.value.code == "access"


# -- slots and mounts -----------------------------------------------------------------------------


class Pod:
    def __init__(self, sandbox: Faulty, journal: Journal, name: str) -> None:
        self.sandbox = sandbox
        self.attachments = Attachments(sandbox, journal, name)
        self.disks = DiskMounts(sandbox, self.attachments)


@pytest.fixture
def run(state_root: Path, tmp_path: Path):
    """Runs a test with two pods of one state root."""

    def run(test: Callable[[Pod, Pod, Journal], Awaitable[None]]) -> None:
        async def main() -> None:
            with Journal(state_root) as journal:
                pods = [Pod(Faulty(FakeSandbox(str(tmp_path))), journal, name) for name in ("one", "two")]
                try:
                    await test(pods[0], pods[1], journal)
                finally:
                    for pod in pods:
                        await pod.sandbox.close()

        asyncio.run(main())

    return run


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Journal, "is_alive", lambda *_: True)

    def disk(**more: Any) -> Disk:
        if not (tmp_path / "disk").exists():
            (tmp_path / "disk").write_bytes(b"filesystem".ljust(8192, b"\0"))
        return Disk(str(tmp_path / "disk"), **{"kind": "disk", "read_only": True, **more})

    return disk


def test_three_levels_of_access(run, disk):
    async def test(one: Pod, two: Pod, journal: Journal) -> None:
        layer = await one.attachments.attach(disk(kind="layer"), "a")
        assert (layer.access, layer.leased, journal.leases()) == ("none", False, [])
        await one.attachments.detach(layer, "a")
        shared = await one.attachments.attach(disk(), "a")
        assert (shared.access, (await two.attachments.attach(disk(), "a")).access) == ("group", "group")
        assert [lease["writable"] for lease in journal.leases()] == [False, False]
        with pytest.raises(InUse, match=r"pod (one|two) has"):
            await two.attachments.attach(disk(access="individual"), "b")
        for pod in (one, two):
            [(held, _holders)] = pod.attachments.items()
            await pod.attachments.detach(held, "a")
        alone = await one.attachments.attach(disk(access="individual"), "a")
        assert (alone.access, alone.disk.read_only) == ("individual", True)
        for pod in (one, two):
            with pytest.raises(InUse):
                await pod.attachments.attach(disk(), "b")
        await one.attachments.detach(alone, "a")
        assert journal.leases() == []
        assert (await two.attachments.attach(disk(read_only=False), "a")).access == "individual"

    run(test)


@pytest.mark.parametrize("more", [{"kind": "layer"}, {"access": "group"}])
def test_what_is_shared_is_never_opened_for_writing(run, disk, more):
    async def test(one: Pod, _two: Pod, _journal: Journal) -> None:
        with pytest.raises(InvalidInput) as caught:
            await one.attachments.attach(disk(read_only=False, **more), "a")
        assert caught.value.code == "access"
        assert one.attachments.free == 256

    run(test)


def test_attach_only_is_not_attach_and_mount(run, disk):
    async def test(one: Pod, _two: Pod, _journal: Journal) -> None:
        device = await one.disks.mount(disk(), "a", block_dev=True)
        mounted = await one.disks.mount(disk(), "a")
        again = await one.disks.mount(disk(), "b", block_dev=True)
        assert device.guest_path == again.guest_path != mounted.guest_path
        assert device.attachment.slot == mounted.attachment.slot
        kinds = {path: mount.kind for path, mount in one.sandbox.inner.mounts.items()}
        assert kinds == {device.guest_path: "device", mounted.guest_path: "disk"}
        for mount, holder in ((device, "a"), (mounted, "a"), (again, "b")):
            await one.disks.unmount(mount, holder)
        assert (one.sandbox.inner.mounts, one.sandbox.inner.disks) == ({}, {})

    run(test)


@pytest.mark.parametrize("first", [True, False])
def test_a_disk_is_not_mounted_while_its_device_is_written_to(run, disk, first):
    async def test(one: Pod, _two: Pod, _journal: Journal) -> None:
        held = await one.disks.mount(disk(read_only=False), "a", block_dev=first)
        with pytest.raises(InUse) as caught:
            await one.disks.mount(disk(read_only=False), "b", block_dev=not first)
        assert caught.value.code == "disk-in-use"
        await one.disks.unmount(held, "a")
        assert one.attachments.free == 256

    run(test)


def test_a_different_disk_at_a_used_path_is_refused(run, disk, tmp_path):
    async def test(one: Pod, _two: Pod, _journal: Journal) -> None:
        (tmp_path / "other").write_bytes(b"filesystem".ljust(8192, b"\0"))
        other = Disk(str(tmp_path / "other"), "disk", read_only=True)
        path = "/run/mounts/scsi/m0"  # a path of our own scheme that somebody asks for: reference 1.4 (g)
        held = await one.disks.mount(disk(), "a", guest_path=path)
        with pytest.raises(InUse) as caught:
            await one.disks.mount(other, "b", guest_path=path)
        assert caught.value.code == "path-in-use"
        assert (await one.disks.mount(other, "b")).guest_path == "/run/mounts/scsi/m1"
        # The same disk is where it is, whatever is asked for.
        assert (await one.disks.mount(disk(), "c", guest_path="/elsewhere")).guest_path == held.guest_path

    run(test)


@pytest.mark.parametrize("ignored", ["Remove SCSIDevice", "unplug"])
def test_a_guest_that_ignores_the_eject_keeps_its_slot(run, disk, ignored):
    async def test(one: Pod, two: Pod, _journal: Journal) -> None:
        held = await one.disks.mount(disk(read_only=False), "a")
        one.sandbox.fail(ignored, NotReleased("eject disk", why="the guest's kernel keeps it", code="device-not-gone"))
        with pytest.raises(NotReleased) as caught:
            await one.disks.unmount(held, "a")
        assert (caught.value.code, caught.value.retryable) == ("device-not-gone", True)
        assert (one.attachments.free, len(one.attachments.items())) == (255, 1)
        with pytest.raises(InUse, match="pod one"):
            await two.disks.mount(disk(), "b")
        await one.disks.unmount(held, "a")
        assert (one.attachments.free, one.sandbox.inner.disks) == (256, {})

    run(test)


def test_nothing_is_granted_on_the_file(run, disk, tmp_path):
    async def test(one: Pod, _two: Pod, _journal: Journal) -> None:
        os.chmod(tmp_path / "disk", 0o600) if (tmp_path / "disk").exists() else None
        wanted = disk(read_only=False)
        before = os.stat(wanted.path)
        for fail in (False, True):
            if fail:
                one.sandbox.fail("plug")
                with pytest.raises(HoldfastError, match="injected"):
                    await one.attachments.attach(wanted, "a")
            else:
                await one.attachments.detach(await one.attachments.attach(wanted, "a"), "a")
            after = os.stat(wanted.path)
            assert (before.st_mode, before.st_uid, before.st_gid, before.st_ctime_ns) == (
                after.st_mode, after.st_uid, after.st_gid, after.st_ctime_ns)  # fmt: skip

    run(test)


# -- the guest's half -----------------------------------------------------------------------------


def test_devices_of_a_specification(monkeypatch):
    status = os.stat_result((stat.S_IFBLK | 0o600, 7, 5, 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 4096, 8, 0x810))
    monkeypatch.setattr(block_devices.os, "stat", lambda _path: status)
    kept = {"destination": "/proc", "type": "proc", "source": "proc"}
    mounts = [
        kept,
        {"destination": "blockdev:///dev/x", "source": "/run/m0", "options": ["rbind", "rw"]},
        {"destination": "blockdev:///dev/y", "source": "/run/m1", "options": ["rbind", "ro"]},
        {"destination": "blockdev://", "source": "/run/m2"},
    ]
    spec: dict[str, Any] = {"mounts": mounts, "linux": {"resources": {"devices": [{"allow": False}]}}}
    block_devices.show(spec)
    assert spec["mounts"] == [kept]
    number = {"type": "b", "major": 8, "minor": 16}
    assert [(d["path"], d["fileMode"]) for d in spec["linux"]["devices"]] == [("/dev/x", 0o660), ("/dev/y", 0o440)]
    assert spec["linux"]["resources"]["devices"] == [
        {"allow": False}, {"allow": True, **number, "access": "rwm"}, {"allow": True, **number, "access": "r"},
    ]  # fmt: skip


def test_what_is_no_device(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="no block device"):
        block_devices.show({"mounts": [{"destination": "blockdev:///dev/x", "source": str(tmp_path / "file")}]})
