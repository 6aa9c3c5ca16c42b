"""Lets many change a pod at once, or one freeze it, who finds nothing half done; and nothing changes meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Gate:
    """Open for everybody, or closed by one who waits until all have left."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._closed = False

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """For what changes the pod."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            await asyncio.shield(asyncio.ensure_future(self._tell()))

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """For who needs that nothing changes."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            try:
                await self._changed.wait_for(lambda: not self._inside)
            except BaseException:
                self._open()
                raise
        try:
            yield
        finally:
            self._closed = False
            await asyncio.shield(asyncio.ensure_future(self._tell()))

    def _open(self) -> None:
        self._closed = False
        self._changed.notify_all()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
