"""QEMU's background jobs: waiting for their end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.errors import MachineFailed, TimedOut

if TYPE_CHECKING:
    from holdfast.machine.qmp import Qmp

_LONGEST_PAUSE_S = 0.05


async def wait_for_job(qmp: Qmp, job: str, seconds: float, *, failed: bool = False) -> None:
    """Waits for a job's end and dismisses it; one that is not there is success, and ``failed`` makes any end so.

    Raises:
        MachineFailed: it failed.
        TimedOut: it has not ended within ``seconds``, and goes on.
    """
    pause = 0.001
    for _ in range(int(seconds / _LONGEST_PAUSE_S)):
        found = next((j for j in await qmp.execute("query-jobs", {}) if j["id"] == job), None)
        if found is None:
            return
        if found["status"] == "concluded":
            await qmp.execute("job-dismiss", {"id": job})
            if "error" in found and not failed:
                raise MachineFailed(f"QEMU {found['type']}", subject=job, why=found["error"], code="job-failed")
            return
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    raise TimedOut("QEMU", subject=job, why=f"not done within {seconds:g} s")
