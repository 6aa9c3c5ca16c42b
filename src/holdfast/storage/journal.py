"""The journal: what was about to be done, what is held, and who has the right to open which disk.

One SQLite file per state root, written by every pod's monitor and read by anyone.  An *intent* is durable
before the act; *held* after it; the row goes when the thing has been let go of.  Rows of a pod are true
as long as its monitor lives, and that is asked of the kernel: the monitor holds a lock on
``pods/<pod>/lock``, which no reuse of a process id can fake.  Only mount points outlive their pod: see
:mod:`holdfast.storage.mount_points`.

::

    pods    (name, pid, isolation, created_ns, folder)
    held    (id, pod, kind, object, state: intent|held|releasing, detail: JSON)
    leases  (device, inode, pod, writable, path)        who may open which disk
    machines (pod, data, guest, template)               what was started from which files of which data folder
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any

import apsw
import msgspec

from holdfast.errors import HoldfastError, InUse, NotFound, NotReleased
from holdfast.machine import cgroups
from holdfast.storage import mount_points

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pods (name TEXT PRIMARY KEY, pid INTEGER NOT NULL, isolation TEXT NOT NULL,
    created_ns INTEGER NOT NULL, folder TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS held (id INTEGER PRIMARY KEY, pod TEXT NOT NULL, kind TEXT NOT NULL,
    object TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS leases (device INTEGER NOT NULL, inode INTEGER NOT NULL, pod TEXT NOT NULL,
    writable INTEGER NOT NULL, path TEXT NOT NULL, PRIMARY KEY (device, inode, pod, writable)) STRICT;
CREATE TABLE IF NOT EXISTS machines (pod TEXT PRIMARY KEY, data TEXT NOT NULL, guest TEXT NOT NULL,
    template TEXT NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS held_pod ON held (pod);
"""
_BUSY_MS = 10_000


class PodRow(msgspec.Struct, frozen=True):
    """A pod as the journal knows it; ``pid`` is the monitor's."""

    name: str
    pid: int
    isolation: str
    created_ns: int
    folder: str


class HeldRow(msgspec.Struct, frozen=True):
    """Something a pod holds, was about to hold (``intent``), or is letting go of (``releasing``)."""

    id: int
    pod: str
    kind: str
    object: str
    state: str
    detail: dict[str, Any]


class MachineRow(msgspec.Struct, frozen=True):
    """What a pod's machine was started from: a guest, and the template's key, which is empty if it was booted."""

    pod: str
    data: str
    guest: str
    template: str


