"""System calls that Python 3.11 does not wrap, one thin function each.

Each takes and returns plain descriptors and raises :class:`OSError` with the call's name and the
path.  One typed prototype of ``syscall(2)`` is bound at import: changing ``argtypes`` per call would
be a race between threads.  Numbers are those of x86-64 and (since Linux 5.x, shared) every
architecture; constants are spelled as in the kernel's headers.
"""

from __future__ import annotations

import ctypes
import errno
import os

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_STATX_DONT_SYNC = 0x4000

STATX_INO = 0x100
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000
STATX_ATTR_MOUNT_ROOT = 0x2000

STATMOUNT_SB_BASIC = 0x01
STATMOUNT_MNT_BASIC = 0x02
STATMOUNT_MNT_POINT = 0x10

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x00000004
MOVE_MOUNT_T_EMPTY_PATH = 0x00000040

MOUNT_ATTR_RDONLY = 0x00000001
MOUNT_ATTR_NOSUID = 0x00000002
MOUNT_ATTR_NODEV = 0x00000004
MOUNT_ATTR_NOEXEC = 0x00000008
MOUNT_ATTR__ATIME = 0x00000070
MOUNT_ATTR_RELATIME = 0x00000000
MOUNT_ATTR_NOATIME = 0x00000010
MOUNT_ATTR_STRICTATIME = 0x00000020
MOUNT_ATTR_NODIRATIME = 0x00000080
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW = 0x00200000

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

FICLONE = 0x40049409

RENAME_EXCHANGE = 2

CAP_MKNOD = 27
CAP_SETFCAP = 31

_NR = {
    "pidfd_getfd": 438,
    "umount2": 166,
    "mount": 165,
    "pivot_root": 155,
    "unshare": 272,
    "setns": 308,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "openat2": 437,
    "mount_setattr": 442,
    "prctl": 157,
    "fallocate": 285,
    "clock_settime": 227,
    "renameat2": 316,
    "syncfs": 306,
    "inotify_init1": 294,
    "inotify_add_watch": 254,
    "inotify_rm_watch": 255,
    "statx": 332,
    "statmount": 457,
    "listmount": 458,
}

# Every argument is a machine word: pointers are passed as addresses of buffers kept alive by the caller.
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_long, *([ctypes.c_void_p] * 6), use_errno=True
)(ctypes.cast(_libc.syscall, ctypes.c_void_p).value or 0)  # fmt: skip


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("_unused", ctypes.c_uint8 * 16),
        ("stx_ino", ctypes.c_uint64),
        ("_unused_sizes", ctypes.c_uint8 * 40),
        ("stx_btime_sec", ctypes.c_int64),
        ("stx_btime_nsec", ctypes.c_uint32),
        ("_unused_times", ctypes.c_uint8 * 44),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("stx_mnt_id", ctypes.c_uint64),
        ("_spare", ctypes.c_uint8 * 104),
    )


