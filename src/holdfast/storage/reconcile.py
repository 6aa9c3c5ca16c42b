"""What the journal says of a pod's machine, beside what the machine itself says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from holdfast.storage.journal import HeldRow, Journal


class Places(Protocol):
    """What is asked of a machine."""

    async def occupied(self) -> set[str]:
        """``slot 0:3``, ``pmem 0``, ``port 1`` and so on, of everything that is plugged in."""


async def reconcile(machine: Places, journal: Journal, pod: str) -> dict[str, list[str]]:
    """``unknown``: places that only the machine says are occupied; ``missing``: those that only the journal does.

    The pod goes on meanwhile, so what is just coming or going counts as neither.
    """
    before = journal.held(pod)
    occupied = await machine.occupied()
    after = journal.held(pod)
    known = {_place(row) for row in (*before, *after)}
    held = {_place(row) for row in before if row.state == "held"} & {_place(row) for row in after}
    # A device of persistent memory stays when its last layer has gone: QEMU does not take it out.
    unknown = {place for place in occupied - known if not place.startswith("pmem ")}
    return {"unknown": sorted(unknown), "missing": sorted(held - occupied - {""})}


def _place(row: HeldRow) -> str:
    match row.kind:
        case "attachment":
            return f"slot {row.detail.get('slot')}"
        case "pmem":
            return f"pmem {row.detail.get('device')}"
        case "pci":
            return f"port {row.detail.get('port')}"
    return ""
