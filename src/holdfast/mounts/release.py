"""Unmounting, given the target alone; and undoing what was recorded with the mount.

``""``, a path that is not there and one on which nothing is mounted are no errors, so that whatever failed half way is
simply tried again.  What is busy is waited for, a bounded time, and then the error says who holds it.  Nothing here
deletes anything but empty mount points.

Two ways to call it: :func:`unmount`, :func:`unmount_all` and :func:`unmount_recursive` are the library's;
:func:`drop` and :func:`drop_below` are for an agent, which keeps no records and may not wait.
"""

from __future__ import annotations

import errno
import os
import time

from holdfast.errors import HoldfastError, InvalidInput, NotReleased
from holdfast.linux import syscalls
from holdfast.mounts import table

#: Records of mounts; see records.py, which is not loaded by who keeps none.
DEFAULT_FOLDER = "/run/holdfast-mounts"
#: How long something busy is waited for: security scanners and the like look and go.
WAIT_S = 2.5
_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1
#: More mounts than this stacked on one path is a mistake, not a use.
_MOST_STACKED = 128
_GONE = (errno.ENOENT, errno.ENOTDIR)


def unmount(target: str, *, lazy: bool = False, wait_s: float = WAIT_S, records: str = DEFAULT_FOLDER) -> bool:
    """Takes away the mount on top of ``target``.

    Args:
        target: where; a link is not followed.
        lazy: take it away with all below it, at once, also if somebody uses it: they keep it until they let go.
        wait_s: how long to wait while it is busy, in seconds.
        records: folder that was named when it was mounted; empty if it has none.

    Returns:
        Whether there was one.

    Raises:
        NotReleased: it is busy, and by whom (``mount-busy``); or something that belongs to it could not be undone.
            What is left stays on record, and the same call goes on from there.
        InvalidInput: ``target`` is the root directory.
    """
    _check(target)
    if not target:
        return False
    was_mounted = _take(target, lazy, wait_s)
    _settle(target, records)
    return was_mounted


def unmount_all(target: str, *, lazy: bool = False, wait_s: float = WAIT_S, records: str = DEFAULT_FOLDER) -> int:
    """Takes away all mounts that are stacked on ``target``.  Args, Raises: as :func:`unmount`.

    Returns:
        How many there were.
    """
    _check(target)
    if not target:
        return 0
    count = 0
    deadline = time.monotonic() + wait_s
    while _take(target, lazy, max(0.0, deadline - time.monotonic())):
        count += 1
        if count > _MOST_STACKED:
            why = f"more than {_MOST_STACKED} mounts are stacked on it"
            raise NotReleased("unmount", subject=target, why=why, code="mount-busy")
    _settle(target, records)
    return count


def unmount_recursive(
    target: str, *, lazy: bool = False, wait_s: float = WAIT_S, records: str = DEFAULT_FOLDER
) -> bool:
    """Takes away all mounts at ``target`` and below it, children first.

    One that is busy does not keep the others: all errors are reported together.  With ``lazy`` one call of the kernel
    takes away a whole tree.

    Args, Raises: as :func:`unmount`; ``wait_s`` is for all of them together.

    Returns:
        Whether there was any.
    """
    _check(target)
    path = canonical(target) if target else ""
    if not path:
        return False
    _check(path)
    deadline = time.monotonic() + wait_s
    found = False
    while lazy and _take(path, True, 0.0):
        found = True
    failed: dict[str, HoldfastError] = {}
    entries = table.within(path)
    while entries:
        for entry in reversed(entries):  # in the table a parent comes before its children
            if any(table.is_within(target, entry.target) for target in failed):
                continue  # it is busy with that one
            try:
                found |= _take(entry.target, lazy, max(0.0, deadline - time.monotonic()))
            except HoldfastError as error:
                failed[entry.target] = error
        left = table.within(path)
        if len(left) >= len(entries):
            break
        entries = left  # what was stacked under others, or has come meanwhile
    errors = [*failed.values()]
    if records:
        from holdfast.mounts.records import settle_within

        errors += settle_within(records, path)
    _report(errors)
    return found


def drop(target: str) -> None:
    """Takes away all that is stacked on ``target``, at once; not mounted, or not there, is success.

    Raises:
        NotReleased: somebody still uses it (``mount-busy``); the same call may succeed later.
    """
    unmount_all(target, wait_s=0.0, records="")


