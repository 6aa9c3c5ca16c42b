"""What the storage engine must do on every kind of sandbox.

A test file makes a subclass of :class:`EngineConformance` whose name starts with ``Test``, with a fixture
``sandbox_factory``: it takes the export's folder and gives an asynchronous context manager of a running sandbox, which
is entered inside the test's event loop.  The methods at the top say what else differs between sandboxes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.errors import Exhausted, HoldfastError, InUse, InvalidInput, NotReleased
from holdfast.storage.description import describe
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.steps import (
    CombineLayers,
    FillVolume,
    MakeScratch,
    MountDisk,
    MountLayer,
    ShareDirectory,
    UseVolume,
)
from tests.fakes import Fault, Faulty

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.held import Held
    from holdfast.storage.steps import AnyStep

    Factory = Callable[[str], AbstractAsyncContextManager[Sandbox]]

SLOTS = 256
#: Where the guest mounts what the engine asks for.
KEPT_IN = ("/run/mounts/scsi/", "/run/mounts/shares/", "/run/mounts/volumes/", "/run/mounts/places/", "/run/gcs/c/")
ADDING = (
    "plug", "Add MappedVirtualDisk", "Add CombinedLayers", "Add PodVolume", "Add ImageVolume", "Add MappedDirectory",
)  # fmt: skip
REMOVING = (
    "Remove CombinedLayers", "Remove PodVolume", "Remove ImageVolume", "Remove MappedDirectory",
    "Remove MappedVirtualDisk", "Remove SCSIDevice", "unplug",
)  # fmt: skip
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="shares are bind mounts")


class Pod:
    """An engine on a sandbox whose steps can fail, with a journal."""

    def __init__(self, suite: EngineConformance, sandbox: Sandbox, journal: Journal, folder: Path) -> None:
        self.suite = suite
        self.sandbox = Faulty(sandbox)
        self.journal = journal
        self.folder = folder
        self.engine = Engine(self.sandbox, journal, "pod", folder / "data")

    def disk(self, name: str = "disk") -> Path:
        """A disk with a filesystem on it."""
        path = self.folder / name
        if not path.exists():
            self.suite.make_disk(path)
        return path

    def mount(
        self, path: Path | str, *, read_only: bool = False, id: str = "m0", options: tuple[str, ...] = ()
    ) -> MountDisk:
        """The step that a plan has for a disk."""
        status = os.stat(path)
        return MountDisk(id, str(path), status.st_dev, status.st_ino, read_only, "raw", False, "ext4", options)

    def container(self, *, share: bool = False) -> tuple[AnyStep, ...]:
        """The steps of a container with two layers, a scratch disk, a disk, volumes and, if asked for, a share."""
        layers = []
        for index in range(2):
            path = self.folder / f"layer{index}"
            if not path.exists():
                self.suite.make_layer(path)
            layers.append(MountLayer(f"layer{index}", str(path), f"sha256:{index}"))
        scratch = MakeScratch("scratch", self.suite.scratch_bytes(self.folder / "data"))
        steps: list[AnyStep] = [*layers, scratch, CombineLayers("root", ("layer0", "layer1"), "scratch")]
        steps += [self.mount(self.disk()), UseVolume("v0", "shared", "tmpfs", ("size=1m",)), FillVolume("v1", "/data")]
        if share:
            steps.append(self.share("share", "m1"))
        return tuple(steps)

    def share(self, name: str, id: str) -> ShareDirectory:
        """The step that a plan has for a directory."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        (path / "file").write_text("the user's")
        status = path.stat()
        return ShareDirectory(id, str(path), status.st_dev, status.st_ino, read_only=False)

    async def prepare(self, holder: str, *steps: AnyStep) -> Held:
        """See :meth:`Engine.prepare`."""
        return await self.engine.prepare(holder, steps)

    async def expect_nothing(self) -> None:
        """Nothing is held anywhere: slots, devices, mounts, rows, leases, the export."""
        assert self.engine.held() == []
        assert self.engine.attachments.items() == []
        assert self.engine.shares.items() == []
        assert self.engine.attachments.free == SLOTS
        assert self.journal.held("pod") == []
        assert self.journal.leases() == []
        assert os.listdir(self.sandbox.export) == []
        if not self.sandbox.died.done():
            assert await self.sandbox.plugged() == set()
            assert await self.suite.guest_mounts(self.sandbox.inner) == []

    @contextlib.contextmanager
    def other_pod(self, name: str = "other") -> Iterator[None]:
        """Another pod that lives as long as the block."""
        folder = self.journal.pods_folder / name
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        (folder / "lock").unlink()
        folder.rmdir()


