"""Whatever is killed while a pod is forked: nothing is left of the forks, and the source goes on if it was not it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.storage.journal import Journal
from tests.images import is_clean, make_disk
from tests.vm.dying import child_of, stopping
from tests.vm.forks import end, forks, idle, shell, until
from tests.vm.support import assert_nothing_held, is_running, python_program, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: In the source's monitor: before the machine stands still, while it does, and after.
SOURCE = (
    "holdfast.machine.frozen:Memory.copy",
    "holdfast.machine.frozen:Memory.finish",
    "holdfast.machine.disk_copies:Copies.at_stop",
    "holdfast.machine.disk_copies:Copies.finish",
    "holdfast.pod.snapshot:Snapshot.make",
)
#: In a fork's monitor.
CHILD = (
    "holdfast.pod.service:Service._thaw",
    "holdfast.pod.thawing:_plug",
    "holdfast.machine.migration:restore",
    "holdfast.machine.vm:VirtualMachine.make_unique",
    "holdfast.pod.containers:Containers.adopt",
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "ext4")


@pytest.fixture
def marker(run_folder: Path) -> Iterator[Path]:
    path = run_folder / "stopped-here"
    yield path
    path.unlink(missing_ok=True)


class Forking(threading.Thread):
    """Forks a pod in a thread of its own."""

    def __init__(self, pod: holdfast.Pod, **options: Any) -> None:
        super().__init__()
        self._pod, self._options = pod, options
        self.result: list[holdfast.Pod] | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._pod.fork(**self._options)
        except BaseException as error:
            self.result = error

    def pods(self) -> list[holdfast.Pod]:
        assert isinstance(self.result, list), self.result
        return self.result


def start_pod(data: Path, state_root: Path, disk: Path) -> holdfast.Pod:
    pod = holdfast.Pod(root=state_root, data=data)
    idle(pod, mounts=[f"type=disk,src={disk},dst=/d"])
    shell(pod, "c", "echo before > /file; echo before > /d/file")
    return pod


def assert_goes_on(pod: holdfast.Pod, root: Path) -> None:
    """The source is what it was, alone, and can be forked."""
    until(lambda: os.listdir(root / "pods") == [pod.name])
    with Journal(root) as journal:
        assert [row.name for row in journal.pods()] == [pod.name]
        assert {row.pod for row in journal.held()} == {lease["pod"] for lease in journal.leases()} == {pod.name}
    assert shell(pod, "c", "echo after >> /file; sync; cat /file /d/file") == "before\nafter\nbefore\n"
    with forks(pod) as [child]:
        assert shell(child, "c", "cat /file /d/file") == "before\nafter\nbefore\n"


@pytest.mark.parametrize("victim", ["monitor", "machine"])
@pytest.mark.parametrize("where", SOURCE)
def test_the_source(data, state_root, disk, marker, monkeypatch, where, victim):
    with stopping(monkeypatch, where, marker):
        pod = start_pod(data, state_root, disk)
    with pod:
        info = pod.inspect()
        forking = Forking(pod)
        until(marker.exists)
        os.kill(info.pid if victim == "monitor" else info.qemu_pid, signal.SIGKILL)
        wait_for_end(info.qemu_pid)
        marker.unlink()
        forking.join(60)
        if (where, victim) == (SOURCE[-1], "machine"):  # by then everything of it has been copied
            [child] = forking.pods()
            assert shell(child, "c", "cat /file /d/file") == "before\nbefore\n"
            child.remove()
        else:
            assert isinstance(forking.result, HoldfastError), forking.result
    wait_for_end(info.pid)
    assert_nothing_held(state_root)


@pytest.mark.parametrize(
    ("where", "victim"), [*((where, "monitor") for where in CHILD), *((where, "machine") for where in CHILD[1::2])]
)
def test_a_fork(data, state_root, disk, marker, monkeypatch, where, victim):
    with start_pod(data, state_root, disk) as pod:
        with stopping(monkeypatch, where, marker):
            forking = Forking(pod, names=["fork"], detached=True)
            until(marker.exists)
        with Journal(state_root) as journal:
            [monitor] = [row.pid for row in journal.pods() if row.name == "fork"]
        killed = monitor if victim == "monitor" else child_of(monitor)
        os.kill(killed, signal.SIGKILL)
        wait_for_end(killed)
        marker.unlink()
        forking.join(60)
        assert isinstance(forking.result, HoldfastError), forking.result
        wait_for_end(monitor)
        assert_goes_on(pod, state_root)
        end(pod)
    assert is_clean(disk)
    assert_nothing_held(state_root)


@pytest.mark.parametrize("where", [*SOURCE, *CHILD[::2]])
def test_the_client(data, state_root, disk, marker, monkeypatch, where):
    """The source goes on, though nobody has told it to, and the forks are gone."""
    root, of_source = state_root, where in SOURCE
    program = python_program(f"""
import holdfast
from holdfast.pod import launch, early
if {not of_source}:
    launch._START = early.START.replace("main()", "from tests.vm.dying import arm; arm(); main()")
holdfast.Pod.open("p", root={str(root)!r}, data={str(data)!r}).fork(2)
""")
    environment = dict(os.environ) if of_source else {**os.environ, "HOLDFAST_TEST_STOP": f"{where}:{marker}"}
    if of_source:
        with stopping(monkeypatch, where, marker):
            pod = holdfast.Pod("p", root=state_root, data=data)
    else:
        pod = holdfast.Pod("p", root=state_root, data=data)
    with pod:
        idle(pod, mounts=[f"type=disk,src={disk},dst=/d"])
        shell(pod, "c", "echo before > /file; echo before > /d/file")
        with subprocess.Popen(program, env=environment) as client:
            until(marker.exists)
            client.kill()
        marker.unlink()
        if of_source:
            assert shell(pod, "c", "cat /file") == "before\n"  # once it has gone on
            until(lambda: not is_running(client.pid))
        else:
            until(lambda: os.listdir(state_root / "pods") == ["p"] or marker.unlink(missing_ok=True))
            assert_goes_on(pod, state_root)
        end(pod)
    assert is_clean(disk)
    assert_nothing_held(state_root)
