"""What saved machines and guests take of the disk and of memory, whether they are still good, and removing them.

A template is stale when no new pod of this host would start from it: its guest is not what would be built now, or
QEMU, the accelerator or Holdfast has changed.  That harms nobody, so it is no finding of ``audit``; it takes room.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import Corrupt, InUse, NotFound
from holdfast.machine import accelerator, guest_image, template
from holdfast.machine.config import MachineConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from holdfast.machine.guest_image import GuestImage
    from holdfast.machine.template import Template

#: A start holds a template's lock for less than that.
_REMOVE_SECONDS = 5.0
_POLL_SECONDS = 0.02


class Saved(msgspec.Struct, frozen=True):
    """A template as ``list`` shows it.

    Attributes:
        stale: why no new pod would start from it; empty if it is good.
        disk_bytes: what it really takes of the disk.
        record: what it is; None if that cannot be read.
    """

    key: str
    stale: str
    disk_bytes: int
    record: Template | None


class Freed(msgspec.Struct, frozen=True):
    """Something that was removed: ``kind`` is ``template``, ``guest``, ``leftover`` or ``memory``."""

    kind: str
    object: str
    why: str
    bytes: int


class Present(msgspec.Struct, frozen=True):
    """What new pods of this host start as.

    Attributes:
        guest: None if it would have to be built first.
        qemu_version: empty if QEMU is not installed.
        accelerator: empty if that is not known yet.
    """

    guest: GuestImage | None
    qemu_version: str
    accelerator: str

    def why_stale(self, record: Template) -> str:
        """Why no new pod would start from a template; empty if it is good."""
        if self.guest is None:
            return "no guest is built from this host's files as they are now"
        if record.guest != self.guest.id:
            return f"its guest is {record.guest[:12]}, not {self.guest.id[:12]}"
        if not self.qemu_version:
            return "QEMU is not installed"
        if record.qemu_version != self.qemu_version:
            return f"it was saved by {record.qemu_version}, and this is {self.qemu_version}"
        if self.accelerator not in ("", record.accelerator):
            return f"it is for {record.accelerator.upper()}, and this host uses {self.accelerator.upper()}"
        size = (record.memory_bytes, record.cpus)
        machine = MachineConfig(self.guest, record.accelerator, *size, record.qemu_version, record.expandable)
        return "" if machine.key == record.key else "it was saved by another version of Holdfast"


def present(data: Path) -> Present:
    """What new pods of this host start as; builds and tries nothing."""
    try:
        version = accelerator.cached_qemu_version(data)
    except NotFound:
        return Present(guest_image.find(data), "", "")
    verdict = accelerator.known(data, accelerator.host_identity(version))
    return Present(guest_image.find(data), version, verdict.accelerator if verdict else "")


def survey(data: Path) -> list[Saved]:
    """Every template of a data folder, in the order of their keys."""
    folders = _folders(data)
    now = present(data) if folders else None
    return [_saved(data, folder, now) for folder in folders] if now else []


def _folders(data: Path) -> list[Path]:
    return sorted(path for path in (data / "templates").glob("[0-9a-f]*") if path.is_dir())


def _saved(data: Path, folder: Path, now: Present) -> Saved:
    size = template.disk_usage(folder)
    try:
        record = template.load(data, folder.name)[1]
    except Corrupt as error:
        return Saved(folder.name, error.why, size, None)
    except NotFound:
        return Saved(folder.name, "it has no record", size, None)
    return Saved(folder.name, now.why_stale(record), size, record)


def remove(data: Path, key: str) -> int:
    """Deletes a template; returns the bytes that it took.

    Running clones keep their open files and go on.

    Raises:
        NotFound: there is none.
        InUse: it is being built, or has been started from for too long a time.
    """
    templates = data / "templates"
    folder = templates / key
    if not folder.is_dir():
        raise NotFound("remove template", subject=key, code="template-not-found")
    deadline = time.monotonic() + _REMOVE_SECONDS
    while (freed := _try_to_remove(templates, key)) is None:
        if time.monotonic() > deadline:
            why = "a process is building it, or starting a pod from it"
            raise InUse("remove template", subject=key, why=why, code="template-busy")
        time.sleep(_POLL_SECONDS)
    return freed


def _try_to_remove(templates: Path, key: str) -> int | None:
    """Removes all that there is of a template, the lock included; None if somebody holds that."""
    lock_fd = template.try_lock(templates, key, fcntl.LOCK_EX)
    if lock_fd < 0:
        return None
    try:
        freed = template.sweep(templates, key)
        folder = templates / key
        if folder.is_dir():
            freed += template.disk_usage(folder)
            template.discard(folder)
        (templates / f".{key}.lock").unlink()
        return freed
    finally:
        os.close(lock_fd)


# -- what nobody needs ------------------------------------------------------------------------------


def collect(data: Path, templates_in_use: Collection[str], guests_in_use: Collection[str]) -> list[Freed]:
    """Removes stale templates, guests that are not the present one, and what was left half made.

    Args:
        templates_in_use, guests_in_use: keys and ids of what pods run from; they stay.
    """
    if not (data / "templates").is_dir() and not (data / "guests").is_dir():
        return []
    guests = {path.name for path in (data / "guests").glob("[0-9a-f]*")}
    freed = []
    kept = set(guests_in_use)
    for saved in survey(data):
        size = None
        if saved.stale and saved.key not in templates_in_use:
            size = _try_to_remove(data / "templates", saved.key)
        if size is not None:
            freed.append(Freed("template", saved.key, saved.stale, size))
        elif saved.record:
            kept.add(saved.record.guest)
    freed += _sweep(data)
    freed += _collect_guests(data, guests, kept)
    return freed


def _sweep(data: Path) -> Iterator[Freed]:
    """What builders left that are dead, and locks of templates that are gone."""
    templates = data / "templates"
    keys = {path.name.split(".")[1] for path in templates.glob(".[0-9a-f]*.*")}
    for key in sorted(keys - {path.name for path in _folders(data)}):
        if size := _try_to_remove(templates, key):
            yield Freed("leftover", key, "its builder is dead", size)
    for folder in _folders(data):
        lock_fd = template.try_lock(templates, folder.name, fcntl.LOCK_EX)
        if lock_fd < 0:
            continue
        try:
            if size := template.sweep(templates, folder.name):
                yield Freed("leftover", folder.name, "its builder is dead", size)
        finally:
            os.close(lock_fd)


def _collect_guests(data: Path, known: set[str], kept: set[str]) -> Iterator[Freed]:
    """Those that were there before it was asked what is used: what is built meanwhile stays."""
    now = guest_image.find(data)
    guests = data / "guests"
    keep = {path.name for path in guests.glob("[0-9a-f]*")} - known | kept | ({now.id} if now else set())
    sizes = {name: template.disk_usage(guests / name) for name in known - keep}
    for name in guest_image.prune(data, keep) if sizes else []:
        yield Freed("guest", name, "it is not what this host would build now", sizes[name])
