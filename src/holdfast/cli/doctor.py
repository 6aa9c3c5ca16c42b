"""``doctor``: what this host can do, what is missing, and the command that gets it.

Looks and tries, and leaves nothing behind.  What needs a virtual machine to find out, such as whether KVM really
works, is not tried here: the first pod does that, and its verdict is shown.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from holdfast.cli import output as shown
from holdfast.errors import HoldfastError
from holdfast.linux import syscalls, user_namespaces
from holdfast.machine import accelerator, cgroups, closure, guest_image, kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.cli.options import CommandLine, DoctorOptions
    from holdfast.cli.output import Output

State = Literal["ok", "warn", "missing"]
_STYLES: dict[State, tuple[str, ...]] = {
    "ok": (shown.GREEN,),
    "warn": (shown.YELLOW,),
    "missing": (shown.RED, shown.BOLD),
}
#: Programs: what each is for, the package, and whether nothing works without.
_PROGRAMS = (
    ("crun", "runs containers in the guest", "crun", True),
    ("busybox", "starts the guest", "busybox-static", True),
    ("mkfs.erofs", "makes layer disks and the guest's root disk", "erofs-utils", True),
    ("mke2fs", "formats scratch disks", "e2fsprogs", True),
    ("cryptsetup", "encrypts scratch disks in the guest", "cryptsetup-bin", True),
    ("skopeo", "holdfast image pull", "skopeo", False),
    ("umoci", "the demo and some tests make images with it", "umoci", False),
)
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
_LOW_SPACE_BYTES = 2 << 30


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        state: ``missing`` means that pods do not work without it.
        fix: the command that puts it right; empty if there is none, or nothing to put right.
    """

    name: str
    state: State
    what: str
    fix: str = ""


class Host(msgspec.Struct, frozen=True):
    """Where things are on this host; tests have hosts of their own."""

    path: str | None = None
    boot: Path = kernel.BOOT
    modules: Path = kernel.MODULES
    kvm: str = "/dev/kvm"
    vsock: str = "/dev/vhost-vsock"
    cgroup: str = "/sys/fs/cgroup"
    loop_control: str = "/dev/loop-control"
    iommu_groups: str = "/sys/kernel/iommu_groups"
    vfio: str = "/sys/bus/pci/drivers/vfio-pci"


def doctor(_command: DoctorOptions, line: CommandLine, output: Output) -> int:
    """Prints every check; 1 if something needed is missing."""
    checks = examine(Path(line.root), Path(line.data))
    missing = [check for check in checks if check.state == "missing"]
    if output.json:
        output.data({"ready": not missing, "checks": checks})
        return 1 if missing else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = check.state.ljust(7)
        colour = shown.paint(state, *_STYLES[check.state]) if output.colour else state
        print(colour, check.name.ljust(width), shown.clean(check.what).replace("\n", " "))
        if check.fix:
            print(" " * (8 + width), shown.paint("fix:", shown.CYAN) if output.colour else "fix:", check.fix)
    return 1 if missing else 0


def examine(root: Path, data: Path, host: Host | None = None) -> list[Check]:
    """Every check, in the order in which one would put things right."""
    host = host or Host()
    checks = [_privilege(), *_ids(), _namespaces(), _mount_calls()]
    checks += _programs(host)
    version = _qemu(checks)
    checks += [_kernel(host), _guest(data), _accelerator(data, version, host)]
    checks += [_folder("state root", root), _folder("data folder", data), _unnamed_files(data), _space(data)]
    checks += [_cgroups(host), _namespace_pods(host), _vsock(host), _assignment(host)]
    return checks


# -- the kernel that runs here --------------------------------------------------------------------


def _privilege() -> Check:
    if not user_namespaces.rootless():
        return Check("privilege", "ok", "root")
    if why := user_namespaces.refusal() if os.geteuid() else "":
        why = f"pods need root, or a user namespace, and users can have none here: {why}"
        return Check("privilege", "missing", why, "sudo holdfast doctor")
    why = "not root: a pod in namespaces then has no images, disks, named volumes or limits; one with a machine has"
    return Check("privilege", "warn", why, "run --rootfs DIR, or with --isolation vm, or as root")


def _ids() -> Iterator[Check]:
    """Which users and groups a user's pods have; root's have all."""
    if not os.geteuid():
        return
    counts = user_namespaces.granted_ids()
    if counts:
        yield Check("user ids", "ok", f"a pod has {counts[0]} users and {counts[1]} groups: /etc/subuid, /etc/subgid")
        return
    why = "a pod has one user, root, who is you: no range in /etc/subuid and /etc/subgid, or no newuidmap"
    fix = "apt install uidmap; usermod --add-subuids 100000-165535 --add-subgids 100000-165535 NAME"
    yield Check("user ids", "warn", why, fix)


def _own_namespace(flags: int) -> None:
    """As a pod's monitor does: who is not root becomes that of a user namespace first."""
    syscalls.unshare(flags | (syscalls.CLONE_NEWUSER if os.geteuid() else 0))


