"""Saving a machine's state and starting from it.

A save is guest RAM in a file (the machine booted into it, shared) and the device state beside it.  The
state says nothing about RAM (QEMU's ``x-ignore-shared``), so it is small, and a clone maps the RAM file
privately: hundreds of clones share every page that none has written.

The machine must have nothing attached and no share mounted when it is saved: QEMU does not save a
machine whose guest has a 9p mount.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.errors import MachineFailed, TimedOut

if TYPE_CHECKING:
    from holdfast.machine.qmp import Qmp

_MIGRATE_SECONDS = 60.0
_FD_NAME = "state"


async def save(qmp: Qmp, state_fd: int) -> None:
    """Stops the machine and writes its device state.  It cannot go on afterwards: its RAM is the save's.

    Raises:
        MachineFailed: QEMU refused, or failed.
    """
    await _ignore_shared_ram(qmp)
    await qmp.execute("stop", {})
    await qmp.get_fd(_FD_NAME, state_fd)
    await qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
    await _wait(qmp, "save machine", ("completed",))


async def restore(qmp: Qmp, state_fd: int) -> None:
    """Loads device state into a machine that was started to wait for it, and lets the guest run.

    Raises:
        MachineFailed: the state does not fit or is damaged.
    """
    await _ignore_shared_ram(qmp)
    await qmp.get_fd(_FD_NAME, state_fd)
    await qmp.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
    await _wait(qmp, "restore machine", ("completed",))
    await qmp.execute("cont", {})


async def _ignore_shared_ram(qmp: Qmp) -> None:
    capability = {"capability": "x-ignore-shared", "state": True}
    await qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})


async def _wait(qmp: Qmp, what: str, good: tuple[str, ...]) -> None:
    """Asks until the migration has ended; it takes milliseconds, so the pauses are short ones."""
    pause = 0.001
    for _ in range(int(_MIGRATE_SECONDS / 0.02)):
        answer = await qmp.execute("query-migrate", {})
        status = answer.get("status", "none")
        if status in good:
            return
        if status in ("failed", "cancelled"):
            raise MachineFailed(what, why=answer.get("error-desc", status), code="state-refused")
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    raise TimedOut(what, why=f"QEMU has not finished within {_MIGRATE_SECONDS:g} s")
