"""Mounts that end with their ``with``."""

from __future__ import annotations

import os

from holdfast.mounts import mounting, release
from holdfast.mounts.model import Mount
from holdfast.mounts.records import Record
from holdfast.mounts.release import DEFAULT_FOLDER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

_VOLATILE = ("volatile", "fsync=volatile")


class temporary:
    """A folder with ``mounts`` in it, for the time of a ``with``; its path is what ``as`` names.

    The folder is on record before it is made.  If this process dies, :func:`recover` takes away both.  Where overlay is
    told not to write back (``volatile``), that is left out: the same layers could not be mounted again afterwards.

    Args:
        mounts: made in order, their targets resolved under the folder; without a target, on the folder itself.
        records: folder for records; the temporary folder is in it, too.
        wait_s: how long to wait at the end while something is busy, in seconds.

    Raises:
        HoldfastError: on entering as :func:`mount_all`, on leaving as :func:`unmount_recursive`.
    """

    def __init__(
        self, mounts: Iterable[Mount], *, records: str = DEFAULT_FOLDER, wait_s: float = release.WAIT_S
    ) -> None:
        self._mounts = [_written_back(mount) for mount in mounts]
        self._records = records
        self._wait_s = wait_s
        self._record: Record | None = None

    def __enter__(self) -> str:
        if self._record:
            raise RuntimeError("temporary mounts are entered once")
        path = os.path.realpath(f"{self._records}/.temporary-{os.urandom(6).hex()}")
        self._record = record = Record(self._records, path)
        record.undo = [{"folder": path}]
        record.write()
        try:
            os.mkdir(path, 0o700)
            mounting.mount_all(self._mounts, path, records=self._records)
        except BaseException:
            self._end(record)
            raise
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record:
            self._end(self._record)

    def _end(self, record: Record) -> None:
        try:
            release.unmount_recursive(record.target, wait_s=self._wait_s, records=self._records)
            record.carry_out()
        finally:
            record.release()


def _written_back(mount: Mount) -> Mount:
    if mount.type != "overlay":
        return mount
    words = [option for option in mount.options if option not in _VOLATILE]
    return Mount(mount.type, mount.source, mount.target, words)
