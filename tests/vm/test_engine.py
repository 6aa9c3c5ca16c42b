"""The storage engine on real machines: the suite that the fake one passes, too."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from holdfast.storage import scratch
from tests.conformance import EngineConformance
from tests.vm.test_machine import cloned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox
    from tests.conformance import Factory


@pytest.fixture
def sandbox_factory(data: Path, tmp_path: Path) -> Factory:
    @contextlib.asynccontextmanager
    async def factory(export: str) -> AsyncIterator[Sandbox]:
        assert export == str(tmp_path / "export")
        async with cloned(data, tmp_path) as machine:
            yield machine

    return factory


class TestEngineOnVm(EngineConformance):
    @pytest.fixture(autouse=True)
    def _prepared_scratch(self, data: Path, tmp_path: Path) -> None:
        """What scratch disks are copied from, made once."""
        (tmp_path / "data").mkdir()
        os.close(scratch.formatted(data, 16 << 20))
        os.symlink(data / "scratch", tmp_path / "data" / "scratch")
