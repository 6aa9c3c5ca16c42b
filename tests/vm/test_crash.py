"""Things that are killed: whatever it is, and whenever, the rest is let go of and the disks are whole."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import holdfast
from holdfast.errors import HoldfastError, NotFound
from holdfast.spec.default import CAPABILITIES
from holdfast.storage.journal import Journal
from tests.images import is_clean, make_bundle, make_disk, run
from tests.vm.support import (
    BUSYBOX,
    assert_nothing_held,
    is_running,
    output,
    python_program,
    running,
    sh,
    start,
    wait_for_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Writes for ever, so that whatever is killed is killed in the middle of it.
BUSY = "while :; do echo data > /d/file; mv /d/file /d/other; done & echo up; cat"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "ext4", size="32M")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def assert_mends(disk: Path) -> None:
    """The journal of the filesystem is all that it takes."""
    done = subprocess.run(["e2fsck", "-p", disk], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout
    assert is_clean(disk)


def assert_free(root: Path, data: Path, disk: Path) -> None:
    """Nothing is left, and another pod can have the disk at once."""
    assert_nothing_held(root)
    with holdfast.Pod("next", root=root, data=data) as pod:
        assert (
            output(sh(pod, "ls /d >/dev/null; echo taken over", mounts=[f"type=disk,src={disk},dst=/d"]))
            == "taken over\n"
        )
    assert_nothing_held(root)
    assert_mends(disk)


def test_qemu_while_a_container_writes(data, state_root, disk):
    with holdfast.Pod(root=state_root, data=data) as pod:
        info = pod.inspect()
        with start(pod, BUSY, name="c", stdin=True, mounts=[f"type=disk,src={disk},dst=/d"]) as session:
            session.wait_for(b"up")
            kill(info.qemu_pid)
            with pytest.raises(HoldfastError) as caught:
                session.wait()
        assert caught.value.exit_status == 125
        assert "killed by signal 9" in str(caught.value)
    wait_for_end(info.pid)
    assert_free(state_root, data, disk)


def test_the_monitor_while_a_container_writes(data, state_root, disk):
    """QEMU dies with it: the monitor is the first process of its PID namespace."""
    with holdfast.Pod(root=state_root, data=data) as pod:
        info = pod.inspect()
        with start(pod, BUSY, name="c", stdin=True, mounts=[f"type=disk,src={disk},dst=/d"]) as session:
            session.wait_for(b"up")
            kill(info.pid)
            wait_for_end(info.qemu_pid)
            with pytest.raises(HoldfastError) as caught:
                session.wait()
        assert caught.value.code == "monitor-died"
        with pytest.raises(HoldfastError) as caught:
            sh(pod, "true")
        assert caught.value.exit_status == 125
    assert_free(state_root, data, disk)


def test_the_monitor_of_a_detached_pod(data, state_root, disk):
    """Nobody is there to clean up: the journal knows, the lease is taken over, and collecting lets go of the rest."""
    pod = holdfast.Pod("lost", root=state_root, data=data, detached=True)
    info = pod.inspect()
    sh(pod, BUSY.replace("cat", "sleep 1000"), name="c", detach=True, mounts=[f"type=disk,src={disk},dst=/d"])
    pod.close()
    kill(info.pid)
    wait_for_end(info.qemu_pid)
    with Journal(state_root) as journal:
        assert not journal.is_alive("lost")
        assert {row.kind for row in journal.held("lost")} >= {"attachment"}
        assert [lease["path"] for lease in journal.leases()] == [str(disk)]
    with pytest.raises(NotFound) as caught:
        holdfast.Pod.open("lost", root=state_root, data=data)
    assert "dead" in str(caught.value)
    with holdfast.Pod("other", root=state_root, data=data) as other:  # before anybody has collected anything
        assert output(sh(other, "echo mine", mounts=[f"type=disk,src={disk},dst=/d"])) == "mine\n"
    with Journal(state_root) as journal:
        assert journal.collect("lost")
    assert_free(state_root, data, disk)


def test_a_dead_pods_name_can_be_used_again(data, state_root):
    pod = holdfast.Pod("again", root=state_root, data=data, detached=True)
    pid = pod.inspect().pid
    pod.close()
    kill(pid)
    with holdfast.Pod("again", root=state_root, data=data) as pod:
        assert output(sh(pod, "echo well")) == "well\n"
    assert_nothing_held(state_root)


def test_the_agent(data, state_root, disk, tmp_path):
    """The end of PID 1 is a panic of the guest."""
    with holdfast.Pod(root=state_root, data=data) as pod:
        info = pod.inspect()
        names = [*CAPABILITIES, "CAP_SYS_ADMIN"]
        bundle = make_bundle(
            tmp_path / "b", ["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; cat"],
            process={"capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names)},
        )  # fmt: skip
        with start(pod, BUSY, name="c", stdin=True, mounts=[f"type=disk,src={disk},dst=/d"]) as session:
            session.wait_for(b"up")
            with pytest.raises(HoldfastError):
                pod.run(bundle=bundle)
            with pytest.raises(HoldfastError) as caught:
                session.wait()
            assert "panic" in str(caught.value)
    assert not is_running(info.qemu_pid)
    assert_free(state_root, data, disk)


def test_attaching_to_a_machine_that_dies(data, state_root, disk):
    """Stopped, QEMU answers nothing; killed in the middle of an attach, it fails that and leaves no lease."""
    with holdfast.Pod(root=state_root, data=data) as pod:
        info = pod.inspect()
        os.kill(info.qemu_pid, signal.SIGSTOP)
        pod._client.send("attach", {"mount": {"type": "virtual-disk", "source": str(disk), "options": ["rw"]}})
        with Journal(state_root) as journal:
            wait_until(lambda: journal.leases())
            os.kill(info.qemu_pid, signal.SIGKILL)
            wait_for_end(info.qemu_pid)
            with pytest.raises(HoldfastError):
                pod.attach(f"type=disk,src={disk}")
    assert_free(state_root, data, disk)


def test_detaching_from_a_machine_that_dies(data, state_root, disk):
    with holdfast.Pod(root=state_root, data=data) as pod:
        path = pod.attach(f"type=disk,src={disk}")
        kill(pod.inspect().qemu_pid)
        try:
            pod.detach(path)  # the machine is gone, and with it all that it held
        except HoldfastError as error:
            assert error.code in ("machine-died", "monitor-died", "connection-lost", "pod-not-found")
    assert_free(state_root, data, disk)


# -- the client -----------------------------------------------------------------------------------


class ClientProcess:
    """Another process that uses the package; says when it is ready, and then waits to be killed."""

    def __init__(self, root: Path, data: Path, body: str) -> None:
        program = f"""
