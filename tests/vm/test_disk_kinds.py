"""Disks of every kind in a real guest: formats, partitions, devices, and what reading alone must not change."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import struct
import subprocess
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import HoldfastError, InUse, NotFound, NotReleased
from holdfast.pod.client import STDERR, STDIN, STDOUT
from holdfast.pod.messages import Stdio
from holdfast.pod.requests import container_request
from holdfast.spec.default import CAPABILITIES
from tests.images import busybox_tree, is_clean, make_bundle, make_disk, run
from tests.vm.support import (
    HOST_PYTHON,
    HOST_PYTHON_ENV,
    HOST_USR,
    Session,
    assert_holds_nothing,
    output,
    running,
    sh,
    start,
    wait_for_end,
)

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("from the host\n")
    return shared


@pytest.fixture(scope="module")
def bundle_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem for bundles."""
    root = tmp_path_factory.mktemp("bundle") / "rootfs"
    busybox_tree(root)
    return root


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "options"), [("vpc", "subformat=dynamic"), ("vpc", "subformat=fixed,force_size"), ("vhdx", "")]
)
def test_formats(shared_pod, folder, tmp_path, kind, options):
    raw, disk = make_disk(tmp_path / "raw", "ext4", folder), tmp_path / "disk"
    run("qemu-img", "convert", "-O", kind, *(["-o", options] if options else []), raw, disk)
    mount = f"type=disk,src={disk},dst=/d"
    script = "cat /d/file; echo data > /d/new"
    assert output(sh(shared_pod, script, mounts=[mount])) == "from the host\n"
    before = digest(disk)
    assert output(sh(shared_pod, "cat /d/new; ! touch /d/x 2>/dev/null", mounts=[f"{mount},ro"])) == "data\n"
    assert digest(disk) == before
    run("qemu-img", "convert", "-f", kind, "-O", "raw", disk, raw)
    assert is_clean(raw)
    assert_holds_nothing(shared_pod)


def test_a_format_that_is_said(shared_pod, folder, tmp_path):
    """What a guest has written to the beginning of a raw disk does not make another disk of it."""
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with open(disk, "r+b") as file:
        file.write(b"QFI\xfb" + struct.pack(">IQ", 3, 512))
    with pytest.raises(HoldfastError) as caught:
        sh(shared_pod, "true", mounts=[f"type=disk,src={disk},dst=/d"])
    assert caught.value.code == "disk-format"
    assert (
        output(sh(shared_pod, "cat /d/file", mounts=[f"type=disk,src={disk},dst=/d,format=raw"])) == "from the host\n"
    )


def partitioned(path: Path, *parts: Path) -> Path:
    """A disk with a table of the old kind, and a filesystem in each partition."""
    table, at = bytearray(512), 2048
    with open(path, "wb") as file:
        for index, part in enumerate(parts):
            sectors = part.stat().st_size // 512
            struct.pack_into("<B3sB3sII", table, 446 + 16 * index, 0, b"", 0x83, b"", at, sectors)
            file.seek(at * 512)
            file.write(part.read_bytes())
            at += sectors
        table[510:] = b"\x55\xaa"
        file.seek(0)
        file.write(table)
        file.truncate(at * 512 + MIB)
    return path


def test_partitions(shared_pod, folder, tmp_path):
    parts = [make_disk(tmp_path / "p1", "ext4", folder), make_disk(tmp_path / "p2", "squashfs", folder)]
    os.truncate(parts[1], 1 * MIB)
    disk = partitioned(tmp_path / "disk", *parts)
    mounts = [f"type=disk,src={disk},dst=/p{number},partition={number}" for number in (1, 2)]
    script = "cat /p1/file /p2/file; echo new > /p1/new; grep -E ' /p[12] ' /proc/mounts | cut -d' ' -f1,3"
    with running(shared_pod, "c", mounts) as name:
        [attachment] = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "disk"]
        assert len(attachment["guest_paths"]) == 2
        text = output(shared_pod.exec(name, ["sh", "-c", script]))
        assert text.startswith("from the host\nfrom the host\n")
        devices = [line.split() for line in text.splitlines()[2:]]
        assert [(device[-1], kind) for device, kind in devices] == [("1", "ext4"), ("2", "squashfs")]
        assert devices[0][0].startswith("/dev/sd")
    assert_holds_nothing(shared_pod)  # the first to go does not stumble over the second
    assert output(sh(shared_pod, "cat /d/new", mounts=[f"{mounts[0].replace('dst=/p1', 'dst=/d')},ro"])) == "new\n"
    with pytest.raises(NotFound) as caught:
        shared_pod.attach(f"type=disk,src={disk},partition=3")
    assert (caught.value.code, "partitions 1, 2" in str(caught.value)) == ("no-partition", True)
    with pytest.raises(HoldfastError) as whole:
        shared_pod.attach(f"type=disk,src={disk}")
    assert (whole.value.code, "partition=1" in whole.value.hint) == ("no-filesystem", True)
    assert_holds_nothing(shared_pod)