async def reached(fault: Fault) -> None:
    """Waits until a step has come to its fault."""
    async with asyncio.timeout(30):
        await fault.reached.wait()


class EngineConformance:
    """The suite."""

    # -- what differs between sandboxes -------------------------------------------------------

    def make_disk(self, path: Path) -> None:
        """Makes a disk that the guest can mount."""
        with open(path, "wb") as file:
            file.truncate(1 << 20)
        subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", path], check=True)

    def make_layer(self, path: Path) -> None:
        """Makes a layer disk: a file or two in an erofs."""
        tree = path.with_suffix(".tree")
        tree.mkdir()
        (tree / path.name).write_text("in the layer")
        subprocess.run(["mkfs.erofs", "--quiet", path, tree], check=True, stdout=subprocess.DEVNULL)

    def scratch_bytes(self, data: Path) -> int:
        """The size of scratch disks; may put a prepared one into the data folder."""
        return 16 << 20

    async def guest_mounts(self, sandbox: Sandbox) -> list[str]:
        """What the guest has mounted for the engine."""
        table = (await sandbox.request("mounts", {}, 5))["mountinfo"]
        where = [line.split(" ")[4] for line in table.splitlines()]
        return [path for path in where if path.startswith(KEPT_IN)]

    async def kill(self, sandbox: Sandbox) -> None:
        """Lets the machine die."""
        await sandbox.close()

    # -- running ------------------------------------------------------------------------------

    @pytest.fixture
    def run(self, sandbox_factory: Factory, state_root: Path, tmp_path: Path) -> Callable[..., None]:
        """Runs an asynchronous test with a pod; at its end nothing may be left in the process either."""

        def run(test: Callable[[Pod], Awaitable[None]]) -> None:
            asyncio.run(self._with_pod(test, sandbox_factory, state_root, tmp_path))

        return run

    async def _with_pod(
        self, test: Callable[[Pod], Awaitable[None]], factory: Factory, root: Path, folder: Path
    ) -> None:
        export = folder / "export"
        export.mkdir()
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        with Journal(root) as journal:
            async with self._sandbox(factory, export) as sandbox:
                pod = Pod(self, sandbox, journal, folder)
                await test(pod)
            journal.forget_pod("pod")
        assert complaints == []

    @contextlib.asynccontextmanager
    async def _sandbox(self, factory: Factory, export: Path) -> AsyncIterator[Sandbox]:
        async with factory(str(export)) as sandbox:
            try:
                yield sandbox
            finally:
                await sandbox.close()

    # -- adding and removing ------------------------------------------------------------------

    def test_attach_and_detach_twice(self, run):
        async def test(pod: Pod) -> None:
            for _ in range(2):
                held = await pod.prepare("a", pod.mount(pod.disk()))
                assert held.paths == {"m0": "/run/mounts/scsi/m0"}
                assert await pod.suite.guest_mounts(pod.sandbox.inner) == ["/run/mounts/scsi/m0"]
                assert [row.state for row in pod.journal.held("pod")] == ["held"]
                assert pod.journal.leases() == [{"path": str(pod.disk()), "pod": "pod", "writable": True}]
                assert pod.engine.attachments.free == SLOTS - 1
                await pod.engine.release("a")
                await pod.expect_nothing()

        run(test)

    def test_a_container_s_storage(self, run):
        async def test(pod: Pod) -> None:
            held = await pod.prepare("a", *pod.container())
            assert held.paths["root"] == "/run/gcs/c/a/rootfs"
            assert len(set(held.paths.values())) == 7
            assert len(await pod.sandbox.plugged()) == 4
            described = describe(pod.engine)
            assert [a["kind"] for a in described["attachments"]].count("layer") == 2
            assert {a["slot"] for a in described["attachments"]} == {"0:0", "0:1", "0:2", "0:3"}
            assert all(a["holders"] == ["a"] and len(a["guest_paths"]) == 1 for a in described["attachments"])
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_volume_stays_and_its_views_go(self, run):
        """Each holder has a view of its own; how the first made it holds for all."""

        async def test(pod: Pod) -> None:
            first = await pod.prepare("a", UseVolume("m0", "shared", "tmpfs", ("size=1m",)))
            second = await pod.prepare("b", UseVolume("m0", "shared", "tmpfs", ("size=1m",), "a/folder"))
            assert first.paths != second.paths
            [volume] = describe(pod.engine)["volumes"]
            assert (volume["volume"], volume["holders"]) == ("shared", ["a", "b"])
            with pytest.raises(InUse) as failure:
                await pod.prepare("c", UseVolume("m0", "shared", "tmpfs", ("size=2m",)))
            assert failure.value.code == "volume-conflict"
            await pod.engine.release("a")
            await pod.engine.release("b")
            [volume] = describe(pod.engine)["volumes"]
            assert volume["guest_paths"] == []
            await pod.expect_nothing()

        run(test)

    @needs_root
    def test_a_share(self, run):
        async def test(pod: Pod) -> None:
            held = await pod.prepare("a", pod.share("dir", "m0"))
            assert held.paths == {"m0": "/run/mounts/shares/m0"}
            assert Path(pod.sandbox.export, "0/file").read_text() == "the user's"
            await pod.engine.release("a")
            await pod.expect_nothing()
            assert (pod.folder / "dir/file").read_text() == "the user's"

        run(test)

    def test_two_holders_share_one(self, run):
        async def test(pod: Pod) -> None:
            first = await pod.prepare("a", pod.mount(pod.disk()))
            second = await pod.prepare("b", pod.mount(pod.disk()))
            assert first.paths == second.paths
            assert pod.sandbox.steps.count("plug") == 1
            [(_, holders)] = pod.engine.attachments.items()
            assert holders == ["a", "b"]
            await pod.engine.release("a")
            assert pod.engine.attachments.free == SLOTS - 1
            assert await pod.suite.guest_mounts(pod.sandbox.inner) == ["/run/mounts/scsi/m0"]
            await pod.engine.release("b")
            await pod.expect_nothing()

        run(test)

    def test_other_options_are_another_mount_of_the_same_attachment(self, run):
        async def test(pod: Pod) -> None:
            disk = pod.disk()
            first = await pod.prepare("a", pod.mount(disk, options=("noatime", "nodev")))
            second = await pod.prepare("b", pod.mount(disk, options=("nodev", "noatime")))
            third = await pod.prepare("c", pod.mount(disk, options=("nosuid",)))
            assert first.paths == second.paths != third.paths
            assert pod.sandbox.steps.count("plug") == 1
            await pod.engine.release("a")
            await pod.engine.release("b")
            assert pod.sandbox.steps.count("unplug") == 0
            await pod.engine.release("c")
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("other", [("errors=remount-ro",), ("sync",), ()])
    def test_bug_e_other_options_of_the_filesystem_are_refused(self, run, other):
        """The kernel has one filesystem for both mounts, and drops what the second asks for without a word."""

        async def test(pod: Pod) -> None:
            disk = pod.disk()
            await pod.prepare("a", pod.mount(disk, options=("errors=continue", "nodev")))
            with pytest.raises(InUse) as failure:
                await pod.prepare("b", pod.mount(disk, options=other))
            assert failure.value.code == "mount-options"
            same = await pod.prepare("c", pod.mount(disk, options=("noexec", "errors=continue")))
            assert same.paths == {"m0": "/run/mounts/scsi/m1"}
            await pod.engine.release("c")
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_lease_lasts_as_long_as_any_attachment_of_the_file(self, run):
        """One file in two formats is two attachments, with one right to open it between them."""

        async def test(pod: Pod) -> None:
            step = pod.mount(pod.disk(), read_only=True)
            await pod.prepare("a", step)
            other = msgspec.structs.replace(step, disk_format="qcow2", block_dev=True)
            with contextlib.suppress(HoldfastError):  # QEMU finds that it is none, after the lease
                await pod.prepare("b", other)
            assert len(pod.journal.leases()) == 1
            await pod.engine.release("b")
            assert len(pod.journal.leases()) == 1
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_user_s_disk_does_not_join_a_layer(self, run):
        """Nobody has a lease on a layer: what reads the same file as a disk of the user's has one."""

        async def test(pod: Pod) -> None:
            pod.suite.make_layer(pod.folder / "layer")
            layer = MountLayer("layer", str(pod.folder / "layer"), "sha256:1")
            await pod.prepare("a", layer)
            step = msgspec.structs.replace(pod.mount(pod.folder / "layer", read_only=True), filesystem="erofs")
            await pod.prepare("b", step)
            assert [lease["writable"] for lease in pod.journal.leases()] == [False]
            await pod.engine.release("b")
            assert pod.journal.leases() == []
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_holder_holds_once_at_a_time(self, run):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            with pytest.raises(InUse, match="a: it holds some already"):
                await pod.prepare("a", pod.mount(pod.disk("other-disk")))
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_what_is_not_held_is_released_without_a_word(self, run):
        async def test(pod: Pod) -> None:
            await pod.engine.release("nobody")
            await pod.expect_nothing()

        run(test)

    # -- failing to add -----------------------------------------------------------------------

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("step", ADDING)
    def test_a_failure_leaves_nothing_and_the_same_works_when_tried_again(self, run, step, after):
        if "Directory" in step and os.geteuid() != 0:
            pytest.skip("shares are bind mounts")

        async def test(pod: Pod) -> None:
            steps = pod.container(share="Directory" in step)
            pod.sandbox.fail(step, after=after)
            with pytest.raises(HoldfastError, match=f"{step}: injected") as failure:
                await pod.engine.prepare("a", steps)
            assert failure.value.causes == ()
            await pod.expect_nothing()
            await pod.engine.prepare("a", steps)
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("method", ["intend", "lease", "hold"])
    def test_a_journal_that_fails(self, run, method, monkeypatch):
        async def test(pod: Pod) -> None:
            def fail(*_args: object, **_more: object) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(pod.journal, method, fail)
                with pytest.raises(OSError, match="No space left"):
                    await pod.prepare("a", pod.mount(pod.disk()))
            await pod.expect_nothing()
            await pod.prepare("a", pod.mount(pod.disk()))

        run(test)

    def test_bug_a_phantom_attachment(self, run):
        """A failed attach must neither keep its slot nor make the next one succeed without attaching."""

        async def test(pod: Pod) -> None:
            for _ in range(SLOTS + 1):
                pod.sandbox.fail("plug")
                with pytest.raises(HoldfastError, match="injected"):
                    await pod.prepare("a", pod.mount(pod.disk()))
            await pod.expect_nothing()
            await pod.prepare("a", pod.mount(pod.disk()))
            assert len(await pod.sandbox.plugged()) == 1

        run(test)

    def test_a_failure_whose_undoing_fails_stays_recorded_until_it_can_be_undone(self, run):
        async def test(pod: Pod) -> None:
            pod.sandbox.fail("Add MappedVirtualDisk")
            pod.sandbox.fail("unplug", always=True)
            with pytest.raises(HoldfastError, match="Add MappedVirtualDisk: injected; also: unplug: injected"):
                await pod.prepare("a", pod.mount(pod.disk()))
            assert len(await pod.sandbox.plugged()) == 1
            assert pod.engine.attachments.free == SLOTS - 1  # the device is still in it
            assert [row.state for row in pod.journal.held("pod")] == ["releasing"]
            assert len(pod.journal.leases()) == 1  # the machine still has it open
            with pytest.raises(HoldfastError, match="unplug: injected"):
                await pod.prepare("b", pod.mount(pod.disk()))
            pod.sandbox.heal()
            await pod.prepare("a", pod.mount(pod.disk("another")))
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_a_mount_whose_undoing_fails_is_undone_before_its_disk(self, run):
        async def test(pod: Pod) -> None:
            pod.sandbox.fail("Add MappedVirtualDisk", after=True)  # it is mounted, and the answer is lost
            pod.sandbox.fail("Remove MappedVirtualDisk")
            with pytest.raises(HoldfastError, match="also: Remove MappedVirtualDisk: injected"):
                await pod.prepare("a", pod.mount(pod.disk()))
            await pod.prepare("a", pod.mount(pod.disk()))
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("step", ["plug", "Add MappedVirtualDisk", "Add CombinedLayers"])
    def test_a_cancelled_attach_leaves_nothing(self, run, step):
        async def test(pod: Pod) -> None:
            steps = pod.container()
            fault = pod.sandbox.hold(step)
            task = asyncio.ensure_future(pod.engine.prepare("a", steps))
            await reached(fault)
            task.cancel()
            await asyncio.sleep(0)
            fault.proceed.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await pod.expect_nothing()
            await pod.engine.prepare("a", steps)

        run(test)

    def test_a_second_cancellation_does_not_stop_the_undoing(self, run):
        async def test(pod: Pod) -> None:
            pod.sandbox.fail("Add CombinedLayers")
            fault = pod.sandbox.hold("unplug")
            task = asyncio.ensure_future(pod.engine.prepare("a", pod.container()))
            await reached(fault)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fault.proceed.set()
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    # -- several at a time --------------------------------------------------------------------

    def test_bug_b_the_second_adder_waits_for_the_first(self, run):
        async def test(pod: Pod) -> None:
            fault = pod.sandbox.hold("plug")
            first = asyncio.ensure_future(pod.prepare("a", pod.mount(pod.disk())))
            await reached(fault)
            second = asyncio.ensure_future(pod.prepare("b", pod.mount(pod.disk())))
            await asyncio.wait({second}, timeout=0.02)
            assert not second.done()
            fault.proceed.set()
            assert (await first).paths == (await second).paths
            assert pod.sandbox.steps.count("plug") == 1
            await pod.engine.release("a")
            await pod.engine.release("b")
            await pod.expect_nothing()

        run(test)

    def test_bug_b_the_second_adder_shares_the_first_one_s_failure(self, run):
        async def test(pod: Pod) -> None:
            fault = pod.sandbox.hold("plug", HoldfastError("plug", why="injected"))
            tasks = [asyncio.ensure_future(pod.prepare(name, pod.mount(pod.disk()))) for name in "ab"]
            await reached(fault)
            fault.proceed.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(outcome) for outcome in outcomes] == ["plug: injected"] * 2
            await pod.expect_nothing()
            await pod.prepare("a", pod.mount(pod.disk()))

        run(test)

    @pytest.mark.parametrize("gives_up", ["a", "b", "ab"])
    def test_who_gives_up_waiting_holds_nothing(self, run, gives_up):
        async def test(pod: Pod) -> None:
            fault = pod.sandbox.hold("plug")
            tasks = {}
            for name in "ab":
                tasks[name] = asyncio.ensure_future(pod.prepare(name, pod.mount(pod.disk())))
                await reached(fault)
            await asyncio.sleep(0)
            for name in gives_up:
                tasks[name].cancel()
            await asyncio.sleep(0)
            fault.proceed.set()
            outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [
                n in gives_up for n in "ab"
            ]
            stays = [name for name in "ab" if name not in gives_up]
            assert pod.engine.held() == stays
            assert [holders for _, holders in pod.engine.attachments.items()] == ([stays] if stays else [])
            for name in stays:
                await pod.engine.release(name)
            await pod.expect_nothing()

        run(test)

    def test_who_releases_at_the_same_time_shares_the_outcome(self, run):
        async def test(pod: Pod) -> None:
            await pod.engine.prepare("a", pod.container())
            fault = pod.sandbox.hold("unplug")
            first = asyncio.ensure_future(pod.engine.release("a"))
            await reached(fault)
            second = asyncio.ensure_future(pod.engine.release("a"))
            await asyncio.wait({second}, timeout=0.02)
            assert not second.done()
            fault.proceed.set()
            await asyncio.gather(first, second)
            await pod.expect_nothing()

        run(test)

    def test_a_release_during_the_attach_leaves_nothing(self, run):
        async def test(pod: Pod) -> None:
            fault = pod.sandbox.hold("Add CombinedLayers")
            adding = asyncio.ensure_future(pod.engine.prepare("a", pod.container()))
            await reached(fault)
            releasing = asyncio.ensure_future(pod.engine.release("a"))
            await asyncio.sleep(0)
            fault.proceed.set()
            await releasing
            with pytest.raises(InUse, match="released meanwhile"):
                await adding
            await pod.expect_nothing()

        run(test)

    def test_a_release_that_is_given_up_goes_on(self, run):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            fault = pod.sandbox.hold("unplug")
            task = asyncio.ensure_future(pod.engine.release("a"))
            await reached(fault)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fault.proceed.set()
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    # -- failing to remove --------------------------------------------------------------------

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("step", REMOVING)
    def test_bug_c_a_failed_release_can_be_tried_again(self, run, step, after):
        """Counting down before the removal would let the retry believe that nothing is left to do."""
        if "Directory" in step and os.geteuid() != 0:
            pytest.skip("shares are bind mounts")

        async def test(pod: Pod) -> None:
            await pod.engine.prepare("a", pod.container(share="Directory" in step))
            for _ in range(2):
                pod.sandbox.fail(step, after=after)
                with pytest.raises(NotReleased, match=f"{step}: injected"):
                    await pod.engine.release("a")
                assert pod.engine.holds("a")
                assert pod.journal.held("pod") != [] or "Combined" in step or "Volume" in step
            await pod.engine.release("a")
            await pod.expect_nothing()
            await pod.engine.release("a")

        run(test)

    def test_a_failed_release_keeps_only_what_it_could_not_let_go_of(self, run):
        async def test(pod: Pod) -> None:
            steps = [pod.mount(pod.disk(f"disk{n}"), id=f"m{n}") for n in range(3)]
            await pod.prepare("a", *steps)
            pod.sandbox.fail("unplug")
            with pytest.raises(NotReleased, match=r"1 part.s. could not be released.*unplug: injected"):
                await pod.engine.release("a")
            assert [row.state for row in pod.journal.held("pod")] == ["releasing"]
            assert len(await pod.sandbox.plugged()) == 1
            assert pod.engine.attachments.free == SLOTS - 1
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_an_ignored_eject_keeps_the_slot_and_the_lease(self, run):
        """The slot is free when the device is gone, not when it was asked to go."""

        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            pod.sandbox.fail("unplug", always=True)
            for _ in range(3):
                with pytest.raises(NotReleased):
                    await pod.engine.release("a")
            assert pod.engine.attachments.free == SLOTS - 1
            disk = os.stat(pod.disk())
            with pod.other_pod("pod"), pytest.raises(InUse, match="pod pod has"):
                pod.journal.lease("thief", disk.st_dev, disk.st_ino, "disk", writable=True)
            pod.sandbox.heal()
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    def test_nobody_joins_what_is_half_detached(self, run):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            pod.sandbox.fail("unplug")
            with pytest.raises(NotReleased):
                await pod.engine.release("a")
            pod.sandbox.fail("unplug")
            with pytest.raises(HoldfastError, match="unplug: injected"):
                await pod.prepare("b", pod.mount(pod.disk()))
            await pod.prepare("b", pod.mount(pod.disk()))
            assert pod.sandbox.steps.count("plug") == 2
            await pod.engine.release("a")  # what it held is gone; b's is not touched
            assert [holders for _, holders in pod.engine.attachments.items()] == [["b"]]
            await pod.engine.release("b")
            await pod.expect_nothing()

        run(test)

    def test_release_goes_the_other_way(self, run):
        """The root filesystem first, then what it is made of; of each disk the guest's part before the host's."""

        async def test(pod: Pod) -> None:
            await pod.engine.prepare("a", pod.container())
            pod.sandbox.steps.clear()
            await pod.engine.release("a")
            steps = pod.sandbox.steps
            assert steps[:2] == ["Remove ImageVolume", "Remove CombinedLayers"]
            disks = ["Remove MappedVirtualDisk", "Remove SCSIDevice", "unplug"] * 4
            assert sorted(steps[2:]) == sorted([*disks, "Remove PodVolume"])
            for count in range(len(steps)):
                done = [steps[: count + 1].count(step) for step in REMOVING[-3:]]
                assert done == sorted(done, reverse=True)

        run(test)

    def test_what_is_added_later_is_released_first(self, run):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            order: list[str] = []

            async def stop() -> None:
                order.extend(["container", *(step for step in pod.sandbox.steps if step.startswith("Remove"))])

            pod.engine.also_release("a", "container", stop)
            await pod.engine.release("a")
            assert order == ["container"]

        run(test)

    # -- limits -------------------------------------------------------------------------------

    def test_every_slot_taken_then_recovery(self, run):
        async def test(pod: Pod) -> None:
            steps = [pod.mount(pod.disk(f"disk{n}"), id=f"m{n}") for n in range(SLOTS)]
            held = await pod.prepare("many", *steps)
            assert len(set(held.paths.values())) == SLOTS
            assert len(await pod.sandbox.plugged()) == SLOTS
            with pytest.raises(Exhausted, match="all 256 SCSI slots are taken") as failure:
                await pod.prepare("one", pod.mount(pod.disk("one-more")))
            assert failure.value.code == "no-free-slot"
            await pod.prepare("shared", steps[0])  # needs no slot of its own
            await pod.engine.release("shared")
            await pod.engine.release("many")
            await pod.expect_nothing()
            await pod.prepare("one", pod.mount(pod.disk("one-more")))

        run(test)

    # -- death --------------------------------------------------------------------------------

    def test_death_releases(self, run):
        async def test(pod: Pod) -> None:
            await pod.engine.prepare("a", pod.container(share=os.geteuid() == 0))
            await pod.suite.kill(pod.sandbox.inner)
            await pod.engine.release("a")
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("step", ["Remove MappedVirtualDisk", "Remove SCSIDevice", "unplug"])
    def test_death_in_the_middle_of_a_release(self, run, step):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk()))
            fault = pod.sandbox.hold(step)
            task = asyncio.ensure_future(pod.engine.release("a"))
            await reached(fault)
            await pod.suite.kill(pod.sandbox.inner)
            fault.proceed.set()
            await task
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("step", ["plug", "Add MappedVirtualDisk", "Add CombinedLayers"])
    def test_death_in_the_middle_of_an_attach(self, run, step):
        async def test(pod: Pod) -> None:
            fault = pod.sandbox.hold(step)
            task = asyncio.ensure_future(pod.engine.prepare("a", pod.container()))
            await reached(fault)
            await pod.suite.kill(pod.sandbox.inner)
            fault.proceed.set()
            with pytest.raises(HoldfastError) as failure:
                await task
            assert failure.value.causes == ()
            await pod.expect_nothing()

        run(test)

    # -- identity and leases ------------------------------------------------------------------

    def test_other_names_of_a_file_make_no_second_attachment(self, run):
        async def test(pod: Pod) -> None:
            disk = pod.disk()
            (pod.folder / "link").symlink_to(disk)
            os.link(disk, pod.folder / "hard")
            (pod.folder / "dir").mkdir()
            names = [disk, pod.folder / "link", pod.folder / "hard", f"{pod.folder}/dir/../disk"]
            paths = {(await pod.prepare(f"a{n}", pod.mount(name))).paths["m0"] for n, name in enumerate(names)}
            assert len(paths) == 1
            assert pod.engine.attachments.free == SLOTS - 1
            for n in range(len(names)):
                await pod.engine.release(f"a{n}")
            await pod.expect_nothing()

        run(test)

    @pytest.mark.parametrize("first", [True, False], ids=["reader-first", "writer-first"])
    def test_read_only_and_writable_do_not_go_together(self, run, first):
        async def test(pod: Pod) -> None:
            await pod.prepare("a", pod.mount(pod.disk(), read_only=first))
            with pytest.raises(InUse, match=f"pod pod has {pod.disk()} open for {'reading' if first else 'writing'}"):
                await pod.prepare("b", pod.mount(pod.disk(), read_only=not first))
            await pod.engine.release("a")
            await pod.expect_nothing()
            await pod.prepare("b", pod.mount(pod.disk(), read_only=not first))

        run(test)

    def test_another_pod_s_disk(self, run):
        async def test(pod: Pod) -> None:
            disk = os.stat(pod.disk())
            with pod.other_pod():
                pod.journal.lease("other", disk.st_dev, disk.st_ino, "/their/name", writable=True)
                for read_only in (True, False):
                    with pytest.raises(InUse, match="pod other has /their/name open for writing") as failure:
                        await pod.prepare("a", pod.mount(pod.disk(), read_only=read_only))
                    assert failure.value.code == "disk-in-use"
                assert pod.sandbox.steps == []
            await pod.prepare("a", pod.mount(pod.disk()))  # its holder is dead

        run(test)

    def test_readers_of_several_pods(self, run):
        async def test(pod: Pod) -> None:
            disk = os.stat(pod.disk())
            with pod.other_pod():
                pod.journal.lease("other", disk.st_dev, disk.st_ino, "/their/name", writable=False)
                await pod.prepare("a", pod.mount(pod.disk(), read_only=True))
                await pod.engine.release("a")
                assert [lease["pod"] for lease in pod.journal.leases()] == ["other"]
                pod.journal.forget_pod("nobody")
                pod.journal.end_lease("other", disk.st_dev, disk.st_ino, writable=False)
            await pod.expect_nothing()

        run(test)

    def test_a_file_that_was_swapped_after_planning(self, run):
        async def test(pod: Pod) -> None:
            step = pod.mount(pod.disk())
            os.rename(pod.disk("other-disk"), step.path)
            with pytest.raises(InvalidInput, match="another file is there now") as failure:
                await pod.prepare("a", step)
            assert failure.value.code == "source-changed"
            os.unlink(step.path)
            os.mkfifo(step.path)
            with pytest.raises(InvalidInput):
                await pod.prepare("a", step)
            os.unlink(step.path)
            with pytest.raises(HoldfastError) as failure:
                await pod.prepare("a", step)
            assert failure.value.code == "source-not-found"
            assert pod.sandbox.steps == []
            await pod.expect_nothing()

        run(test)
