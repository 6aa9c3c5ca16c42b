"""The storage engine under any order of requests, failures, cancellations, deaths and passing time, against a model.

The model is simple on purpose: who was told that they hold something, and what may be left of what failed.  While
anything is under way, only what must never be untrue is looked at: nothing is plugged in that is not recorded, leased
and in a slot that is taken.  When nothing is, the engine, the machine, the guest, the journal and the descriptors of
this process must all agree with the model; exactly, unless something could not be undone.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from holdfast.errors import HoldfastError
from holdfast.storage.description import describe
from holdfast.storage.engine import Engine
from holdfast.storage.journal import Journal
from holdfast.storage.steps import CombineLayers, MakeScratch, MountDisk, MountLayer, ShareDirectory
from tests import leaks
from tests.conformance import SLOTS
from tests.fakes import FakeSandbox, Faulty, Mounted, injected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

    from holdfast.storage.attachments import Attachment
    from holdfast.storage.held import Held
    from holdfast.storage.steps import AnyStep
    from tests.fakes import Fault

    Thing = tuple[object, ...]

POD = "pod"
NAMES = "abcdef"
SCRATCH_BYTES = 16 << 20
#: A file in two formats at a time is two attachments under one lease.
FORMATS = ("raw", "raw", "raw", "qcow2")
AS_ROOT = os.geteuid() == 0  # shares are bind mounts
MAKING = "make scratch"
OF_DISKS = ("plug", "Add MappedVirtualDisk")
OF_CONTAINERS = (*OF_DISKS, MAKING, "Add CombinedLayers", *(["Add MappedDirectory"] if AS_ROOT else []))
REMOVING = (
    "Remove MappedVirtualDisk", "Remove SCSIDevice", "unplug", "Remove CombinedLayers",
    *(["Remove MappedDirectory"] if AS_ROOT else []),
)  # fmt: skip
#: What may fail, and what then undoes it; a removal is tried again.
UNDOING: dict[str, tuple[str, ...]] = {
    MAKING: (),
    "plug": ("unplug",),
    "Add MappedVirtualDisk": ("Remove MappedVirtualDisk", "Remove SCSIDevice", "unplug"),
    "Add CombinedLayers": REMOVING,
    "Add MappedDirectory": ("Remove MappedDirectory",),
    **{step: (step,) for step in REMOVING},
}
#: More than the longest prepare and the longest release take, by far.
ENOUGH = 1000
#: What can go on beside a step that is held has done so after that many rounds of the loop, or nearly.
BESIDE = 120


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes only when a test says so: deadlines pass there, and never because the host is slow."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Workshop(ThreadPoolExecutor):
    """Does at once what would be given to a thread, or when a test says so: no thread's speed decides what happens.

    A loop takes nothing but a pool of threads; this one never has any.

    Attributes:
        hold_next: the next job waits.
        waiting: jobs that wait to be done.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.hold_next = False
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # as in a thread, which nobody can take it back from

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        if self.hold_next:
            self.hold_next = False
            self.waiting.append(work)
        else:
            work()
        return future


class Wish(NamedTuple):
    """A disk as a user asks for it; ``name`` is one of several that a file may have."""

    name: str
    read_only: bool
    disk_format: str
    options: tuple[str, ...]
    block_dev: bool
    access: str = ""


class Trouble(NamedTuple):
    """What is to happen at the next such step: it waits, or fails, or both, before it has its effect or ``after``.

    The making of a scratch disk only waits.
    """

    step: str
    waits: bool
    fails: bool
    after: bool


@st.composite
def troubles(draw: st.DrawFn, *steps: str) -> tuple[Trouble, ...]:
    """Often none; else with one of these steps, and then perhaps with one that undoes it, too."""
    if draw(st.booleans()):
        return ()
    chain = [draw(st.sampled_from(steps))]
    if UNDOING[chain[0]] and draw(st.booleans()):
        chain.append(draw(st.sampled_from(UNDOING[chain[0]])))
    how = st.sampled_from([(False, True), (True, False), (True, True)])
    return tuple(Trouble(step, *draw(how), draw(st.booleans())) for step in chain)


class Outcome(NamedTuple):
    """How a request has ended; ``error`` is None if it did what it was asked."""

    what: str
    holder: str
    steps: tuple[AnyStep, ...]
    held: Held | None
    error: BaseException | None