def drop_below(target: str) -> None:
    """Takes away what is mounted below ``target``, the deepest first, not ``target`` itself.

    A container with the right to mount leaves such things, where its mounts are shared with what they were made from.

    Raises:
        NotReleased: somebody still uses it.
    """
    for entry in reversed(table.within(target.rstrip("/"))):
        if entry.target != target.rstrip("/"):
            drop(entry.target)


def remove_mount_point(target: str) -> None:
    """Removes an empty mount point, a folder or a file: what is still mounted there stays untouched.

    Raises:
        NotReleased: it is not empty, or still a mount point.
    """
    try:
        try:
            os.rmdir(target)
        except NotADirectoryError:
            if os.path.ismount(target) or os.lstat(target).st_size:
                raise
            os.unlink(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise NotReleased("remove mount point", subject=target, why=error, code="mount-busy") from None


def recover(records: str = DEFAULT_FOLDER) -> list[str]:
    """Finishes what processes that died have left: temporary mounts, and records of mounts that are gone.

    Nothing that somebody still works on or that is mounted for good is touched, nor what belongs to another mount
    namespace that is alive.

    Returns:
        The targets that something was undone for.

    Raises:
        NotReleased: some of it could not be undone; the rest was.
    """
    from holdfast.mounts.records import all_in, remove_drafts

    done = []
    errors: list[HoldfastError] = []
    for record in all_in(records, errors):
        if record.is_elsewhere() or not (record.is_temporary or record.is_over()) or not record.try_lock():
            continue
        try:
            if record.is_temporary:
                unmount_recursive(record.target, records=records)
            record.carry_out()
            done.append(record.target)
        except HoldfastError as error:
            errors.append(error)
        finally:
            record.release()
    remove_drafts(records)
    _report(errors)
    return done


def canonical(target: str) -> str:
    """``target`` as the kernel writes it: links on the way resolved, the last component not followed."""
    head, name = os.path.split(target.rstrip("/"))
    if name in ("", ".", ".."):
        return os.path.realpath(target)
    return os.path.join(os.path.realpath(head or "."), name)


def _check(target: str) -> None:
    if target.startswith("/") and not target.strip("/."):
        raise InvalidInput("unmount", subject=target, why="that is the root directory", code="bad-target")


def _take(target: str, lazy: bool, wait_s: float) -> bool:
    """One umount2(2), again while it is busy; whether something was mounted."""
    flags = syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0)
    pause = _PAUSE_S
    deadline = 0.0
    while True:
        try:
            syscalls.umount(target, flags)
            return True
        except OSError as error:
            if error.errno in _GONE or not _is_mount(target):
                return False
            if error.errno == errno.EPERM and os.geteuid() and _by_helper(target):
                return True
            if error.errno != errno.EBUSY:
                raise NotReleased("unmount", subject=target, why=_why(error), code="mount-kept") from error
        now = time.monotonic()
        deadline = deadline or now + wait_s
        if now >= deadline:
            raise _busy(target)
        time.sleep(min(pause, deadline - now))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _by_helper(target: str) -> bool:
    from holdfast.mounts import helper

    return helper.unmount_as_user(target)


def _is_mount(target: str) -> bool:
    try:
        return table.mount_id(target)[1]
    except OSError as error:
        return error.errno not in _GONE  # of a dead server, say: it is one


def _why(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "the kernel keeps it: it came with this user namespace, and is locked"
    return f"{os.strerror(error.errno or 0)} (errno {error.errno})"


def _busy(target: str) -> NotReleased:
    from holdfast.mounts import holders

    who = holders.describe(canonical(target))
    return NotReleased(
        "unmount", subject=target, code="mount-busy",
        why=f"{os.strerror(errno.EBUSY)} (errno {errno.EBUSY})" + (f": {who}" if who else ", nobody seen that uses it"),
        hint="end what uses it and unmount it again",
    )  # fmt: skip


def _settle(target: str, folder: str) -> None:
    if folder:
        from holdfast.mounts.records import any_in, settle

        if any_in(folder):
            settle(folder, canonical(target))


def _report(errors: list[HoldfastError]) -> None:
    if errors:
        errors[0].causes += tuple(errors[1:])
        raise errors[0]