class Journal:
    """The journal of one state root.  Owns its database connection.

    Raises:
        HoldfastError: the file cannot be opened or is no journal.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pods_folder = root / "pods"
        self.pods_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._db = apsw.Connection(str(root / "journal.db"))
            self._db.set_busy_timeout(_BUSY_MS)
            # SQLite waits for nobody while it changes to this mode (sqlite.org/wal.html): of two who open a new
            # journal at once, one would be told that it is locked.
            with open(root / "journal.db-lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._db.pragma("journal_mode", "wal")
                self._db.pragma("synchronous", "full")
                self._db.execute(_SCHEMA)
        except apsw.Error as error:
            raise HoldfastError(
                "open journal", subject=root / "journal.db", why=error, code="journal-unusable"
            ) from None

    def close(self) -> None:
        """Closes the database; a second call does nothing."""
        self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- pods ---------------------------------------------------------------------------------

    def add_pod(self, name: str, pid: int, isolation: str) -> None:
        """Records a pod whose lock the caller holds."""
        row = (name, pid, isolation, time.time_ns(), str(self.pods_folder / name))
        self._db.execute("INSERT OR REPLACE INTO pods VALUES (?, ?, ?, ?, ?)", row)

    def rename_pod(self, old: str, new: str) -> None:
        """Gives a pod that holds nothing yet another name, its folder first; for who holds its lock.

        Raises:
            InUse: a pod of that name exists.
        """
        if (self.pods_folder / new).is_dir():
            self.collect(new)  # if its monitor is dead
        try:
            os.rename(self.pods_folder / old, self.pods_folder / new)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise InUse(
                "start pod", subject=new, why="a pod of this name exists", code="pod-exists",
                hint=f"choose another name, or: holdfast pod remove {new}",
            ) from None  # fmt: skip
        with self._db:
            folder = str(self.pods_folder / new)
            self._db.execute("UPDATE pods SET name = ?, folder = ? WHERE name = ?", (new, folder, old))
            self._db.execute("UPDATE machines SET pod = ? WHERE pod = ?", (new, old))

    def pods(self) -> list[PodRow]:
        """Every recorded pod, oldest first; whether one lives is :meth:`is_alive`'s answer."""
        return [PodRow(*row) for row in self._db.execute("SELECT * FROM pods ORDER BY created_ns, name")]

    def pod(self, name: str) -> PodRow:
        """One pod.

        Raises:
            NotFound: there is none of that name.
        """
        for row in self._db.execute("SELECT * FROM pods WHERE name = ?", (name,)):
            return PodRow(*row)
        raise NotFound("find pod", subject=name, code="pod-not-found", hint="holdfast ps lists the pods")

    def add_machine(self, row: MachineRow) -> None:
        """Records what a pod's machine is about to be started from, before the files are opened."""
        values = (row.pod, os.path.realpath(row.data), row.guest, row.template)
        self._db.execute("INSERT OR REPLACE INTO machines VALUES (?, ?, ?, ?)", values)

    def machines(self, data: Path) -> list[MachineRow]:
        """The machines, of pods that live, that were started from files of a data folder."""
        rows = self._db.execute("SELECT * FROM machines WHERE data = ? ORDER BY pod", (os.path.realpath(data),))
        return [row for row in [MachineRow(*values) for values in rows] if self.is_alive(row.pod)]

    def is_alive(self, pod: str) -> bool:
        """Whether the pod's monitor lives: it holds the pod's lock."""
        try:
            fd = os.open(self.pods_folder / pod / "lock", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            # Shared, so that two who ask at the same time do not take each other for the monitor.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(fd)

    def forget_pod(self, name: str) -> None:
        """Removes a pod with everything it held: its rows, its leases and its folder.

        Mount points that others use stay recorded: see :mod:`holdfast.storage.mount_points`.

        Only for who holds the pod's lock, or has found it free.

        Raises:
            NotReleased: something of it is in use still; it stays recorded.
        """
        if self._db.execute("SELECT 1 FROM pods WHERE name = ? AND isolation = 'namespace'", (name,)).fetchone():
            cgroups.remove(cgroups.of_pod(self.root, name))
        mount_points.remove_unused(self, name)
        with self._db:
            self._db.execute("DELETE FROM held WHERE pod = ? AND kind != ?", (name, mount_points.KIND))
            self._db.execute("DELETE FROM leases WHERE pod = ?", (name,))
            self._db.execute("DELETE FROM machines WHERE pod = ?", (name,))
            self._db.execute("DELETE FROM pods WHERE name = ?", (name,))
        _remove_pod_folder(self.pods_folder / name)

    def collect(self, name: str) -> bool:
        """Forgets a pod if its monitor is dead; returns whether it was.

        The lock is held meanwhile, so that of two collectors one does it.
        """
        path = self.pods_folder / name / "lock"
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):  # any other error says nothing about the pod
                self.forget_pod(name)
                return True
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(fd, path):  # collected since it was opened, and perhaps the lock of a new pod is there
                    continue
                self.forget_pod(name)
                return True
            except BlockingIOError:
                if self.is_alive(name):
                    return False
                # It was only somebody who asked whether the pod is alive.
            finally:
                os.close(fd)

    # -- what is held -------------------------------------------------------------------------

    def intend(self, pod: str, kind: str, subject: str, detail: dict[str, Any] | None = None) -> int:
        """Records that something is about to be done; durable when this returns."""
        self._db.execute(
            "INSERT INTO held (pod, kind, object, state, detail) VALUES (?, ?, ?, 'intent', ?)",
            (pod, kind, subject, json.dumps(detail or {})),
        )
        return self._db.last_insert_rowid()

    def hold(self, row: int, detail: dict[str, Any] | None = None) -> None:
        """Records that it was done."""
        self._db.execute(
            "UPDATE held SET state = 'held', detail = coalesce(?, detail) WHERE id = ?",
            (None if detail is None else json.dumps(detail), row),
        )

    def releasing(self, row: int) -> None:
        """Records that it is about to be let go of."""
        self._db.execute("UPDATE held SET state = 'releasing' WHERE id = ?", (row,))

    def release(self, row: int) -> None:
        """Records that it has been let go of, or was never done."""
        self._db.execute("DELETE FROM held WHERE id = ?", (row,))

    def intend_all(self, pod: str, kind: str, wanted: Iterable[tuple[str, dict[str, Any]]]) -> list[int]:
        """The same as :meth:`intend` for many, by one commit; each is a subject and its detail."""
        rows = [(pod, kind, subject, json.dumps(detail)) for subject, detail in wanted]
        insert = "INSERT INTO held (pod, kind, object, state, detail) VALUES (?, ?, ?, 'intent', ?) RETURNING id"
        with self._db:
            ids = [row for (row,) in self._db.executemany(insert, rows)]
        return ids

    def hold_all(self, rows: Iterable[int], details: Iterable[dict[str, Any]] | None = None) -> None:
        """The same as :meth:`hold` for many, by one commit; ``details``, if given, are one for each."""
        if details is None:
            self._all("UPDATE held SET state = 'held' WHERE id = ?", rows)
            return
        changes = [(json.dumps(detail), row) for row, detail in zip(rows, details, strict=True)]
        with self._db:
            self._db.executemany("UPDATE held SET state = 'held', detail = ? WHERE id = ?", changes)

    def releasing_all(self, rows: Iterable[int]) -> None:
        """The same as :meth:`releasing` for many, by one commit."""
        self._all("UPDATE held SET state = 'releasing' WHERE id = ?", rows)

    def release_all(self, rows: Iterable[int]) -> None:
        """The same as :meth:`release` for many, by one commit."""
        self._all("DELETE FROM held WHERE id = ?", rows)

    def _all(self, change: str, rows: Iterable[int]) -> None:
        with self._db:
            self._db.executemany(change, [(row,) for row in rows])

    def held(self, pod: str | None = None, kind: str | None = None) -> list[HeldRow]:
        """What a pod, or every pod, holds, or that of one kind, in the order of acquisition."""
        rows: Iterable[tuple[Any, ...]]
        if pod is None:
            rows = self._db.execute("SELECT * FROM held WHERE kind = coalesce(?, kind) ORDER BY id", (kind,))
        else:
            every = "SELECT * FROM held WHERE pod = ? AND kind = coalesce(?, kind) ORDER BY id"
            rows = self._db.execute(every, (pod, kind))
        return [HeldRow(i, p, k, o, s, json.loads(d)) for i, p, k, o, s, d in rows]

    # -- leases -------------------------------------------------------------------------------

    def lease(self, pod: str, device: int, inode: int, path: str, *, writable: bool) -> None:
        """Takes the right to open a disk: one writer, or any number of readers, on the whole host.

        Raises:
            InUse: another pod, or this one, has it in a way that does not go together; names the holder.
        """
        with self._db:
            self._db.execute("DELETE FROM leases WHERE 0")  # takes the write lock before anything is read
            rows = list(self._db.execute(
                "SELECT pod, writable, path FROM leases WHERE device = ? AND inode = ?", (device, inode)
            ))  # fmt: skip
            for holder, held_writable, held_path in rows:
                if not writable and not held_writable:
                    continue
                if holder != pod and not self.is_alive(holder):
                    self._db.execute("DELETE FROM leases WHERE pod = ?", (holder,))
                    continue
                mode = "for writing" if held_writable else "for reading"
                raise InUse(
                    "open disk", subject=path, code="disk-in-use", why=f"pod {holder} has {held_path} open {mode}",
                    hint=f"end that pod first: holdfast pod remove {holder}",
                )  # fmt: skip
            self._db.execute(
                "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?, ?)", (device, inode, pod, int(writable), path)
            )

    def end_lease(self, pod: str, device: int, inode: int, *, writable: bool) -> None:
        """Gives the right back; one that is not held is no error."""
        self._db.execute(
            "DELETE FROM leases WHERE device = ? AND inode = ? AND pod = ? AND writable = ?",
            (device, inode, pod, int(writable)),
        )

    def leases(self) -> list[dict[str, Any]]:
        """Every lease: ``path``, ``pod``, ``writable``."""
        rows = self._db.execute("SELECT path, pod, writable FROM leases ORDER BY path, pod")
        return [{"path": path, "pod": pod, "writable": bool(writable)} for path, pod, writable in rows]


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_pod_folder(folder: Path) -> None:
    """Removes a pod's folder: its files, and the empty mount point in it.

    Never recursively: shares are mounted below, and what is mounted is the user's.  A folder that cannot be
    removed this way stays, and ``audit`` finds it.
    """
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    # The lock goes last: as long as it is there, nobody takes the name and nobody else removes anything.
    for entry in sorted(entries, key=lambda entry: entry.name == "lock"):
        with contextlib.suppress(FileNotFoundError):
            _remove_entry(entry)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno == errno.ENOENT or (folder / "lock").exists():  # gone, or already the folder of a new pod
            return
        raise NotReleased("remove pod's folder", subject=folder, why=error, code="pod-folder-busy") from None


def _remove_entry(entry: os.DirEntry[str]) -> None:
    remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
    try:
        remove(entry.path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotReleased("remove pod's folder", subject=entry.path, why=error, code="pod-folder-busy") from None
