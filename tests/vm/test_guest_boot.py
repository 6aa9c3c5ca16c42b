"""The built guest on a real (emulated) machine: everything a pod needs is there, and a broken one ends.

The agent is a small one of the test's own that looks around and tells what it sees on the console, so
that what is tested is the guest and not the agent.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from holdfast.machine import guest_image

if TYPE_CHECKING:
    from pathlib import Path

QEMU = shutil.which("qemu-system-x86_64")
COMMAND_LINE = "console=ttyS0 panic=-1 quiet cryptomgr.notests noreplace-smp"
TIMEOUT_S = 90

AGENT = """
import ctypes, json, os, time

LIBC = ctypes.CDLL(None, use_errno=True)


def main():
    try:
        print("REPORT " + json.dumps(look_around()), flush=True)
    finally:
        LIBC.reboot(0x4321FEDC)  # power off


def look_around():
    mount("tmpfs", "/run", "tmpfs")
    mount("holdfast", "/mnt", "9p", "trans=virtio,version=9p2000.L")
    report = {"pid": os.getpid(), "options": open("/proc/cmdline").read().split()}
    report["filesystems"] = [line.split()[-1] for line in open("/proc/filesystems")]
    report["controllers"] = len(os.listdir("/sys/class/scsi_host"))
    report["ports"] = [open(f"/sys/class/virtio-ports/{name}/name").read().strip()
                       for name in os.listdir("/sys/class/virtio-ports")]
    report["shared"] = open("/mnt/hello").read()
    report["random"] = os.path.exists("/dev/hwrng")
    report["crun"] = run("/usr/bin/crun", "--version")
    report["shell"] = run("/bin/sh", "-c", "exit 7")
    with open("/run/disk", "wb") as file:
        file.truncate(16 << 20)
    report["mke2fs"] = run("/usr/sbin/mke2fs", "-q", "-t", "ext4", "/run/disk")
    report["e2fsck"] = run("/usr/sbin/e2fsck", "-fn", "/run/disk")
    report["resize2fs"] = run("/usr/sbin/resize2fs", "/run/disk", "12M")
    report["written"] = writable("/usr/lib/holdfast/new")
    report["refused"] = [line for name in sorted(os.listdir("/usr/lib/holdfast/modules.d"))
                         for line in open(f"/usr/lib/holdfast/modules.d/{name}") if not loads(line)]
    report["later"] = [line.split()[-1] for line in open("/proc/filesystems")]
    fd = os.open("/dev/vport1p1" if os.path.exists("/dev/vport1p1") else "/dev/vport0p1", os.O_RDWR)
    os.write(fd, b"?")  # now the test plugs in disks
    report["disks"] = disks(2)
    return report


def mount(source, target, kind, data=""):
    if LIBC.mount(source.encode(), target.encode(), kind.encode(), 0, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind}")


def run(*argv):
    output = os.open("/run/output", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    pid = os.posix_spawn(argv[0], argv, {}, file_actions=actions)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [status, os.pread(output, 4096, 0).decode()]


def writable(path):
    try:
        open(path, "w")
    except OSError as error:
        return error.errno
    return 0


def loads(line):
    path, _, options = line.strip().partition(" ")
    fd = os.open(path, os.O_RDONLY)
    return LIBC.syscall(313, fd, options.encode(), 0) == 0 or ctypes.get_errno() == 17


def disks(count):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [name for name in os.listdir("/sys/bus/scsi/devices") if name.count(":") == 3]
        if len(found) >= count and all(os.path.isdir(f"/sys/bus/scsi/devices/{name}/block") for name in found):
            break
        time.sleep(0.01)
    return sorted(name.split(":", 1)[1] for name in found)
"""

pytestmark = pytest.mark.skipif(not QEMU, reason="qemu-system-x86_64 is not installed")


class Qemu:
    """A machine like a pod's, by the contract between guest and machine."""

    def __init__(self, guest: guest_image.GuestImage, export: Path, append: str = COMMAND_LINE, root: str = "") -> None:
        self.port, port = socket.socketpair()
        self.qmp, qmp = socket.socketpair()
        root = guest.root if root == "" else root
        argv = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35",
            "-accel", "tcg", "-cpu", "max", "-m", "256M", "-kernel", guest.kernel, "-initrd", guest.initrd,
            "-append", append, "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control",
            "-chardev", f"socket,id=agent,fd={port.fileno()}", "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=agent,name=holdfast.agent",
            "-fsdev", f"local,id=shares,path={export},security_model=none",
            "-device", "virtio-9p-pci,fsdev=shares,mount_tag=holdfast", "-device", "virtio-rng-pci",
        ]  # fmt: skip
        if root != "none":
            argv += ["-blockdev", f"driver=file,node-name=root,filename={root},read-only=on"]
            argv += ["-device", "virtio-blk-pci,drive=root"]
        for number in range(4):
            argv += ["-device", f"virtio-scsi-pci,id=scsi{number}"]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=[port.fileno(), qmp.fileno()],
        )  # fmt: skip
        port.close()
        qmp.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.port.close()
        self.qmp.close()

    def plug(self, controller: int, lun: int) -> None:
        """Hot-add an empty disk."""
        name = f"disk-{controller}-{lun}"
        for command, arguments in (
            ("qmp_capabilities", {}),
            ("blockdev-add", {"driver": "null-co", "node-name": name, "size": 1 << 20}),
            ("device_add", {"driver": "scsi-hd", "bus": f"scsi{controller}.0", "lun": lun, "scsi-id": 0,
                            "drive": name, "id": f"d{name}"}),
        ):  # fmt: skip
            self.qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())

    def output(self) -> str:
        """The console, until QEMU has exited."""
        return self.process.communicate(timeout=TIMEOUT_S)[0].decode(errors="replace")


