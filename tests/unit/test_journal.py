"""The journal: durable before the act, true as long as the kernel says so, collected exactly once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import HoldfastError, InUse, NotFound, NotReleased
from holdfast.storage.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a monitor does first: hold the pod's lock.  Prints a line when it has done what follows, then waits.
MONITOR = """
import fcntl, os, sys
from pathlib import Path
from holdfast.storage.journal import Journal
root, name = Path(sys.argv[1]), sys.argv[2]
journal = Journal(root)
(root / "pods" / name).mkdir()
lock = os.open(root / "pods" / name / "lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
journal.add_pod(name, os.getpid(), "vm")
{act}
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{script}"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def monitor(root: Path, name: str, act: str = "") -> Iterator[subprocess.Popen[str]]:
    """A living pod; when it was only its ``kill`` that ended it, its folder and rows are still there."""
    with process(MONITOR.format(act=act), root, name) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.fixture
def journal(state_root: Path) -> Iterator[Journal]:
    with Journal(state_root) as journal:
        yield journal
        for name in os.listdir(journal.pods_folder):
            assert journal.collect(name)


def names(journal: Journal) -> list[str]:
    return [pod.name for pod in journal.pods()]


# -- rows -------------------------------------------------------------------------------------


def test_pods(journal):
    journal.add_pod("a", 1, "vm")
    journal.add_pod("b", 2, "namespace")
    assert names(journal) == ["a", "b"]
    pod = journal.pod("b")
    assert (pod.pid, pod.isolation, pod.folder) == (2, "namespace", str(journal.pods_folder / "b"))
    journal.add_pod("a", 3, "vm")
    assert journal.pod("a").pid == 3
    with pytest.raises(NotFound, match="find pod nosuch") as failure:
        journal.pod("nosuch")
    assert failure.value.code == "pod-not-found"


def test_an_intent_is_there_for_others_before_the_act(journal, state_root):
    row = journal.intend("p", "attachment", "/disk", {"slot": "0:0"})
    with Journal(state_root) as other:
        [held] = other.held("p")
        assert (held.id, held.pod, held.kind, held.object, held.state) == (row, "p", "attachment", "/disk", "intent")
        assert held.detail == {"slot": "0:0"}
        journal.hold(row)
        assert [h.state for h in other.held()] == ["held"]
        journal.hold(row, {"slot": "1:1"})
        assert other.held()[0].detail == {"slot": "1:1"}
        journal.releasing(row)
        assert [h.state for h in other.held()] == ["releasing"]
        journal.release(row)
        assert other.held() == []
        journal.release(row)


def test_many_by_one_commit(journal, state_root):
    first = journal.intend("p", "attachment", "/disk")
    rows = journal.intend_all("p", "share", [(f"/{number}", {"number": number}) for number in range(3)])
    with Journal(state_root) as other:

        def states() -> list[tuple[str, str]]:
            return [(held.object, held.state) for held in other.held("p") if held.kind == "share"]

        assert len({first, *rows}) == 4
        assert states() == [("/0", "intent"), ("/1", "intent"), ("/2", "intent")]
        assert [held.detail for held in other.held()] == [{}, {"number": 0}, {"number": 1}, {"number": 2}]
        journal.hold_all(rows[:2])
        assert states() == [("/0", "held"), ("/1", "held"), ("/2", "intent")]
        journal.releasing_all(rows[1:])
        assert states() == [("/0", "held"), ("/1", "releasing"), ("/2", "releasing")]
        journal.release_all(rows)
        journal.release_all([])
        assert [held.object for held in other.held()] == ["/disk"]


def test_many_with_what_was_found_out_meanwhile(journal):
    rows = journal.intend_all("p", "share", [("/0", {}), ("/1", {})])
    journal.intend("q", "disk", "/2", {"kept": 1})
    journal.hold_all(rows, [{"number": 3}, {"number": 4}])
    assert [(h.state, h.detail) for h in journal.held("p")] == [("held", {"number": 3}), ("held", {"number": 4})]
    assert [h.object for h in journal.held(kind="share")] == ["/0", "/1"]
    assert [(h.object, h.detail) for h in journal.held(kind="disk")] == [("/2", {"kept": 1})]
    assert journal.held("p", "disk") == []


def test_rows_come_in_the_order_of_acquisition(journal):
    rows = [journal.intend(pod, "k", str(n)) for n, pod in enumerate("aba")]
    assert len(set(rows)) == 3
    assert [h.object for h in journal.held("a")] == ["0", "2"]
    assert [h.object for h in journal.held()] == ["0", "1", "2"]


def test_closing_twice(state_root):
    journal = Journal(state_root)
    journal.close()
    journal.close()


def test_not_a_journal(state_root):
    (state_root / "journal.db").write_bytes(b"not a database at all" * 99)
    with pytest.raises(HoldfastError, match="open journal") as failure:
        Journal(state_root)
    assert failure.value.code == "journal-unusable"


def test_many_open_a_new_journal_at_once(state_root):
    script = """
from pathlib import Path
from holdfast.storage.journal import Journal
print("ready", flush=True)
sys.stdin.readline()
with Journal(Path(sys.argv[1])) as journal:
    journal.intend(sys.argv[2], "k", "o")
print("done", flush=True)
"""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(script, state_root, n)) for n in range(4)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        assert [child.stdout.readline() for child in children] == ["done\n"] * 4
    with Journal(state_root) as journal:
        assert sorted(held.pod for held in journal.held()) == list("0123")