class Place:
    """What all examples use: files to attach, a data folder, and a journal.  Nothing of it may be changed by them."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self.journal = journal
        for name in ("disk0", "disk1", "last", "layer0", "layer1", f"data/scratch/{SCRATCH_BYTES}.ext4"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"filesystem".ljust(4096, b"\0"))
        (folder / "empty").write_bytes(bytes(4096))
        (folder / "link0").symlink_to("disk0")
        os.link(folder / "disk0", folder / "hard0")
        for name in ("share0", "share1"):
            (folder / name).mkdir()
        # Nothing here survives a crash of the host, so nobody waits for its disk.
        journal._db.pragma("synchronous", "off")

    def disk(self, number: int, wish: Wish) -> MountDisk:
        path = self.folder / wish.name
        status = path.stat()
        return MountDisk(
            f"disk{number}", str(path), status.st_dev, status.st_ino, wish.read_only, wish.disk_format,
            filesystem="ext4", options=wish.options, block_dev=wish.block_dev, access=wish.access,
        )  # fmt: skip

    def share(self, name: str, read_only: bool) -> ShareDirectory:
        path = self.folder / name
        status = path.stat()
        return ShareDirectory(f"{name}{read_only}", str(path), status.st_dev, status.st_ino, read_only)


def level(step: MountDisk) -> str:
    """Who may have the disk open besides."""
    return step.access or ("group" if step.read_only else "individual")


def thing_of(holder: str, step: AnyStep) -> Thing:
    """What a step puts into a slot or the export; steps with the same thing share it.  Empty: nothing."""
    match step:
        case MountLayer():
            return ("layer", os.stat(step.path).st_ino, True, "raw", "none")
        case MountDisk():
            return ("disk", step.inode, step.read_only, step.disk_format, level(step))
        case MakeScratch():
            return ("scratch", f"scratch of {f'pod {POD}' if step.shared else holder}", step.encrypted)
        case ShareDirectory():
            return ("share", step.path, step.read_only)
    return ()


def mount_of(holder: str, step: AnyStep) -> Thing:
    """What a step puts into the guest's mount table; steps with the same mount share it."""
    match step:
        case MountDisk():
            return (*thing_of(holder, step), tuple(sorted(step.options)), step.block_dev)
        case CombineLayers():
            return ("overlay", holder)
    return thing_of(holder, step)


def thing_in_slot(attachment: Attachment) -> Thing:
    disk, key = attachment.disk, attachment.key
    if disk.kind == "scratch":
        return ("scratch", disk.path, disk.encrypted)
    return (disk.kind, key.inode, key.read_only, key.disk_format, attachment.access)


def clash(one: AnyStep, other: AnyStep) -> bool:
    """Whether two disks cannot be had at the same time: a writer has one use of it, and who wants to be alone is."""
    if not isinstance(one, MountDisk) or not isinstance(other, MountDisk) or one.inode != other.inode:
        return False
    if thing_of("", one) != thing_of("", other):
        return "individual" in (level(one), level(other))
    return not one.read_only and one.block_dev != other.block_dev


def codes(error: BaseException) -> Iterator[str]:
    """The codes of everything that an error reports."""
    assert isinstance(error, HoldfastError), repr(error)
    if error.code != "not-released" or not error.causes:  # that one only says how many there are
        yield error.code
    for cause in error.causes:
        yield from codes(cause)