def _namespaces() -> Check:
    why = _in_child(lambda: _own_namespace(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID))
    if not why:
        return Check("namespaces", "ok", "mount and PID namespaces can be made")
    fix = (
        "run it as root"
        if os.geteuid()
        else "a container needs CAP_SYS_ADMIN and a seccomp profile that allows unshare"
    )
    return Check("namespaces", "missing", f"no mount or PID namespace can be made: {why}", fix)


def _mount_calls() -> Check:
    def use() -> None:
        _own_namespace(syscalls.CLONE_NEWNS)
        root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        syscalls.openat2(root_fd, ".", os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_IN_ROOT)
        # With what is mounted below: in a user namespace nothing can be uncovered.
        whole = syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE
        tree_fd = syscalls.open_tree(root_fd, "", whole | syscalls.OPEN_TREE_CLONE)
        syscalls.mount_setattr(tree_fd, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_RDONLY)

    why = _in_child(use)
    if not why:
        return Check("mount calls", "ok", "openat2, open_tree and mount_setattr work")
    old = "Function not implemented" in why
    return Check("mount calls", "missing", why, "a kernel of 5.12 or newer" if old else "run it as root")


def _in_child(action: Callable[[], object]) -> str:
    """What goes wrong with ``action``, done in a process that ends with it; empty if nothing."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        why = b""
        try:
            action()
        except OSError as error:
            why = f"{error.filename or ''} {error.strerror or error}".strip().encode()
        except BaseException as error:  # nothing may leave this process but by its end
            why = repr(error).encode()
        os.write(writer, why)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        why = file.read()
    os.waitpid(pid, 0)
    return why.decode("utf-8", "replace")


def _cgroups(host: Host) -> Check:
    if os.path.exists(f"{host.cgroup}/cgroup.controllers"):
        return Check("cgroups", "ok", "version 2")
    if os.path.isdir(host.cgroup) and os.listdir(host.cgroup):
        return Check("cgroups", "ok", "version 1 or hybrid (containers get those of the guest)")
    return Check("cgroups", "ok", "none here (containers get those of the guest)")


def _namespace_pods(host: Host) -> Check:
    """What ``--isolation namespace`` needs of the host's own kernel; those who have machines need none of it."""
    try:
        runtime = cgroups.choose_runtime(host.cgroup)
    except HoldfastError as error:
        return Check("namespace pods", "warn", f"--isolation namespace: {error.subject}: {error.why}", error.hint)
    if user_namespaces.rootless():
        what = f"{runtime.path} runs bundles and root filesystems, without control groups"
        return Check("namespace pods", "ok", what)
    if not os.path.exists(host.loop_control):
        return Check("namespace pods", "warn", f"{runtime.path}, but no loop devices for disks", "modprobe loop")
    if not _knows_filesystem("erofs"):
        why = f"{runtime.path}, but the kernel has no erofs for images' layers: bundles alone can be run"
        return Check("namespace pods", "warn", why, "a kernel with CONFIG_EROFS_FS")
    return Check("namespace pods", "ok", f"containers run with {runtime.path}: {runtime.why}")


def _knows_filesystem(name: str) -> bool:
    """Whether the kernel has it, or has a module that it loads at the first mount."""
    if any(line.split()[-1] == name for line in Path("/proc/filesystems").read_text().splitlines()):
        return True
    folder = kernel.MODULES / os.uname().release
    lists = [folder / "modules.dep", folder / "modules.builtin"]
    return any(f"/{name}.ko" in found.read_text() for found in lists if found.exists())


def _assignment(host: Host) -> Check:
    """Whether PCI devices can be assigned to pods; few want to, so that they cannot is no warning."""
    groups = len(os.listdir(host.iommu_groups)) if os.path.isdir(host.iommu_groups) else 0
    if not groups:
        why = "none can be assigned: this host has no IOMMU in use (intel_iommu=on or amd_iommu=on, and the firmware)"
        return Check("PCI devices", "ok", why)
    if not os.path.isdir(host.vfio):
        return Check("PCI devices", "ok", f"{groups} IOMMU groups; vfio-pci is not loaded", "modprobe vfio-pci")
    bound = sorted(name for name in os.listdir(host.vfio) if name[:1].isdigit())
    what = f"vfio-pci has {', '.join(bound)}" if bound else "vfio-pci has no device yet"
    return Check("PCI devices", "ok", f"{groups} IOMMU groups; {what}")


def _vsock(host: Host) -> Check:
    there = os.path.exists(host.vsock)
    return Check("vsock", "ok", f"{host.vsock} is there" if there else "not there, and nothing needs it")


# -- programs -------------------------------------------------------------------------------------


def _programs(host: Host) -> Iterator[Check]:
    search = (os.environ.get("PATH", os.defpath) if host.path is None else host.path) + (
        _SBIN if host.path is None else ""
    )
    for name, purpose, package, needed in _PROGRAMS:
        found = shutil.which(name, path=search)
        if found and name == "busybox" and closure.loader_of(Path(found)):
            why = f"{found} is not static, and there is nothing to link it to when the guest starts"
            yield Check(name, "missing", why, f"apt install {package}")
        elif found:
            yield Check(name, "ok", found)
        else:
            state: State = "missing" if needed else "warn"
            yield Check(name, state, f"not installed; {purpose}", f"apt install {package}")


