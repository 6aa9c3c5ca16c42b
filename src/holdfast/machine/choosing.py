"""Which machine a pod of this host gets, from what was asked for and from what there is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.errors import InvalidInput
from holdfast.machine import accelerator, guest_image
from holdfast.machine.config import MIN_MEMORY_BYTES, MOST_CPUS, MachineConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def choose_machine(
    data: Path, memory_bytes: int, cpus: int, expandable: bool, say: Callable[[str], None]
) -> MachineConfig:
    """The machine of that size; builds the guest, and tries the accelerator, where that was not done yet.

    Raises:
        InvalidInput: no guest boots in a machine of that size.
        NotFound: something is not installed.
    """
    if memory_bytes < MIN_MEMORY_BYTES:
        raise InvalidInput(
            "start machine", subject=f"{memory_bytes >> 20}M of memory", code="too-little-memory",
            why="a guest does not boot with so little", hint=f"at least {MIN_MEMORY_BYTES >> 20}M",
        )  # fmt: skip
    if not 1 <= cpus <= MOST_CPUS:
        raise InvalidInput(
            "start machine", subject=f"{cpus} processors", why=f"a machine has 1 to {MOST_CPUS}", code="cpus"
        )
    version = accelerator.cached_qemu_version(data)
    guest = guest_image.find(data) or await _build_guest(data, say)
    verdict = await accelerator.choose(data, guest, version, say)
    return MachineConfig(guest, verdict.accelerator, memory_bytes, cpus, version, expandable)


async def _build_guest(data: Path, say: Callable[[str], None]) -> guest_image.GuestImage:
    """Builds the guest in a thread, whose words reach the loop as the loop's own calls."""
    loop = asyncio.get_running_loop()

    def progress(text: str) -> None:
        loop.call_soon_threadsafe(say, text)

    return await asyncio.to_thread(guest_image.ensure, data, progress=progress)