# -- life and death ---------------------------------------------------------------------------


def test_a_killed_monitor_is_dead_at_once(journal, state_root):
    with monitor(state_root, "p") as child:
        assert journal.is_alive("p")
        assert not journal.collect("p")
        assert journal.pod("p").pid == child.pid
        kill(child)
        assert not journal.is_alive("p")
        assert journal.collect("p")
    assert names(journal) == []
    assert not (journal.pods_folder / "p").exists()
    assert journal.collect("p")  # there is nothing to do any more


def test_a_monitor_killed_between_intent_and_act(journal, state_root):
    act = 'journal.intend(name, "attachment", "/disk"); journal.lease(name, 1, 2, "/disk", writable=True)'
    with monitor(state_root, "p", act) as child:
        kill(child)
    assert [(h.pod, h.state) for h in journal.held()] == [("p", "intent")]
    assert len(journal.leases()) == 1
    assert journal.collect("p")
    assert journal.held() == journal.leases() == journal.pods() == []


def test_a_reused_process_id_does_not_make_a_pod_alive(journal):
    (journal.pods_folder / "p").mkdir()
    (journal.pods_folder / "p/lock").touch()
    journal.add_pod("p", os.getpid(), "vm")
    assert not journal.is_alive("p")


@pytest.mark.parametrize("there", ["nothing", "folder", "lock"])
def test_what_was_never_locked_is_dead(journal, there):
    journal.add_pod("p", 1, "vm")
    journal.intend("p", "k", "o")
    if there != "nothing":
        (journal.pods_folder / "p").mkdir()
    if there == "lock":
        (journal.pods_folder / "p/lock").touch()
        (journal.pods_folder / "p/monitor.sock").touch()
        (journal.pods_folder / "p/export").mkdir()
    assert not journal.is_alive("p")
    assert journal.collect("p")
    assert journal.pods() == journal.held() == []
    assert os.listdir(journal.pods_folder) == []


def test_asking_does_not_make_a_dead_pod_look_alive(journal, state_root):
    """Two may ask at the same moment, and neither is a monitor."""
    (journal.pods_folder / "p").mkdir()
    lock = os.open(journal.pods_folder / "p/lock", os.O_RDWR | os.O_CREAT, 0o600)
    asking = os.open(journal.pods_folder / "p/lock", os.O_RDWR)
    try:
        fcntl.flock(asking, fcntl.LOCK_SH)  # what is_alive holds for a moment
        assert not journal.is_alive("p")
        journal.lease("p", 1, 2, "/disk", writable=True)
        journal.lease("q", 1, 2, "/disk", writable=True)
        with Journal(state_root) as other:
            collecting = threading.Thread(target=lambda: other.collect("p"))
            collecting.start()
            fcntl.flock(asking, fcntl.LOCK_UN)
            collecting.join(20)
        assert not (journal.pods_folder / "p").exists()
    finally:
        os.close(lock)
        os.close(asking)


def test_a_lock_of_a_pod_that_was_collected_meanwhile_is_not_the_new_pods(journal, state_root, monkeypatch):
    """Opened before the pod was collected, locked after a new one of the same name has come."""
    (journal.pods_folder / "p").mkdir()
    (journal.pods_folder / "p/lock").touch()
    real = fcntl.flock
    with contextlib.ExitStack() as stack:

        def first_somebody_else(fd: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            with Journal(state_root) as other:
                assert other.collect("p")
            stack.enter_context(monitor(state_root, "p", 'journal.intend(name, "k", "new")'))
            real(fd, how)

        monkeypatch.setattr(fcntl, "flock", first_somebody_else)
        assert not journal.collect("p")
        assert [h.object for h in journal.held("p")] == ["new"]
        assert journal.is_alive("p")


def test_several_collect_at_once(journal, state_root):
    script = """
from pathlib import Path
from holdfast.storage.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range(20):
        assert journal.collect(f"p{n}") or True
print("done", flush=True)
"""
    for n in range(20):
        folder = journal.pods_folder / f"p{n}"
        folder.mkdir()
        for name in ("lock", "monitor.sock", "console.log"):
            (folder / name).touch()
        (folder / "export").mkdir()
        journal.add_pod(f"p{n}", 1, "vm")
        journal.intend(f"p{n}", "k", "o")
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(script, state_root)) for _ in range(3)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        assert [child.stdout.readline() for child in children] == ["done\n"] * 3
    assert journal.pods() == journal.held() == []
    assert os.listdir(journal.pods_folder) == []


