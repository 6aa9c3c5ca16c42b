"""Disks that are mounted through a device above them: checked by dm-verity, or encrypted by dm-crypt.

What was made for a mount is remembered here by its mount point, and taken away by that: a request to unmount
need not, and does not, say again what the mount was made of (hcsshim #2109).
"""

from __future__ import annotations

import errno
import os

from holdfast.errors import Corrupt, GuestFailed, InUse, InvalidInput, NotReleased, TimedOut, Unsupported
from holdfast.guest import dm
from holdfast.guest.launch import load_on_demand

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from holdfast.guest.children import Children
    from holdfast.guest.loop import Task

_CRYPTSETUP, _MKE2FS = "/usr/sbin/cryptsetup", "/usr/sbin/mke2fs"
_FOLDER = "/dev/mapper"
_BLOCK = 4096
#: The key is random and used once: nothing is gained by making it costly to guess.  The header takes 1 MiB
#: instead of the usual 16: ``LUKS_BYTES`` of the host's storage/scratch.py.
_LUKS = (
    "--batch-mode", "--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256",
    "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096", "--luks2-metadata-size", "16k",
    "--luks2-keyslots-size", "512k", "--offset", "2048", "--use-urandom",
)  # fmt: skip
_EXT4 = ("-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", "-m", "0")
_HEX = frozenset("0123456789abcdefABCDEF")
#: Mount point -> name of the mapped device that is mounted there.
_held: dict[str, str] = {}


def verity(mount_point: str, device: str, info: dict[str, Any], place: tuple[int, int, int]) -> Task:
    """Task: makes a device that reads ``device`` and gives an error for what is not what it was; returns its node.

    Args:
        info: the request's ``VerityInfo``.
        place: controller, LUN and partition.

    Raises:
        InvalidInput: ``info`` is wrong.
        GuestFailed: the kernel refused it.
    """
    number = os.stat(device).st_rdev
    root, table = verity_table(f"{os.major(number)}:{os.minor(number)}", info)
    yield from _free(mount_point)
    load_on_demand("dm_verity")
    name = f"dm-verity-scsi-contr{place[0]}-lun{place[1]}-p{place[2]}-{root}"
    _held[mount_point] = name
    return (yield from dm.create(name, table, read_only=True))