class _MntIdReq(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("spare", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("param", ctypes.c_uint64),
    )


class _Statmount(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("mnt_opts", ctypes.c_uint32),
        ("mask", ctypes.c_uint64),
        ("sb_dev_major", ctypes.c_uint32),
        ("sb_dev_minor", ctypes.c_uint32),
        ("sb_magic", ctypes.c_uint64),
        ("sb_flags", ctypes.c_uint32),
        ("fs_type", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("mnt_parent_id", ctypes.c_uint64),
        ("mnt_id_old", ctypes.c_uint32),
        ("mnt_parent_id_old", ctypes.c_uint32),
        ("mnt_attr", ctypes.c_uint64),
        ("mnt_propagation", ctypes.c_uint64),
        ("mnt_peer_group", ctypes.c_uint64),
        ("mnt_master", ctypes.c_uint64),
        ("propagate_from", ctypes.c_uint64),
        ("mnt_root", ctypes.c_uint32),
        ("mnt_point", ctypes.c_uint32),
        ("_spare", ctypes.c_uint64 * 50),
        ("text", ctypes.c_char * 8192),
    )


class MountFacts:
    """What statmount(2) says of a mount; numbers are those of mountinfo, ``point`` is empty if it cannot be reached."""

    __slots__ = ("attributes", "number", "parent", "point")

    def __init__(self, number: int, parent: int, attributes: int, point: bytes) -> None:
        self.number = number
        self.parent = parent
        self.attributes = attributes
        self.point = point


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _call(name: str, subject: str | bytes | None, *args: int | bytes | None) -> int:
    words: list[object] = [None] * 6
    keep = []
    for index, value in enumerate(args):
        if isinstance(value, bytes):
            if b"\0" in value:  # the kernel would see what is before it: another path
                raise OSError(errno.EINVAL, f"{name}: embedded null byte", subject)
            buffer = ctypes.create_string_buffer(value)
            keep.append(buffer)
            words[index] = ctypes.addressof(buffer)
        else:
            words[index] = value
    result = int(_syscall(_NR[name], *words))
    if result < 0:
        code = ctypes.get_errno()
        text = os.strerror(code)
        if code == errno.ENOSYS:
            text += f": {name} is not in this kernel, or a filter refuses it"
        raise OSError(code, f"{name}: {text}", subject)
    return result


def mount(source: str | bytes, target: str | bytes, fstype: str, flags: int = 0, data: str | bytes = "") -> None:
    """mount(2)."""
    _call("mount", target, os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))


def umount(target: str | bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _call("umount2", target, os.fsencode(target), flags)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call("pivot_root", new_root, os.fsencode(new_root), os.fsencode(put_old))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _call("unshare", None, flags)


def setns(fd: int, flags: int = 0) -> None:
    """setns(2)."""
    _call("setns", None, fd, flags)


def prctl(option: int, value: int | bytes) -> None:
    """prctl(2) with one argument."""
    _call("prctl", None, option, value)


def openat2(dir_fd: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), Linux 5.6.  ``path`` is resolved under ``dir_fd`` as ``resolve`` says.

    A concurrent rename can make the kernel answer EAGAIN; it is tried again a bounded number of times.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    name = os.fsencode(path)
    for attempt in range(32):
        try:
            return _call("openat2", path, dir_fd, name, ctypes.addressof(how), ctypes.sizeof(how))
        except OSError as error:
            if error.errno != errno.EAGAIN or attempt == 31:
                raise
    raise AssertionError("unreachable")


def open_tree(dir_fd: int, path: str | bytes, flags: int) -> int:
    """open_tree(2), Linux 5.2."""
    return _call("open_tree", path, dir_fd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC)


def move_mount(from_fd: int, from_path: str | bytes, to_fd: int, to_path: str | bytes, flags: int) -> None:
    """move_mount(2), Linux 5.2."""
    _call("move_mount", to_path or from_path, from_fd, os.fsencode(from_path), to_fd, os.fsencode(to_path), flags)


def mount_setattr(
    fd: int, path: str | bytes, flags: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0,
    userns_fd: int = 0,
) -> None:  # fmt: skip
    """mount_setattr(2), Linux 5.12."""
    attr = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    _call("mount_setattr", path, fd, os.fsencode(path), flags, ctypes.addressof(attr), ctypes.sizeof(attr))


def fsopen(fstype: str) -> int:
    """fsopen(2), Linux 5.2."""
    return _call("fsopen", fstype, fstype.encode(), FSOPEN_CLOEXEC)


def fsconfig_string(fs_fd: int, key: str, value: str | bytes) -> None:
    """fsconfig(2) FSCONFIG_SET_STRING; a value holds at most 255 bytes."""
    _call("fsconfig", key, fs_fd, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)


def fsconfig_flag(fs_fd: int, key: str) -> None:
    """fsconfig(2) FSCONFIG_SET_FLAG."""
    _call("fsconfig", key, fs_fd, FSCONFIG_SET_FLAG, key.encode(), None, 0)


def fsconfig_create(fs_fd: int) -> None:
    """fsconfig(2) FSCONFIG_CMD_CREATE."""
    _call("fsconfig", None, fs_fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(fs_fd: int, attr_flags: int = 0) -> int:
    """fsmount(2), Linux 5.2."""
    return _call("fsmount", None, fs_fd, FSMOUNT_CLOEXEC, attr_flags)


def statx_mount(dir_fd: int, path: str | bytes, flags: int = 0, mask: int = STATX_MNT_ID) -> tuple[int, bool]:
    """statx(2): the number of the mount that ``path`` is in, and whether it is that mount's root.  Linux 5.8.

    The number is 0 on a kernel that does not give what ``mask`` asks for.  Nothing is asked of a remote server.
    """
    found = _Statx()
    how = flags | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC
    _call("statx", path, dir_fd, os.fsencode(path), how, mask, ctypes.addressof(found))
    number = int(found.stx_mnt_id) if found.stx_mask & mask else 0
    return number, bool(found.stx_attributes & STATX_ATTR_MOUNT_ROOT)


def statx_birth(dir_fd: int, path: str | bytes, flags: int = 0) -> tuple[int, int, int]:
    """statx(2): device, inode and birth time, in nanoseconds since the epoch, of what is there.

    The time is 0 on a filesystem that has none.
    """
    found, mask = _Statx(), STATX_INO | STATX_BTIME
    how = flags | AT_NO_AUTOMOUNT
    _call("statx", path, dir_fd, os.fsencode(path), how, mask, ctypes.addressof(found))
    born_ns = found.stx_btime_sec * 10**9 + found.stx_btime_nsec if found.stx_mask & STATX_BTIME else 0
    return os.makedev(found.stx_dev_major, found.stx_dev_minor), int(found.stx_ino), int(born_ns)


def statmount(unique_id: int) -> MountFacts:
    """statmount(2), Linux 6.8: one mount, by its unique number."""
    mask = STATMOUNT_MNT_BASIC | STATMOUNT_MNT_POINT
    request = _MntIdReq(ctypes.sizeof(_MntIdReq), 0, unique_id, mask)
    found = _Statmount()
    _call("statmount", None, ctypes.addressof(request), ctypes.addressof(found), ctypes.sizeof(found), 0)
    point = b""
    if found.mask & STATMOUNT_MNT_POINT:
        point = ctypes.string_at(ctypes.addressof(found) + _Statmount.text.offset + found.mnt_point)
    return MountFacts(found.mnt_id_old, found.mnt_parent_id_old, found.mnt_attr, point)


def listmount(unique_id: int, after: int = 0) -> list[int]:
    """listmount(2), Linux 6.8: unique numbers of the next 512 mounts below one, those after ``after``."""
    request = _MntIdReq(ctypes.sizeof(_MntIdReq), 0, unique_id, after)
    found = (ctypes.c_uint64 * 512)()
    count = _call("listmount", None, ctypes.addressof(request), ctypes.addressof(found), 512, 0)
    return list(found[:count])


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call("fallocate", None, fd, mode, offset, length)


def clock_settime(clock: int, nanoseconds: int) -> None:
    """clock_settime(2): sets ``clock`` to nanoseconds since the epoch."""
    spec = _Timespec(nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
    _call("clock_settime", None, clock, ctypes.addressof(spec))


def renameat2(old: str | bytes, new: str | bytes, flags: int) -> None:
    """renameat2(2), Linux 3.15."""
    _call("renameat2", old, AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of a descriptor that another process has open (pidfd_getfd(2), Linux 5.6); close-on-exec."""
    return _call("pidfd_getfd", str(fd), pidfd, fd, 0)


def syncfs(fd: int) -> None:
    """syncfs(2): writes everything of the filesystem that ``fd`` is in; an error since the last time is raised."""
    _call("syncfs", None, fd)


def inotify_init1(flags: int) -> int:
    """inotify_init1(2)."""
    return _call("inotify_init1", None, flags)


def inotify_add_watch(fd: int, path: str | bytes, mask: int) -> int:
    """inotify_add_watch(2)."""
    return _call("inotify_add_watch", path, fd, os.fsencode(path), mask)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """inotify_rm_watch(2)."""
    _call("inotify_rm_watch", None, fd, watch)
