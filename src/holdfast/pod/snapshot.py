"""A frozen pod: a record of everything that its monitor knew, and descriptors of its RAM, its devices and its disks.

While it is handed on it has no name anywhere: when nobody has its descriptors open any more, it is gone, whoever died.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.errors import Corrupt, MachineFailed
from holdfast.linux import syscalls
from holdfast.machine.config import MachineConfig  # noqa: TC001  msgspec reads the types
from holdfast.pod.messages import ContainerInfo  # noqa: TC001
from holdfast.storage.frozen import FrozenStorage  # noqa: TC001
from holdfast.storage.restore import SavedContainer  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT_VERSION = 1


class FrozenContainers(msgspec.Struct, frozen=True):
    """What is known of a pod's containers.

    Attributes:
        specs: of those that run, with the guest's paths.
        processes: those whose end has not been dealt with -> exit status, -1 while they run.
        execs: how many there have been.
        mounts: of those that run, as they were asked for; of one from a file of an earlier Holdfast there is nothing.
    """

    infos: tuple[ContainerInfo, ...]
    specs: dict[str, dict[str, Any]]
    processes: dict[str, int]
    execs: int
    mounts: tuple[SavedContainer, ...] = ()


class FrozenAttached(msgspec.Struct, frozen=True):
    """What was attached by request: holder -> path in the guest, container, destination."""

    attached: dict[str, tuple[str, str, str]]
    count: int


class FrozenPod(msgspec.Struct, frozen=True):
    """The record.

    Attributes:
        pod: name of the pod that was frozen.
        frozen_ns: when, since the epoch.
    """

    version: int
    pod: str
    frozen_ns: int
    machine: MachineConfig
    writable_shares: bool
    storage: FrozenStorage
    containers: FrozenContainers
    attached: FrozenAttached


class _Head(msgspec.Struct, frozen=True):
    """What a record of every version has."""

    version: int
    pod: str


class Snapshot:
    """A frozen pod in this process.  Owns its descriptors: of the record, RAM, the device state, the disks' files."""

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = list(fds)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes everything; a second call does nothing."""
        while self.fds:
            os.close(self.fds.pop())

    @classmethod
    def make(cls, record: FrozenPod, ram_fd: int, state_fd: int, files: Sequence[int]) -> Snapshot:
        """From a record and descriptors, which become its own."""
        record_fd = os.memfd_create("record", os.MFD_CLOEXEC)
        data = msgspec.msgpack.encode(record)
        while data:
            data = data[os.write(record_fd, data) :]
        return cls([record_fd, ram_fd, state_fd, *files])

    @classmethod
    def of_process(cls, pid: int, fds: Sequence[int]) -> Snapshot:
        """Copies of descriptors that another process has open (pidfd_getfd(2), Linux 5.6).

        Raises:
            MachineFailed: it is gone, or has closed them.
        """
        found = cls([])
        try:
            pidfd = os.pidfd_open(pid)
            try:
                for fd in fds:
                    found.fds.append(syscalls.pidfd_getfd(pidfd, fd))
            finally:
                os.close(pidfd)
        except OSError as error:
            found.close()
            raise MachineFailed("take over snapshot", subject=f"process {pid}", why=error) from None
        return found

    @property
    def ram_fd(self) -> int:
        """Of the file that RAM is to map privately."""
        return self.fds[1]

    @property
    def state_fd(self) -> int:
        """Of the device state."""
        return self.fds[2]

    def file(self, number: int) -> int:
        """Of one of the disks' files."""
        return self.fds[3 + number]

    def record(self) -> FrozenPod:
        """The record, checked.

        Raises:
            Corrupt: it is of another version, or damaged.
        """
        data = os.pread(self.fds[0], os.fstat(self.fds[0]).st_size, 0)
        try:
            # First what every version has: another one may be otherwise in all the rest.
            head = msgspec.msgpack.decode(data, type=_Head)
            if head.version != FORMAT_VERSION:
                why = f"its format is version {head.version}, not {FORMAT_VERSION}"
                raise Corrupt("read snapshot", subject=head.pod, why=why, code="snapshot-version")
            return msgspec.msgpack.decode(data, type=FrozenPod)
        except msgspec.DecodeError as error:
            raise Corrupt("read snapshot", why=error, code="snapshot-damaged") from None
