"""A pod's monitor, as whoever uses the pod has it: started, waited for, and ended."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import HoldfastError, InvalidInput, ProtocolError, TimedOut, from_dict
from holdfast.pod.client import Client
from holdfast.pod.launch import launch
from holdfast.pod.messages import PodRequest
from holdfast.storage.journal import Journal

if TYPE_CHECKING:
    from holdfast.pod.snapshot import Snapshot

START_SECONDS = 300.0
#: Of a pod that writes back: its monitor ends a guest that does nothing, so this is a last resort.
_REMOVE_SECONDS = 900
_END_SECONDS = 5.0


class Monitor:
    """The monitor of one pod, and the connection to it.

    Attributes:
        detached: the pod outlives the connection.
    """

    def __init__(self, name: str, root: Path, client: Client, *, detached: bool) -> None:
        self.name = name
        self.root = root
        self.client = client
        self.detached = detached

    def wait_for_start(self) -> None:
        """Returns when the pod runs.

        Raises:
            HoldfastError: it could not be started; nothing of it is left.
        """
        try:
            self.client.request("start", {}, START_SECONDS)
        except BaseException as error:
            if self.detached:  # it waits to be asked, and nobody else knows of it yet
                with contextlib.suppress(HoldfastError):
                    self.remove()
            self._abandon()
            raise self.better(error) from None

    def remove(self) -> None:
        """Ends the pod and everything in it; returns when nothing of it is left.

        Raises:
            NotReleased: something could not be let go of.
        """
        if self.client.closed:
            return
        try:
            self.client.request("remove", {}, 60)
            ended_in_time = self.client.wait_closed(_REMOVE_SECONDS)
        except ProtocolError:
            ended_in_time = True
        if not ended_in_time:
            raise TimedOut(
                "remove pod", subject=self.name, why=f"it has not ended within {_REMOVE_SECONDS} s",
                code="pod-not-ended", hint="try again; holdfast pod inspect says what it is",
            )  # fmt: skip
        ended = self.client.last_event("ended")
        self._abandon()
        for error in (ended or {}).get("errors", ()):
            raise from_dict(error)

    def close(self) -> None:
        """Ends the pod, unless it is detached: then only this connection."""
        if self.detached:
            self.client.close()
        else:
            self.remove()

    def undo(self) -> None:
        """Ends a pod of which nothing is to be left, whether or not it has started."""
        self.detached = False  # what a dead monitor has left is waited for
        with contextlib.suppress(HoldfastError):
            if self.client.closed:  # one that did not start, and waits for somebody to ask why
                self.client = Client.connect(self.root, self.name)
            self.remove()
        self._abandon()

    def _abandon(self) -> None:
        """Closes the connection and lets go of what a monitor that died has left."""
        if not self.client.closed and not self.detached:
            # An ephemeral pod's monitor ends when this connection does; its last act is to close its side.
            self.client.shut_down()
            self.client.wait_closed(30)
        self.client.close()
        with Journal(self.root) as journal:
            # A killed monitor's connection ends a moment before its last child does, which may have its lock open.
            deadline = time.monotonic() + (0 if self.detached else _END_SECONDS)
            while (self.root / "pods" / self.name).is_dir() and not journal.collect(self.name):
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.01)

    def better(self, error: BaseException) -> BaseException:
        """What has gone wrong, said better if it is that the monitor has died."""
        if isinstance(error, ProtocolError) and error.code == "monitor-died":
            return HoldfastError(
                "run pod", subject=self.name, why="its monitor has died", code="monitor-died",
                hint="what it held has been let go of; the machine ended with it",
            )  # fmt: skip
        return error


def start(request: PodRequest, template: str | None) -> Client:
    """Starts a pod: afresh, or from a template that holds what runs; see :class:`holdfast.Pod`."""
    return launch(request) if template in (None, "none") else _start_from(template, request)


def _start_from(template: str, request: PodRequest) -> Client:
    """Starts a pod from a template that holds what runs.

    Raises:
        InvalidInput: another machine was asked for than the one that it is.
    """
    from holdfast.pod import templates

    with templates.snapshot_of(Path(request.data), template) as snapshot:
        record = snapshot.record()
        machine = record.machine
        memory_bytes, cpus, plain = machine.memory_bytes, machine.cpus, PodRequest("", "", "")
        asked = (
            (request.memory_bytes not in (memory_bytes, plain.memory_bytes), f"{memory_bytes >> 20}M of memory"),
            (request.cpus not in (cpus, plain.cpus), f"{cpus} processors"),
            (request.isolation != "vm", "a machine"),
            (bool(request.pmem.count) or (request.ports and not machine.expandable), "no places for devices"),
            (not request.writable_shares and record.writable_shares, "a right to writable shares"),
        )
        for is_other, what in asked:
            if is_other:
                raise InvalidInput(
                    "start pod", subject=f"template {template}", why=f"it has {what}", code="template-differs",
                    hint="leave out what says otherwise",
                )  # fmt: skip
        request = msgspec.structs.replace(
            request, memory_bytes=memory_bytes, cpus=cpus, ports=False, writable_shares=record.writable_shares,
            template=template,
        )  # fmt: skip
        return launch(request, snapshot)


def go_on(name: str, snapshot: Snapshot, root: Path, data: Path, *, detached: bool) -> Client:
    """Starts a pod that goes on from a snapshot."""
    record = snapshot.record()
    request = PodRequest(
        name, str(root), str(data), memory_bytes=record.machine.memory_bytes, cpus=record.machine.cpus,
        ephemeral=not detached, writable_shares=record.writable_shares,
    )  # fmt: skip
    return launch(request, snapshot)
