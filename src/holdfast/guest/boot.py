"""What PID 1 does before anything else: the guest's own filesystems.

The root is a read-only disk, so everything that changes lives on tmpfs.
"""

from __future__ import annotations

import errno
import os

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


def refresh_identity(time_ns: int, entropy: bytes, hostname: str) -> None:
    """Makes a clone its own: clock, kernel random numbers, host name, machine id.

    ``RNDADDENTROPY`` credits the bytes, ``RNDRESEEDCRNG`` makes the kernel's generator use them at once
    (random(4)); both streams of two clones differ from here on.
    """
    import fcntl
    import struct
    from time import CLOCK_REALTIME

    syscalls.clock_settime(CLOCK_REALTIME, time_ns)
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, 0x40085203, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(device, 0x5207)
    with open("/proc/sys/kernel/hostname", "w") as file:
        file.write(hostname)
    with open("/run/machine-id", "w") as file:
        file.write(os.urandom(16).hex() + "\n")