def _qemu(checks: list[Check]) -> str:
    """Adds QEMU's check; returns its version, or nothing."""
    try:
        version = accelerator.qemu_version()
    except HoldfastError as error:
        checks.append(_failed("qemu", error))
        return ""
    checks.append(Check("qemu", "ok", version))
    return version


def _failed(name: str, error: HoldfastError) -> Check:
    return Check(name, "missing", f"{error.what} {error.subject}: {error.why}", error.hint)


# -- the guest ------------------------------------------------------------------------------------


def _kernel(host: Host) -> Check:
    try:
        found, _modules = kernel.find(boot=host.boot, modules=host.modules)
    except HoldfastError as error:
        return _failed("guest kernel", error)
    return Check("guest kernel", "ok", f"{found.release} ({found.path}), with all modules that a guest needs")


def _guest(data: Path) -> Check:
    try:
        found = guest_image.find(data)
    except HoldfastError as error:
        return _failed("guest image", error)
    except OSError as error:
        return Check("guest image", "warn", f"cannot be looked for: {error}", "run it as root")
    if found:
        return Check("guest image", "ok", found.id)
    why = "not built for this host as it is now; the first pod builds it, which takes some seconds"
    return Check("guest image", "warn", why, "holdfast guest build")


def _accelerator(data: Path, version: str, host: Host) -> Check:
    asked = os.environ.get("HOLDFAST_ACCELERATOR", "")
    if asked:
        return Check("accelerator", "ok" if asked in ("kvm", "tcg") else "warn", f"HOLDFAST_ACCELERATOR={asked}")
    verdict = accelerator.known(data, accelerator.host_identity(version)) if version else None
    if verdict:
        state: State = "ok" if verdict.accelerator == "kvm" else "warn"
        return Check("accelerator", state, f"{verdict.accelerator.upper()}: {verdict.why}", _kvm_fix(verdict.why, host))
    try:
        os.close(os.open(host.kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = f"{host.kvm}: {error.strerror}; machines are emulated, which works and is slower"
        return Check("accelerator", "warn", why, _kvm_fix(why, host))
    return Check("accelerator", "ok", f"{host.kvm} opens; the first pod tries whether a guest boots with it")


def _kvm_fix(why: str, host: Host) -> str:
    """Only what a command can change: a host without virtualisation cannot be given it."""
    if not os.path.exists(host.kvm) and host.kvm in why and _has_virtualisation():
        return "modprobe kvm_intel || modprobe kvm_amd"
    return ""


def _has_virtualisation() -> bool:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("flags"):
                return bool({"vmx", "svm"} & set(line.split()))
    return False


# -- folders --------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _folder(name: str, path: Path) -> Check:
    there = _existing(path)
    if not there.is_dir():
        return Check(
            name, "missing", f"{there} is not a folder", f"use another --{'root' if 'root' in name else 'data'}"
        )
    note = "" if there == path else ", to be made"
    filesystem = _filesystem(there)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "missing", f"{path} cannot be written to", "run it as root, or use another folder")
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return Check(name, "missing", f"{path}: {filesystem} is mounted read-only", "use another folder")
    return Check(name, "ok", f"{path} on {filesystem}{note}")


def _filesystem(path: Path) -> str:
    """Type of the filesystem that ``path`` is on: the last mount of its device, as ``findmnt`` tells it."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kind = ""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[2] == number:
                kind = fields[fields.index("-") + 1]
    return kind or "a filesystem of its own kind"  # btrfs shows other device numbers than stat(2)


def _unnamed_files(data: Path) -> Check:
    """Scratch disks are unnamed files; copies that share blocks make them quick."""
    folder = _existing(data)
    fds: list[int] = []
    try:
        for _ in range(2):
            fds.append(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.write(fds[0], bytes(4096))
        fcntl.ioctl(fds[1], syscalls.FICLONE, fds[0])
    except OSError as error:
        if len(fds) == 2 and error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV):
            return Check("scratch disks", "ok", "unnamed files work; no reflinks here, so each scratch disk is copied")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Check("scratch disks", "missing", f"{folder}: {error.strerror}", "run it as root")
        why = f"{folder} has no unnamed files (O_TMPFILE): {error.strerror}"
        return Check("scratch disks", "missing", why, "put --data on ext4, xfs, btrfs or tmpfs")
    finally:
        for fd in fds:
            os.close(fd)
    return Check("scratch disks", "ok", "unnamed files and reflinks work")


def _space(data: Path) -> Check:
    room = os.statvfs(_existing(data))
    free = room.f_bavail * room.f_frsize
    if free >= _LOW_SPACE_BYTES:
        return Check("free space", "ok", f"{shown.size(free)} for {data}")
    return Check(
        "free space", "warn", f"only {shown.size(free)} for {data}", "holdfast image remove, or another --data"
    )