def tries_again(outcome: Outcome) -> bool:
    """Whether a request surely got as far as to undo what earlier ones had left."""
    error = outcome.error
    refused = isinstance(error, HoldfastError) and error.code == "holder-in-use"
    return outcome.what == "prepare" and not refused and not isinstance(error, asyncio.CancelledError)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class EngineMachine(RuleBasedStateMachine):
    """Requests to an engine whose machine fails, hangs and dies.

    Attributes:
        granted: holders that were told that they hold something -> the steps, and what came of them.
        stuck: holders of which something could not be let go of -> steps that may not have been undone.
        left: steps of which something may be left that nobody holds, with who had asked for them.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.journal = place.journal
        self.export = tempfile.mkdtemp(dir=place.folder, prefix="export")
        self.loop = Clock()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, context: self.complaints.append(context))
        self.workshop = Workshop()
        self.loop.set_default_executor(self.workshop)
        self.granted: dict[str, tuple[tuple[AnyStep, ...], Held]] = {}
        self.stuck: dict[str, set[AnyStep]] = {}
        self.left: set[tuple[str, AnyStep]] = set()
        self.tasks: list[tuple[str, asyncio.Task[Any]]] = []
        self.releases: Counter[str] = Counter()
        self._begin_epoch()
        self._boot()
        self.fds = open_fds()

    def _boot(self) -> None:
        """A new machine, with an engine of its own; the journal stays."""

        async def boot() -> None:
            self.machine = FakeSandbox(self.export)

        self.loop.run_until_complete(boot())
        self.sandbox = Faulty(self.machine)
        self.engine = Engine(self.sandbox, self.journal, POD, self.place.folder / "data")
        self.faults: list[Fault] = []

    def _begin_epoch(self) -> None:
        """An epoch lasts from one moment in which nothing is under way to the next."""
        self.outcomes: list[Outcome] = []
        self.asked: list[tuple[str, str]] = []
        self.asked_steps: list[AnyStep] = []
        self.time_passed = False

    # -- running ------------------------------------------------------------------------------

    def _quiet(self) -> bool:
        """Whether nothing is under way, nor in the background: an undoing goes on when nobody waits for it any more."""
        return not (self.tasks or asyncio.all_tasks(self.loop))

    def _held_up(self) -> list[Callable[[], None]]:
        """How to let each thing go on that is held."""
        faults = [f.proceed.set for f in self.faults if f.waits and f.reached.is_set() and not f.proceed.is_set()]
        jobs = [lambda job=job: (self.workshop.waiting.remove(job), job()) for job in self.workshop.waiting]
        return [*faults, *jobs]

    def _run(self, rounds: int | None) -> None:
        """Lets the loop go round so often; None: until nothing is under way but what is held."""

        async def go() -> None:
            for count in range(ENOUGH if rounds is None else rounds):
                if count % 4 == 0:
                    done = len(asyncio.all_tasks()) == 1 and not self.tasks
                    if done or (rounds is None and count > BESIDE and self._held_up()):
                        return
                await asyncio.sleep(0)
            assert rounds is not None, f"it never ends: {asyncio.all_tasks()}"

        self.loop.run_until_complete(go())
        if self._quiet():  # but perhaps for callbacks of what has just ended
            self.loop.run_until_complete(asyncio.sleep(0))

    def _complete(self, request: Awaitable[None]) -> None:
        """Does something while nothing else is under way and nothing is held."""

        async def complete() -> None:
            await request

        task = self.loop.create_task(complete())
        self._run(None)
        task.result()

    def _ask(self, what: str, holder: str, steps: tuple[AnyStep, ...], request: Awaitable[Held | None]) -> None:
        def ended(task: asyncio.Task[Held | None]) -> None:
            if task.cancelled():
                self.outcomes.append(Outcome(what, holder, steps, None, asyncio.CancelledError()))
            elif task.exception() is not None:
                self.outcomes.append(Outcome(what, holder, steps, None, task.exception()))
            else:
                self.outcomes.append(Outcome(what, holder, steps, task.result(), None))
            self.tasks.remove((what, task))

        async def ask() -> Held | None:
            fresh, before = not self.engine.holds(holder), self.releases[holder]
            self.releases[holder] += what == "release"
            result = await request
            assert what == "release" or not fresh or self.releases[holder] == before, "told so, and released meanwhile"
            return result

        task = self.loop.create_task(ask())
        self.tasks.append((what, task))
        task.add_done_callback(ended)
        self.asked.append((what, holder))
        self.asked_steps += steps

    # -- rules --------------------------------------------------------------------------------

    numbers = st.integers(0, len(NAMES))
    rounds = st.sampled_from([None, None, 0, 1, 2, 4, 8, 16])
    disks = st.builds(
        Wish,
        st.sampled_from(["disk0", "disk0", "link0", "hard0", "disk1", "disk1", "disk1", "empty"]),
        st.sampled_from([True, True, False]),
        st.sampled_from(FORMATS),
        st.sampled_from([(), (), ("noatime", "nodev"), ("nodev", "noatime"), ("nosuid",)]),
        st.sampled_from([False, False, False, True]),
        st.sampled_from(["", "", "", "", "", "individual"]),
    )
    layers = st.sampled_from([(), (), ("layer0",), ("layer1",), ("layer0", "layer1")])
    scratches = st.sampled_from(["", "", "own", "shared", "own encrypted", "shared encrypted"])
    shares = st.sampled_from([None, *([(name, mode) for name in ("share0", "share1") for mode in (False, True)])])
    if not AS_ROOT:
        shares = st.none()

    def _expect(self, troubles: tuple[Trouble, ...]) -> None:
        """From now on the next such steps fail, or wait; earlier ones that nothing has come to are few."""
        if self.sandbox.faults_left > 2:
            self.sandbox.heal()
        for step, waits, fails, after in troubles:
            if step == MAKING:
                self.workshop.hold_next = True
            elif waits:
                self.faults.append(self.sandbox.hold(step, injected(step) if fails else None, after=after))
            else:
                self.faults.append(self.sandbox.fail(step, after=after))

    # Rules take numbers and not names of holders: most shall ask for a holder that has nothing yet.
    def _prepare(self, steps: list[AnyStep], number: int, troubles: tuple[Trouble, ...], rounds: int | None) -> None:
        names = [name for name in NAMES if not self.engine.holds(name)]
        names += self.engine.held()[-1:]  # that one may be under way, and must be refused in any case
        holder = names[number % len(names)]
        note(f"for {holder}: {steps}")
        self._expect(troubles)
        self._ask("prepare", holder, tuple(steps), self.engine.prepare(holder, tuple(steps)))
        self._run(rounds)

    @rule(number=numbers, disk=disks, troubles=troubles(*OF_DISKS), rounds=rounds)
    def prepare_disk(self, number: int, disk: Wish, troubles: tuple[Trouble, ...], rounds: int | None) -> None:
        self._prepare([self.place.disk(0, disk)], number, troubles, rounds)

    @rule(
        number=numbers,
        disks=st.lists(disks, max_size=2),
        layers=layers,
        scratch=scratches,
        share=shares,
        troubles=troubles(*OF_CONTAINERS),
        rounds=rounds,
    )
    def prepare_container(
        self,
        number: int,
        disks: list[Wish],
        layers: tuple[str, ...],
        scratch: str,
        share: tuple[str, bool] | None,
        troubles: tuple[Trouble, ...],
        rounds: int | None,
    ) -> None:
        steps: list[AnyStep] = [MountLayer(name, str(self.place.folder / name)) for name in layers]
        if scratch:
            steps.append(MakeScratch("scratch", SCRATCH_BYTES, "encrypted" in scratch, "shared" in scratch))
        if layers:
            steps.append(CombineLayers("root", layers, "scratch" if scratch else ""))
        steps += [self.place.disk(number, wish) for number, wish in enumerate(disks)]
        if share is not None:
            steps.append(self.place.share(*share))
        self._prepare(steps, number, troubles, rounds)

    @precondition(lambda self: self.engine.held())
    @rule(data=st.data(), troubles=troubles(*REMOVING), rounds=rounds)
    def release(self, data: st.DataObject, troubles: tuple[Trouble, ...], rounds: int | None) -> None:
        holder = data.draw(st.sampled_from(self.engine.held()))
        self._expect(troubles)
        self._ask("release", holder, (), self.engine.release(holder))
        self._run(rounds)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), rounds=rounds)
    def cancel(self, data: st.DataObject, rounds: int | None) -> None:
        data.draw(st.sampled_from([task for _, task in self.tasks])).cancel()
        self._run(rounds)

    @rule(troubles=troubles(*OF_CONTAINERS, *REMOVING))
    def trouble_ahead(self, troubles: tuple[Trouble, ...]) -> None:
        """For what is under way already, or for whoever comes to it first."""
        self._expect(troubles)

    @precondition(lambda self: self._held_up())
    @rule(data=st.data(), rounds=rounds)
    def proceed(self, data: st.DataObject, rounds: int | None) -> None:
        held_up = self._held_up()
        held_up[data.draw(st.integers(0, len(held_up) - 1))]()
        self._run(rounds)

    @precondition(lambda self: not self._quiet())
    @rule(seconds=st.sampled_from([2.0, 60.0]), rounds=rounds)
    def time_passes(self, seconds: float, rounds: int | None) -> None:
        """More than a prepare waits for what earlier failures have left; more than an undo gets."""
        self.loop.now += seconds
        self.time_passed = True
        self._run(rounds)

    @precondition(lambda self: not self._quiet())
    @rule()
    def everything_ends(self) -> None:
        self._let_all_end()

    def _let_all_end(self) -> None:
        self._run(None)
        while held_up := self._held_up():
            held_up[0]()
            self._run(None)

    @precondition(lambda self: len(self.engine.held()) > 2)
    @rule()
    def the_machine_dies(self) -> None:
        """In whatever moment; then what is held is let go of, and the next pod has a machine of its own."""
        self.machine.die()
        self.sandbox.heal()
        self.workshop.hold_next = False
        self._let_all_end()
        for outcome in self.outcomes:
            if outcome.error is not None and not isinstance(outcome.error, asyncio.CancelledError):
                # A machine that has died has let go of everything: to release is no error then.
                assert outcome.what == "prepare" or "machine-died" not in codes(outcome.error)
        for holder in self.engine.held():
            self._complete(self.engine.release(holder))
        self._use_once_more()
        self._expect_nothing()
        self._begin_epoch()
        self.granted.clear()
        self.stuck.clear()
        self.left.clear()
        self._boot()

    # -- what must be true --------------------------------------------------------------------

    @invariant()
    def what_the_machine_has_is_recorded(self) -> None:
        """Always: the journal knew before the machine, a slot is not free before it is, nor is a lease over."""
        recorded = {row.detail["slot"] for row in self.journal.held(POD) if row.kind == "attachment"}
        assert {str(slot) for slot in self.machine.disks} <= recorded
        assert len(self.machine.disks) <= SLOTS - self.engine.attachments.free
        leases = self._leases()
        layers = {os.stat(self.place.folder / name).st_ino for name in ("layer0", "layer1")}
        seen = set()
        for disk in self.machine.disks.values():
            use = (disk.identity, disk.disk_format)
            assert use not in seen, "plugged in twice"
            seen.add(use)
            scratch = not disk.read_only and os.fstat(disk.fd).st_nlink == 0
            if not scratch and disk.identity[1] not in layers:
                assert (disk.identity[1], True) in leases or (disk.read_only and (disk.identity[1], False) in leases)

    @precondition(lambda self: self._quiet())
    @invariant()
    def all_agree(self) -> None:
        """When nothing is under way: what each of them says of everything that is held."""
        self._account()
        assert self.complaints == []
        exact = not (self.stuck or self.left)
        assert sorted(self.engine.held()) == sorted([*self.granted, *self.stuck])
        self._check_slots(exact)
        self._check_shares(exact)
        self._check_mounts(exact)
        self._check_fds()
        self._begin_epoch()

    def _leases(self) -> set[tuple[int, bool]]:
        return {(os.stat(lease["path"]).st_ino, lease["writable"]) for lease in self.journal.leases()}

    def _account(self) -> None:
        """Enters what has ended into the model; an error must have a reason."""
        fired = [fault for fault in self.faults if fault.reached.is_set()]
        self.faults = [fault for fault in self.faults if not fault.reached.is_set()]
        failed = [fault.step for fault in fired if fault.error is not None]
        # What was not undone has kept something busy, or has failed itself.
        undoing_failed = bool(set(failed) & set(REMOVING)) or self.time_passed
        may_stick = undoing_failed or bool(self.stuck or self.left)
        reasons = {"injected"} if failed else set()
        reasons |= {"disk-busy"} if may_stick else set()
        reasons |= {"timed-out"} if self.time_passed else set()
        uncertain: dict[str, set[AnyStep]] = {holder: set(steps) for holder, steps in self.stuck.items()}
        before = [*self._steps_there(), *self.asked_steps]
        for outcome in self.outcomes:
            what, holder, steps, held, error = outcome
            self._explain(outcome, reasons, before)
            if what == "prepare" and error is None:
                assert held is not None
                self.granted[holder] = (steps, held)
                uncertain.pop(holder, None)
            elif what == "prepare":
                if holder not in self.granted:
                    uncertain.setdefault(holder, set()).update(steps)
                if may_stick:
                    self.left |= {(holder, step) for step in steps}
            else:
                steps, _ = self.granted.pop(holder, ((), None))
                if error is None:
                    uncertain.pop(holder, None)
                else:
                    uncertain.setdefault(holder, set()).update(steps)
        self.stuck = {holder: steps for holder, steps in uncertain.items() if self.engine.holds(holder)}
        assert may_stick or not self.stuck
        if any(map(tries_again, self.outcomes)) and not undoing_failed and not self.stuck:
            self.left.clear()

    def _steps_there(self) -> Iterator[AnyStep]:
        for steps, _ in self.granted.values():
            yield from steps
        for stuck in self.stuck.values():
            yield from stuck
        yield from (step for _, step in self.left)

    def _explain(self, outcome: Outcome, reasons: set[str], others: list[AnyStep]) -> None:
        what, holder, steps, _, error = outcome
        if error is None or isinstance(error, asyncio.CancelledError):
            return
        for code in codes(error):
            if code == "holder-in-use":
                known = holder in self.granted or holder in self.stuck
                assert known or [asked for _, asked in self.asked].count(holder) > 1
            elif code == "released":
                assert ("release", holder) in self.asked
            elif code == "disk-in-use":
                # The steps themselves are among the others: those of one holder may clash, too.
                assert any(clash(step, other) for step in steps for other in others)
            elif code == "no-filesystem":
                assert any(isinstance(step, MountDisk) and step.path.endswith("empty") for step in others)
            else:
                assert code in reasons, f"{what} {holder}: {error}"

    def _check_slots(self, exact: bool) -> None:
        items = self.engine.attachments.items()
        slots = {attachment.slot for attachment, _ in items}
        assert len(slots) == len(items) == SLOTS - self.engine.attachments.free
        rows = {row.detail["slot"]: row for row in self.journal.held(POD) if row.kind == "attachment"}
        assert {a.row for a, _ in items} == {row.id for row in self.journal.held(POD) if row.kind == "attachment"}
        assert {str(slot) for slot in slots} == set(rows)
        described = {a["slot"]: a["holders"] for a in describe(self.engine)["attachments"]}
        assert described == {str(attachment.slot): holders for attachment, holders in items}
        disks = {(a.key.inode, a.access == "individual") for a, _ in items if a.disk.kind == "disk"}
        assert self._leases() == disks
        plugged = set(self.machine.disks)
        assert self.machine.devices <= plugged <= slots
        for slot in slots - self.machine.devices:  # the answer of its end was lost
            assert rows[str(slot)].state != "held"
        for attachment, _ in items:
            if attachment.slot in plugged:
                disk = self.machine.disks[attachment.slot]
                key = attachment.key
                assert disk.identity == (key.device, key.inode)
                assert (disk.read_only, disk.disk_format) == (key.read_only, key.disk_format)
        self._check_holders([(thing_in_slot(a), holders) for a, holders in items], "share", exact, inside=False)
        if exact:
            assert self.machine.devices == slots
            assert {row.state for row in rows.values()} <= {"held"}

    def _check_holders(self, found: list[tuple[Thing, list[str]]], kind: str, exact: bool, *, inside: bool) -> None:
        """Things and their holders are those of the model; more than those only as far as something may be left."""

        def things(pairs: Iterable[tuple[str, AnyStep]]) -> set[tuple[Thing, str]]:
            pairs = [(thing_of(holder, step), holder) for holder, step in pairs]
            return {(thing, holder) for thing, holder in pairs if thing and (thing[0] == kind) == inside}

        # What could not be let go of keeps its last holder; only what failed while it was made is nobody's.
        held = things((holder, step) for holder, (steps, _) in self.granted.items() for step in steps)
        maybe = things((holder, step) for holder, steps in self.stuck.items() for step in steps)
        nobodys = {thing for thing, _ in things(self.left)}
        there = {(thing, holder) for thing, holders in found for holder in holders}
        assert held <= there <= held | maybe
        ownerless = {thing for thing, holders in found if not holders}
        assert ownerless <= nobodys
        if exact:
            assert not ownerless
            assert len({thing for thing, _ in found}) == len(found)

    def _check_shares(self, exact: bool) -> None:
        items = self.engine.shares.items()
        rows = {row.id: row.state for row in self.journal.held(POD) if row.kind == "share"}
        assert set(rows) == {share.row for share, _ in items}
        assert sorted(os.listdir(self.export)) == sorted(str(share.number) for share, _ in items)
        described = [(share["share"], share["holders"]) for share in describe(self.engine)["shares"]]
        assert described == [(share.number, holders) for share, holders in items]
        found = [(("share", share.key.path, share.key.read_only), holders) for share, holders in items]
        self._check_holders(found, "share", exact, inside=True)
        if exact:
            assert set(rows.values()) <= {"held"}

    def _check_mounts(self, exact: bool) -> None:
        """What a holder was told is where it was told, from the disk it asked for; with nobody else's in its place."""
        items = self.engine.attachments.items()
        slots = {(thing_in_slot(a), holder): a.slot for a, holders in items for holder in holders}
        numbers = {(s.key.path, s.key.read_only): str(s.number) for s, _ in self.engine.shares.items()}
        paths: dict[str, Thing] = {}
        for holder, (steps, held) in self.granted.items():
            assert set(held.paths) == {step.id for step in steps}
            for step in steps:
                path, mount = held.paths[step.id], mount_of(holder, step)
                if isinstance(step, MakeScratch) and step.shared:
                    path, _, own = path.partition("/scratch/")
                    assert own == holder
                assert paths.setdefault(path, mount) == mount, "two mounts at one path"
                there = self.machine.mounts[path]
                match step:
                    case CombineLayers():
                        assert (there.kind, there.source) == ("overlay", holder)
                    case ShareDirectory():
                        assert there == Mounted("share", numbers[step.path, step.read_only], step.read_only)
                    case MountDisk():
                        kind = "device" if step.block_dev else "disk"
                        assert there == Mounted(kind, slots[thing_of(holder, step), holder], step.read_only)
                    case _:
                        layer = isinstance(step, MountLayer)
                        assert there == Mounted("disk", slots[thing_of(holder, step), holder], layer)
        assert len(set(paths.values())) == len(paths), "one mount at two paths"
        more = set(self.machine.mounts) - set(paths)
        maybe = [(holder, step) for holder, steps in self.stuck.items() for step in steps]
        assert len(more) <= len({mount_of(holder, step) for holder, step in [*maybe, *self.left]})
        assert not (exact and more)

    def _check_fds(self) -> None:
        """One for each disk of the machine, its own, and one for each scratch disk that is shared."""

        def shared(steps: Iterable[AnyStep]) -> int:
            return len({step.encrypted for step in steps if isinstance(step, MakeScratch) and step.shared})

        more = open_fds() - self.fds - len(self.machine.disks)
        assert shared(s for steps, _ in self.granted.values() for s in steps) <= more <= shared(self._steps_there())

    # -- the end ------------------------------------------------------------------------------

    def _use_once_more(self) -> str:
        """What is left that nobody holds is undone by the next that comes, whatever becomes of that one."""
        step = self.place.disk(0, Wish("last", False, "raw", (), False))
        paths: dict[str, str] = {}

        async def use() -> None:
            try:
                paths.update((await self.engine.prepare("last", (step,))).paths)
            except HoldfastError as error:
                assert error.code == "machine-died"
                assert self.sandbox.died.done()
            await self.engine.release("last")

        self._complete(use())
        return paths.get(step.id, "")

    def _expect_nothing(self) -> None:
        assert self._quiet()
        assert self.engine.held() == []
        assert self.engine.attachments.items() == []
        assert self.engine.shares.items() == []
        assert self.engine.attachments.free == SLOTS
        assert self.journal.held() == []
        assert self.journal.leases() == []
        assert os.listdir(self.export) == []
        assert self.machine.disks == {}
        assert self.machine.mounts == {}
        assert open_fds() == self.fds
        assert self.complaints == []

    def teardown(self) -> None:
        """When all has ended and been released, nothing is left anywhere; nor, whatever happened, of the example."""
        try:
            self.sandbox.heal()
            self.workshop.hold_next = False
            self._let_all_end()
            self.all_agree()
            self._release_all()
            assert self._use_once_more() == "/run/mounts/scsi/m0"  # no path is taken
            self._expect_nothing()
        finally:
            self._clean_up()

    def _release_all(self) -> None:
        for holder in self.engine.held():
            try:
                self._complete(self.engine.release(holder))
            except HoldfastError as error:  # something is mounted still that another holds, or nobody
                assert self.stuck or self.left
                assert set(codes(error)) == {"disk-busy"}
        self._use_once_more()
        for holder in self.engine.held():
            self._complete(self.engine.release(holder))

    def _clean_up(self) -> None:
        self.machine.die()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        for go_on in self._held_up():
            go_on()
        for _ in range(9):
            self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        self.journal.forget_pod(POD)
        leaks.remove_folder(self.export)


def test_any_order_of_requests_and_failures(state_root, tmp_path):
    with Journal(state_root) as journal:
        place = Place(tmp_path, journal)
        run_state_machine_as_test(
            lambda: EngineMachine(place),
            settings=hypothesis_settings(max_examples=100, stateful_step_count=30, derandomize=True),
        )
