"""Letting go of everything that a pod holds: cleanly where data could be lost, at once where it could not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError, NotReleased, TimedOut

if TYPE_CHECKING:
    from holdfast.machine.sandbox import PodSandbox
    from holdfast.storage.engine import Engine

#: Less than this, a process writes to wake its own threads, and the like.
_NOISE_BYTES = 1 << 16
#: How long a guest that writes nothing may take to unmount the user's disks when its pod ends.
_CLEAN_SECONDS = 20.0


async def release_cleanly(engine: Engine, machine: PodSandbox, pod: str) -> list[Exception]:
    """Unmounts what could lose writes; returns what could not be, for then something may be lost.

    A guest that neither finishes nor writes anything for a while is given up.
    """

    async def release() -> list[Exception]:
        # What a container kept busy is free when it is gone.
        return await release_all(engine) and await release_all(engine)

    releasing = asyncio.ensure_future(release())
    written = (-1, -1)
    try:
        while not (await asyncio.wait({releasing}, timeout=_CLEAN_SECONDS))[0]:
            disks = sum([writes for _, writes in (await machine.traffic()).values()])
            now = (disks, _written_by(machine.pid) // _NOISE_BYTES)  # shares are written to by the process itself
            if now == written:
                raise TimedOut("write back", why=f"the guest has written nothing for {_CLEAN_SECONDS:g} s")
            written = now
        return releasing.result()
    except HoldfastError as error:
        releasing.cancel()
        return [
            NotReleased(
                "end pod", subject=pod, why=f"its disks were not unmounted: {error}", code="unclean-end",
                hint="check the disks and shares that it could write to",
            )
        ]  # fmt: skip


async def release_all(engine: Engine) -> list[Exception]:
    """Lets go for all holders side by side; nothing is in the way of the others."""
    results = await asyncio.gather(*map(engine.release, engine.held()), return_exceptions=True)
    return [result for result in results if isinstance(result, Exception)]


def _written_by(pid: int) -> int:
    """Bytes that a process has written, to anything (proc(5), io); 0 if it cannot be known."""
    try:
        with open(f"/proc/{pid}/io") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))
    except OSError:
        return 0