import signal
import holdfast
pod = holdfast.Pod("p", root={str(root)!r}, data={str(data)!r})
info = pod.inspect()
print(info.pid, info.qemu_pid, flush=True)
{body}
signal.pause()
"""
        self.process = subprocess.Popen(python_program(program), stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0]
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def client(data: Path, state_root: Path) -> Iterator[Any]:
    made: list[ClientProcess] = []

    def make(body: str) -> ClientProcess:
        made.append(ClientProcess(state_root, data, body))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.mark.parametrize("moment", ["idle", "attached", "running"])
def test_the_client(client, data, state_root, disk, moment):
    """An ephemeral pod ends with the process that started it."""
    bodies = {
        "idle": "",
        "attached": f"pod.attach('type=disk,src={disk}'); print('up', flush=True)",
        "running": f"""
import threading, time
threading.Thread(target=lambda: pod.run({BUSYBOX!r}, ["sh", "-c", "echo x > /d/up; {BUSY}"], name="c", stdin=b"",
    mounts=["type=disk,src={disk},dst=/d"]), daemon=True).start()
while not [c for c in pod.inspect().containers if c.state != "starting"]:
    time.sleep(0.01)
print("up", flush=True)
""",
    }
    process = client(bodies[moment])
    monitor, qemu = map(int, process.line().split())
    if moment != "idle":
        assert process.line() == "up"
    process.kill()
    wait_for_end(monitor)
    wait_for_end(qemu)
    assert_free(state_root, data, disk)


def test_the_client_while_a_pod_starts(data, state_root):
    """At whatever moment: with a template, and with the whole way from nothing to a machine before it."""
    program = python_program(f"""
import holdfast
print("go", flush=True)
holdfast.Pod("p", root={str(state_root)!r}, data={str(data)!r}, template="none")
""")
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        with Journal(state_root) as journal:
            wait_until(lambda: journal.pods())
            monitor = journal.pods()[0].pid
        process.kill()
    wait_for_end(monitor)
    assert_nothing_held(state_root)


def test_the_monitor_while_a_pod_starts(data, state_root):
    program = python_program(f"""
import holdfast
try:
    holdfast.Pod("p", root={str(state_root)!r}, data={str(data)!r}, template="none")
except holdfast.HoldfastError as error:
    print(error.code)
""")
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        with Journal(state_root) as journal:
            wait_until(lambda: journal.pods())
            kill(journal.pods()[0].pid)
        assert process.communicate(timeout=30)[0] == "monitor-died\n"
    assert_nothing_held(state_root)


def test_signals_end_a_pod_in_an_orderly_way(data, state_root, disk):
    pod = holdfast.Pod("p", root=state_root, data=data, detached=True)
    info = pod.inspect()
    with running(pod, "c", [f"type=disk,src={disk},dst=/d"]) as name:
        pod.exec(name, ["sh", "-c", "echo written > /d/file"])
        os.kill(info.pid, signal.SIGTERM)
        wait_for_end(info.pid)
        pod.close()
    assert_nothing_held(state_root)
    assert is_clean(disk)
    assert "written" in run("debugfs", "-R", "cat /file", disk).stdout


def wait_until(condition: Any) -> None:
    """Asks again and again: for what nothing tells of."""
    poll = select.poll()
    for _ in range(3000):
        if condition():
            return
        poll.poll(10)
    raise AssertionError("it has not come to pass")
