"""Pods that are ready before anybody wants them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

import holdfast
from holdfast.cli.pods import ask
from holdfast.errors import HoldfastError, InUse, InvalidInput
from holdfast.pod import pool as module
from holdfast.pod.client import Client
from holdfast.pod.launch import start_monitor
from holdfast.pod.messages import PodRequest
from holdfast.pod.pool import Pool
from tests.vm.cli import COMMAND
from tests.vm.support import BUSYBOX, DEADLINE_S, assert_nothing_held, output, sh, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def request_for(data: Path, state_root: Path) -> PodRequest:
    return PodRequest("", str(state_root), str(data))


@pytest.fixture
def pool(request_for: PodRequest) -> Iterator[Pool]:
    with Pool(request_for, 1, start_monitor, print) as pool:
        yield pool


def ready(root: Path) -> list[str]:
    return [name for name in os.listdir(root / "pods") if name.startswith(module.PREFIX)]


def test_who_wants_a_pod_gets_one_that_is_ready(pool, state_root, data):
    name = pool.add()
    assert ready(state_root) == [name]
    before = ask(state_root, name)
    assert before.state == "ready"
    with holdfast.Pod("mine", root=state_root, data=data) as pod:
        info = pod.inspect()
        assert (info.name, info.qemu_pid, info.state) == ("mine", before.qemu_pid, "running")
        assert ready(state_root) == []
        assert output(sh(pod, "hostname", hostname="inside")) == "inside\n"
        threads = [int(t) for pid in (info.pid, info.qemu_pid) for t in os.listdir(f"/proc/{pid}/task")]
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {0}
    assert_nothing_held(state_root)


def test_of_two_who_want_one_at_once_one_gets_it(pool, state_root, data):
    pool.add()
    pods: list[holdfast.Pod] = []
    makers = [threading.Thread(target=lambda: pods.append(holdfast.Pod(root=state_root, data=data))) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len({pod.inspect().qemu_pid for pod in pods}) == 2
    for pod in pods:
        assert output(sh(pod, "echo up")) == "up\n"
        pod.remove()
    assert_nothing_held(state_root)


def test_a_name_that_is_taken_leaves_the_ready_one_ready(pool, state_root, data):
    with holdfast.Pod("taken", root=state_root, data=data):
        name = pool.add()
        with pytest.raises(InUse, match="a pod of this name exists"):
            holdfast.Pod("taken", root=state_root, data=data)
        assert ready(state_root) == [name]
    with holdfast.Pod("taken", root=state_root, data=data):  # free again
        assert ready(state_root) == []


def test_others_are_not_for_who_wants_something_else(pool, state_root, data):
    name = pool.add()
    request = PodRequest("other", str(state_root), str(data))
    for other in ({"cold": True}, {"ports": True}, {"isolation": "namespace"}, {"cpus": 2}):
        assert module.take(msgspec.structs.replace(request, **other)) is None
    with holdfast.Pod(root=state_root, data=data, memory="288M") as pod:
        assert pod.inspect().memory_bytes == 288 << 20
        assert ready(state_root) == [name]


def test_a_detached_pod_outlives_the_pool(request_for, state_root, data, monkeypatch):
    """And the pool does not wait for its end: if it did, this test would find none."""
    wait_closed = Client.wait_closed
    monkeypatch.setattr(Client, "wait_closed", lambda self, _seconds, **more: wait_closed(self, 600.0, **more))
    with Pool(request_for, 1, start_monitor, print) as pool:
        pool.add()
        holdfast.Pod("kept", root=state_root, data=data, detached=True).close()
        pool.add()
    assert ready(state_root) == []
    with holdfast.Pod.open("kept", root=state_root, data=data) as pod:
        assert output(sh(pod, "echo still")) == "still\n"
        pod.remove()
    assert_nothing_held(state_root)


def test_a_dead_pod_of_that_name_is_no_hindrance(pool, state_root, data):
    old = holdfast.Pod("again", root=state_root, data=data, detached=True)
    pid = old.inspect().pid
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    old.close()
    pool.add()
    with holdfast.Pod("again", root=state_root, data=data) as pod:
        assert ready(state_root) == []
        assert output(sh(pod, "echo up")) == "up\n"
    assert_nothing_held(state_root)


def pool_command(root: Path, data: Path) -> subprocess.Popen[bytes]:
    words = ["--root", str(root), "--data", str(data), "pool", "--size", "1"]
    return subprocess.Popen([COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_the_command_refills_and_leaves_nothing(state_root, data):
    with pool_command(state_root, data) as process:
        try:
            first = wait_for_ready(process, state_root)
            with holdfast.Pod(root=state_root, data=data):
                assert wait_for_ready(process, state_root) != first
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
    assert_nothing_held(state_root)


def test_killed_the_command_leaves_nothing_either(state_root, data):
    with pool_command(state_root, data) as process:
        name = wait_for_ready(process, state_root)
        pid = ask(state_root, name).pid
        process.kill()
    wait_for_end(pid)
    assert_nothing_held(state_root)


def wait_for_ready(process: subprocess.Popen[bytes], root: Path) -> str:
    """The name of a pod that is ready; asking its monitor waits until it is."""
    while process.poll() is None:
        for name in ready(root) if (root / "pods").is_dir() else []:
            try:
                with module.Client.connect(root, name) as client:
                    client.request("warm", {}, DEADLINE_S)
                return name
            except HoldfastError:  # it is just coming, or going
                continue
    raise AssertionError("the command has ended")


def test_sizes_that_make_no_sense(request_for):
    for size in (0, -1, module.MOST + 1):
        with pytest.raises(InvalidInput, match="it has 1 to"):
            Pool(request_for, size, start_monitor, print)
    with pytest.raises(InvalidInput, match="plain ones"):
        Pool(PodRequest("", request_for.root, request_for.data, "namespace"), 1, start_monitor, print)


def test_the_image_is_there(pool, state_root, data):
    pool.add()
    assert holdfast.run(BUSYBOX, ["echo", "x"], root=state_root, data=data).text == "x\n"