def test_only_what_a_pod_folder_can_hold_is_removed(journal):
    """Nothing is removed recursively: shares are mounted below, and they are the user's."""
    folder = journal.pods_folder / "p"
    (folder / "export/0").mkdir(parents=True)
    (folder / "export/0/file").write_text("the user's")
    (folder / "link").symlink_to("/etc")
    with pytest.raises(NotReleased, match="not empty"):
        journal.collect("p")
    assert (folder / "export/0/file").read_text() == "the user's"
    assert os.path.isdir("/etc")
    (folder / "export/0/file").unlink()
    (folder / "export/0").rmdir()
    assert journal.collect("p")
    assert not folder.exists()


def test_forgetting_touches_nobody_else(journal):
    for pod in "ab":
        journal.add_pod(pod, 1, "vm")
        journal.intend(pod, "k", "o")
        journal.lease(pod, 1, 2, "/disk", writable=False)
        (journal.pods_folder / pod).mkdir()
    journal.forget_pod("a")
    assert names(journal) == ["b"]
    assert [h.pod for h in journal.held()] == ["b"]
    assert [lease["pod"] for lease in journal.leases()] == ["b"]
    assert os.listdir(journal.pods_folder) == ["b"]


# -- leases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [True, False], ids=["writer", "reader"])
@pytest.mark.parametrize("ours", [True, False], ids=["to write", "to read"])
def test_one_writer_or_any_number_of_readers(journal, state_root, theirs, ours):
    act = f'journal.lease(name, 1, 2, "/their/name", writable={theirs})'
    with monitor(state_root, "p", act) as child:
        if theirs or ours:
            mode = "writing" if theirs else "reading"
            with pytest.raises(InUse, match=f"open disk /our/name: pod p has /their/name open for {mode}") as failure:
                journal.lease("q", 1, 2, "/our/name", writable=ours)
            assert failure.value.code == "disk-in-use"
            assert "holdfast pod remove p" in failure.value.hint
        else:
            journal.lease("q", 1, 2, "/our/name", writable=False)
            journal.end_lease("q", 1, 2, writable=False)
        journal.lease("q", 1, 3, "/another", writable=True)
        kill(child)
        journal.lease("q", 1, 2, "/our/name", writable=ours)
        assert {lease["pod"] for lease in journal.leases()} == ({"q"} if theirs or ours else {"p", "q"})
    with pytest.raises(InUse, match="pod q has"), _alive(journal, "q"):
        journal.lease("r", 1, 2, "/our/name", writable=True)
    journal.end_lease("q", 1, 2, writable=ours)
    journal.end_lease("q", 1, 2, writable=ours)
    journal.lease("r", 1, 2, "/our/name", writable=True)


@contextlib.contextmanager
def _alive(journal: Journal, name: str) -> Iterator[None]:
    (journal.pods_folder / name).mkdir()
    with open(journal.pods_folder / name / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_pod_does_not_get_the_same_disk_twice_either(journal):
    journal.lease("p", 1, 2, "/disk", writable=True)
    for writable in (True, False):
        with pytest.raises(InUse, match="pod p has /disk open for writing"):
            journal.lease("p", 1, 2, "/link", writable=writable)
    assert len(journal.leases()) == 1


def test_leases_are_listed(journal):
    journal.lease("p", 1, 2, "/b", writable=True)
    journal.lease("p", 1, 3, "/a", writable=False)
    assert journal.leases() == [
        {"path": "/a", "pod": "p", "writable": False},
        {"path": "/b", "pod": "p", "writable": True},
    ]


def test_of_many_writers_one_gets_it(journal, state_root):
    """Reading who holds it and taking it are one transaction."""
    act = """
print("ready", flush=True)
sys.stdin.readline()
try:
    journal.lease(name, 1, 2, "/disk", writable=True)
    print("got it", flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(MONITOR.format(act=act), state_root, f"p{n}")) for n in range(4)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        outcomes = [child.stdout.readline().strip() for child in children]
        assert sorted(outcomes) == ["InUse", "InUse", "InUse", "got it"]
        assert journal.leases()[0]["pod"] == f"p{outcomes.index('got it')}"


def test_the_lock_goes_with_the_last_descriptor_of_it(journal, state_root):
    """The launcher hands the lock to the monitor: a copy of the descriptor keeps the pod alive."""
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
pid = os.fork()
if pid:
    print(pid, flush=True)
    os._exit(0)
sys.stdin.read()
"""
    (journal.pods_folder / "p").mkdir()
    with process(script, journal.pods_folder / "p/lock") as launcher:
        heir = int(launcher.stdout.readline())
        launcher.wait()
        pidfd = os.pidfd_open(heir)
        assert journal.is_alive("p")
        launcher.stdin.close()
        select.select([pidfd], [], [], 20)
        os.close(pidfd)
        assert not journal.is_alive("p")
