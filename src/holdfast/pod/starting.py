"""Starting a pod's sandbox: namespaces, a clone of a template, or a machine that boots; and what it sees of shares."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from holdfast.errors import InUse
from holdfast.linux import syscalls
from holdfast.linux.fds import OwnedFd
from holdfast.machine import cgroups, migration, namespace, template, vm
from holdfast.machine.choosing import choose_machine
from holdfast.storage.journal import Journal, MachineRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.machine.config import MachineConfig
    from holdfast.machine.sandbox import PodSandbox
    from holdfast.pod.messages import PodRequest


class Place(NamedTuple):
    """Where a pod is: its folder, and in it that of its shares and what the guest is served of that."""

    folder: Path

    @property
    def export(self) -> Path:
        """Shares are bound here."""
        return self.folder / "export"

    @property
    def served(self) -> Path:
        """The guest's view of it."""
        return self.folder / "served"

    @property
    def console_log(self) -> str:
        """What the guest prints."""
        return str(self.folder / "console.log")

    def mount(self) -> None:
        """Mounts the folder that shares are bound in, and the view of it that the guest is served.

        The view is read-only and a slave: shares appear in it with their own access, and nothing else can be
        made there.  A guest that could, might put a link where the next share is about to be bound.
        """
        export, served = str(self.export), str(self.served)
        self.export.mkdir(mode=0o700)
        self.served.mkdir(mode=0o700)
        syscalls.mount("holdfast", export, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=1m")
        syscalls.mount("none", export, "", syscalls.MS_PRIVATE)
        syscalls.mount("none", export, "", syscalls.MS_SHARED)
        syscalls.mount(export, served, "", syscalls.MS_BIND)
        syscalls.mount("none", served, "", syscalls.MS_SLAVE)
        syscalls.mount("none", served, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)

    def unmount(self) -> None:
        """Takes both away."""
        for mounted in (self.served, self.export):
            with contextlib.suppress(OSError):
                syscalls.umount(str(mounted), syscalls.MNT_DETACH)


class Started(NamedTuple):
    """A sandbox, what its machine is (None without one), and whether that has booted."""

    sandbox: PodSandbox
    machine: MachineConfig | None = None
    booted: bool = False


async def start(
    config: PodRequest, place: Place, journal: Journal, lock_fd: int, say: Callable[[str], None]
) -> Started:  # fmt: skip
    """Starts the kind of sandbox that was asked for, and never the other one.

    Args:
        lock_fd: the pod's lock.  The kernel closes a dead monitor's files before it kills what is in its namespace, so
            the sandbox holds it, too: nobody gets a lease on a disk that it can still write to.
        say: takes each line about slow work.
    """
    if config.isolation == "namespace":
        return Started(await _start_namespaces(config, place, lock_fd))
    data = Path(config.data)
    machine = await choose_machine(data, config.memory_bytes, config.cpus, config.ports or bool(config.pmem.count), say)
    row = MachineRow(config.name, config.data, machine.guest.id, machine.key)
    if not config.cold:
        try:
            async with template.held(data, machine, say, wait=False) as (folder, _):
                journal.add_machine(row)
                clone = await template.clone(
                    folder, machine, export=str(place.served), console_log=place.console_log, hold_fd=lock_fd,
                    hostname=config.name,
                )  # fmt: skip
                return Started(clone, machine)
        except InUse as error:
            if error.code != "template-busy":
                raise
            say(f"booting without a template: {error.why}")
    journal.add_machine(msgspec.structs.replace(row, template=""))
    return Started(await _boot(config, machine, place, lock_fd), machine, booted=True)


async def _boot(config: PodRequest, machine: MachineConfig, place: Place, lock_fd: int) -> vm.VirtualMachine:
    """Boots a machine, saves it to memory, and goes on from there: so a pod that has booted can be forked like others.

    That takes a twentieth of the boot.
    """
    with OwnedFd(os.memfd_create("ram")) as ram, OwnedFd(os.memfd_create("state")) as state:
        os.ftruncate(ram.fileno(), config.memory_bytes)
        start = partial(
            vm.start, machine, ram_path="", ram_fd=ram.fileno(), export=str(place.served),
            console_log=place.console_log, hold_fd=lock_fd,
        )  # fmt: skip
        booted = await start(ram_shared=True)
        try:
            await migration.save(booted.qmp, state.fileno())
        finally:
            await booted.close()
        os.lseek(state.fileno(), 0, os.SEEK_SET)
        return await start(ram_shared=False, state_fd=state.fileno(), hostname=config.name)


async def _start_namespaces(config: PodRequest, place: Place, lock_fd: int) -> PodSandbox:
    cgroup = cgroups.of_pod(config.root, config.name)
    cgroups.remove(cgroup)  # what is left of a pod of this name, whose monitor was killed
    runtime = cgroups.choose_runtime()
    return await namespace.start(
        export=str(place.export), console_log=place.console_log, cgroup=cgroup,
        runtime=(runtime.path, *runtime.options), hold_fd=lock_fd,
    )  # fmt: skip
