"""The storage engine on the host's kernel, in namespaces: the suite that machines and the fake one pass, too."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from holdfast.linux import syscalls
from holdfast.machine import namespace
from holdfast.storage import scratch
from tests.conformance import EngineConformance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox
    from tests.conformance import Factory


@contextlib.contextmanager
def shared_folder(path: str) -> Iterator[None]:
    """The folder of shares, as a monitor has it: what is mounted in it shows up in the agent's namespace."""
    syscalls.mount("shares", path, "tmpfs")
    try:
        syscalls.mount("none", path, "", syscalls.MS_SHARED)
        yield
    finally:
        syscalls.umount(path, syscalls.MNT_DETACH)


@pytest.fixture
def sandbox_factory(tmp_path: Path) -> Factory:
    @contextlib.asynccontextmanager
    async def factory(export: str) -> AsyncIterator[Sandbox]:
        with shared_folder(export):
            log = str(tmp_path / "agent.log")
            yield await namespace.start(export=export, console_log=log, cgroup="", runtime=("/bin/false",))

    return factory


class TestEngineInNamespaces(EngineConformance):
    @pytest.fixture(autouse=True)
    def _prepared_scratch(self, tmp_path: Path) -> None:
        """What scratch disks are copied from."""
        (tmp_path / "data").mkdir()
        os.close(scratch.formatted(tmp_path / "data", 16 << 20))
