"""What PID 1 does before anything else: the guest's own filesystems.

The root is a read-only disk, so everything that changes lives on tmpfs.
"""

from __future__ import annotations

import errno
import fcntl
import os
from time import CLOCK_REALTIME

from holdfast.errors import InvalidInput
from holdfast.guest import files
from holdfast.linux import syscalls
from holdfast.linux.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC, MS_SHARED

#: (type, target, flags, data); made in this order, skipped when the initramfs has mounted it already.
_MOUNTS = (
    ("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devtmpfs", "/dev", MS_NOSUID, "mode=0755"),
    ("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5"),
    ("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("mqueue", "/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
#: What the kernel's generator is seeded with: 256 bits (drivers/char/random.c, BLAKE2S_HASH_SIZE).
_LEAST_ENTROPY = 32


def mount_system() -> None:
    """Mounts /proc, /sys, /dev and their like where nothing is mounted yet.

    Raises:
        OSError: a mount failed; the guest cannot work.
    """
    for fstype, target, flags, data in _MOUNTS:
        if os.path.ismount(target):
            continue
        if not os.path.isdir(target):
            os.makedirs(target, exist_ok=True)
        try:
            syscalls.mount(fstype, target, fstype, flags, data)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    # Containers get their mounts by bind: what is mounted later below /run reaches them only if asked for.
    syscalls.mount("none", "/", "", MS_REC | MS_SHARED)
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{link}"):
            os.symlink(target, f"/dev/{link}")


def enable_cgroup_controllers() -> None:
    """Hands every cgroup controller down to the containers' groups (cgroups(7), ``cgroup.subtree_control``)."""
    with open("/sys/fs/cgroup/cgroup.controllers") as file:
        controllers = file.read().split()
    for controller in controllers:
        try:
            with open("/sys/fs/cgroup/cgroup.subtree_control", "w") as file:
                file.write(f"+{controller}")
        except OSError:  # some (cpu with real-time tasks) cannot be enabled; crun says so when one is asked for
            continue


def find_port(name: str) -> str:
    """The device of the virtio-serial port called ``name``, or ``""`` while it is not there yet."""
    try:
        ports = os.listdir("/sys/class/virtio-ports")
    except FileNotFoundError:
        return ""
    for port in ports:
        with open(f"/sys/class/virtio-ports/{port}/name") as file:
            if file.read().strip() == name:
                return f"/dev/{port}"
    return ""


def refresh_identity(time_ns: int, entropy: bytes, hostname: str) -> dict[str, str]:
    """Makes a clone its own: clock, kernel random numbers, host name, machine id, boot id; returns the last three.

    ``RNDADDENTROPY`` credits the bytes, ``RNDRESEEDCRNG`` makes the kernel's generator use them at once
    (random(4)); both streams of two clones differ from here on.  The boot id is made of them when it is first read,
    and nothing reads it before.

    Raises:
        InvalidInput: that is too little to be made unique by.
        OSError: the kernel refuses; the machine is not to be used.
    """
    if len(entropy) < _LEAST_ENTROPY or not hostname:
        raise InvalidInput("make unique", why=f"no host name, or less than {_LEAST_ENTROPY} random bytes")
    syscalls.clock_settime(CLOCK_REALTIME, time_ns)
    device = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        sizes = (len(entropy) * 8).to_bytes(4, "little") + len(entropy).to_bytes(4, "little")
        fcntl.ioctl(device, 0x40085203, sizes + entropy)
        fcntl.ioctl(device, 0x5207)
    finally:
        os.close(device)
    files.write("/proc/sys/kernel/hostname", hostname.encode())
    machine_id = os.urandom(16).hex()
    files.write("/run/machine-id", f"{machine_id}\n".encode())
    boot_id = files.read("/proc/sys/kernel/random/boot_id").strip()
    return {"hostname": os.uname().nodename, "machine_id": machine_id, "boot_id": boot_id}