@pytest.fixture(scope="module")
def guest(tmp_path_factory) -> guest_image.GuestImage:
    folder = tmp_path_factory.mktemp("guest")
    package = folder / "holdfast"
    (package / "guest").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "guest/__init__.py").touch()
    (package / "guest/agent.py").write_text(AGENT)
    return guest_image.build(folder / "data", agent=package)


@pytest.fixture(scope="module")
def report(guest, tmp_path_factory) -> dict:
    """What the agent saw, in one start for all tests."""
    export = tmp_path_factory.mktemp("export")
    (export / "hello").write_text("from the host")
    start = time.monotonic()
    with Qemu(guest, export) as qemu:
        qemu.port.settimeout(TIMEOUT_S)
        assert qemu.port.recv(1) == b"?", qemu.output()
        seconds = time.monotonic() - start
        qemu.plug(0, 0)  # LUN 0 is announced to the kernel in another way than the others
        qemu.plug(3, 63)
        output = qemu.output()
        status = qemu.process.returncode
    lines = [line for line in output.splitlines() if line.startswith("REPORT ")]
    assert lines, output
    assert status == 0
    return {**json.loads(lines[0].removeprefix("REPORT ")), "seconds": seconds, "output": output}


@pytest.mark.parametrize("name", ["9p", "overlay", "erofs", "ext4", "tmpfs", "proc", "sysfs", "cgroup2", "devpts"])
def test_filesystem_is_there_from_the_start(report, name):
    assert name in report["filesystems"]


def test_agent_is_the_first_process(report):
    assert report["pid"] == 1


def test_devices(report):
    assert report["controllers"] == 4
    assert report["ports"] == ["holdfast.agent"]
    assert report["shared"] == "from the host"
    assert report["random"]


def test_disks_plugged_in_are_found(report):
    assert report["disks"] == ["0:0:0", "0:0:63"]


def test_programs_run(report):
    assert report["crun"][0] == 0
    assert "crun version" in report["crun"][1]
    for name in ("mke2fs", "e2fsck", "resize2fs"):
        assert report[name][0] == 0, report[name]
    assert report["shell"][0] == 7


def test_root_is_read_only(report):
    assert report["written"] == 30  # EROFS


def test_optional_modules_load_in_the_listed_order(report):
    assert report["refused"] == []
    assert {"xfs", "squashfs", "fuse"} <= set(report["later"])


def test_console_is_quiet(report):
    """What is printed costs time, and buries what matters."""
    lines = [line for line in report["output"].splitlines() if line.strip() and not line.startswith("REPORT")]
    assert len(lines) < 10, lines


def test_starts_within_reason(report):
    assert report["seconds"] < 30  # 2 s on a quiet host; this catches a guest that waits for something


def test_without_a_root_disk_it_says_so_and_ends(guest, tmp_path):
    with Qemu(guest, tmp_path, root="none") as qemu:
        output = qemu.output()
    assert "guest cannot start: the root disk /dev/vda did not appear" in output


def test_a_root_disk_that_is_none_is_reported(guest, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(4096) * 16)
    with Qemu(guest, tmp_path, root=str(disk)) as qemu:
        output = qemu.output()
    assert "guest cannot start: mount the root disk" in output


def test_a_panic_ends_the_machine(guest, tmp_path):
    with Qemu(guest, tmp_path, append=f"{COMMAND_LINE} rdinit=/none root=/dev/none") as qemu:
        output = qemu.output()
    assert "Kernel panic" in output