def verity_table(node: str, info: dict[str, Any]) -> tuple[str, bytes]:
    """The root hash, and the table of the kernel's admin-guide/device-mapper/verity.rst.

    Args:
        node: the disk's ``major:minor``.
    """
    root: Any = info.get("RootDigest")
    salt: Any = info.get("Salt") or "-"
    size: Any = info.get("Ext4SizeInBytes")
    kind = (info.get("Version") or 1, info.get("Algorithm") or "sha256", info.get("BlockSize") or _BLOCK)
    whole = type(size) is int and size > 0 and size % _BLOCK == 0
    if not _is_hex(root) or not (salt == "-" or _is_hex(salt)) or not whole or kind != (1, "sha256", _BLOCK):
        raise InvalidInput(
            "verify disk", subject=node, why="its VerityInfo is not of version 1, sha256, blocks of 4096 bytes",
            code="verity-info",
        )  # fmt: skip
    blocks = size // _BLOCK
    tree = blocks + 1 if info.get("SuperBlock") else blocks
    parameters = f"1 {node} {node} {_BLOCK} {_BLOCK} {blocks} {tree} sha256 {root} {salt}"
    return root, dm.target("verity", size // dm.SECTOR, parameters)


def blame_contents(what: str, device: str, error: BaseException) -> None:
    """Says that a verified disk is not what it was, if that is what an error is about.

    Raises:
        Corrupt: it is: dm-verity gives EIO for a block that has changed, and E2BIG for a disk that is too small.
    """
    if any(getattr(error, "errno", 0) == e or f"(errno {e})" in str(error) for e in (errno.EIO, errno.E2BIG)):
        raise Corrupt(
            what, subject=device, why=f"it does not hold what its root hash says: {error}", code="verity-failed",
            hint="import the image again",
        ) from None  # fmt: skip


def _is_hex(text: object) -> bool:
    return isinstance(text, str) and bool(text) and _HEX.issuperset(text)


def encrypted(mount_point: str, device: str, children: Children, place: tuple[int, int, int]) -> Task:
    """Task: makes an empty encrypted ext4 of a blank disk, with a key that nobody is told; returns the node to mount.

    Raises:
        InUse: the disk is not blank.
        GuestFailed: a tool failed.
        Unsupported: the guest has not got cryptsetup or its modules.
    """
    if not os.path.exists(_CRYPTSETUP):
        raise Unsupported("encrypt disk", subject=device, why="the guest has no cryptsetup", code="no-cryptsetup")
    _check_blank(device)
    yield from _free(mount_point)
    load_on_demand("dm_crypt")
    try:
        load_on_demand("aesni_intel")  # twice as fast under emulation, more so without
    except OSError as error:
        if error.errno != errno.ENODEV:  # a processor that has no such instructions
            raise
    name = f"dm-crypt-scsi-contr{place[0]}-lun{place[1]}-p{place[2]}"
    _held[mount_point] = name
    key = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        os.write(key, os.urandom(64))
        for arguments in (("luksFormat", *_LUKS), ("open", "--type", "luks2")):
            os.lseek(key, 0, os.SEEK_SET)
            tail = (device,) if arguments[0] == "luksFormat" else (device, name)
            yield from run("encrypt disk", children, [_CRYPTSETUP, *arguments, "--key-file", "-", *tail], key)
    finally:
        os.close(key)
    node = f"{_FOLDER}/{name}"
    yield from run("encrypt disk", children, [_MKE2FS, *_EXT4, node])
    return node


def release(mount_point: str) -> Task:
    """Task: takes away what was made for a mount, which is gone by now; nothing is success.

    Raises:
        NotReleased: somebody still uses it; it stays remembered.
    """
    name = _held.get(mount_point)
    if name is not None:
        yield from dm.remove(name)
        _forget(mount_point, name)


def give_up(mount_point: str) -> None:
    """The same at once, on the way out of a failure that may be a deadline's: what stays is for the next try."""
    name = _held.get(mount_point)
    if name is not None and dm.remove_now(name) is None:
        _forget(mount_point, name)


def _free(mount_point: str) -> Task:
    try:
        yield from release(mount_point)
    except NotReleased as error:
        raise InUse("map device", subject=mount_point, why=error.why, code="path-in-use") from None


def _forget(mount_point: str, name: str) -> None:
    del _held[mount_point]
    try:
        os.unlink(f"{_FOLDER}/{name}")  # cryptsetup makes one; the kernel's own is /dev/dm-<n>
    except FileNotFoundError:
        return


def _check_blank(device: str) -> None:
    """A new scratch disk reads as zeros: whatever else there is belongs to somebody."""
    with open(device, "rb", buffering=0) as file:
        if any(file.read(1 << 16)):
            raise InUse(
                "encrypt disk", subject=device, why="it is not blank", code="disk-not-blank",
                hint="only new scratch disks are encrypted",
            )  # fmt: skip


def run(what: str, children: Children, argv: list[str], stdin: int = -1) -> Task:
    """Task: runs a tool.

    Raises:
        GuestFailed: it failed; carries what it said.
    """
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    said = os.memfd_create("said", os.MFD_CLOEXEC)
    try:
        status = yield from children.run(argv, nothing if stdin < 0 else stdin, said, said)
        if status:
            text = os.pread(said, 2000, 0).decode("utf-8", "backslashreplace").strip()
            code = os.waitstatus_to_exitcode(status)
            raise GuestFailed(what, subject=" ".join(argv[:2]), why=f"{text} (status {code})", code="tool-failed")
    except TimedOut as error:
        raise TimedOut(what, subject=argv[0], why=error.why) from None
    finally:
        os.close(said)
        os.close(nothing)


def is_mapped(mount_point: str) -> bool:
    """Whether something was made for a mount there."""
    return mount_point in _held
