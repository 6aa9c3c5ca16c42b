"""The storage engine on a fake machine: the suite that every sandbox passes, and what only a fake can do."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import GuestFailed, HoldfastError, NotReleased
from holdfast.storage import acquisition as acquisition_module
from tests.conformance import EngineConformance, Pod
from tests.fakes import FakeSandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from holdfast.machine.sandbox import Sandbox


@pytest.fixture
def sandbox_factory():
    @contextlib.asynccontextmanager
    async def factory(export: str) -> AsyncIterator[Sandbox]:
        yield FakeSandbox(export)

    return factory


class TestEngineOnFake(EngineConformance):
    def make_disk(self, path: Path) -> None:
        path.write_bytes(b"filesystem".ljust(4096, b"\0"))

    make_layer = make_disk

    def scratch_bytes(self, data: Path) -> int:
        (data / "scratch").mkdir(parents=True, exist_ok=True)
        self.make_disk(data / "scratch" / f"{16 << 20}.ext4")
        return 16 << 20

    async def guest_mounts(self, sandbox: Sandbox) -> list[str]:
        assert isinstance(sandbox, FakeSandbox)
        return list(sandbox.mounts)

    # -- what only a fake can do --------------------------------------------------------------

    @pytest.mark.parametrize("answer", [None, [], {}, {"path": "/run/mounts/scsi/m1"}, {"path": 7}])
    def test_a_guest_that_answers_nonsense(self, run, monkeypatch, answer):
        async def test(pod: Pod) -> None:
            async def nonsense(*_: object) -> object:
                return answer

            with monkeypatch.context() as patch:
                patch.setattr(pod.sandbox.inner, "request", nonsense)
                with pytest.raises(GuestFailed, match="nonsense"):
                    await pod.prepare("a", pod.mount(pod.disk()))
            await pod.expect_nothing()

        run(test)

    def test_a_disk_without_a_filesystem(self, run):
        async def test(pod: Pod) -> None:
            (pod.folder / "empty").write_bytes(bytes(4096))
            with pytest.raises(GuestFailed, match="no known filesystem"):
                await pod.prepare("a", pod.mount(pod.folder / "empty"))
            await pod.expect_nothing()

        run(test)

    def test_what_the_machine_gets_is_a_descriptor_of_its_own(self, run):
        async def test(pod: Pod) -> None:
            held = await pod.prepare("a", pod.mount(pod.disk(), read_only=True))
            [disk] = pod.sandbox.inner.disks.values()
            status = pod.disk().stat()
            assert disk.identity == (status.st_dev, status.st_ino)
            assert disk.read_only
            assert pod.sandbox.inner.mounts[held.paths["m0"]].read_only

        run(test)

    def test_a_layer_that_an_overlay_uses_is_not_let_go_of(self, run):
        """What the fake must do for the suite's order to mean something."""

        async def test(pod: Pod) -> None:
            await pod.engine.prepare("a", pod.container())
            pod.sandbox.fail("Remove CombinedLayers")
            with pytest.raises(NotReleased) as failure:
                await pod.engine.release("a")
            assert [type(cause) for cause in failure.value.causes] == [HoldfastError, *[NotReleased] * 3]
            assert len(await pod.sandbox.plugged()) == 3  # the overlay's; the user's disk is gone
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_scratch_disk_nobody_waits_for_any_more_is_closed(self, run, monkeypatch):
        async def test(pod: Pod) -> None:
            loop = asyncio.get_running_loop()
            began, go_on, copy = asyncio.Event(), asyncio.Event(), acquisition_module.scratch_disks.copy

            def slow(prepared: Path) -> int:
                fd = copy(prepared)
                loop.call_soon_threadsafe(began.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
                return fd

            monkeypatch.setattr(acquisition_module.scratch_disks, "copy", slow)
            task = asyncio.ensure_future(pod.engine.prepare("a", pod.container()))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await pod.expect_nothing()
            go_on.set()
            await loop.shutdown_default_executor()

        run(test)  # a descriptor that is left fails the test

    def test_snapshot(self, run):
        async def test(pod: Pod) -> None:
            assert pod.engine.snapshot().free_slots == 256
            steps = pod.container()
            await pod.engine.prepare("a", steps)
            status = pod.disk().stat()
            snapshot = pod.engine.snapshot()
            assert snapshot.free_slots == 252
            assert snapshot.containers == {"a"}
            assert snapshot.disks[status.st_dev, status.st_ino] is True
            assert snapshot.layers == {(str(pod.folder / "layer0"), ""), (str(pod.folder / "layer1"), "")}

        run(test)

    def test_has_writable(self, run):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk(), read_only=True))
            assert not pod.engine.has_writable()
            await pod.prepare("b", pod.mount(pod.disk("other-disk")))
            assert pod.engine.has_writable()

        run(test)