def test_flags_data_and_propagation(shared_pod, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4")
    mount = f'type=disk,src={disk},dst=/d,noexec,nosuid,nodev,noatime,propagation=rslave,"options=commit=7,nodelalloc"'
    [line] = output(sh(shared_pod, "grep ' /d ' /proc/mounts", mounts=[mount])).splitlines()
    assert {"noexec", "nosuid", "nodev", "noatime", "commit=7", "nodelalloc"} <= set(line.split()[3].split(","))
    with pytest.raises(HoldfastError) as caught:
        shared_pod.attach(f"type=disk,src={disk},options=no-such-option")
    assert caught.value.code == "mount-failed"
    assert_holds_nothing(shared_pod)


def tags(mountinfo: str, path: str) -> list[str]:
    """The optional fields that the one mount at a path has in a mount table: proc(5)."""
    [line] = [fields for line in mountinfo.splitlines() if (fields := line.split())[4] == path]
    return line[6 : line.index("-")]


def test_propagation_in_the_guest(data, tmp_path):
    """Each is a call of its own, in the order in which they are written: the last one counts."""
    import asyncio

    from holdfast.machine.sandbox import Slot
    from tests.vm.test_machine import cloned

    cases = {
        "": "shared", "shared": "shared", "rshared": "shared", "private": "", "rprivate": "", "slave": "", "rslave": "",
        "unbindable": "unbindable", "runbindable": "unbindable", "private,shared": "shared", "rshared,rprivate": "",
        "unbindable,private": "", "noexec,shared,commit=7": "shared",
    }  # fmt: skip

    async def test() -> None:
        async with cloned(data, tmp_path) as machine:
            with open(make_disk(tmp_path / "disk", "ext4"), "r+b") as file:
                await machine.plug_disk(Slot(0, 0), file.fileno(), "raw", False, False)
            for options, expected in cases.items():
                settings: dict[str, object] = {"MountPath": "/run/m0", "Options": options.split(",") if options else []}
                for action in ("Add", "Remove"):
                    request = {"ResourceType": "MappedVirtualDisk", "RequestType": action, "Settings": settings}
                    await machine.request("modify", request, 20)
                    table = (await machine.request("mounts", {}, 5))["mountinfo"]
                    if action == "Add":
                        found = [tag.partition(":")[0] for tag in tags(table, "/run/m0")]
                        assert found == ([expected] if expected else []), options
                    assert ("/run/m0" in table) is (action == "Add")

    asyncio.run(test())


@pytest.mark.parametrize(
    ("propagation", "of_root", "seen"),
    [
        ("shared", "rslave", "master"),
        ("rshared", "rshared", "shared"),
        ("shared", "rprivate", ""),
        ("slave", "rslave", ""),
    ],
)
def test_propagation_from_the_guest_to_a_container(shared_pod, tmp_path, bundle_root, propagation, of_root, seen):
    """The container's mount is in the group of the guest's: not of a group of its own that nobody else is in."""
    capabilities = {key: [*CAPABILITIES, "CAP_SYS_PTRACE"] for key in ("bounding", "effective", "permitted")}
    bundle = make_bundle(  # with the guest's process 1 in its /proc
        tmp_path / "bundle", ["sh", "-c", "cat /proc/1/mountinfo; echo; cat /proc/self/mountinfo"],
        root={"path": str(bundle_root)}, hostname="", process={"capabilities": capabilities},
        linux={"namespaces": [{"type": "mount"}], "rootfsPropagation": of_root},
    )  # fmt: skip
    disk = make_disk(tmp_path / "disk", "ext4")
    mount = f"type=disk,src={disk},dst=/d,propagation={propagation}"
    guest, inside = output(shared_pod.run(bundle=bundle, mounts=[mount])).split("\n\n")
    [path] = {line.split()[4] for line in guest.splitlines() if " /run/mounts/scsi/" in line and " ext4 " in line}
    groups = tags(guest, path)
    assert [group.partition(":")[0] for group in groups] == (["shared"] if "shared" in propagation else [])
    assert tags(inside, "/d") == ([f"{seen}:{groups[0].partition(':')[2]}"] if seen else [])
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_dirty_journal_is_not_replayed(shared_pod, data, state_root, tmp_path, filesystem):
    """A disk whose machine was killed while it wrote: to read it changes nothing of it."""
    disk = make_disk(tmp_path / "disk", filesystem)
    mount = f"type=disk,src={disk},dst=/d"
    script = "echo kept > /d/kept; sync; echo ready; while :; do mkdir /d/x; sync; rmdir /d/x; done"
    doomed = holdfast.Pod(root=state_root, data=data)
    with doomed, start(doomed, script, name="c", mounts=[mount]) as session:
        session.wait_for(b"ready")
        qemu = doomed.inspect().qemu_pid
        os.kill(qemu, signal.SIGKILL)
        wait_for_end(qemu)
        with pytest.raises(HoldfastError):
            session.wait()
    if filesystem == "ext4":
        assert "needs_recovery" in run("dumpe2fs", "-h", disk).stdout
    before = digest(disk)
    output(sh(shared_pod, "ls -l /d", mounts=[f"{mount},ro"]))  # what is in the journal alone is not there yet
    assert digest(disk) == before
    assert output(sh(shared_pod, "cat /d/kept", mounts=[mount])) == "kept\n"  # and to write it replays the journal
    assert_holds_nothing(shared_pod)


#: fstrim(8): FITRIM of all that is free.
TRIM = """
import fcntl, os, struct
fcntl.ioctl(os.open("/d", os.O_RDONLY), 0xC0185879, struct.pack("=QQQ", 0, 1 << 62, 0))
"""


@pytest.mark.parametrize(("kind", "options"), [("qcow2", ",options=discard"), ("raw", "")], ids=["at once", "by hand"])
def test_what_is_deleted_is_given_back_to_the_host(shared_pod, tmp_path, bundle_root, kind, options):
    """A file of the host that only ever grows takes in the end what all its disks together could."""
    disk = make_disk(tmp_path / "raw", "ext4", size="64M")
    if kind != "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", kind, disk, tmp_path / "disk")
        disk = tmp_path / "disk"
    capabilities = {key: [*CAPABILITIES, "CAP_SYS_ADMIN"] for key in ("bounding", "effective", "permitted")}
    script = """
        dd if=/dev/zero of=/d/big bs=4M count=10 2>/dev/null; sync; echo written; read x
        rm /d/big; sync; echo deleted; read x
    """
    bundle = make_bundle(
        tmp_path / "bundle", ["sh", "-c", script], root={"path": str(bundle_root)},
        process={"capabilities": capabilities},
    )  # fmt: skip
    request = container_request(
        "c", shared_pod.data, bundle=bundle, stdio=Stdio(STDIN, STDOUT, STDERR),
        mounts=[f"type=disk,src={disk},dst=/d{options}", *([] if options else [HOST_USR])],
    )  # fmt: skip
    with Session(shared_pod, "run", request, stdin=True) as session:
        session.wait_for(b"written")
        full = disk.stat().st_blocks * 512
        session.write(b"\n")
        session.wait_for(b"deleted")
        if not options:
            output(shared_pod.exec("c", [*HOST_PYTHON, "-c", TRIM], env=HOST_PYTHON_ENV))
        session.write(b"\n")
        assert session.wait() == 0
    assert full > 40 * MIB
    assert disk.stat().st_blocks * 512 < full - 35 * MIB
    assert_holds_nothing(shared_pod)


