"""Pods that have started before anybody wants them: who wants one then waits for no machine.

A *ready* pod is one with a name that nobody can give, ``.pool-<what it is>-<number>``, whose machine runs and waits; it
ends with the process that keeps the pool.  Who takes it gives it its name and becomes its owner (see
``Service._take``).  Of several who try at once, one gets it.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import holdfast
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.pod import early
from holdfast.pod.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.pod.messages import PodRequest

PREFIX = early.POOL
_TAKE_SECONDS = 10.0
_START_SECONDS = 300.0
#: After a pod could not be made, before the next try: longer each time, up to the second.
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
MOST = 256


def prefix_of(request: PodRequest) -> str:
    """How the names of ready pods begin that will do for a request."""
    parts = (holdfast.__version__, os.path.realpath(request.data), request.memory_bytes, request.cpus)
    return f"{PREFIX}{zlib.crc32(repr(parts).encode()):08x}-"


def is_for(request: PodRequest) -> bool:
    """Whether a ready pod can do for a request at all."""
    plain = msgspec.structs.replace(
        request, name="", ephemeral=False, writable_shares=True, memory_bytes=0, cpus=1, pooled=False
    )  # fmt: skip
    return plain == type(request)("", request.root, request.data, memory_bytes=0)


def take(request: PodRequest) -> Client | None:
    """A ready pod that has become the one that was asked for, or None if there is none.

    Raises:
        InUse: a pod of this name exists.
    """
    if not is_for(request):
        return None
    root, beginning = Path(request.root), prefix_of(request)
    try:
        names = [entry.name for entry in os.scandir(root / "pods") if entry.name.startswith(beginning)]
    except FileNotFoundError:
        return None
    for name in names:
        client = None
        try:
            client = Client.connect(root, name)
            client.request("take", {"request": msgspec.to_builtins(request)}, _TAKE_SECONDS)
        except HoldfastError as error:
            if client is not None:
                client.close()
            if error.code == "pod-exists":
                raise
            continue  # another has taken it, or it is not ready yet
        return client
    return None


class Pool:
    """Keeps pods ready.  Owns them until they are taken; use it with ``with``.

    Args:
        request: what they are to be; its name does not count.
        size: how many.
        launch: starts a monitor; see :func:`holdfast.pod.launch.start_monitor`.
        say: called with each line about what goes wrong.
    """

    def __init__(
        self, request: PodRequest, size: int, launch: Callable[[PodRequest], Client], say: Callable[[str], None]
    ) -> None:  # fmt: skip
        if not 1 <= size <= MOST:
            raise InvalidInput("keep pool", subject=f"{size} pods", why=f"it has 1 to {MOST}", code="pool-size")
        if not is_for(msgspec.structs.replace(request, name="")):
            raise InvalidInput("keep pool", why="pods that are ready are plain ones in machines", code="pool-kind")
        self._request = request
        self._size = size
        self._launch = launch
        self._say = say
        self._ready: dict[str, Client] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Those that are ready."""
        return list(self._ready)

    def keep(self, stop_fd: int) -> None:
        """Keeps the pool full until ``stop_fd`` is readable."""
        pause, not_before = _PAUSE_S, 0.0
        while True:
            missing = len(self._ready) < self._size
            if missing and time.monotonic() >= not_before:
                try:
                    self.add()
                    pause = _PAUSE_S
                except HoldfastError as error:
                    self._say(f"no pod could be made ready, the next try is in {pause:g} s: {error}")
                    not_before, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S)
            waits = max(0.0, not_before - time.monotonic()) if missing else None
            fds: dict[int, str] = {client.fileno(): name for name, client in self._ready.items()}
            readable, _, _ = select.select([stop_fd, *fds], [], [], waits if len(self._ready) < self._size else None)
            if stop_fd in readable:
                return
            for fd in readable:  # all that its monitor says is that somebody has it, or that it has ended
                self._ready.pop(fds[fd]).close()

    def add(self) -> str:
        """Makes one more pod ready; returns its name."""
        name = f"{prefix_of(self._request)}{os.urandom(4).hex()}"
        request = msgspec.structs.replace(self._request, name=name, ephemeral=True, pooled=True)
        client = self._launch(request)
        try:
            client.request("warm", {}, _START_SECONDS)
        except BaseException:
            client.close()
            raise
        self._ready[name] = client
        return name

    def close(self) -> None:
        """Ends those that nobody has taken, and waits until they are gone."""
        for client in self._ready.values():
            client.shut_down()
        for client in self._ready.values():
            with contextlib.suppress(HoldfastError):
                client.wait_closed(30, unless="taken")  # by somebody, a moment ago
            client.close()
        self._ready.clear()