def test_attach_only(shared_pod, tmp_path):
    """A blank disk: nothing is looked for on it, and nothing is mounted."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    path = shared_pod.attach(f"type=disk,src={disk}", mounted=False)
    assert shared_pod.attach(f"type=disk,src={disk},mount=none") == path
    [attachment] = shared_pod.storage()["attachments"]
    assert (attachment["guest_paths"], attachment["access"], attachment["size_bytes"]) == ([path], "individual", MIB)
    links = f"/proc/{shared_pod.inspect().qemu_pid}/fd"
    assert str(disk) in [os.readlink(link) for link in Path(links).iterdir()]
    shared_pod.detach(path)
    shared_pod.detach(path)
    assert str(disk) not in [os.readlink(link) for link in Path(links).iterdir()]  # nothing stays granted
    assert_holds_nothing(shared_pod)


def test_a_device_that_a_process_has_open_keeps_its_slot(pod, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    path = pod.attach(f"type=disk,src={disk},mount=none")
    device = f"/proc/1/root$(readlink /proc/1/root{path})"
    capabilities = {key: [*CAPABILITIES, "CAP_SYS_PTRACE"] for key in ("bounding", "effective", "permitted")}
    allowed = [{"allow": True, "type": "a", "access": "rwm"}]
    bundle = make_bundle(  # in the guest's own mount namespace
        tmp_path / "busy", ["sh", "-c", f"exec 3<{device} && echo open && read x; exec 3<&-; echo shut; cat"],
        hostname="", linux={"namespaces": [{"type": "mount"}], "resources": {"devices": allowed}},
        process={"capabilities": capabilities},
    )  # fmt: skip
    request = container_request("busy", pod.data, bundle=bundle, stdio=Stdio(STDIN, STDOUT, STDERR))
    with Session(pod, "run", request, stdin=True) as session:
        session.wait_for(b"open")
        for _ in range(2):
            with pytest.raises(NotReleased) as caught:
                pod.detach(path)
            assert caught.value.retryable
            assert (pod.storage()["attachments"][0]["slot"], pod.storage()["free_slots"]) == ("0:0", 255)
        session.write(b"\n")
        session.wait_for(b"shut")
        pod.detach(path)
        session.end_input()
        assert session.wait() == 0
    assert_holds_nothing(pod)


def test_a_device_in_a_container(shared_pod, tmp_path):
    disks = [tmp_path / "rw", tmp_path / "ro"]
    for disk in disks:
        disk.write_bytes(b"from the host".ljust(MIB, b"\0"))
    mounts = [
        f"type=disk,src={disks[0]},dst=blockdev:///dev/data",
        f"type=disk,src={disks[1]},dst=/dev/disks/ro,mount=none,ro",
    ]
    script = """
        head -c 13 /dev/data; echo; head -c 13 /dev/disks/ro; echo
        echo written | dd of=/dev/data bs=512 seek=4 conv=notrunc,fsync 2>/dev/null && echo yes
        echo written | dd of=/dev/disks/ro bs=512 conv=notrunc 2>/dev/null || echo no
        mknod /tmp/other b 253 0 2>/dev/null && head -c 1 /tmp/other 2>/dev/null || echo refused
    """
    expected = ["from the host", "from the host", "yes", "no", "refused"]
    assert output(sh(shared_pod, script, mounts=mounts)).splitlines() == expected
    assert disks[0].read_bytes()[2048:2055] == b"written"
    assert disks[1].read_bytes()[:13] == b"from the host"
    assert_holds_nothing(shared_pod)


def test_a_different_disk_at_a_used_guest_path_is_refused(data, tmp_path):
    """By the guest itself, too: whatever is asked of it, nothing is mounted over."""
    import asyncio

    from holdfast.machine.sandbox import Slot
    from tests.vm.test_machine import cloned

    async def test() -> None:
        async with cloned(data, tmp_path) as machine:
            for lun in range(2):
                disk = make_disk(tmp_path / f"disk{lun}", "ext4")
                fd = os.open(disk, os.O_RDONLY)
                await machine.plug_disk(Slot(0, lun), fd, "raw", True, False)
                os.close(fd)

            async def ask(action: str, lun: int, path: str, **more: object) -> object:
                settings = {"MountPath": path, "Lun": lun, "ReadOnly": True, **more}
                request = {"ResourceType": "MappedVirtualDisk", "RequestType": action, "Settings": settings}
                return await machine.request("modify", request, 20)

            await ask("Add", 0, "/run/m0")
            await ask("Add", 0, "/run/d0", BlockDev=True)
            for path in ("/run/m0", "/run/d0"):
                for more in ({}, {"BlockDev": True}):
                    with pytest.raises(InUse) as caught:
                        await ask("Add", 1, path, **more)
                    assert caught.value.code == "path-in-use"
            for path in ("/run/d0", "/run/m0", "/run/m0"):  # and already gone is success
                await ask("Remove", 0, path)
            await ask("Add", 1, "/run/m0")

    asyncio.run(test())


def test_what_was_read_and_written_is_counted(shared_pod, folder, tmp_path):
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    with running(shared_pod, "c", [f"type=disk,src={disk},dst=/d"]) as name:
        output(shared_pod.exec(name, ["sh", "-c", "head -c 300000 /dev/zero > /d/x; sync"]))
        [found] = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "disk"]
        assert found["read_bytes"] > 0
        assert found["written_bytes"] >= 300000
        assert found["container_paths"] == ["c:/d"]
        layers = [a for a in shared_pod.storage()["attachments"] if a["kind"] == "layer"]
        assert {(a["access"], a["written_bytes"]) for a in layers} == {("none", 0)}
    assert_holds_nothing(shared_pod)


@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_partition_and_its_whole_disk_do_not_go_to_two_pods(data, state_root, tmp_path, first):
    """Two devices, of which leases know nothing: the kernel's claim on a device does."""
    disk = partitioned(tmp_path / "disk", make_disk(tmp_path / "part", "ext4"))
    device = run("losetup", "--find", "--partscan", "--show", disk).stdout.strip()
    try:
        name = os.path.basename(device)
        if not Path(f"/sys/block/{name}/{name}p1").exists():  # a kernel that cannot read the table takes it from us
            run("addpart", device, "1", "2048", str((os.path.getsize(disk) >> 9) - 4096))
        node = tmp_path / "p1"
        major, minor = Path(f"/sys/block/{name}/{name}p1/dev").read_text().split(":")
        os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(int(major), int(minor)))
        whole, part = f"type=physical-disk,src={device},dst=/d,partition=1", f"type=physical-disk,src={node},dst=/d"
        mine, theirs = (whole, part) if first == "whole" else (part, whole)
        with holdfast.Pod(root=state_root, data=data) as one, holdfast.Pod(root=state_root, data=data) as two:
            with running(one, "c", [mine]):
                for mount in (theirs, f"{theirs},ro"):
                    with pytest.raises(InUse) as caught:
                        sh(two, "true", mounts=[mount])
                    assert caught.value.code == "disk-in-use"
            assert sh(two, "true", mounts=[theirs]).status == 0
    finally:
        run("losetup", "--detach", device)


def test_a_block_device_of_the_host(shared_pod, folder, tmp_path):
    """One device, whatever node it is named by; what the host has mounted is refused."""
    disk = make_disk(tmp_path / "disk", "ext4", folder)
    done = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        node = tmp_path / "node"
        os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
        mount = f"type=physical-disk,src={device},dst=/d"
        with running(shared_pod, "c", [mount]) as name:
            assert output(shared_pod.exec(name, ["sh", "-c", "cat /d/file; echo x > /d/x"])) == "from the host\n"
            with pytest.raises(InUse) as caught:
                shared_pod.attach(f"type=physical-disk,src={node},ro")
            assert caught.value.code == "disk-in-use"
            # Another container of the pod shares it; the host cannot take it meanwhile.
            assert output(sh(shared_pod, "cat /d/x", mounts=[mount])) == "x\n"
            (tmp_path / "taken").mkdir()
            assert subprocess.run(["mount", device, tmp_path / "taken"], capture_output=True, check=False).returncode
        assert_holds_nothing(shared_pod)
        assert output(sh(shared_pod, "cat /d/x", mounts=[f"type=disk,src={node},dst=/d,ro"])) == "x\n"
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        run("mount", device, mounted)
        try:
            with pytest.raises(InUse, match="uses this device"):
                shared_pod.attach(f"type=physical-disk,src={node},ro")
        finally:
            run("umount", mounted)
    finally:
        run("losetup", "--detach", device)
    assert is_clean(disk)
